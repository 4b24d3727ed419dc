"""Attention of one query over a long cache as CUDA kernels, without tensor cores: the context is split over blocks.

Flash-decoding (Dao and others, 2023): each block has for its part of the context the sums of values with their largest
score and total, as flash attention keeps them. Blocks that are a cluster join their parts themselves, a second kernel
those of others. A few lanes of a warp share a key: each has 16 bytes of it, and of the queries, values and sums as many
elements. Their number is a power of 2, so that some may have none.
"""

import math

from tvm_items.target import ALL_LANES, WARP_THREADS
from tvm_items.templates.attention_task import LOG2_E, kernel_function
from tvm_items.templates.clusters import load_from_block, shared_address, synchronize_cluster

VECTOR_BYTES = 16  # of a load
LOWEST = -1e30  # what stands for the largest score until there is one: finite, as -inf - -inf is NaN


def vector(attention):
    """Returns how many elements a load has."""
    return VECTOR_BYTES // (4 if attention.dtype == "float32" else 2)


def lanes_of_key(attention):
    """Returns how many lanes of a warp share a key."""
    return 1 << (attention.head_dim // vector(attention) - 1).bit_length()


def is_decode(attention):
    """Returns whether decode_kernel() can compute an Attention."""
    return (
        attention.heads_first
        and attention.query_count == 1
        and not attention.is_causal
        and attention.head_dim % vector(attention) == 0
        and lanes_of_key(attention) <= WARP_THREADS
    )


def decode_resources(attention, warps, group, part, keys):
    """Returns what a block that has keys needs: (threads, registers of a thread, bytes of shared memory).

    The registers are an estimate: queries and sums, scores, keys or values on their way, and 40 for all else.
    """
    size = vector(attention)
    registers = 2 * group * size + group * (keys + 3) + keys * VECTOR_BYTES // 4 + size + 40
    return warps * WARP_THREADS, registers, (warps + 1) * group * (attention.head_dim + 2) * 4


def decode_kernel(attention, warps, group, part, keys, *, max_cluster_blocks):
    """Returns the scheduled TIR function of an Attention that is_decode(), of define_attention()'s signature.

    warps: of a block. group: heads of queries of a block, which share their keys and values. part: keys of a block.
    keys: that a few lanes have on their way at once. max_cluster_blocks: 1 where there are no clusters.
    """
    from tvm.script import tirx as T

    a = attention
    size, sharing = vector(a), a.heads // a.key_heads
    lanes = lanes_of_key(a)
    threads = warps * WARP_THREADS
    rows = threads // lanes  # keys of a step, but for `keys` of each
    parts = -(-a.key_count // part)
    steps = -(-part // (rows * keys))
    groups = a.heads // group
    first_query, first_key, first_value = (source.first for source in a.sources)
    # Where the warps' sums, largest scores and totals end in shared memory; behind them are those of the block.
    largest_at = warps * group * a.head_dim
    totals_at = largest_at + warps * group
    block_at = totals_at + warps * group
    block_largest_at = block_at + group * a.head_dim
    block_totals_at = block_largest_at + group
    cluster_blocks = parts if parts <= max_cluster_blocks else 1
    is_alone = parts == cluster_blocks  # whether there is no second kernel
    key_shuffles, row_shuffles = lanes.bit_length() - 1, (WARP_THREADS // lanes).bit_length() - 1
    is_whole = part % (rows * keys) == 0 and a.key_count % part == 0

    def column(lane, e):  # in a head; of lanes that have none, other lanes'
        return T.min(lane * size, a.head_dim - size) + e

    def in_part(step, k, row):  # the number of a key
        return (step * keys + k) * rows + row

    def nearest(number, step, k, row):  # the key's place in the context, or the last one's for those behind it
        return T.min(number * part + in_part(step, k, row), a.key_count - 1)

    def visible(score, mask, number, step, k, row, batch, head):
        if a.mask_shape is not None:
            indices = (batch, head, 0, nearest(number, step, k, row))
            at = mask[tuple(i if extent > 1 else 0 for i, extent in zip(indices, a.mask_shape))]
            if a.mask_dtype == "bool":
                score = T.if_then_else(at, score, T.float32(-math.inf))
            else:
                score = score + T.Cast("float32", at) * T.float32(LOG2_E)
        if is_whole:
            return score
        is_in = T.And(in_part(step, k, row) < part, number * part + in_part(step, k, row) < a.key_count)
        # No Select, of which both sides are computed: TVM leaves out nearest()'s limit where is_in stands for it.
        return T.if_then_else(is_in, score, T.float32(-math.inf))

    def average(sums, total):  # of a query that sees no key the total is 0, and so are its sums
        return T.Cast(a.dtype, sums / T.max(total, T.float32(1e-30)))

    @T.inline
    def attend(queries, cached_keys, cached_values, mask, store, join):
        with T.launch_thread("blockIdx.x", a.batch * groups) as block:
            number = T.launch_thread("blockIdx.z", parts)
            if cluster_blocks > 1:
                T.launch_thread("clusterCtaIdx.z", cluster_blocks)
            thread = T.launch_thread("threadIdx.x", threads)
            shared = T.alloc_buffer((block_totals_at + group,), "float32", scope="shared.dyn", align=128)
            query = T.alloc_local((group * size,), "float32")
            sums = T.alloc_local((group * size,), "float32")
            loaded = T.alloc_local((keys * size,), a.dtype)
            scores = T.alloc_local((keys * group,), "float32")
            largest = T.alloc_local((group,), "float32")
            before = T.alloc_local((group,), "float32")
            totals = T.alloc_local((group,), "float32")
            joined = T.alloc_local((2,), "float32")
            head: T.let = block % groups * group
            batch: T.let = block // groups
            lane: T.let = thread % lanes
            row: T.let = thread // lanes

            @T.inline
            def load(source, first, step):
                for k in T.unroll(keys):
                    for e in T.vectorized(size):
                        loaded[k * size + e] = source[
                            batch, first + head // sharing, nearest(number, step, k, row), column(lane, e)
                        ]

            @T.inline
            def scale_by(h):  # what was summed with another largest score
                totals[h] = totals[h] * before[h]
                for e in T.unroll(size):
                    sums[h * size + e] = sums[h * size + e] * before[h]

            for h in T.unroll(group):
                largest[h] = T.float32(LOWEST)
                totals[h] = T.float32(0)
                for e in T.unroll(size):
                    sums[h * size + e] = T.float32(0)
                    query[h * size + e] = T.Cast(
                        "float32", queries[batch, 0, first_query + head + h, column(lane, e)]
                    ) * T.Select(lane * size < a.head_dim, T.float32(a.scale * LOG2_E), T.float32(0))
            for step in T.serial(steps):
                load(cached_keys, first_key, step)
                for k in T.unroll(keys):
                    for h in T.unroll(group):
                        scores[k * group + h] = T.float32(0)
                        for e in T.unroll(size):
                            scores[k * group + h] = scores[k * group + h] + query[h * size + e] * T.Cast(
                                "float32", loaded[k * size + e]
                            )
                load(cached_values, first_value, step)
                for k in T.unroll(keys):
                    for h in T.unroll(group):
                        for i in T.unroll(key_shuffles):
                            scores[k * group + h] = scores[k * group + h] + T.tvm_warp_shuffle_xor(
                                T.uint32(ALL_LANES), scores[k * group + h], 1 << i, WARP_THREADS, WARP_THREADS
                            )
                        scores[k * group + h] = visible(
                            scores[k * group + h], mask, number, step, k, row, batch, head + h
                        )
                for h in T.unroll(group):
                    before[h] = largest[h]
                    for k in T.unroll(keys):
                        largest[h] = T.max(largest[h], scores[k * group + h])
                    before[h] = T.exp2(before[h] - largest[h])
                    scale_by(h)
                    for k in T.unroll(keys):
                        scores[k * group + h] = T.exp2(scores[k * group + h] - largest[h])
                        totals[h] = totals[h] + scores[k * group + h]
                        for e in T.unroll(size):
                            sums[h * size + e] = sums[h * size + e] + scores[k * group + h] * T.Cast(
                                "float32", loaded[k * size + e]
                            )
            # The keys of a warp, then those of a block.
            for h in T.unroll(group):
                before[h] = largest[h]
                for i in T.unroll(row_shuffles):
                    largest[h] = T.max(
                        largest[h],
                        T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), largest[h], lanes << i, WARP_THREADS, WARP_THREADS),
                    )
                before[h] = T.exp2(before[h] - largest[h])
                scale_by(h)
                for i in T.unroll(row_shuffles):
                    totals[h] = totals[h] + T.tvm_warp_shuffle_xor(
                        T.uint32(ALL_LANES), totals[h], lanes << i, WARP_THREADS, WARP_THREADS
                    )
                    for e in T.unroll(size):
                        sums[h * size + e] = sums[h * size + e] + T.tvm_warp_shuffle_xor(
                            T.uint32(ALL_LANES), sums[h * size + e], lanes << i, WARP_THREADS, WARP_THREADS
                        )
                if T.And(thread % WARP_THREADS < lanes, lane * size < a.head_dim):
                    for e in T.unroll(size):
                        shared[(thread // WARP_THREADS * group + h) * a.head_dim + lane * size + e] = sums[h * size + e]
                    if lane == 0:
                        shared[largest_at + thread // WARP_THREADS * group + h] = largest[h]
                        shared[totals_at + thread // WARP_THREADS * group + h] = totals[h]
            T.cuda.cta_sync()
            for i in T.serial(-(-group * a.head_dim // threads)):
                if i * threads + thread < group * a.head_dim:
                    h: T.let = (i * threads + thread) // a.head_dim
                    d: T.let = (i * threads + thread) % a.head_dim
                    before[0] = T.float32(LOWEST)
                    for w in T.unroll(warps):
                        before[0] = T.max(before[0], shared[largest_at + w * group + h])
                    joined[0] = T.float32(0)
                    joined[1] = T.float32(0)
                    for w in T.unroll(warps):
                        joined[0] = joined[0] + shared[(w * group + h) * a.head_dim + d] * T.exp2(
                            shared[largest_at + w * group + h] - before[0]
                        )
                        joined[1] = joined[1] + shared[totals_at + w * group + h] * T.exp2(
                            shared[largest_at + w * group + h] - before[0]
                        )
                    store(shared, batch, head, number, h, d, joined[0], before[0], joined[1])
            join(shared, batch, head, number, thread)

    @T.inline
    def compute_alone(queries, cached_keys, cached_values, mask, result):
        @T.inline
        def store(shared, batch, head, number, h, d, sums, largest, total):
            if parts == 1:
                result[batch, 0, head + h, d] = average(sums, total)
            else:
                shared[block_at + h * a.head_dim + d] = sums
                if d == 0:
                    shared[block_largest_at + h] = largest
                    shared[block_totals_at + h] = total

        @T.inline
        def join(shared, batch, head, number, thread):
            if parts > 1:
                synchronize_cluster()
                largest_of_parts = T.alloc_local((parts,), "float32")
                loaded = T.alloc_local((1,), "float32")
                state = T.alloc_local((3,), "float32")
                for i in T.serial(-(-group * a.head_dim // (threads * parts))):
                    if (i * parts + number) * threads + thread < group * a.head_dim:
                        h: T.let = ((i * parts + number) * threads + thread) // a.head_dim
                        d: T.let = ((i * parts + number) * threads + thread) % a.head_dim
                        state[0] = T.float32(LOWEST)
                        state[1] = T.float32(0)
                        state[2] = T.float32(0)
                        for p in T.unroll(parts):
                            load_from_block(shared_address(shared, block_largest_at + h), p, loaded)
                            largest_of_parts[p] = loaded[0]
                            state[0] = T.max(state[0], loaded[0])
                        for p in T.unroll(parts):
                            load_from_block(shared_address(shared, block_totals_at + h), p, loaded)
                            state[1] = state[1] + T.exp2(largest_of_parts[p] - state[0]) * loaded[0]
                            load_from_block(shared_address(shared, block_at + h * a.head_dim + d), p, loaded)
                            state[2] = state[2] + T.exp2(largest_of_parts[p] - state[0]) * loaded[0]
                        result[batch, 0, head + h, d] = average(state[2], state[1])
                synchronize_cluster()  # none ends while others read what it has

        attend(queries, cached_keys, cached_values, mask, store, join)

    @T.inline
    def compute_in_two(queries, cached_keys, cached_values, mask, result):
        sums_of_parts = T.alloc_buffer((a.batch, a.heads, parts, a.head_dim), "float32", scope="global")
        largest_of_parts = T.alloc_buffer((a.batch, a.heads, parts), "float32", scope="global")
        totals_of_parts = T.alloc_buffer((a.batch, a.heads, parts), "float32", scope="global")

        @T.inline
        def store(shared, batch, head, number, h, d, sums, largest, total):
            sums_of_parts[batch, head + h, number, d] = sums
            if d == 0:
                largest_of_parts[batch, head + h, number] = largest
                totals_of_parts[batch, head + h, number] = total

        @T.inline
        def join(shared, batch, head, number, thread):
            pass

        attend(queries, cached_keys, cached_values, mask, store, join)
        with T.launch_thread("blockIdx.x", a.batch * a.heads) as of_head:
            d = T.launch_thread("threadIdx.x", a.head_dim)
            state = T.alloc_local((3,), "float32")
            state[0] = T.float32(LOWEST)
            state[1] = T.float32(0)
            state[2] = T.float32(0)
            for p in T.serial(parts):
                state[0] = T.max(state[0], largest_of_parts[of_head // a.heads, of_head % a.heads, p])
            for p in T.serial(parts):
                weight: T.let = T.exp2(largest_of_parts[of_head // a.heads, of_head % a.heads, p] - state[0])
                state[1] = state[1] + weight * totals_of_parts[of_head // a.heads, of_head % a.heads, p]
                state[2] = state[2] + weight * sums_of_parts[of_head // a.heads, of_head % a.heads, p, d]
            result[of_head // a.heads, 0, of_head % a.heads, d] = average(state[2], state[1])

    return kernel_function(attention, compute_alone if is_alone else compute_in_two)
