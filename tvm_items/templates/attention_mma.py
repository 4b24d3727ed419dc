"""Attention as one CUDA kernel on tensor cores, for fp16 and bf16: mma.sync m16n8k16, softmax in registers.

The algorithm is FlashAttention-2's (Dao, arXiv:2307.08691): a block of threads has some queries of a head and goes
through the keys in steps. The sums that are the scores lie in the registers as the first operand of the product with
the values has to. Each row's largest score and total of weights so far are kept; when the largest changes, what was
summed up before is rescaled. Where there are few queries and many keys, groups of the block's warps take the steps in
turns, each with sums of its own, which are joined in the end. Queries stay in registers where these suffice for them.
"""

import math

from tvm_items.target import ALL_LANES, WARP_THREADS
from tvm_items.templates.attention_task import Softmax, kernel_function, masked

TILE = 16  # rows, columns and terms of what one ldmatrix loads for mma.sync
ROW_PADDING = 8  # elements behind each row in shared memory: 8 rows at the same column lie in distinct banks then
MAX_DEPTH_IN_REGISTERS = 128  # of queries; those of longer heads are read from shared memory in every step


def copy_elements(attention):
    """Returns how many elements one cp.async copies: 16 bytes, which both addresses must be multiples of, or else 8.

    In global memory a row begins where the one before it ends: at a multiple of 16 bytes, or of 8 in the other case.
    """
    return 8 if attention.head_dim % 8 == 0 else 4


