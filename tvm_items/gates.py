"""Gated MLPs: the product that a gate is made of and the one that it multiplies, side by side in one, with the gate.

activation(x @ gateᵀ) * (x @ upᵀ) is one product of twice the columns. Column by column the two lie in pairs, so that a
thread that has two sums side by side has all that an element of the result needs: one launch, which reads x once and
writes nothing in between.
"""

import collections
import functools

from tvm_items.constants import (
    VIEWS,
    Constants,
    aten,
    behind_views,
    constants_of_product,
    input_of_product,
    insert_product,
    is_pointwise,
    shape,
)
from tvm_items.exported_graph import insert_call
from tvm_items.reductions import blocks_of, is_without_reduction
from tvm_items.relax_rewrites import find_calls, find_readers, join_calls
from tvm_items.rewrites import find_product
from tvm_items.templates.product_task import find_pairs

# ---- The exported graph ---------------------------------------------------------------------------------------------


def pair_gates(exported):
    """Makes one product of two whose results meet in pointwise operators, in place, and pairs of its columns.

    They are two Linear layers of the same input, as in Llama, or two halves of one, as in ModernBERT. What computes the
    meeting point reads nothing else but numbers.
    """
    exported.graph.eliminate_dead_code()  # what nothing needs would count as a reader
    constants, groups = Constants(exported), collections.defaultdict(list)
    for target in (aten.mm.default, aten.addmm.default):
        for product in exported.graph.find_nodes(op="call_function", target=target):
            if not constants.include(constants_of_product(product)):
                continue
            halves = find_halves(product)
            if halves is not None and do_meet(*halves):
                pair_columns(product, constants_of_product(product), halves)
            else:
                groups[behind_views(input_of_product(product)), target, shape(product)].append(product)
    for products in groups.values():
        if len(products) == 2 and do_meet(*sorted(products)):
            pair_products(*sorted(products))
    exported.graph.eliminate_dead_code()


def find_halves(product):
    """Returns the two nodes that are the halves of a product's columns, where nothing else reads it; else None."""
    columns, readers = shape(product)[-1], readers_of(product)
    if len(readers) != 2 or any(not is_slice_of_columns(reader, columns) for reader in readers):
        return None
    first, second = sorted(readers, key=lambda reader: reader.args[2])
    bounds = [(node.args[2], min(node.args[3], columns)) for node in (first, second)]
    return (first, second) if bounds == [(0, columns / 2), (columns / 2, columns)] else None


def is_slice_of_columns(node, columns):
    """Returns whether a node is a slice, without gaps, of the last axis, which has so many columns."""
    if node.target != aten.slice.Tensor or len(node.args) != 4:
        return False
    source, axis, *_ = node.args
    return axis == len(shape(source)) - 1 and shape(source)[-1] == columns


def readers_of(node):
    """Returns what reads a node, or a view of it."""
    return [reader for user in node.users for reader in (readers_of(user) if user.target in VIEWS else [user])]


def do_meet(first, second):
    """Returns whether two nodes become one by pointwise operators, which read nothing else and alone read them."""
    sources, inside = {first: {first}, second: {second}}, {first, second}
    node = min(first, second)
    while (node := node.next).op != "output":
        reads = node.all_input_nodes
        if not inside.intersection(reads) or node is max(first, second):
            continue
        if not is_pointwise(node) or not inside.issuperset(reads) or shape(node) != shape(first):
            return False
        sources[node] = set().union(*(sources[read] for read in reads))
        if len(sources[node]) == 2:
            return all(inside.union([node]).issuperset(user.users) for user in inside)
        inside.add(node)
    return False


def pair_products(first, second):
    """Replaces two products of the same input, in the graph's order, by one of pairs of columns."""
    insert = functools.partial(insert_call, first)
    constants = zip(*map(constants_of_product, (first, second)))
    pair_columns(first, [insert(aten.cat.default, list(nodes)) for nodes in constants], (first, second))


def pair_columns(product, constants, halves):
    """Inserts a product of pairs of columns in front of another one of the same input, and replaces two nodes by them.

    constants: nodes of the weight and, where there is one, the bias of a layer that has the columns of `halves` one
    behind the other.
    """
    insert = functools.partial(insert_call, product)

    def in_turns(node):
        columns, *others = shape(node)
        axes = [1, 0, *range(2, len(others) + 2)]
        halved = insert(aten.reshape.default, node, [2, columns // 2, *others])
        return insert(aten.reshape.default, insert(aten.permute.default, halved, axes), [columns, *others])

    paired = insert_product(insert, input_of_product(product), *map(in_turns, constants))
    rows, columns = shape(paired)
    pairs = insert(aten.reshape.default, paired, [rows, columns // 2, 2])
    for number, node in enumerate(halves):
        part = insert(aten.slice.Tensor, pairs, 2, number, number + 1)
        node.replace_all_uses_with(insert(aten.reshape.default, part, list(shape(node))))


# ---- Relax ----------------------------------------------------------------------------------------------------------


def fuse_gates():
    """Returns a pass over Relax modules that joins a product of pairs to what makes one column of each pair."""
    import tvm

    @tvm.transform.module_pass(opt_level=0)
    def fuse(module, _):
        calls, readers = find_calls(module["main"]), find_readers(module["main"])

        def is_pair(var):
            sources = list(calls[var].args[1])
            if len(sources) != 1 or sources[0] not in calls or len(readers[sources[0]]) != 1:
                return False
            product, gate = (module[calls[each].args[0]] for each in (sources[0], var))
            return is_product(product) and is_gate(gate)

        return join_calls(module, [[call.args[1][0], var] for var, call in calls.items() if is_pair(var)], calls)

    return fuse


def is_product(function):
    from tvm.s_tir import Schedule

    return bool(blocks_of(function)) and find_product(Schedule(function)) is not None


def is_gate(function):
    """Returns whether a TIR function makes one column of each pair of its parameter's columns."""
    import tvm
    from tvm import tirx
    from tvm.s_tir import Schedule

    if not is_without_reduction(function) or len(function.params) != 2:
        return False
    schedule = Schedule(function)
    *before, last = schedule.get_child_blocks(schedule.get_sblock("root"))
    try:
        for block in before:
            schedule.compute_inline(block)
    except tvm.s_tir.ScheduleError:
        return False
    source = schedule.mod["main"].params[0]
    places = [tirx.Var(f"place_{number}", "int64") for number in range(len(source.shape))]
    return find_pairs(schedule.get(last), source, places) is not None
