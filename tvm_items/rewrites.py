"""A task's product, rewritten before MetaSchedule sees it: one block of all that follows, and a sum split in parts.

A product is a matrix product or a convolution. How it is rewritten is a number, `split`: 0 leaves the task as it is, 1
makes one block of what follows the product, and a larger number also splits its sum in so many parts.
"""

import math

AS_IT_IS, UNSPLIT = 0, 1
PARTS_OF_A_SUM = (16, 8, 4, 2)
MIN_TERMS_OF_A_PART = 64
MAX_PARTIAL_SUMS = 2**20  # of a task. An H200 has 132 multiprocessors of 2048 threads: these are 4 for each thread.


def find_rewrites(module):
    """Returns a list of every `split` by which rewrite_product() may gain something for a task's IRModule.

    Of the numbers of parts that may pay, the largest and the one two steps below it. The task as it is comes first, so
    that a record of a version without rewriting keeps its meaning.
    """
    from tvm.s_tir import Schedule

    schedule = Schedule(module)
    found = find_product(schedule)
    if found is None:
        return [AS_IT_IS]
    product, *after = [schedule.get(block) for block in (found[0], *found[1])]
    parts = possible_parts(product)
    try:
        rewrite_product(schedule, 2 if parts else UNSPLIT)
    except Exception:  # what is fused with the product is of a kind that cannot be inlined or moved
        return [AS_IT_IS]
    read = [region.source for block in after for region in block.reads]
    read_twice = any(sum(map(block.writes[0].source.same_as, read)) > 1 for block in (product, *after))
    return [AS_IT_IS] + [UNSPLIT] * read_twice + parts[:1] + parts[2:3]


def possible_parts(product):
    """Returns the numbers of parts, largest first, that a product's sum can be split in and that may pay."""
    extents = [int(loop.dom.extent) for loop in product.iter_vars]
    terms = math.prod(int(loop.dom.extent) for loop in reduction_loops(product))
    outputs, innermost = math.prod(extents) // terms, extents[-1]
    return [
        parts
        for parts in PARTS_OF_A_SUM
        if innermost % parts == 0 and terms // parts >= MIN_TERMS_OF_A_PART and outputs * parts <= MAX_PARTIAL_SUMS
    ]


def rewrite_product(schedule, split):
    """Makes one block of all that is fused after the schedule's product, splits its sum, and returns the schedule.

    One block, because MetaSchedule leaves a launch of its own to what reads the product twice, as GELU does. And its
    rules for CUDA give each output to one block of threads: a product with few outputs and a long sum, which is what a
    network has at batch 1, keeps few of the GPU's multiprocessors busy. `split` > 1: so many parts of each sum, which a
    second launch adds up when it does what is fused after the product. 0: the schedule is left as it is.
    """
    if split == AS_IT_IS:
        return schedule
    product, after = find_product(schedule)
    for block in after[:-1]:
        schedule.compute_inline(block)
    if split == UNSPLIT:
        return schedule
    part, _ = schedule.split(schedule.get_loops(product)[-1], [split, None])
    partial = schedule.rfactor(part, 0)
    *loops, part, _ = schedule.get_loops(partial)
    schedule.reorder(part, *loops)  # MetaSchedule tiles a block only if its loops are in the order of its indices
    if after:
        schedule.compute_at(product, schedule.get_loops(after[-1])[-1])
        schedule.set_scope(product, 0, "local")
    return schedule


def find_product(schedule):
    """Returns (block of a task's product, list of the blocks after it), or None where it has none."""
    blocks = [schedule.get(block) for block in schedule.get_child_blocks(schedule.get_sblock("root"))]
    reductions = [i for i, block in enumerate(blocks) if reduction_loops(block)]
    if len(reductions) != 1 or len(blocks[reductions[0]].reads) < 2:
        return None
    names = [block.name_hint for block in blocks[reductions[0] :]]
    product, *after = map(schedule.get_sblock, names)
    return product, after


def reduction_loops(block):
    return [loop for loop in block.iter_vars if loop.iter_type == loop.CommReduce]
