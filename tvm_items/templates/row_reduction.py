"""A template for reductions along rows: each element is read once, into registers, and reductions go over the threads.

A row has a few threads side by side, and a block several rows. A thread has vectors of neighbouring columns, as far
from one another as all threads of the row reach.
"""

import dataclasses

from tvm_items.target import ALL_LANES, MAX_BLOCK_THREADS, WARP_THREADS
from tvm_items.templates.epilogue import MAX_VECTOR_BYTES
from tvm_items.templates.expressions import dtype_of, find, loads_of
from tvm_items.templates.product_module import make_module
from tvm_items.templates.product_task import on_buffers
from tvm_items.templates.row_task import RowTask
from tvm_items.templates.template import Template

MAX_HELD_ELEMENTS = 256  # of a thread: not all of them are in its 255 registers at once

# The options of each parameter.
ROW_THREADS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
BLOCK_THREADS = (32, 64, 128, 256, 512, 1024)
VECTOR = (1, 2, 4, 8)
PARAMETERS = (ROW_THREADS, BLOCK_THREADS, VECTOR)


@dataclasses.dataclass
class RowReductionTemplate(Template):
    number, parameters = 105, PARAMETERS

    task: RowTask

    def fits(self, decisions):
        """Returns whether the kernel of these decisions can be made and is no obvious waste."""
        row_threads, block_threads, vector = self.read(decisions)
        held, columns = self.task.held(), self.task.columns
        in_memory = [buffer for buffer in held if self.task.is_parameter(buffer)]
        in_memory += [load.source for _, load in self.task.loads_of_parts()]
        element_bytes = max(4 if str(buffer.dtype) == "float32" else 2 for buffer in in_memory)
        if not row_threads <= block_threads <= MAX_BLOCK_THREADS or columns % vector:
            return False
        if vector * element_bytes > MAX_VECTOR_BYTES or row_threads * vector >= 2 * columns:
            return False
        return -(-columns // (row_threads * vector)) * vector * max(1, len(held)) <= MAX_HELD_ELEMENTS

    def make(self, *values):
        return make_module(self.task, 1, lambda buffers, _: Kernel(self.task, buffers, *values).emit())


class Kernel:
    """One kernel while it is emitted."""

    def __init__(self, task, buffers, row_threads, block_threads, vector):
        self.task, self.buffers, self.row_threads, self.vector = task, buffers, row_threads, vector
        self.block_threads, self.block_rows = block_threads, block_threads // row_threads
        self.stride = row_threads * vector  # columns from one vector of a thread to its next one
        self.count = -(-task.columns // self.stride)  # of a thread's vectors
        self.held, self.of_rows = {}, {}  # {buffer: its elements in registers}: of a place, of a row

    def emit(self):
        from tvm import tirx
        from tvm.tirx.script.builder import ir as build

        task = self.task
        with (
            build.launch_thread("blockIdx.x", -(-task.rows // self.block_rows)) as block,
            build.launch_thread("threadIdx.x", self.block_threads) as thread,
        ):
            self.thread = thread
            row = block * self.block_rows + thread // self.row_threads
            self.is_inside = row < task.rows if task.rows % self.block_rows else None
            # Rows behind the last one are computed too, and not written: all threads take part in shuffles.
            self.row = build.Bind(row if self.is_inside is None else tirx.Min(row, task.rows - 1))
            self.first = build.Bind(thread % self.row_threads * self.vector)
            for parameter in task.whole:
                self.load(parameter)
            for step in task.steps:
                if step.reduces:
                    self.reduce(step)
                elif step.of_rows:
                    self.compute_of_row(step)
                else:
                    self.compute(step)

    def column(self, number):
        """Returns (the first column of a thread's vector, whether it is inside, None where all threads' are)."""
        from tvm import tirx

        column = self.first + number * self.stride
        if (number + 1) * self.stride <= self.task.columns:
            return column, None
        return tirx.Min(column, self.task.columns - self.vector), column < self.task.columns

    def load(self, parameter):
        """Emits the loads of a parameter that is read at the very place that is computed."""
        from tvm.tirx.script.builder import ir as build

        copy = build.alloc_buffer((self.count * self.vector,), str(parameter.dtype), scope="local")
        self.held[parameter] = copy
        flat = self.flat(parameter, self.task.rows * self.task.columns)
        for number in range(self.count):
            column, _ = self.column(number)
            start = self.row * self.task.columns + column
            with build.vectorized(self.vector) as j:
                build.buffer_store(copy, flat[start + j], [number * self.vector + j])

    def flat(self, parameter, size):
        """Returns a parameter's buffer, of so many elements, as one of a single dimension."""
        from tvm.tirx.script.builder import ir as build

        return build.decl_buffer((size,), str(parameter.dtype), data=find(parameter, self.buffers).data)

    def at_place(self, place):
        """Returns a function of a load that gives its value from registers, None of what is not there.

        place: of the thread's elements of a row; None where only what is of rows is wanted.
        """

        def value(load):
            of_row = find(load.source, self.of_rows)
            if of_row is not None:
                return of_row[0].astype(dtype_of(load))
            held = None if place is None else find(load.source, self.held)
            return None if held is None else held[place]

        return value

    def reduce(self, step):
        """Emits a reduction: over a thread's elements, then over the row's threads."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as build

        dtype = dtype_of(step.value)
        wide = "float32" if dtype in ("float16", "bfloat16") else dtype
        total = build.alloc_buffer((1,), wide, scope="local")
        combine = type(step.value)  # of the total so far and an element
        build.buffer_store(total, step.initial.astype(wide), [0])
        for number in range(self.count):
            column, is_inside = self.column(number)
            for j in range(self.vector):
                positions = step.positions(self.row, column + j)
                at_place = self.at_place(number * self.vector + j)
                value = combine(total[0], on_buffers(step.value.b, positions, self.buffers, at_place).astype(wide))
                value = value if is_inside is None else tirx.Select(is_inside, value, total[0])
                build.buffer_store(total, value, [0])
        self.reduce_over_threads(total, combine, wide)
        self.of_rows[step.output] = total
        self.write_of_row(step)

    def reduce_over_threads(self, total, combine, dtype):
        """Emits the reduction of what the threads of a row have; all of them have the result then."""
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        distance = 1
        while distance < min(self.row_threads, WARP_THREADS):
            other = T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), total[0], distance, WARP_THREADS, WARP_THREADS)
            build.buffer_store(total, combine(total[0], other), [0])
            distance *= 2
        if self.row_threads <= WARP_THREADS:
            return
        warps = self.row_threads // WARP_THREADS
        # Of each reduction's own: none is overwritten that another warp still reads.
        shared = build.alloc_buffer((self.block_threads // WARP_THREADS,), dtype, scope="shared")
        with build.If(self.thread % WARP_THREADS == 0), build.Then():
            build.buffer_store(shared, total[0], [self.thread // WARP_THREADS])
        build.evaluate(T.cuda.cta_sync())
        first = build.Bind(self.thread // self.row_threads * warps)
        build.buffer_store(total, shared[first], [0])
        for warp in range(1, warps):
            build.buffer_store(total, combine(total[0], shared[first + warp]), [0])

    def compute_of_row(self, step):
        """Emits what is computed once for a row, by all of its threads."""
        from tvm.tirx.script.builder import ir as build

        value = on_buffers(step.value, step.positions(self.row, None), self.buffers, self.at_place(None))
        result = build.alloc_buffer((1,), dtype_of(step.value), scope="local")
        build.buffer_store(result, value, [0])
        self.of_rows[step.output] = result
        self.write_of_row(step)

    def write_of_row(self, step):
        """Emits the store of a row's element by its first thread, where it is an output of the task."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as build

        if find(step.output, self.buffers) is None:
            return
        condition = self.first == 0
        if self.is_inside is not None:
            condition = tirx.all(condition, self.is_inside)
        with build.If(condition), build.Then():
            value = self.of_rows[step.output][0].astype(dtype_of(step.value))
            build.buffer_store(self.flat(step.output, self.task.rows), value, [self.row])

    def compute(self, step):
        """Emits what is computed for each place, and writes it where it is an output of the task."""
        from tvm.tirx.script.builder import ir as build
        from tvm_ffi import structural_equal

        results = build.alloc_buffer((self.count * self.vector,), dtype_of(step.value), scope="local")
        beside = [load for load in loads_of(step.value) if self.at_place(0)(load) is None]
        vectors = [load for load in beside if self.vector > 1 and step.is_vector(load, self.vector)]
        for number in range(self.count):
            column, is_inside = self.column(number)
            copies = []
            for load in vectors:  # such as the weights of a LayerNorm
                copies.append(build.alloc_buffer((self.vector,), dtype_of(load), scope="local"))
                with build.vectorized(self.vector) as j:
                    value = on_buffers(load, step.positions(self.row, column + j), self.buffers)
                    build.buffer_store(copies[-1], value, [j])
            for j in range(self.vector):
                in_registers = self.at_place(number * self.vector + j)

                def at_place(load, j=j, copies=copies, in_registers=in_registers):
                    for vector, copy in zip(vectors, copies):
                        if structural_equal(load, vector):
                            return copy[j]
                    return in_registers(load)

                value = on_buffers(step.value, step.positions(self.row, column + j), self.buffers, at_place)
                build.buffer_store(results, value, [number * self.vector + j])
            if find(step.output, self.buffers) is not None:
                self.write(step, results, number, column, is_inside)
        self.held[step.output] = results

    def write(self, step, results, number, column, is_inside):
        """Emits the store of a thread's vector, where its row and columns are inside."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as build

        flat = self.flat(step.output, self.task.rows * self.task.columns)
        start = self.row * self.task.columns + column

        def store():
            with build.vectorized(self.vector) as j:
                build.buffer_store(flat, results[number * self.vector + j], [start + j])

        conditions = [condition for condition in (self.is_inside, is_inside) if condition is not None]
        if conditions:
            with build.If(tirx.all(*conditions)), build.Then():
                store()
        else:
            store()
