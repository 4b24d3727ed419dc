"""The exported graph, made better to tune: less to run, and more that fuses with a convolution or a matrix product."""

import itertools
import math

import torch

from tvm_items.constants import VIEWS, fold_batch_norms, is_pointwise, merge_parallel_products, shape
from tvm_items.exported_graph import insert_call
from tvm_items.gates import pair_gates
from tvm_items.queries_and_keys import compute_at_once
from tvm_items.unit_vectors import divide_by_root_of_squares

aten = torch.ops.aten
VIEW, PERMUTE = aten.view.default, aten.permute.default
INSERTED = "inserted"  # in the `meta` of what brings an operand into another's form
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default)


def simplify(exported, with_gates=False):
    """Rewrites a decomposed torch.export.ExportedProgram in place; it computes the same as before.

    BatchNorm goes into the weights of the layer before it, products of the same input become one, and pointwise
    operators go behind products. with_gates: whether those that a gate multiplies become one, too (gates.py).
    """
    graph = exported.graph
    multiply_in_two_dimensions(graph)
    fold_batch_norms(exported)
    remove_what_does_nothing(graph)
    squeeze_axes_of_one(graph)
    multiply_small_powers(graph)
    divide_by_root_of_squares(graph)
    split_into_slices(graph)
    take_parts_of_concatenations(graph)
    slice_before_views(graph)
    merge_parallel_products(exported)
    compute_at_once(exported)
    move_behind_products(graph)
    if with_gates:
        pair_gates(exported)
    merge_views(graph)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


# ---- What does nothing, or what is simpler in another form ----------------------------------------------------------


def remove_what_does_nothing(graph):
    """Removes assertions, aliases, and clones that are not for another order in memory: dropout at inference."""
    for assertion in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(assertion)
    for target in (aten.alias.default, aten.clone.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if not node.kwargs:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def squeeze_axes_of_one(graph):
    """Leaves axes with more than one place out of squeezes, at which TVM's ConvertLayout loses count of the axes."""
    for node in graph.find_nodes(op="call_function", target=aten.squeeze.dims):
        source, axes = node.args
        axes = [axis for axis in axes if shape(source)[axis] == 1]
        if axes:
            node.args = source, axes
        else:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def multiply_in_two_dimensions(graph):
    """Makes plain products of batched ones with the same weight for all, as Linear layers on permuted tokens become."""
    for product in graph.find_nodes(op="call_function", target=aten.bmm.default):
        source, weight = product.args
        while weight.target == VIEW and shape(weight) == shape(weight.args[0]):
            weight = weight.args[0]
        if weight.target != aten.expand.default or len(shape(weight.args[0])) != 2:
            continue
        value, (batch, rows, columns) = product.meta["val"], shape(product)
        with graph.inserting_before(product):
            flat = graph.call_function(VIEW, (source, [batch * rows, shape(source)[-1]]))
            plain = graph.call_function(aten.mm.default, (flat, weight.args[0]))
        flat.meta["val"] = source.meta["val"].reshape(flat.args[1])
        plain.meta["val"] = value.new_empty(batch * rows, columns)
        product.target, product.args = VIEW, (plain, [batch, rows, columns])
    graph.eliminate_dead_code()  # what has expanded the weights


def multiply_small_powers(graph):
    """Makes products of squares and cubes, as PyTorch's own kernels do; in TVM they are calls of pow()."""
    for power in graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar):
        base, exponent = power.args
        if exponent not in (2, 3):
            continue
        power.target, power.args = aten.mul.Tensor, (base, base)
        if exponent == 3:
            with graph.inserting_before(power):
                square = graph.call_function(aten.mul.Tensor, (base, base))
            square.meta["val"] = power.meta["val"]
            power.args = (square, base)


def split_into_slices(graph):
    """Makes slices of what is split: each fuses with what reads it, and a split is a launch that copies."""
    for split in graph.find_nodes(op="call_function", target=aten.split_with_sizes.default):
        source, sizes, dim = (*split.args, 0)[:3]
        for part in list(split.users):
            start = sum(sizes[: part.args[1]])
            part.target, part.args = (
                aten.slice.Tensor,
                (source, dim % len(shape(source)), start, start + shape(part)[dim]),
            )
        graph.erase_node(split)


def take_parts_of_concatenations(graph):
    """Takes what is a slice of a concatenation, such as the bias of one projection, from before it."""
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        source, dim, start, end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
        if source.target != aten.cat.default or step != 1:
            continue
        parts, dim_of_parts = (*source.args, 0)[:2]
        ends = list(itertools.accumulate(shape(part)[dim] for part in parts))
        if dim == dim_of_parts and (start, end) in zip([0, *ends], ends):
            node.replace_all_uses_with(parts[ends.index(end)])


def slice_before_views(graph):
    """Slices what a view splits the last axis into by slicing that axis, as attention reads parts of a product in it.

    ModernBERT's products are viewed as (…, 3, heads, head dim), of which queries, keys and values are one each.
    """
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        view, axis, start, end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
        if view.target not in VIEWS or step != 1 or None in (start, end):
            continue
        source, split, last = view.args[0], shape(view)[axis % len(shape(view)) :], len(shape(view.args[0])) - 1
        if len(split) < 2 or math.prod(split) != shape(source)[last]:
            continue
        inner = math.prod(split[1:])
        part = insert_call(node, aten.slice.Tensor, source, last, start * inner, min(end, split[0]) * inner)
        node.target, node.args = VIEW, (part, list(shape(node)))
        for squeezed in [user for user in node.users if user.target == aten.squeeze.dims]:
            squeezed.target, squeezed.args = VIEW, (node, list(shape(squeezed)))


