"""Templates for products with a few rows, as a decode step has them: what they take is the time to read the weights.

No tensor cores. A thread reads 16 bytes of the weights at a time. Where these are neighbouring columns of one term, it
multiplies them by the rows' elements of that term. Threads side by side in the columns form a slice; the slices of a
block have other terms each, and what they have summed is added up at the end, by shuffles and through shared memory.
Where they are neighbouring terms of one column, as of weights that are kept as (columns, terms), threads side by side
have all terms of a few columns, and shuffles add up what they have summed.
"""

import dataclasses
import functools

from tvm_items.target import ALL_LANES, MAX_BLOCK_THREADS, WARP_THREADS
from tvm_items.templates.epilogue import output_vector, store_outputs
from tvm_items.templates.expressions import zero
from tvm_items.templates.product_module import make_module, make_sums, parts_fit, steps_of_part
from tvm_items.templates.product_task import ProductTask
from tvm_items.templates.template import Template, unrolled

MAX_ROWS = 8  # with more, tensor cores and padding take less
MIN_VECTOR_BYTES = 4  # of a load
MAX_SUMS_OF_A_THREAD = 64

# The options of each parameter.
COLUMN_THREADS = (2, 4, 8, 16, 32)  # of a slice
SLICES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
AHEAD = (1, 2, 4, 8)  # loads of a thread that are under way at once
PARTS = (1, 2, 3, 4, 6, 8)  # of each sum, in blocks of their own
PARAMETERS = (COLUMN_THREADS, SLICES, AHEAD, PARTS)
LANES, WARPS = (4, 8, 16, 32), (1, 2, 4, 8)  # threads that have a column; of a block
PARAMETERS_ALONG_TERMS = (LANES, WARPS, AHEAD)


def gemv_templates(task, max_shared_bytes):
    """Returns the templates, of which there is one, for a ProductTask with few rows; none where it is another one."""
    right = task.right
    is_plain = right.condition is None and task.left.condition is None
    if task.rows.extent > MAX_ROWS or not is_plain or right.vector * right.element_bytes < MIN_VECTOR_BYTES:
        return []
    if not right.along_terms and right.vector % task.pair:
        return []
    return [GemvAlongTermsTemplate(task)] if right.along_terms else [GemvTemplate(task, max_shared_bytes)]


