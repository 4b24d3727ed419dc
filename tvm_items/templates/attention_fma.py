"""Attention as one CUDA kernel without tensor cores, for IEEE fp32: products of register tiles, softmax in registers.

The algorithm is that of attention_mma.py. The threads of a block form rows and columns: those of a row of threads share
some queries. Each has some of these queries' scores, and then some columns of their results; the weights go from one to
the other through shared memory.
"""

import math

from tvm_items.target import ALL_LANES, WARP_THREADS
from tvm_items.templates.attention_task import Softmax, kernel_function, masked

VECTOR = (
    4  # elements of 32 bits of one load or cp.async; rows in shared memory are so much longer, as the next one begins
)


def fma_resources(attention, thread_columns, thread_rows, row_tile, key_tile, stages):
    """Returns what a block of threads of fma_kernel() needs: (threads, registers of a thread, bytes of shared memory).

    The registers are an estimate: a thread's scores and sums, what it multiplies at once, and 50 for all else.
    """
    scores, sums = row_tile * key_tile // thread_columns, row_tile * attention.head_dim // thread_columns
    operands = VECTOR * (row_tile + max(key_tile, attention.head_dim) // thread_columns)
    block_rows = thread_rows * row_tile
    rows_bytes = (block_rows + 2 * stages * key_tile) * (attention.head_dim + VECTOR) * 4
    weights_bytes = block_rows * (key_tile + VECTOR) * 4
    return thread_columns * thread_rows, scores + sums + operands + 50, rows_bytes + weights_bytes


def fma_kernel(attention, thread_columns, thread_rows, row_tile, key_tile, stages):
    """Returns the scheduled TIR function of an Attention in fp32, of define_attention()'s signature.

    thread_columns, thread_rows: of a block of threads; a row of threads is in one warp. row_tile: queries of a thread.
    key_tile: keys of a step, a multiple of 8 and of thread_columns, of which 4 times as many divide head_dim. stages:
    steps whose keys and values are in shared memory or on their way there, at least 1.
    """
    from tvm.script import tirx as T

    a = attention
    threads, block_rows, row_length = thread_columns * thread_rows, thread_rows * row_tile, a.head_dim + VECTOR
    query_blocks, steps = -(-a.query_count // block_rows), -(-a.key_count // key_tile)
    sharing = a.heads // a.key_heads
    first_query, first_key, first_value = (source.first for source in a.sources)
    thread_keys, vectors = key_tile // thread_columns, a.head_dim // (VECTOR * thread_columns)
    row_copies = a.head_dim // VECTOR
    weights_at = block_rows * row_length
    weights_length = key_tile + VECTOR
    stages_at = weights_at + block_rows * weights_length
    stage_length = 2 * key_tile * row_length
    softmax = Softmax(a)
    exponent = softmax.exponent

    def crosses_diagonal(step, first_row):
        return a.is_causal and step * key_tile + key_tile - 1 > first_row

    def is_cut(step):
        return a.key_count % key_tile != 0 and step == steps - 1

    @T.inline
    def compute(queries, keys, values, mask, result):
        T.device_entry()
        block = T.cta_id([query_blocks * a.heads * a.batch])
        thread = T.thread_id([threads])
        shared = T.alloc_buffer((stages_at + stages * stage_length,), "float32", scope="shared.dyn", align=128)
        left = T.alloc_local((row_tile * VECTOR,), "float32")
        right = T.alloc_local((VECTOR,), "float32")
        scores = T.alloc_local((row_tile * thread_keys,), "float32")
        sums = T.alloc_local((row_tile * vectors * VECTOR,), "float32")
        largest = T.alloc_local((row_tile,), "float32")
        before = T.alloc_local((row_tile,), "float32")
        totals = T.alloc_local((row_tile,), "float32")
        batch: T.let = block // (query_blocks * a.heads)
        head: T.let = block // query_blocks % a.heads
        # Where attention is causal the last queries see the most keys: they begin first.
        number: T.let = query_blocks - 1 - block % query_blocks if a.is_causal else block % query_blocks
        first_row: T.let = number * block_rows
        column: T.let = thread % thread_columns
        row: T.let = (
            thread // thread_columns
        )  # in the block, of the thread's first query; the others are thread_rows apart
        end: T.let = T.min(steps, (first_row + block_rows - 1) // key_tile + 1) if a.is_causal else steps

        @T.inline
        def copy(to, rows, source, first, count, head):
            for i in T.unroll(-(-rows * row_copies // threads)):
                if i * threads + thread < rows * row_copies:
                    T.ptx["cp.async.cg.shared.global"](
                        T.address_of(
                            shared[
                                to
                                + (i * threads + thread) // row_copies * row_length
                                + (i * threads + thread) % row_copies * VECTOR
                            ]
                        ),
                        T.address_of(
                            source[
                                batch,
                                T.min(first + (i * threads + thread) // row_copies, count - 1),
                                head,
                                (i * threads + thread) % row_copies * VECTOR,
                            ]
                        ),
                        16,
                        # Rows of zeros behind the last: the weights of those keys are 0, and 0 times NaN is NaN.
                        T.Select(first + (i * threads + thread) // row_copies < count, T.uint32(16), T.uint32(0)),
                    )

        @T.inline
        def copy_keys_and_values(step, stage):
            copy(
                stages_at + stage * stage_length,
                key_tile,
                keys,
                step * key_tile,
                a.key_count,
                first_key + head // sharing,
            )
            copy(
                stages_at + stage * stage_length + key_tile * row_length,
                key_tile,
                values,
                step * key_tile,
                a.key_count,
                first_value + head // sharing,
            )

        @T.inline
        def multiply_queries_and_keys(keys_at):
            for i in T.unroll(row_tile * thread_keys):
                scores[i] = T.float32(0)
            for d in T.serial(a.head_dim // VECTOR):
                for r in T.unroll(row_tile):
                    for e in T.vectorized(VECTOR):
                        left[r * VECTOR + e] = shared[(r * thread_rows + row) * row_length + d * VECTOR + e]
                for n in T.unroll(thread_keys):
                    for e in T.vectorized(VECTOR):
                        right[e] = shared[keys_at + (n * thread_columns + column) * row_length + d * VECTOR + e]
                    for r in T.unroll(row_tile):
                        for e in T.unroll(VECTOR):
                            scores[r * thread_keys + n] = scores[r * thread_keys + n] + left[r * VECTOR + e] * right[e]

        @T.inline
        def hide(step, hidden):  # hidden: gives what a score becomes, from (score, query, key)
            for r in T.unroll(row_tile):
                for n in T.unroll(thread_keys):
                    query: T.let = first_row + r * thread_rows + row
                    key: T.let = step * key_tile + n * thread_columns + column
                    scores[r * thread_keys + n] = hidden(scores[r * thread_keys + n], query, key)

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
            for r in T.unroll(row_tile):
                before[r] = largest[r]
                for n in T.unroll(thread_keys):
                    largest[r] = T.max(largest[r], scores[r * thread_keys + n])
                for i in T.unroll(thread_columns.bit_length() - 1):
                    largest[r] = T.max(
                        largest[r],
                        T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), largest[r], 1 << i, WARP_THREADS, WARP_THREADS),
                    )
                before[r] = T.exp2(exponent(before[r], largest[r]))
                totals[r] = totals[r] * before[r]
                for i in T.unroll(vectors * VECTOR):
                    sums[r * vectors * VECTOR + i] = sums[r * vectors * VECTOR + i] * before[r]
                for n in T.unroll(thread_keys):
                    scores[r * thread_keys + n] = T.exp2(exponent(scores[r * thread_keys + n], largest[r]))
                    totals[r] = totals[r] + scores[r * thread_keys + n]
                    shared[weights_at + (r * thread_rows + row) * weights_length + n * thread_columns + column] = (
                        scores[r * thread_keys + n]
                    )

        @T.inline
        def multiply_weights_and_values(values_at):
            for j in T.serial(key_tile // VECTOR):
                for r in T.unroll(row_tile):
                    for e in T.vectorized(VECTOR):
                        left[r * VECTOR + e] = shared[
                            weights_at + (r * thread_rows + row) * weights_length + j * VECTOR + e
                        ]
                for k in T.unroll(VECTOR):
                    for c in T.unroll(vectors):
                        for e in T.vectorized(VECTOR):
                            right[e] = shared[
                                values_at + (j * VECTOR + k) * row_length + (c * thread_columns + column) * VECTOR + e
                            ]
                        for r in T.unroll(row_tile):
                            for e in T.unroll(VECTOR):
                                sums[(r * vectors + c) * VECTOR + e] = (
                                    sums[(r * vectors + c) * VECTOR + e] + left[r * VECTOR + k] * right[e]
                                )

        copy(0, block_rows, queries, first_row, a.query_count, first_query + head)
        for step in T.unroll(stages - 1):
            if step < end:
                copy_keys_and_values(step, step)
            T.ptx["cp.async.commit_group"]()
        for i in T.unroll(row_tile):
            largest[i] = T.float32(softmax.lowest)
            totals[i] = T.float32(0)
        for i in T.unroll(row_tile * vectors * VECTOR):
            sums[i] = T.float32(0)
        for step in T.serial(end):
            if stages > 1:
                T.ptx["cp.async.wait_group"](stages - 2)
                T.cuda.cta_sync()
                if step + stages - 1 < end:
                    copy_keys_and_values(step + stages - 1, (step + stages - 1) % stages)
                T.ptx["cp.async.commit_group"]()
            else:
                T.cuda.cta_sync()
                copy_keys_and_values(step, 0)
                T.ptx["cp.async.commit_group"]()
                T.ptx["cp.async.wait_group"](0)
                T.cuda.cta_sync()
            multiply_queries_and_keys(stages_at + step % stages * stage_length)
            hide_unseen(step)
            update_softmax()
            T.cuda.warp_sync()  # a row of threads is in one warp, and so are the weights that it writes and reads
            multiply_weights_and_values(stages_at + step % stages * stage_length + key_tile * row_length)
        for r in T.unroll(row_tile):
            for i in T.unroll(thread_columns.bit_length() - 1):
                totals[r] = totals[r] + T.tvm_warp_shuffle_xor(
                    T.uint32(ALL_LANES), totals[r], 1 << i, WARP_THREADS, WARP_THREADS
                )
            # Of a query that sees no key the total is 0, and so are its sums; else it is 1 at least.
            totals[r] = T.float32(1) / T.max(totals[r], T.float32(1e-30))
            if first_row + r * thread_rows + row < a.query_count:
                for c in T.unroll(vectors):
                    for e in T.vectorized(VECTOR):
                        result[
                            batch,
                            first_row + r * thread_rows + row,
                            head,
                            (c * thread_columns + column) * VECTOR + e,
                        ] = sums[(r * vectors + c) * VECTOR + e] * totals[r]

    return kernel_function(attention, compute)
