"""Reductions along rows, as RMSNorm's or LayerNorm's: one task with all that is elementwise before and after them."""

import math

from tvm_items.lowering import is_s_tir
from tvm_items.relax_rewrites import find_calls, find_readers, join_calls
from tvm_items.templates.row_task import is_copy


def fuse_around_reductions():
    """Returns a pass over Relax modules that joins TIR functions of elementwise operators to the reduction beside them.

    TVM's FuseOps puts nothing in front of a reduction, and nothing behind a normalization, where a mean and a sum of
    squares stand side by side: an RMSNorm in fp16 is three launches (cast, square and the rest), and a LayerNorm in
    bf16, which is computed in fp32, is three as well. What others read too stays, and is computed once more here.
    """
    import tvm

    @tvm.transform.module_pass(opt_level=0)
    def fuse(module, _):
        calls = find_calls(module["main"])
        reductions = [var for var, call in calls.items() if is_row_reduction(module[call.args[0]])]
        readers = find_readers(module["main"])
        groups = [find_group(module, readers, calls, var) for var in reductions]
        return join_calls(module, [group for group in groups if len(group) > 1], calls)

    return fuse


def find_group(module, readers, calls, reduction):
    """Returns the variables whose calls are to be one: that of a row reduction and those around it, in their order.

    Before it come elementwise calls, but none that others need too and that reads more than it gives. Behind it come
    elementwise calls that alone read what is before them. readers: find_readers()'s.
    """

    def may_join(var, size):
        return var in calls and 0 < size_of(var) == size and is_elementwise(module[calls[var].args[0]])

    def is_cheap(var):
        return sum(size_of(argument) == size_of(var) for argument in calls[var].args[1]) <= 1

    group, to_visit = {reduction}, [reduction]
    size = max(size_of(argument) for argument in calls[reduction].args[1])
    while to_visit:
        for argument in calls[to_visit.pop()].args[1]:
            if argument in group or not may_join(argument, size):
                continue
            if is_cheap(argument) or group.issuperset(readers[argument]):
                group.add(argument)
                to_visit.append(argument)
    last = reduction
    while len(readers[last]) == 1 and may_join(readers[last][0], size_of(last)):
        (last,) = readers[last]
        group.add(last)
    reshapes = {var for var in group if is_reshape(module[calls[var].args[0]])}
    return without_reshapes_at_its_ends([var for var in calls if var in group], reshapes, calls)


def without_reshapes_at_its_ends(group, reshapes, calls):
    """Returns a group without what only reshapes what comes in or goes out: alone that launches nothing."""
    while group[-1] in reshapes:
        group = group[:-1]
    for var in group:
        if var in reshapes and not any(argument in group for argument in calls[var].args[1]):
            return without_reshapes_at_its_ends([other for other in group if other is not var], reshapes, calls)
    return group


def size_of(value):
    """Returns the number of elements of a Relax value, 0 where that is not known before it runs, or it is no tensor."""
    shape = getattr(value.ty, "shape", None)
    return 0 if shape is None else known_product(shape)


def known_product(extents):
    """Returns the product of extents of which all are known, else 0."""
    from tvm.tirx import IntImm

    known = [int(extent) for extent in extents if isinstance(extent, IntImm)]
    return math.prod(known) if len(known) == len(extents) else 0


# ---- What a TIR function does ---------------------------------------------------------------------------------------


def blocks_of(function):
    """Returns the blocks of an unscheduled TIR function; none where it is of another kind."""
    import tvm
    from tvm.s_tir import Schedule

    if not isinstance(function, tvm.tirx.PrimFunc) or not is_s_tir(function):
        return []
    schedule = Schedule(function)
    if function.body.block.name_hint != "root":  # one that TVM has written by hand, such as its cumulative sum
        return []
    return [schedule.get(block) for block in schedule.get_child_blocks(schedule.get_sblock("root"))]


def is_row_reduction(function):
    """Returns whether a TIR function reduces, and only along the last axis of one buffer in each of its blocks."""
    reductions = [block for block in blocks_of(function) if reduced_axes(block)]
    return bool(reductions) and all(map(reduces_a_row, reductions))


def is_without_reduction(function):
    """Returns whether each element of what an unscheduled TIR function gives is computed by itself."""
    blocks = blocks_of(function)
    return bool(blocks) and not any(map(reduced_axes, blocks))


def reduced_axes(block):
    return [axis.var for axis in block.iter_vars if axis.iter_type == axis.CommReduce]


def reduces_a_row(block):
    """Returns whether a block of a TIR function reduces one axis, the last index of all that is read along it.

    What is read beside that is smaller: it has one element for a row.
    """
    axes = reduced_axes(block)
    if len(axes) != 1:
        return False
    largest = max(elements(region) for region in block.reads)
    if not all(map(elements, block.reads)):
        return False
    for region in block.reads:
        *others, last = [index.min for index in region.region]
        if any(axes[0].same_as(other) for other in others) or last.same_as(axes[0]) != (elements(region) == largest):
            return False
    return True


def is_elementwise(function):
    """Returns whether a TIR function is made of blocks whose outputs lie in memory as what they read does.

    Or as a slice of it does. What is smaller than an output may be read in any way: it is a scalar, a bias or the like.
    """
    blocks = blocks_of(function)
    return bool(blocks) and all(map(is_elementwise_block, blocks))


def is_reshape(function):
    """Returns whether an elementwise TIR function does nothing to the elements, and leaves none of them out."""
    return all(
        is_copy(block) and elements(block.reads[0]) == elements(block.writes[0]) for block in blocks_of(function)
    )


def is_elementwise_block(block):
    from tvm.sym import Analyzer

    if reduced_axes(block) or len(block.writes) != 1 or not all(map(elements, [*block.reads, *block.writes])):
        return False
    analyzer = Analyzer()
    for axis in block.iter_vars:
        analyzer.bind(axis.var, axis.dom)
    (written,) = block.writes
    return all(
        elements(region) < elements(written)
        or analyzer.can_prove_equal(offset(region), offset(written))
        or is_slice(region, written)
        for region in block.reads
    )


def is_slice(region, written):
    """Returns whether an element that is read lies at a constant distance from the one written, along each axis."""
    from tvm.sym import Analyzer
    from tvm.tirx import IntImm

    if len(region.region) != len(written.region):
        return False
    distances = [read.min - write.min for read, write in zip(region.region, written.region)]
    return all(isinstance(Analyzer().simplify(distance), IntImm) for distance in distances)


def elements(region):
    """Returns the number of elements of a region's buffer, 0 where that is not known."""
    return known_product(region.source.shape)


def offset(region):
    """Returns the place in memory of a region's first element, as an expression."""
    place = 0
    for index, extent in zip(region.region, region.source.shape):
        place = place * extent + index.min
    return place