@dataclasses.dataclass
class GemvTemplate(Template):
    number, parameters = 102, PARAMETERS

    task: ProductTask
    max_shared_bytes: int  # of a block

    def fits(self, decisions):
        """Returns whether the kernel of these decisions can be made and is no obvious waste."""
        column_threads, slices, ahead, parts = self.read(decisions)
        task, threads = self.task, column_threads * slices
        steps = -(-task.terms.extent // (slices * ahead))
        if threads % WARP_THREADS or threads > MAX_BLOCK_THREADS:
            return False
        if task.rows.extent * task.right.vector > MAX_SUMS_OF_A_THREAD or slices * ahead > task.terms.extent:
            return False
        is_wide = column_threads > COLUMN_THREADS[0] and column_threads * task.right.vector >= 2 * task.columns.extent
        shared_bytes = threads * task.rows.extent * task.right.vector * 4 // (WARP_THREADS // column_threads)
        return not is_wide and shared_bytes <= self.max_shared_bytes and parts_fit(task, steps, parts)

    def make(self, *values):
        return make_module(self.task, values[-1], Kernel(self.task, *values).emit)


class Kernel:
    """One kernel while it is emitted."""

    def __init__(self, task, column_threads, slices, ahead, parts):
        self.task, self.column_threads, self.slices, self.ahead, self.parts = task, column_threads, slices, ahead, parts
        self.rows, self.vector = task.rows.extent, task.right.vector
        self.threads = column_threads * slices
        self.columns = column_threads * self.vector  # of a block
        self.steps = -(-task.terms.extent // (slices * ahead))

    def emit(self, buffers, partial):
        """Emits the launch; buffers, partial: make_module()'s."""
        from tvm.tirx.script.builder import ir as build

        task = self.task
        with (
            build.launch_thread("blockIdx.x", -(-task.columns.extent // self.columns)) as tile,
            build.launch_thread("blockIdx.y", task.batch.extent) as batch,
            build.launch_thread("blockIdx.z", self.parts) as part,
            build.launch_thread("threadIdx.x", self.threads) as thread,
        ):
            first_column = build.Bind(tile * self.columns)
            sums = make_sums(self.rows * self.vector)
            self.emit_steps(buffers, batch, part, thread, first_column, sums)
            # What the slices in a warp have summed: all of its lanes have the totals then.
            emit_shuffles(sums, self.rows * self.vector, self.column_threads, WARP_THREADS)

            def store(row, column, values):
                self.store(buffers, partial, part, batch, row, first_column + column, values)

            if self.threads == WARP_THREADS:
                with build.If(thread < self.column_threads), build.Then():
                    for row in range(self.rows):
                        first = row * self.vector
                        values = [sums[first + e] for e in range(self.vector)]
                        store(zero() + row, thread * self.vector, values)
            else:
                self.emit_sums_of_warps(thread, sums, store)

    def emit_steps(self, buffers, batch, part, thread, first_column, sums):
        """Emits the loop over a slice's terms."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as build

        task, ahead, vector = self.task, self.ahead, self.vector
        is_cut = task.terms.extent % (self.slices * ahead) != 0
        column = first_column + thread % self.column_threads * vector
        if task.columns.extent % self.columns:
            column = tirx.Min(column, task.columns.extent - vector)
        column, slice_ = build.Bind(column), build.Bind(thread // self.column_threads)
        loaded = build.alloc_buffer((ahead * vector,), task.dtype, scope="local")
        first_step, count = steps_of_part(self.steps, self.parts, part)
        with build.serial(count) as step:
            terms = [((first_step + step) * ahead + i) * self.slices + slice_ for i in range(ahead)]
            inside = [tirx.Min(term, task.terms.extent - 1) if is_cut else term for term in terms]
            for i, term in enumerate(inside):
                with build.vectorized(vector) as j:
                    load, _ = task.right.access(buffers, batch, column + j, term)
                    build.buffer_store(loaded, load, [i * vector + j])
            for i, (term, all_terms) in enumerate(zip(inside, terms)):
                for row in range(self.rows):
                    load, _ = task.left.access(buffers, batch, zero() + row, term)
                    factor = load.astype("float32")
                    if is_cut:
                        factor = tirx.Select(all_terms < task.terms.extent, factor, tirx.const(0, "float32"))
                    factor = build.Bind(factor)
                    for e in range(vector):
                        at = row * vector + e
                        product = factor * loaded[i * vector + e].astype("float32")
                        build.buffer_store(sums, sums[at] + product, [at])

    def emit_sums_of_warps(self, thread, sums, store):
        """Emits the addition of what the warps of a block have, through shared memory, and store() of the totals."""
        from tvm import tirx
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        warps, tile = self.threads // WARP_THREADS, self.rows * self.columns
        shared = build.alloc_buffer((warps * tile,), "float32", scope="shared.dyn", align=128)
        lane, warp = build.Bind(thread % WARP_THREADS), build.Bind(thread // WARP_THREADS)
        with build.If(lane < self.column_threads), build.Then():
            for i in range(self.rows * self.vector):
                row, e = divmod(i, self.vector)
                build.buffer_store(shared, sums[i], [warp * tile + row * self.columns + lane * self.vector + e])
        build.evaluate(T.cuda.cta_sync())
        vectors = self.rows * self.column_threads
        for first in range(0, vectors, self.threads):
            number = first + thread
            with build.If(number < vectors), build.Then():
                row, column = number // self.column_threads, number % self.column_threads * self.vector
                totals = build.alloc_buffer((self.vector,), "float32", scope="local")
                for e in range(self.vector):
                    total = tirx.const(0, "float32")
                    for w in range(warps):
                        total = total + shared[w * tile + row * self.columns + column + e]
                    build.buffer_store(totals, total, [e])
                store(row, column, [totals[e] for e in range(self.vector)])

    def store(self, buffers, partial, part, batch, row, column, values):
        """Emits what becomes of a row's sums at neighbouring columns, where these are inside the output."""
        from tvm.tirx.script.builder import ir as build

        task = self.task

        def write():
            if partial is not None:
                place = ((part * task.batch.extent + batch) * self.rows + row) * task.columns.extent + column
                for e, value in enumerate(values):
                    build.buffer_store(partial, value, [place + e])
                return
            width = min(output_vector(task), self.vector)
            for e in range(0, self.vector, width):
                store_outputs(task, buffers, batch, row, column + e, values[e : e + width])

        if task.columns.extent % self.columns:
            with build.If(column < task.columns.extent), build.Then():
                write()
        else:
            write()


@dataclasses.dataclass
class GemvAlongTermsTemplate(Template):
    number, parameters = 107, PARAMETERS_ALONG_TERMS

    task: ProductTask

    def fits(self, decisions):
        """Returns whether the kernel of these decisions can be made and is no obvious waste."""
        lanes, warps, ahead = self.read(decisions)
        task, columns = self.task, warps * WARP_THREADS // lanes * ahead
        if ahead % task.pair:
            return False
        is_wide = warps * ahead > 1 and columns >= 2 * task.columns.extent
        is_long = lanes > LANES[0] and lanes * task.right.vector >= 2 * task.terms.extent
        return not is_wide and not is_long and task.rows.extent * ahead <= MAX_SUMS_OF_A_THREAD

    def make(self, *values):
        return make_module(self.task, 1, functools.partial(emit_along_terms, self.task, *values))


def emit_along_terms(task, lanes, warps, ahead, buffers, partial):
    """Emits the launch of a kernel whose threads read neighbouring terms; buffers, partial: make_module()'s.

    lanes: threads that have the terms of a column. warps: of a block. ahead: columns that a thread reads at once.
    """
    from tvm import tirx
    from tvm.tirx.script.builder import ir as build

    rows, vector, terms, pair = task.rows.extent, task.right.vector, task.terms.extent, task.pair
    side_by_side = warps * WARP_THREADS // lanes  # columns that a block reads at once
    step_terms = lanes * vector
    with (
        build.launch_thread("blockIdx.x", -(-task.columns.extent // (side_by_side * ahead))) as tile,
        build.launch_thread("blockIdx.y", task.batch.extent) as batch,
        build.launch_thread("threadIdx.x", warps * WARP_THREADS) as thread,
    ):
        lane, own = build.Bind(thread % lanes), build.Bind(thread // lanes)
        columns = [  # the columns of a pair are one thread's
            build.Bind((tile * ahead + j // pair * pair) * side_by_side + own * pair + j % pair) for j in range(ahead)
        ]
        inside = [tirx.Min(column, task.columns.extent - 1) for column in columns]
        sums = make_sums(rows * ahead)
        loaded = build.alloc_buffer((ahead * vector,), task.dtype, scope="local")
        factors = build.alloc_buffer((vector,), task.dtype, scope="local")
        with build.serial(-(-terms // step_terms)) as step:
            term = build.Bind(step * step_terms + lane * vector)
            first = build.Bind(tirx.Min(term, terms - vector)) if terms % step_terms else term
            for j, column in enumerate(inside):
                with build.vectorized(vector) as e:
                    load, _ = task.right.access(buffers, batch, column, first + e)
                    build.buffer_store(loaded, load, [j * vector + e])
            for row in range(rows):
                is_vector = task.left.along_terms and task.left.vector % vector == 0
                with (build.vectorized if is_vector else unrolled)(vector) as e:
                    load, _ = task.left.access(buffers, batch, zero() + row, first + e)
                    build.buffer_store(factors, load, [e])
                for e in range(vector):
                    factor = factors[e].astype("float32")
                    if terms % step_terms:
                        factor = tirx.Select(term < terms, factor, tirx.const(0, "float32"))
                    factor = build.Bind(factor)
                    for j in range(ahead):
                        at = row * ahead + j
                        product = factor * loaded[j * vector + e].astype("float32")
                        build.buffer_store(sums, sums[at] + product, [at])
        emit_shuffles(sums, rows * ahead, 1, lanes)
        with build.If(lane == 0), build.Then():
            for j in range(0, ahead, pair):
                with build.If(columns[j] < task.columns.extent), build.Then():
                    for row in range(rows):
                        values = [sums[row * ahead + j + number] for number in range(pair)]
                        store_outputs(task, buffers, batch, zero() + row, columns[j], values)


def emit_shuffles(sums, count, first, end):
    """Emits the addition of `count` sums of lanes that are apart by first, 2 first and so on, less than `end`."""
    from tvm.script import tirx as T
    from tvm.tirx.script.builder import ir as build

    distance = first
    while distance < end:
        for i in range(count):
            other = T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), sums[i], distance, WARP_THREADS, WARP_THREADS)
            build.buffer_store(sums, sums[i] + other, [i])
        distance *= 2
