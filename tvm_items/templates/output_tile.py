"""What becomes of the sums that a block of threads has of a tile of the output: outputs, or parts to be added up."""

import dataclasses

from tvm_items.templates.clusters import load_from_block, shared_address, synchronize_cluster
from tvm_items.templates.epilogue import output_vector, store_outputs
from tvm_items.templates.product_task import ProductTask

STAGING_PAD = 8  # elements behind each row of sums in shared memory, against bank conflicts
REDUCTION_THREADS = 128


@dataclasses.dataclass
class OutputTile:
    """A tile of the output, in a kernel that is emitted."""

    task: ProductTask
    buffers: dict  # {parameter: buffer}
    rows: int
    columns: int
    batch: object  # expressions: where the tile lies
    first_row: object
    first_column: object
    # A function that emits emit(row, column, sums) for all sums of a thread, those together that are side by side.
    emit_sums: object
    side_by_side: int = 2
    end_row: object = None  # the row behind the last one that the tile has, where that is not known from its number

    def store_from_registers(self):
        """Emits the epilogue of the sums that a thread has."""
        width = min(self.side_by_side, output_vector(self.task))
        self.emit_sums(lambda *place_and_sums: self.emit_outputs(width, *place_and_sums, self.store))

    def store_parts(self, partial, part):
        """Emits the writing of all sums into `partial`, as part number `part` of them: see emit_reduction()."""
        from tvm.tirx.script.builder import ir as build

        task = self.task

        def store(row, column, sums):
            matrix = part * task.batch.extent + self.batch
            place = (matrix * task.rows.extent + row) * task.columns.extent + column
            for e, value in enumerate(sums):
                build.buffer_store(partial, value, [place + e])

        width = 1 if task.columns.extent % self.side_by_side else self.side_by_side
        self.emit_sums(lambda *place_and_sums: self.emit_outputs(width, *place_and_sums, store))

    def store_through_shared_memory(self, shared, thread, threads, synchronize, part=0, parts=1):
        """Emits the epilogue of as many columns at once as a thread can write as one.

        shared: the buffer of shared memory, in which nothing is needed any more once synchronize() has been emitted: a
        barrier of those `threads`, an int, that take part. thread: the number of a thread, an expression. part, parts:
        the number of a block of a cluster whose blocks have parts of the same sums. Each adds up some of them, always
        in one order.
        """
        from tvm.tirx.script.builder import ir as build

        line, width = self.columns + STAGING_PAD, output_vector(self.task)
        synchronize()
        staged = build.decl_buffer((self.rows * line,), "float32", data=shared.data, scope="shared.dyn")

        def stage(row, column, sums):
            for e, value in enumerate(sums):
                build.buffer_store(staged, value, [row * line + column + e])

        self.emit_sums(stage)
        (synchronize if parts == 1 else synchronize_cluster)()
        vectors = self.columns // width
        with build.serial(-(-self.rows * vectors // (threads * parts)), unroll=4) as i:
            number = (i * parts + part) * threads + thread
            row, column = number // vectors, number % vectors * width

            def copy():
                sums = build.alloc_buffer((width,), "float32", scope="local")
                for first in range(0, width, 4):
                    place, count = row * line + column + first, min(4, width)
                    if parts == 1:
                        with build.vectorized(count) as j:
                            build.buffer_store(sums, staged[place + j], [first + j])
                    else:
                        add_up_parts(staged, place, parts, [(sums, first + j) for j in range(count)])
                self.emit_outputs(width, row, column, [sums[e] for e in range(width)], self.store)

            if self.rows * vectors % (threads * parts):
                with build.If(row < self.rows), build.Then():
                    copy()
            else:
                copy()
        if parts > 1:
            synchronize_cluster()  # none ends while others read what it has staged

    def store(self, row, column, sums):
        store_outputs(self.task, self.buffers, self.batch, row, column, sums)

    def emit_outputs(self, width, row, column, sums, store):
        """Emits store(row, column, sums) for vectors of `width` of the sums, where they are inside the output.

        row, column: in the tile; store() gets them in the output.
        """
        for e in range(0, len(sums), width):
            place = self.first_row + row, self.first_column + column + e
            self.emit_inside(*place, lambda place=place, e=e: store(*place, sums[e : e + width]))

    def emit_inside(self, row, column, emit):
        """Emits what emit() does where a row and a column are inside the output."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as build

        conditions = []
        if self.end_row is not None:
            conditions.append(row < self.end_row)
        elif self.task.rows.extent % self.rows:
            conditions.append(row < self.task.rows.extent)
        if self.task.columns.extent % self.columns:
            conditions.append(column < self.task.columns.extent)
        if conditions:
            with build.If(tirx.And(*conditions) if len(conditions) == 2 else conditions[0]), build.Then():
                emit()
        else:
            emit()


def add_up_parts(staged, place, parts, totals):
    """Emits the sums of neighbouring elements that all blocks of a cluster have in their shared memory.

    staged: the buffer there; place: of the first element, a multiple of their number. totals: (buffer, index) each.
    """
    from tvm.tirx.script.builder import ir as build

    loaded, address = build.alloc_buffer((len(totals),), "float32", scope="local"), shared_address(staged, place)
    for part in range(parts):
        load_from_block(address, part, loaded, len(totals))
        for j, (buffer, index) in enumerate(totals):
            build.buffer_store(buffer, loaded[j] if part == 0 else buffer[index] + loaded[j], [index])


def staging_bytes(rows, columns):
    """Returns the bytes of shared memory that store_through_shared_memory() takes."""
    return rows * (columns + STAGING_PAD) * 4


def emit_reduction(task, parts, buffers, partial):
    """Emits a launch that adds up the parts of all sums, always in one order, and does what follows the product."""
    from tvm import tirx
    from tvm.tirx.script.builder import ir as build

    width = min(4, output_vector(task))
    rows, columns = task.rows.extent, task.columns.extent
    outputs = task.batch.extent * rows * columns
    with (
        build.launch_thread("blockIdx.x", -(-outputs // width // REDUCTION_THREADS)) as block,
        build.launch_thread("threadIdx.x", REDUCTION_THREADS) as thread,
    ):
        first = build.Bind((block * REDUCTION_THREADS + thread) * width)
        with build.If(first < outputs), build.Then():
            sums = build.alloc_buffer((width,), "float32", scope="local")
            loaded = build.alloc_buffer((parts * width,), "float32", scope="local")
            for part in range(parts):
                with build.vectorized(width) as j:
                    build.buffer_store(loaded, partial[part * outputs + first + j], [part * width + j])
            for j in range(width):
                total = tirx.const(0, "float32")
                for part in range(parts):
                    total = total + loaded[part * width + j]
                build.buffer_store(sums, total, [j])
            batch, row, column = first // (rows * columns), first // columns % rows, first % columns
            store_outputs(task, buffers, batch, row, column, [sums[j] for j in range(width)])
