"""A template for products on tensor cores by mma.sync, which every NVIDIA GPU since compute capability 8.0 has.

A warp loads fragments of the tiles that its block has staged by ldmatrix, one ahead of those that it multiplies.
"""

import dataclasses

from tvm_items.target import MAX_BLOCK_THREADS, WARP_THREADS
from tvm_items.templates.product_module import make_sums
from tvm_items.templates.staged_kernel import StagedKernel, StagedTemplate
from tvm_items.templates.template import unrolled

MAX_SUMS_OF_A_THREAD = 128  # of the 255 registers that it may have

# The options of each parameter.
ROWS, COLUMNS = (16, 32, 64, 128, 192, 256), (32, 64, 128, 192, 256)  # of a block's tile
CHUNKS = (4, 8)  # a step's terms, in chunks of 16 bytes
WARPS_ALONG_ROWS, WARPS_ALONG_COLUMNS = (1, 2, 4), (1, 2, 4)
STAGES = (2, 3, 4, 5, 6)
GROUPS = (1, 4, 8, 16)  # rows of tiles that are computed side by side, so that their operands are found in the L2 cache
PARTS = (1, 2, 3, 4, 6, 8, 12, 16)  # of each sum
STAGED = (False, True)  # whether sums go through shared memory, so that a thread writes more of them as one
PARAMETERS = (ROWS, COLUMNS, CHUNKS, WARPS_ALONG_ROWS, WARPS_ALONG_COLUMNS, STAGES, GROUPS, PARTS, STAGED)


@dataclasses.dataclass(frozen=True)
class Config:
    """One choice of all parameters."""

    rows: int
    columns: int
    chunks: int
    warps_along_rows: int
    warps_along_columns: int
    stages: int
    group: int
    parts: int
    staged: bool

    @property
    def threads(self):
        return WARP_THREADS * self.warps_along_rows * self.warps_along_columns

    @property
    def warp_rows(self):
        return self.rows // self.warps_along_rows

    @property
    def warp_columns(self):
        return self.columns // self.warps_along_columns