def merge_views(graph):
    """Makes one of two views in a row, or of one node, and nothing of one that does nothing; all become reshapes."""
    views, known = graph.find_nodes(op="call_function", target=VIEW), {}
    for node in views:
        source = node.args[0]
        if source in views:
            node.replace_input_with(source, source.args[0])
            source = source.args[0]
        if shape(source) == shape(node):
            node.replace_all_uses_with(source)
        else:
            first = known.setdefault((source, shape(node)), node)
            if first is not node:
                node.replace_all_uses_with(first)
        node.target = aten.reshape.default  # what it reads may have another order in memory now


# ---- What follows a product -----------------------------------------------------------------------------------------


def move_behind_products(graph):
    """Moves pointwise operators in front of the view or permutation that stands between them and a product.

    A Linear layer's product has the shape (tokens, features), and that of a convolution is flattened where tokens are
    points of an image. Bias, activation, layer scale and residual then fuse with it. What else they read is brought
    into the product's form, where that costs nothing.
    """
    # Nodes that a pointwise operator may come to stand behind: products, their views, and what was moved behind them.
    behind = {node for product in PRODUCTS for node in graph.find_nodes(op="call_function", target=product)}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target == VIEW and node.args[0] in behind:
            behind.update(split_by_users(node))
        elif is_pointwise(node):
            while move_in_front_of_an_operand(node, behind):
                behind.add(node)
                for view in [user for user in node.users if user.target == VIEW]:
                    behind.update(split_by_users(view))


def split_by_users(view):
    """Gives each user of a view one of its own, as activations that read it twice need; returns them all."""
    views = [view]
    for user in list(view.users)[1:]:
        with view.graph.inserting_after(view):
            views.append(view.graph.call_function(view.target, view.args))
        views[-1].meta["val"] = view.meta["val"]
        user.replace_input_with(view, views[-1])
    return views


def move_in_front_of_an_operand(node, behind):
    """Moves a pointwise operator in front of one of its operands, and returns whether there was one that allows it.

    It must be a view or a permutation of a node of `behind` that nothing else reads, and the operator's other operands
    must be there in the form of that node. What brought one into that form is not moved back.
    """
    for operand in node.all_input_nodes:
        if operand.target not in (VIEW, PERMUTE) or len(operand.users) != 1 or operand.args[0] not in behind:
            continue
        if INSERTED in operand.meta:
            continue
        if shape(node) != shape(operand):
            continue
        others = [other for other in node.all_input_nodes if other is not operand]
        others_before = [in_form_before(operand, other) for other in others]
        if None not in others_before:
            for other, before in zip(others, others_before):
                node.replace_input_with(other, before)
            swap_with_operand(node, operand)
            return True
    return False


def swap_with_operand(node, operand):
    """Turns node(operand(source)) into operand(node(source))."""
    graph, value = node.graph, node.meta["val"]
    source, arguments = operand.args
    node.replace_input_with(operand, source)
    node.meta["val"] = value.new_empty(shape(source))
    with graph.inserting_after(node):
        after = graph.call_function(operand.target, (node, arguments))
    after.meta["val"] = value
    node.replace_all_uses_with(after, lambda user: user is not after)
    graph.erase_node(operand)


def in_form_before(moved, other):
    """Returns a node with the values of `other`, in the form of what the view or permutation `moved` reads.

    None where that would cost something. A node is inserted where `other` itself or what it reads will not do.
    """
    source, arguments = moved.args
    has_room = len(shape(other)) <= len(shape(source))
    elements = other.meta["val"].numel()
    if has_room and elements == 1:
        return other
    is_for_features = shape(source)[-1:] == shape(moved)[-1:] == shape(other)[-1:] == (elements,)
    if has_room and is_for_features and moved.target == VIEW:
        return other
    if shape(other) != shape(moved):
        return None
    if other.target == moved.target and shape(other.args[0]) == shape(source) and other.args[1] == arguments:
        return other.args[0]
    if moved.target == VIEW and lies_in_order(other.meta["val"]):
        return insert_after(other, VIEW, list(shape(source)), other.meta["val"].reshape(shape(source)))
    if moved.target == PERMUTE and other.target == aten.convolution.default:  # channels-last soon, as `source` is
        axes = [arguments.index(axis) for axis in range(len(arguments))]
        return insert_after(other, PERMUTE, axes, other.meta["val"].permute(axes).contiguous())
    return None


def lies_in_order(value):
    """Returns whether a node's value will lie in memory in the order of its axes: as it does, or channels last."""
    return value.is_contiguous() or (value.ndim > 2 and value.movedim(-1, 1).is_contiguous())


def insert_after(node, target, arguments, value):
    """Returns a new node target(node, arguments) behind `node`; `value` has its shape, dtype and order in memory."""
    with node.graph.inserting_after(node):
        inserted = node.graph.call_function(target, (node, arguments))
    inserted.meta |= {"val": value, INSERTED: True}
    return inserted
