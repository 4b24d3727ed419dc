"""A template for products in IEEE fp32, by fused multiply-adds: tensor cores would round their operands to TF32.

Each thread has a small tile of the sums. From the tiles that its block has staged it reads, in vectors of 16 bytes,
what it needs for the next four terms. The lanes of a warp are 4 rows by 8 columns of threads, as in CUTLASS's SIMT
kernels (https://github.com/NVIDIA/cutlass, mma_simt.h), so that a vector is read by all lanes that need it at once.
"""

import dataclasses

from tvm_items.target import MAX_BLOCK_THREADS, WARP_THREADS
from tvm_items.templates.product_module import make_sums
from tvm_items.templates.staged_kernel import StagedKernel, StagedTemplate
from tvm_items.templates.template import unrolled

LANE_ROWS, LANE_COLUMNS = 4, 8
VECTOR = 4  # elements of 16 bytes
SIDE_BY_SIDE = 2, 4  # columns of a thread that are neighbours: where columns are lines of the tile, and where not

# The options of each parameter.
ROWS, COLUMNS = (16, 32, 64, 128, 256), (32, 64, 128, 256)  # of a block's tile
CHUNKS = (2, 4, 8)  # a step's terms, in chunks of 16 bytes
THREAD_ROWS, THREAD_COLUMNS = (4, 8), (4, 8)  # of a thread's tile
STAGES = (2, 3, 4, 5)
GROUPS = (1, 4, 8, 16)  # rows of tiles that are computed side by side, so that their operands are found in the L2 cache
PARTS = (1, 2, 3, 4, 6, 8, 12, 16)  # of each sum
STAGED = (False, True)  # whether sums go through shared memory, so that a thread writes more of them as one
PARAMETERS = (ROWS, COLUMNS, CHUNKS, THREAD_ROWS, THREAD_COLUMNS, STAGES, GROUPS, PARTS, STAGED)


@dataclasses.dataclass(frozen=True)
class Config:
    """One choice of all parameters."""

    rows: int
    columns: int
    chunks: int
    thread_rows: int
    thread_columns: int
    stages: int
    group: int
    parts: int
    staged: bool

    @property
    def warps_along_columns(self):
        return self.columns // (LANE_COLUMNS * self.thread_columns)

    @property
    def threads(self):
        return self.rows // (LANE_ROWS * self.thread_rows) * self.warps_along_columns * WARP_THREADS


class Kernel(StagedKernel):
    """The kernel of one Config, while it is emitted."""

    def __init__(self, template, config):
        super().__init__(template, config)
        self.SIDE_BY_SIDE = SIDE_BY_SIDE[not self.right.operand.along_terms]

    def begin(self):
        from tvm.tirx.script.builder import ir as build

        config = self.config
        lane, warp = build.Bind(self.thread % WARP_THREADS), build.Bind(self.thread // WARP_THREADS)
        self.lane_row, self.lane_column = build.Bind(lane // LANE_COLUMNS), build.Bind(lane % LANE_COLUMNS)
        self.warp_row = build.Bind(warp // config.warps_along_columns * (LANE_ROWS * config.thread_rows))
        self.warp_column = build.Bind(warp % config.warps_along_columns * (LANE_COLUMNS * config.thread_columns))
        self.sums = make_sums(config.thread_rows * config.thread_columns)
        # Of four terms: a thread's rows of the left operand, and its columns of the right one.
        self.left_values, self.right_values = (
            build.alloc_buffer((outputs * VECTOR,), "float32", scope="local")
            for outputs in (config.thread_rows, config.thread_columns)
        )

    def emit_steps(self, count):
        """Emits the loop over steps; count: how many, an int or an expression."""
        from tvm.tirx.script.builder import ir as build

        config = self.config
        stages, ahead = config.stages, self.copy_first_steps(count)
        with build.serial(count) as step:
            self.wait_for_stage()  # and for all threads to be done with the stage that is overwritten now
            self.copy_if(step + ahead < count, step + ahead, (step + ahead) % stages)
            left, right = self.start_of(step % stages)
            with unrolled(config.chunks) as chunk:
                self.load_values(self.left, left, self.row, config.thread_rows, chunk, self.left_values)
                self.load_values(self.right, right, self.column, config.thread_columns, chunk, self.right_values)
                self.multiply()

    def row(self, number):
        """Returns where in the block's tile a thread's row of that number is; number: an int or an expression."""
        side_by_side = 1 if self.left.operand.along_terms else VECTOR
        return self.warp_row + spread(number, side_by_side, self.lane_row, LANE_ROWS)

    def column(self, number):
        """Returns where in the block's tile a thread's column of that number is; number: an int or an expression."""
        return self.warp_column + spread(number, self.SIDE_BY_SIDE, self.lane_column, LANE_COLUMNS)

    def load_values(self, tile, start, output, outputs, chunk, values):
        """Emits the loads of a thread's values of an operand, as (term, output), for a chunk of terms.

        start: of the tile in shared memory. output(number): where in it a thread's rows or columns are, of `outputs`.
        """
        from tvm.tirx.script.builder import ir as build

        if tile.operand.along_terms:
            loaded = build.alloc_buffer((VECTOR,), "float32", scope="local")
            with unrolled(outputs) as number:
                place = start + tile.place(output(number), chunk)
                with build.vectorized(VECTOR) as j:
                    build.buffer_store(loaded, self.shared[place + j], [j])
                with unrolled(VECTOR) as term:
                    build.buffer_store(values, loaded[term], [term * outputs + number])
        else:
            with unrolled(VECTOR) as term, unrolled(outputs // VECTOR) as group:
                place = start + tile.place(chunk * VECTOR + term, output(group * VECTOR) // VECTOR)
                with build.vectorized(VECTOR) as j:
                    build.buffer_store(values, self.shared[place + j], [term * outputs + group * VECTOR + j])

    def multiply(self):
        """Emits a thread's multiplications for a chunk of terms."""
        from tvm.tirx.script.builder import ir as build

        rows, columns = self.config.thread_rows, self.config.thread_columns
        with unrolled(VECTOR) as term, unrolled(rows) as i, unrolled(columns) as j:
            product = self.left_values[term * rows + i] * self.right_values[term * columns + j]
            build.buffer_store(self.sums, self.sums[i * columns + j] + product, [i * columns + j])

    def emit_sums(self, emit):
        """Emits emit(row, column, sums) for all sums of a thread, neighbours together."""
        width, columns = self.SIDE_BY_SIDE, self.config.thread_columns
        with unrolled(self.config.thread_rows) as i, unrolled(columns // width) as group:
            sums = [self.sums[i * columns + group * width + e] for e in range(width)]
            emit(self.row(i), self.column(group * width), sums)


def spread(number, side_by_side, lane, lanes):
    """Returns the place of an output of a thread, where so many lanes have `side_by_side` neighbours each in turns."""
    return number // side_by_side * (side_by_side * lanes) + lane * side_by_side + number % side_by_side


class FmaTemplate(StagedTemplate):
    number, parameters, make_config, kernel = 103, PARAMETERS, Config, Kernel

    @staticmethod
    def is_possible(config):
        return 0 < config.threads <= MAX_BLOCK_THREADS
