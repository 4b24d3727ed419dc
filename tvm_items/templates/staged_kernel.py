"""What templates share whose blocks of threads stage tiles of a product's operands in shared memory.

A block computes a tile of the output, in steps along the terms. It copies tiles of both operands into shared memory,
several steps ahead of the one that it computes. The structure of StagedKernel is that of CUTLASS's multistage kernels
(https://github.com/NVIDIA/cutlass, mma_multistage.h).
"""

import dataclasses

from tvm_items.templates.clusters import MAX_BLOCKS, launch_cluster
from tvm_items.templates.output_tile import OutputTile, staging_bytes
from tvm_items.templates.product_module import is_oversized, locate, make_module, parts_fit, steps_of_part
from tvm_items.templates.product_task import ProductTask
from tvm_items.templates.template import Template
from tvm_items.templates.tiles import CHUNK_BYTES, Tile, copy_tile


@dataclasses.dataclass
class StagedTemplate(Template):
    """What is common to these templates.

    A kind of kernel has, beside its number and parameters, make_config(*values), one choice of all of them, which has
    rows and columns (of a block's tile, the first two parameters), chunks (of 16 bytes: a step's terms), stages, group
    (locate()'s), parts (of each sum) and staged (whether sums go through shared memory: the parts of one then meet
    there, else in global memory, for another launch to add them up); kernel(template, config), which emits one; and
    is_possible(config), whether there is such a kernel, as far as the kind knows.
    """

    task: ProductTask
    max_shared_bytes: int  # of a block
    has_clusters: bool  # whether blocks can read each other's shared memory, as Hopper's can

    def fits(self, decisions):
        config = self.make_config(*self.read(decisions))
        if not self.is_possible(config):
            return False
        rows, columns, *_ = self.parameters
        if is_oversized(config.rows, self.task.rows.extent, rows):
            return False
        if is_oversized(config.columns, self.task.columns.extent, columns):
            return False
        steps = self.steps(config)
        if not parts_fit(self.task, steps, config.parts):
            return False
        if cluster_blocks(config) > (MAX_BLOCKS if self.has_clusters else 1):
            return False
        if config.stages > max(2, steps // config.parts + 1):
            return False
        return self.shared_bytes(config) <= self.max_shared_bytes

    def tiles(self, config):
        """Returns the Tiles of both operands."""
        terms = config.chunks * CHUNK_BYTES // self.task.left.element_bytes
        return (
            Tile(self.task.left, self.task.dtype, config.rows, terms),
            Tile(self.task.right, self.task.dtype, config.columns, terms),
        )

    def steps(self, config):
        """Returns the number of steps in which a block would go through all terms."""
        return -(-self.task.terms.extent // self.tiles(config)[0].terms)

    def shared_bytes(self, config):
        """Returns the bytes of shared memory that a block needs."""
        staged = staging_bytes(config.rows, config.columns) if config.staged else 0
        return max(staged, config.stages * sum(tile.elements * tile.element_bytes for tile in self.tiles(config)))

    def make(self, *values):
        config = self.make_config(*values)
        return make_module(self.task, config.parts // cluster_blocks(config), self.kernel(self, config).emit)


class StagedKernel:
    """The kernel of one config, while it is emitted.

    A kind of kernel has SIDE_BY_SIDE, how many sums of a thread are side by side in the tile; begin(), which says where
    in the tile the thread's sums are and makes its registers; emit_steps(count), which adds up all steps of the block;
    and emit_sums(emit), which emits emit(row, column, sums) for all sums of a thread, SIDE_BY_SIDE at a time.
    """

    def __init__(self, template, config):
        self.task, self.config = template.task, config
        self.left, self.right = template.tiles(config)
        self.steps = template.steps(config)
        self.shared_elements = template.shared_bytes(config) // self.left.element_bytes
        self.row_tiles = -(-self.task.rows.extent // config.rows)
        self.column_tiles = -(-self.task.columns.extent // config.columns)

    def emit(self, buffers, partial):
        """Emits the launch; buffers, partial: make_module()'s."""
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        config, task, self.buffers = self.config, self.task, buffers
        with (
            build.launch_thread("blockIdx.x", self.row_tiles * self.column_tiles) as tile_number,
            build.launch_thread("blockIdx.y", task.batch.extent) as batch,
            build.launch_thread("blockIdx.z", config.parts) as part,
            launch_cluster(cluster_blocks(config)),
            build.launch_thread("threadIdx.x", config.threads) as thread,
        ):
            self.batch, self.thread = batch, thread
            row_tile, column_tile = locate(tile_number, self.row_tiles, self.column_tiles, config.group)
            self.first_row = build.Bind(row_tile * config.rows)
            self.first_column = build.Bind(column_tile * config.columns)
            self.first_step, count = steps_of_part(self.steps, config.parts, part)
            self.shared = build.alloc_buffer((self.shared_elements,), task.dtype, scope="shared.dyn", align=1024)
            self.begin()
            self.emit_steps(count)
            tile = OutputTile(
                task,
                self.buffers,
                config.rows,
                config.columns,
                batch,
                self.first_row,
                self.first_column,
                self.emit_sums,
                self.SIDE_BY_SIDE,
            )
            if partial is not None:
                tile.store_parts(partial, part)
            elif config.staged:
                build.evaluate(T.ptx["cp.async.wait_group"](0))
                tile.store_through_shared_memory(self.shared, thread, config.threads, synchronize, part, config.parts)
            else:
                tile.store_from_registers()

    def copy_first_steps(self, count):
        """Emits the copies of the first steps; count: of all steps, an int or an expression. Returns how many."""
        from tvm.tirx.script.builder import ir as build

        ahead = self.config.stages - 1
        with build.serial(ahead) as step:
            self.copy_if(step < count, step, step)
        return ahead

    def wait_for_stage(self):
        """Emits a wait for the oldest stage that is being copied, by all threads."""
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        build.evaluate(T.ptx["cp.async.wait_group"](self.config.stages - 2))
        synchronize()

    def start_of(self, stage):
        """Returns where in shared memory the left operand's tile of a stage lies, and the right one's behind it."""
        start = stage * (self.left.elements + self.right.elements)
        return start, start + self.left.elements

    def copy_if(self, condition, step, stage):
        """Emits the copies of a step's tiles into a stage as one group, an empty one unless the condition is met."""
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        def copy():
            left, right = self.start_of(stage)
            term = (self.first_step + step) * self.left.terms
            common = (self.thread, self.config.threads, self.batch)
            copy_tile(self.left, self.buffers, self.shared, left, *common, self.first_row, term)
            copy_tile(self.right, self.buffers, self.shared, right, *common, self.first_column, term)

        if condition is True:
            copy()
        elif condition is not False:
            with build.If(condition), build.Then():
                copy()
        build.evaluate(T.ptx["cp.async.commit_group"]())


def cluster_blocks(config):
    """Returns the number of blocks of a cluster, whose parts of a sum they add up themselves; 1: there is none."""
    return config.parts if config.staged else 1


def synchronize():
    """Emits a barrier of all threads of a block."""
    from tvm.script import tirx as T
    from tvm.tirx.script.builder import ir as build

    build.evaluate(T.cuda.cta_sync())