class Kernel(StagedKernel):
    """The kernel of one Config, while it is emitted."""

    SIDE_BY_SIDE = 2

    def __init__(self, template, config):
        super().__init__(template, config)
        self.row_blocks, self.column_blocks = config.warp_rows // 16, config.warp_columns // 8  # of an instruction
        # An instruction takes two chunks of terms; ldmatrix cannot transpose elements of 32 bits.
        self.instructions = config.chunks // 2
        self.is_tf32 = self.task.dtype == "float32"

    def begin(self):
        from tvm.tirx.script.builder import ir as build

        config = self.config
        self.lane, warp = build.Bind(self.thread % WARP_THREADS), build.Bind(self.thread // WARP_THREADS)
        self.warp_row = build.Bind(warp % config.warps_along_rows * config.warp_rows)
        self.warp_column = build.Bind(warp // config.warps_along_rows * config.warp_columns)
        self.sums = make_sums(self.row_blocks * self.column_blocks * 4)
        # Two of each, one of which is multiplied while the other is loaded.
        self.left_fragments = build.alloc_buffer((2 * self.row_blocks * 4,), "uint32", scope="local")
        self.right_fragments = build.alloc_buffer((2 * self.column_blocks * 2,), "uint32", scope="local")

    def emit_steps(self, count):
        """Emits the loop over steps; count: how many, an int or an expression."""
        from tvm.tirx.script.builder import ir as build

        stages, ahead = self.config.stages, self.copy_first_steps(count)
        self.wait_for_stage()
        self.load_fragments(0, 0, 0)
        with build.serial(count) as step:
            for i in range(self.instructions):
                is_last = i == self.instructions - 1
                if is_last:  # of what comes next the fragments are loaded now
                    self.wait_for_stage()
                self.load_fragments((step + is_last) % stages, (i + 1) % self.instructions, (i + 1) % 2)
                if i == 0:
                    self.copy_if(step + ahead < count, step + ahead, (step + ahead) % stages)
                self.multiply(i % 2)

    def load_fragments(self, stage, instruction, half):
        """Emits the loads of a warp's fragments for one of a stage's instructions into one half of the registers."""
        left, right = self.start_of(stage)
        with unrolled(self.row_blocks) as i:
            registers = [(half * self.row_blocks + i) * 4 + r for r in range(4)]
            # Registers 1 and 3 are of the next 8 rows, 2 and 3 of the next chunk.
            self.load_matrices(
                self.left, left, self.warp_row + i * 16, instruction * 2, self.left_fragments, registers, (1, 2)
            )
        with unrolled(self.column_blocks // 2) as j:
            registers = [half * self.column_blocks * 2 + j * 4 + r for r in range(4)]
            # Registers 1 and 3 are of the next chunk, 2 and 3 of the next 8 columns.
            self.load_matrices(
                self.right,
                right,
                self.warp_column + j * 16,
                instruction * 2,
                self.right_fragments,
                registers,
                (2, 1),
            )

    def load_matrices(self, tile, start, output, chunk, fragments, registers, strides):
        """Emits the load of four matrices of 8 outputs by one chunk of terms, one in each register.

        start: of the tile in shared memory. output, chunk: where the first one begins. strides: in the number of the
        register, of a step by 8 outputs and of a step by one chunk.
        """
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        output_stride, chunk_stride = strides
        if self.is_tf32 and not tile.operand.along_terms:
            for number, register in enumerate(registers):
                term = (chunk + number // chunk_stride % 2) * tile.chunk + self.lane % 4
                column = output + number // output_stride % 2 * 8 + self.lane // 4
                place = tile.place(term, column // tile.chunk) + column % tile.chunk
                build.buffer_store(fragments, T.reinterpret("uint32", self.shared[start + place]), [register])
        else:
            matrix = self.lane // 8  # whose row this thread names
            next_outputs, next_chunk = matrix // output_stride % 2, matrix // chunk_stride % 2
            if tile.operand.along_terms:
                line, along, kind = output + next_outputs * 8 + self.lane % 8, chunk + next_chunk, ""
            else:
                line = (chunk + next_chunk) * tile.chunk + self.lane % 8
                along, kind = output // tile.chunk + next_outputs, ".trans"
            load = T.ptx[f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16"]
            address = T.address_of(self.shared[start + tile.place(line, along)])
            build.evaluate(load(*(fragments[register] for register in registers), address))
        if self.is_tf32 and not tile.operand.is_rounded:
            for register in registers:
                value = T.reinterpret("float32", fragments[register])
                build.evaluate(T.ptx["cvt.rna.tf32.f32"](fragments[register], value))

    def multiply(self, half):
        """Emits a warp's multiplications of one half of the fragments."""
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        dtype = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}[self.task.dtype]
        instruction = T.ptx[f"mma.sync.aligned.m16n8k{8 if self.is_tf32 else 16}.row.col.f32.{dtype}.{dtype}.f32"]
        with unrolled(self.row_blocks) as i, unrolled(self.column_blocks) as j:
            sums = [self.sums[(i * self.column_blocks + j) * 4 + r] for r in range(4)]
            left = [self.left_fragments[(half * self.row_blocks + i) * 4 + r] for r in range(4)]
            right = [self.right_fragments[(half * self.column_blocks + j) * 2 + r] for r in range(2)]
            build.evaluate(instruction(*sums, *left, *right, *sums))

    def emit_sums(self, emit):
        """Emits emit(row, column, sums) for each pair of sums of a thread, side by side in the block's tile."""
        with unrolled(self.row_blocks) as i, unrolled(2) as h, unrolled(self.column_blocks) as j:
            row = self.warp_row + i * 16 + h * 8 + self.lane // 4
            column = self.warp_column + j * 8 + self.lane % 4 * 2
            first = (i * self.column_blocks + j) * 4 + h * 2
            emit(row, column, [self.sums[first + e] for e in range(2)])


class MmaTemplate(StagedTemplate):
    number, parameters, make_config, kernel = 100, PARAMETERS, Config, Kernel

    @staticmethod
    def is_possible(config):
        if config.warp_rows % 16 or config.warp_columns % 16 or config.threads > MAX_BLOCK_THREADS:
            return False
        return config.warp_rows * config.warp_columns // WARP_THREADS <= MAX_SUMS_OF_A_THREAD