def padded_depth(attention):
    """Returns the head dim rounded up to a multiple of TILE: shared memory has zeros there."""
    return -(-attention.head_dim // TILE) * TILE


def joined_floats(attention, row_tiles):
    """Returns how many numbers a thread has of its queries' rows: sums, largest scores and totals."""
    return row_tiles * (padded_depth(attention) // 2 + 4)


def mma_resources(attention, warps, row_tiles, key_tile, stages, key_groups):
    """Returns what a block of threads of mma_kernel() needs: (threads, registers of a thread, bytes of shared memory).

    The registers are an estimate: scores, sums and queries of a warp's rows, and 48 for all else.
    """
    depth = padded_depth(attention)
    in_registers = depth <= MAX_DEPTH_IN_REGISTERS
    registers = row_tiles * (key_tile // 2 + depth // 2 + (depth // 4 if in_registers else 4)) + 48
    group_threads = WARP_THREADS * warps
    rows = stages * key_groups * 2 * key_tile + (0 if in_registers else warps * row_tiles * TILE)
    joined = (key_groups - 1) * group_threads * joined_floats(attention, row_tiles) * 4
    return group_threads * key_groups, registers, max(rows * (depth + ROW_PADDING) * 2, joined)


def mma_kernel(attention, warps, row_tiles, key_tile, stages, key_groups):
    """Returns the scheduled TIR function of an Attention in fp16 or bf16, of define_attention()'s signature.

    warps: of a group; row_tiles: 16 queries each, of a warp; key_tile: keys of a step, a multiple of 16; stages: steps
    whose keys and values are in shared memory or on their way there, at least 1; key_groups: groups of warps in a block
    of threads, each of which takes its turn in the steps.
    """
    from tvm.script import tirx as T

    a = attention
    group_threads, warp_rows = WARP_THREADS * warps, TILE * row_tiles
    threads, _, shared_bytes = mma_resources(attention, warps, row_tiles, key_tile, stages, key_groups)
    block_rows, row_length = warps * warp_rows, padded_depth(a) + ROW_PADDING
    query_blocks, steps = -(-a.query_count // block_rows), -(-a.key_count // key_tile)
    sharing = a.heads // a.key_heads
    first_query, first_key, first_value = (source.first for source in a.sources)
    depth_tiles, key_tiles = padded_depth(a) // TILE, key_tile // TILE
    score_count, sum_count = row_tiles * key_tiles * 8, row_tiles * depth_tiles * 8
    largest_at, totals_at = sum_count, sum_count + row_tiles * 2  # among the numbers that groups join
    copied = copy_elements(a)
    row_copies = padded_depth(a) // copied
    copies = key_tile * row_copies
    thread_copies = -(-copies // group_threads)
    stage_length = 2 * key_tile * row_length
    in_registers = padded_depth(a) <= MAX_DEPTH_IN_REGISTERS
    queries_at = stages * key_groups * stage_length  # in shared memory, where they are not in registers
    softmax = Softmax(a)
    exponent = softmax.exponent
    short = {"float16": "f16", "bfloat16": "bf16"}[a.dtype]
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{short}.{short}.f32"
    pack = f"cvt.rn.{short}x2.f32"
    start_copy = f"cp.async.{'cg' if copied == 8 else 'ca'}.shared.global"  # cg has 16 bytes only
    load_keys = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
    load_values = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"

    def crosses_diagonal(step, first_row):
        return a.is_causal and step * key_tile + key_tile - 1 > first_row

    def start(stage, group):  # of what a group has of a stage
        return (stage * key_groups + group) * stage_length

    def joined_at(group, i, place):  # where a thread of a group, not of the first one, puts one of its numbers
        return ((group - 1) * joined_floats(a, row_tiles) + i) * group_threads + place

    def query_at(r, d):  # where a tile's queries begin among a thread's
        return (r * depth_tiles + d if in_registers else r) * 4

    def is_cut(step):
        return a.key_count % key_tile != 0 and step == steps - 1

    @T.inline
    def compute(queries, keys, values, mask, result):
        T.device_entry()
        block = T.cta_id([query_blocks * a.heads * a.batch])
        thread = T.thread_id([threads])
        shared = T.alloc_buffer((shared_bytes // 2,), a.dtype, scope="shared.dyn", align=128)
        query_fragments = T.alloc_local((row_tiles * (depth_tiles if in_registers else 1) * 4,), "uint32")
        fragment = T.alloc_local((4,), "uint32")
        scores = T.alloc_local((score_count,), "float32")
        weights = T.alloc_local((score_count // 2,), "uint32")
        sums = T.alloc_local((sum_count,), "float32")
        largest = T.alloc_local((row_tiles * 2,), "float32")
        before = T.alloc_local((row_tiles * 2,), "float32")
        totals = T.alloc_local((row_tiles * 2,), "float32")
        packed = T.alloc_local((1,), "uint32")
        theirs = T.alloc_local((1,), "float32")
        batch: T.let = block // (query_blocks * a.heads)
        head: T.let = block // query_blocks % a.heads
        lane: T.let = thread % WARP_THREADS
        group: T.let = thread // group_threads
        place: T.let = thread % group_threads  # in the group
        # Where attention is causal the last queries see the most keys: they begin first.
        number: T.let = query_blocks - 1 - block % query_blocks if a.is_causal else block % query_blocks
        first_row: T.let = number * block_rows + place // WARP_THREADS * warp_rows  # of the warp
        row: T.let = first_row + lane // 4  # of what the thread has of a tile, and 8 below
        end: T.let = T.min(steps, (number * block_rows + block_rows - 1) // key_tile + 1) if a.is_causal else steps

        @T.inline
        def copy(step, stage, source, head, offset):
            for i in T.unroll(thread_copies):
                index: T.let = i * group_threads + place
                key: T.let = step * key_tile + index // row_copies
                column: T.let = index % row_copies * copied
                if index < copies:
                    T.ptx[start_copy](
                        T.address_of(shared[start(stage, group) + offset + index // row_copies * row_length + column]),
                        T.address_of(
                            source[batch, T.min(key, a.key_count - 1), head, T.min(column, a.head_dim - copied)]
                        ),
                        copied * 2,
                        # Zeros behind the last key, whose weight 0 times NaN were NaN, and behind the last column.
                        T.Select(T.And(key < a.key_count, column < a.head_dim), T.uint32(copied * 2), T.uint32(0)),
                    )

        @T.inline
        def copy_queries():
            for i in T.unroll(-(-block_rows * row_copies // threads)):
                index: T.let = i * threads + thread
                column: T.let = index % row_copies * copied
                query: T.let = T.min(number * block_rows + index // row_copies, a.query_count - 1)
                if index < block_rows * row_copies:
                    T.ptx[start_copy](
                        T.address_of(shared[queries_at + index // row_copies * row_length + column]),
                        T.address_of(queries[batch, query, first_query + head, T.min(column, a.head_dim - copied)]),
                        copied * 2,
                        T.Select(column < a.head_dim, T.uint32(copied * 2), T.uint32(0)),
                    )

        @T.inline
        def load_queries(r, d):
            T.ptx[load_keys](
                *[query_fragments[r * 4 + i] for i in range(4)],
                T.address_of(
                    shared[
                        queries_at
                        + (place // WARP_THREADS * warp_rows + r * TILE + lane % 16) * row_length
                        + d * TILE
                        + lane // 16 * 8
                    ]
                ),
            )

        @T.inline
        def multiply_queries_and_keys(stage):
            for i in T.unroll(score_count):
                scores[i] = T.float32(0)
            for d in T.unroll(depth_tiles):
                if not in_registers:
                    for r in T.unroll(row_tiles):
                        load_queries(r, d)
                for j in T.unroll(key_tiles):
                    T.ptx[load_keys](
                        *[fragment[i] for i in range(4)],
                        T.address_of(
                            shared[
                                start(stage, group)
                                + (j * TILE + lane // 16 * 8 + lane % 8) * row_length
                                + d * TILE
                                + lane // 8 % 2 * 8
                            ]
                        ),
                    )
                    for r in T.unroll(row_tiles):
                        for n in T.unroll(2):
                            T.ptx[mma](
                                *[scores[((r * key_tiles + j) * 2 + n) * 4 + i] for i in range(4)],
                                *[query_fragments[query_at(r, d) + i] for i in range(4)],
                                fragment[n * 2],
                                fragment[n * 2 + 1],
                                *[scores[((r * key_tiles + j) * 2 + n) * 4 + i] for i in range(4)],
                            )

        @T.inline
        def hide(step, hidden):  # hidden: gives what a score becomes, from (score, query, key)
            for r in T.unroll(row_tiles):
                for n in T.unroll(key_tiles * 2):
                    for i in T.unroll(4):
                        at: T.let = (r * key_tiles * 2 + n) * 4 + i
                        query: T.let = row + r * TILE + i // 2 * 8
                        key: T.let = step * key_tile + n * 8 + lane % 4 * 2 + i % 2
                        scores[at] = hidden(scores[at], query, key)

        @T.inline
        def hide_unseen(step):
            if not softmax.scales_late:
                hide(step, lambda score, query, key: score * T.float32(a.scale))
            if softmax.has_mask:
                hide(step, lambda score, query, key: masked(a, score, mask, batch, head, query, key))
            if crosses_diagonal(step, first_row):
                hide(step, lambda score, query, key: T.Select(key <= query, score, T.float32(-math.inf)))
            if is_cut(step):
                hide(step, lambda score, query, key: T.Select(key < a.key_count, score, T.float32(-math.inf)))

        @T.inline
        def update_softmax():
            for r in T.unroll(row_tiles):
                for h in T.unroll(2):
                    before[r * 2 + h] = largest[r * 2 + h]
                    for n in T.unroll(key_tiles * 2):
                        for i in T.unroll(2):
                            largest[r * 2 + h] = T.max(
                                largest[r * 2 + h], scores[(r * key_tiles * 2 + n) * 4 + h * 2 + i]
                            )
                    for i in T.unroll(2):  # over the four threads that have the row
                        largest[r * 2 + h] = T.max(
                            largest[r * 2 + h],
                            T.tvm_warp_shuffle_xor(
                                T.uint32(ALL_LANES), largest[r * 2 + h], i + 1, WARP_THREADS, WARP_THREADS
                            ),
                        )
                    before[r * 2 + h] = exponent(before[r * 2 + h], largest[r * 2 + h])
                    T.ptx["ex2.approx.ftz.f32"](before[r * 2 + h], before[r * 2 + h])
                    totals[r * 2 + h] = totals[r * 2 + h] * before[r * 2 + h]
                    for n in T.unroll(depth_tiles * 2):
                        for i in T.unroll(2):
                            sums[(r * depth_tiles * 2 + n) * 4 + h * 2 + i] = (
                                sums[(r * depth_tiles * 2 + n) * 4 + h * 2 + i] * before[r * 2 + h]
                            )
                    for n in T.unroll(key_tiles * 2):
                        for i in T.unroll(2):
                            at: T.let = (r * key_tiles * 2 + n) * 4 + h * 2 + i
                            scores[at] = exponent(scores[at], largest[r * 2 + h])
                            T.ptx["ex2.approx.ftz.f32"](scores[at], scores[at])
                            totals[r * 2 + h] = totals[r * 2 + h] + scores[at]
            for i in T.unroll(score_count // 2):
                T.ptx[pack](weights[i], scores[i * 2 + 1], scores[i * 2])

        @T.inline
        def multiply_weights_and_values(stage):
            for j in T.unroll(key_tiles):
                for d in T.unroll(depth_tiles):
                    T.ptx[load_values](
                        *[fragment[i] for i in range(4)],
                        T.address_of(
                            shared[
                                start(stage, group)
                                + key_tile * row_length
                                + (j * TILE + lane % 16) * row_length
                                + d * TILE
                                + lane // 16 * 8
                            ]
                        ),
                    )
                    for r in T.unroll(row_tiles):
                        for n in T.unroll(2):
                            T.ptx[mma](
                                *[sums[((r * depth_tiles + d) * 2 + n) * 4 + i] for i in range(4)],
                                *[weights[(r * key_tiles + j) * 4 + i] for i in range(4)],
                                fragment[n * 2],
                                fragment[n * 2 + 1],
                                *[sums[((r * depth_tiles + d) * 2 + n) * 4 + i] for i in range(4)],
                            )

        @T.inline
        def join_groups():  # into what the first group has, through what were the stages
            T.cuda.cta_sync()
            joined = T.decl_buffer((shared_bytes // 4,), "float32", data=shared.data, scope="shared.dyn")
            if group > 0:
                for i in T.unroll(sum_count):
                    joined[joined_at(group, i, place)] = sums[i]
                for i in T.unroll(row_tiles * 2):
                    joined[joined_at(group, largest_at + i, place)] = largest[i]
                    joined[joined_at(group, totals_at + i, place)] = totals[i]
            T.cuda.cta_sync()
            if group == 0:
                for other in T.unroll(1, key_groups):
                    for r in T.unroll(row_tiles):
                        for h in T.unroll(2):
                            row_half: T.let = r * 2 + h
                            before[row_half] = largest[row_half]
                            theirs[0] = joined[joined_at(other, largest_at + row_half, place)]
                            largest[row_half] = T.max(before[row_half], theirs[0])
                            before[row_half] = exponent(before[row_half], largest[row_half])
                            theirs[0] = exponent(theirs[0], largest[row_half])
                            T.ptx["ex2.approx.ftz.f32"](before[row_half], before[row_half])
                            T.ptx["ex2.approx.ftz.f32"](theirs[0], theirs[0])
                            totals[row_half] = (
                                totals[row_half] * before[row_half]
                                + joined[joined_at(other, totals_at + row_half, place)] * theirs[0]
                            )
                            for n in T.unroll(depth_tiles * 2):
                                for i in T.unroll(2):
                                    at: T.let = (r * depth_tiles * 2 + n) * 4 + h * 2 + i
                                    sums[at] = (
                                        sums[at] * before[row_half] + joined[joined_at(other, at, place)] * theirs[0]
                                    )

        @T.inline
        def copy_step(turn):
            step: T.let = turn * key_groups + group
            if step < end:
                copy(step, turn % stages, keys, first_key + head // sharing, 0)
                copy(step, turn % stages, values, first_value + head // sharing, key_tile * row_length)

        if not in_registers:
            copy_queries()  # with what the first step needs
        for turn in T.unroll(stages - 1):
            copy_step(turn)
            T.ptx["cp.async.commit_group"]()
        if in_registers:
            for r in T.unroll(row_tiles):
                for d in T.unroll(depth_tiles):
                    for i in T.unroll(4):
                        if d * TILE + i // 2 * 8 + lane % 4 * 2 < a.head_dim:
                            T.ptx["ld.global.b32"](
                                query_fragments[query_at(r, d) + i],
                                T.address_of(
                                    queries[
                                        batch,
                                        T.min(row + r * TILE + i % 2 * 8, a.query_count - 1),
                                        first_query + head,
                                        d * TILE + i // 2 * 8 + lane % 4 * 2,
                                    ]
                                ),
                            )
                        else:
                            query_fragments[query_at(r, d) + i] = T.uint32(0)
        for i in T.unroll(row_tiles * 2):
            largest[i] = T.float32(softmax.lowest)
            totals[i] = T.float32(0)
        for i in T.unroll(sum_count):
            sums[i] = T.float32(0)
        for turn in T.serial((end + key_groups - 1) // key_groups):
            step: T.let = turn * key_groups + group
            if stages > 1:
                T.ptx["cp.async.wait_group"](stages - 2)
                T.cuda.cta_sync()
                copy_step(turn + stages - 1)
                T.ptx["cp.async.commit_group"]()
            else:
                T.cuda.cta_sync()
                copy(step, 0, keys, first_key + head // sharing, 0)
                T.ptx["cp.async.commit_group"]()
                copy(step, 0, values, first_value + head // sharing, key_tile * row_length)
                T.ptx["cp.async.commit_group"]()
                T.ptx["cp.async.wait_group"](1)
                T.cuda.cta_sync()
            # A warp may have no queries, or, where attention is causal, none that see a key of the step.
            is_active: T.let = T.And(
                T.And(first_row < a.query_count, step < end),
                step * key_tile < first_row + warp_rows if a.is_causal else T.bool(True),
            )
            if is_active:
                multiply_queries_and_keys(turn % stages)
                hide_unseen(step)
                update_softmax()
            if stages == 1:
                T.ptx["cp.async.wait_group"](0)
                T.cuda.cta_sync()
            if is_active:
                multiply_weights_and_values(turn % stages)
        if key_groups > 1:
            join_groups()
        for r in T.unroll(row_tiles):
            for h in T.unroll(2):
                for i in T.unroll(2):
                    totals[r * 2 + h] = totals[r * 2 + h] + T.tvm_warp_shuffle_xor(
                        T.uint32(ALL_LANES), totals[r * 2 + h], i + 1, WARP_THREADS, WARP_THREADS
                    )
                # Of a query that sees no key the total is 0, and so are its sums; else it is 1 at least.
                totals[r * 2 + h] = T.float32(1) / T.max(totals[r * 2 + h], T.float32(1e-30))
                if T.And(group == 0, row + r * TILE + h * 8 < a.query_count):
                    for n in T.unroll(-(-a.head_dim // 8)):
                        if n * 8 + lane % 4 * 2 < a.head_dim:
                            T.ptx[pack](
                                packed[0],
                                sums[(r * depth_tiles * 2 + n) * 4 + h * 2 + 1] * totals[r * 2 + h],
                                sums[(r * depth_tiles * 2 + n) * 4 + h * 2] * totals[r * 2 + h],
                            )
                            T.ptx["st.global.b32"](
                                T.address_of(result[batch, row + r * TILE + h * 8, head, n * 8 + lane % 4 * 2]),
                                packed[0],
                            )

    return kernel_function(attention, compute)
