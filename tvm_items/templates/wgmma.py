"""A template for products on Hopper's tensor cores: wgmma, whose operands come from shared memory.

Warpgroups that multiply and threads that copy are different ones, and tell one another by mbarriers which stage of the
shared memory is full and which is empty. One thread has TMA copy operands that are plain matrices or a convolution's
windows; for others the threads of a warpgroup compute addresses for cp.async. The structure is that of
CUTLASS's warp-specialized kernels (https://github.com/NVIDIA/cutlass, sm90_mma_tma_gmma_ss_warpspecialized.hpp).
"""

import dataclasses
import functools
import itertools
import operator

from tvm_items.target import WARP_THREADS
from tvm_items.templates.clusters import launch_cluster
from tvm_items.templates.expressions import linear_strides
from tvm_items.templates.output_tile import OutputTile
from tvm_items.templates.product_module import locate, make_sums, steps_of_part
from tvm_items.templates.product_task import buffer_shape
from tvm_items.templates.stage_barriers import MBARRIER_BYTES, StageBarriers
from tvm_items.templates.staged_kernel import StagedTemplate, cluster_blocks
from tvm_items.templates.template import unrolled
from tvm_items.templates.tiles import CHUNK_BYTES, copy_tile
from tvm_items.templates.windows import LINE_BYTES, find_windows

WARPGROUP_THREADS = 128
INSTRUCTION_ROWS, INSTRUCTION_BYTES = 64, 32  # the latter of the terms of a row
MAX_SUMS_OF_A_THREAD = 128
CONSUMERS_BARRIER = 1  # the number of a barrier of the threads that multiply; 0 is that of the whole block
# The compiler takes a sum to be there once wgmma is issued: what reads it comes after this, and this after the wait.
KEEP_BEHIND_WAIT = """
__device__ __forceinline__ void keep_behind_wait(float& sum) { asm volatile("" : "+f"(sum)); }
"""

# The options of each parameter.
ROWS, COLUMNS = (64, 128, 192, 256), (64, 128, 192, 256)  # of a block's tile
CONSUMERS = (1, 2)  # warpgroups that multiply
STAGES = (2, 3, 4, 5, 6, 8)
GROUPS = (1, 4, 8, 16)  # as in mma.py
PARTS = (1, 2, 3, 4, 6, 8)
STAGED = (False, True)
TMA = (True, False)  # of matrices and windows; else, and for the rest, cp.async
PARAMETERS = (ROWS, COLUMNS, CONSUMERS, STAGES, GROUPS, PARTS, STAGED, TMA)


@dataclasses.dataclass(frozen=True)
class Config:
    """One choice of all parameters."""

    rows: int
    columns: int
    consumers: int
    stages: int
    group: int
    parts: int
    staged: bool
    tma: bool

    @property
    def chunks(self):
        """A step's terms, in chunks of 16 bytes."""
        return LINE_BYTES // CHUNK_BYTES

    @property
    def row_blocks(self):
        """How many instructions a warpgroup's rows take."""
        return self.rows // self.consumers // INSTRUCTION_ROWS

    @property
    def sums(self):
        """How many sums a thread has."""
        return self.row_blocks * self.columns // 2

    @property
    def consumer_threads(self):
        return self.consumers * WARPGROUP_THREADS


class Kernel:
    """The kernel of one Config, while it is emitted."""

    def __init__(self, template, config):
        self.task, self.config, self.steps = template.task, config, template.steps(config)
        self.left, self.right = template.tiles(config)
        self.box = template.find_box(config)
        self.by_tma = [config.tma and is_matrix for is_matrix in template.are_matrices]
        self.by_tma[0] |= self.box is not None
        self.producer_threads = WARP_THREADS if all(self.by_tma) else WARPGROUP_THREADS
        self.element_bytes = self.left.element_bytes
        self.data_elements = template.data_bytes(config) // self.element_bytes
        self.stage_elements = self.left.elements + self.right.elements
        self.row_tiles = self.box.count if self.box else -(-self.task.rows.extent // config.rows)
        self.column_tiles = -(-self.task.columns.extent // config.columns)

    def emit(self, buffers, partial):
        """Emits the launch; buffers, partial: make_module()'s."""
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        config, task, self.buffers = self.config, self.task, buffers
        self.maps = [
            self.encode_map(tile, name, self.box if tile is self.left else None) if by_tma else None
            for tile, name, by_tma in zip((self.left, self.right), ("left_map", "right_map"), self.by_tma)
        ]
        with (
            build.launch_thread("blockIdx.x", self.row_tiles * self.column_tiles) as tile_number,
            build.launch_thread("blockIdx.y", task.batch.extent) as self.batch,
            build.launch_thread("blockIdx.z", config.parts) as part,
            launch_cluster(cluster_blocks(config)),
            build.launch_thread("threadIdx.x", config.consumer_threads + self.producer_threads) as thread,
        ):
            row_tile, column_tile = locate(tile_number, self.row_tiles, self.column_tiles, config.group)
            if self.box:
                self.image, self.line, *ends = (build.Bind(each) for each in self.box.locate(row_tile))
                self.first_row, self.end_row = ends
            else:
                self.first_row, self.end_row = build.Bind(row_tile * config.rows), None
            self.first_column = build.Bind(column_tile * config.columns)
            self.first_step, count = steps_of_part(self.steps, config.parts, part)
            elements = self.data_elements + 2 * config.stages * MBARRIER_BYTES // self.element_bytes
            self.shared = build.alloc_buffer((elements,), task.dtype, scope="shared.dyn", align=1024)
            self.barriers = StageBarriers(self.shared, self.element_bytes, self.data_elements, config.stages)
            with build.If(thread == 0), build.Then():
                arrivals = any(self.by_tma) + (0 if all(self.by_tma) else self.producer_threads)
                self.barriers.emit_init(arrivals, config.consumer_threads // WARP_THREADS)
            build.evaluate(T.cuda.cta_sync())
            with build.If(thread < config.consumer_threads):
                with build.Then():
                    self.emit_consumer(thread, count, partial, part)
                with build.Else():
                    producer = build.Bind(thread - config.consumer_threads)
                    if all(self.by_tma):
                        with build.If(producer == 0), build.Then(), build.serial(count) as step:
                            self.barriers.wait_for_empty(step)
                            self.copy_by_tma(step)
                    else:
                        self.emit_producer(producer, count)

    # ---- Copies

    def encode_map(self, tile, name, box):
        """Emits, on the host, the tensor map by which TMA copies a tile, and returns its variable.

        box: of the windows that the tile has, None for a matrix.
        """
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        operand, line = tile.operand, LINE_BYTES // tile.element_bytes
        if box is None:
            all_strides = linear_strides(operand)
            batch, outputs, terms = range(3)
            inner, outer = (terms, outputs) if operand.along_terms else (outputs, terms)
            dimensions = [inner, outer] + [batch] * (operand.axes[batch].extent > 1)
            sizes, strides = (
                [values[d] for d in dimensions] for values in ([a.extent for a in operand.axes], all_strides)
            )
            shape, steps = [line, tile.lines] + [1] * (len(dimensions) - 2), [1] * len(dimensions)
        else:
            sizes = buffer_shape(operand.load.source)[::-1]
            strides = [1, *itertools.accumulate(sizes[:-1], operator.mul)]
            shape, steps = [line, *box.shape], [1, box.windows.horizontal.stride, box.windows.vertical.stride, 1]
        tensor_map = T.Var(name, ty=T.handle("tensormap").ty)
        build.Bind(T.tvm_stack_alloca("tensormap", 1), var=tensor_map)
        build.evaluate(
            T.tensormap_encode_tiled(
                tensor_map,
                self.buffers[operand.load.source].data,
                *sizes,
                *(stride * tile.element_bytes for stride in strides[1:]),
                *shape,
                *steps,
                descriptor_dtype=tile.dtype,
                rank=len(sizes),
                swizzle=3,  # of 128 bytes
                l2_promotion=2,  # to 128 bytes
            )
        )
        return tensor_map

    def places(self, step):
        """Returns (tile, start in shared memory, first row or column, first term, whether by TMA) of both operands."""
        start = step % self.config.stages * self.stage_elements
        term = (self.first_step + step) * self.left.terms
        return (
            (self.left, start, self.first_row, term, self.by_tma[0]),
            (self.right, start + self.left.elements, self.first_column, term, self.by_tma[1]),
        )

    def copy_by_tma(self, step):
        """Emits what one thread does to have TMA copy what it copies of a step; what is out of bounds becomes 0."""
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        barrier = self.barriers.full(step % self.config.stages)
        lines = [self.box.rows if self.box else self.left.lines, self.right.lines]
        copied = sum(
            count * tile.line * tile.element_bytes
            for count, (tile, *_, by_tma) in zip(lines, self.places(step))
            if by_tma
        )
        build.evaluate(T.ptx["mbarrier.arrive.expect_tx.shared.b64"](barrier, T.uint32(copied)))
        for (tile, start, output, term, by_tma), tensor_map in zip(self.places(step), self.maps):
            if not by_tma:
                continue
            operand, line = tile.operand, LINE_BYTES // tile.element_bytes
            batch = [self.batch] if operand.axes[0].extent > 1 else []
            for panel in range(tile.line // line):
                if self.box and tile is self.left:
                    place = self.box.corner(self.image, self.line, term)
                else:
                    place = [term, output, *batch] if operand.along_terms else [output + panel * line, term, *batch]
                address = T.address_of(self.shared[start + panel * tile.lines * line])
                kind = f"{len(place)}d.shared::cluster.global.mbarrier::complete_tx::bytes"
                copy = T.ptx[f"cp.async.bulk.tensor.{kind}"]
                build.evaluate(copy(address, T.address_of(tensor_map), *place, barrier))

    def emit_producer(self, thread, count):
        """Emits what the threads of a producing warpgroup do for `count` steps; thread: the number of one of them.

        A thread says that a stage is full when its own copies are there, while later ones are on their way, and after
        a fence: wgmma reads by another proxy than cp.async writes.
        """
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        stages, threads = self.config.stages, self.producer_threads
        # Not stages - 1: a stage becomes empty only when the one after it is multiplied. And one less, so that those
        # who multiply need not wait for the addresses of the next copies.
        on_their_way = max(0, stages - 3)

        def announce(step):
            build.evaluate(T.ptx["fence.proxy.async"]())
            self.barriers.emit_arrival(self.barriers.full(step % stages))

        with build.serial(count) as step:
            self.barriers.wait_for_empty(step)
            if any(self.by_tma):
                with build.If(thread == 0), build.Then():
                    self.copy_by_tma(step)
            for tile, start, output, term, by_tma in self.places(step):
                if not by_tma:
                    common = (thread, threads, self.batch, output, term)
                    copy_tile(tile, self.buffers, self.shared, start, *common)
            build.evaluate(T.ptx["cp.async.commit_group"]())
            with build.If(step >= on_their_way), build.Then():
                build.evaluate(T.ptx["cp.async.wait_group"](on_their_way))
                announce(step - on_their_way)
        build.evaluate(T.ptx["cp.async.wait_group"](0))
        for i in range(on_their_way):
            with build.If(count - on_their_way + i >= 0), build.Then():
                announce(count - on_their_way + i)

    # ---- Products

    def emit_consumer(self, thread, count, partial, part):
        """Emits what the threads do that multiply, for `count` steps, and what becomes of their sums."""
        from tvm import tirx
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        config = self.config
        self.lane = build.Bind(thread % WARP_THREADS)
        self.warp = build.Bind(thread % WARPGROUP_THREADS // WARP_THREADS)
        self.warpgroup_row = build.Bind(thread // WARPGROUP_THREADS * (config.rows // config.consumers))
        self.sums = make_sums(config.sums)
        descriptors = build.alloc_buffer((2,), "uint64", scope="local")
        line = LINE_BYTES // self.element_bytes
        self.encode_descriptor(descriptors, 0, self.left, self.warpgroup_row * line)
        self.encode_descriptor(descriptors, 1, self.right, self.left.elements)
        # Not unrolled: ptxas 13.0 moves what reads the sums in front of the last wait, where it has unrolled this.
        with build.serial(count, unroll=1) as step:
            stage = step % config.stages
            self.barriers.wait_for_full(step)
            build.evaluate(T.ptx["wgmma.fence.sync.aligned"]())
            self.multiply(descriptors, stage)
            build.evaluate(T.ptx["wgmma.commit_group.sync.aligned"]())
            build.evaluate(T.ptx["wgmma.wait_group.sync.aligned"](1))
            with build.If(tirx.And(step > 0, self.lane == 0)), build.Then():  # the step before has been multiplied
                self.barriers.emit_arrival(self.barriers.empty((step + config.stages - 1) % config.stages))
        build.evaluate(T.ptx["wgmma.wait_group.sync.aligned"](0))
        for i in range(config.sums):
            build.evaluate(T.cuda.func_call("keep_behind_wait", self.sums[i], source_code=KEEP_BEHIND_WAIT))
        tile = OutputTile(
            self.task,
            self.buffers,
            config.rows,
            config.columns,
            self.batch,
            self.first_row,
            self.first_column,
            self.emit_pairs,
            end_row=self.end_row,
        )
        if partial is not None:
            tile.store_parts(partial, part)
        elif config.staged:
            threads = config.consumer_threads

            def synchronize():
                build.evaluate(T.ptx["bar.sync"](T.uint32(CONSUMERS_BARRIER), T.uint32(threads)))

            tile.store_through_shared_memory(self.shared, thread, threads, synchronize, part, config.parts)
        else:
            tile.store_from_registers()

    def encode_descriptor(self, descriptors, number, tile, start):
        """Emits the matrix descriptor of a tile that lies at an element `start` of the shared memory.

        Strides are in units of 16 bytes: of eight lines, and of a panel where there are several (PTX ISA, "Strides").
        """
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        panel = 1 if tile.operand.along_terms else tile.lines * LINE_BYTES // 16
        build.evaluate(
            T.cuda.wgmma.encode_matrix_descriptor(
                T.address_of(descriptors[number]), T.address_of(self.shared[start]), panel, 8 * LINE_BYTES // 16, 3
            )
        )

    def multiply(self, descriptors, stage):
        """Emits a warpgroup's multiplications of a stage."""
        from tvm.script import tirx as T
        from tvm.tirx.script.builder import ir as build

        config = self.config
        dtype = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}[self.task.dtype]
        shape = f"m64n{config.columns}k{INSTRUCTION_BYTES // self.element_bytes}"
        instruction = T.ptx[f"wgmma.mma_async.sync.aligned.{shape}.f32.{dtype}.{dtype}"]
        start = build.Bind(T.Cast("uint64", stage * (self.stage_elements * self.element_bytes // 16)))
        transposed = [int(not tile.operand.along_terms) for tile in (self.left, self.right)]
        # Operands are multiplied by 1; in TF32 none can be transposed.
        flags = [1, 1] if dtype == "tf32" else [1, 1, *transposed]
        for i in range(LINE_BYTES // INSTRUCTION_BYTES):
            left_step, right_step = (  # by lines, or along the line
                i * INSTRUCTION_BYTES // self.element_bytes * LINE_BYTES // 16
                if is_transposed
                else i * INSTRUCTION_BYTES // 16
                for is_transposed in transposed
            )
            for block in range(config.row_blocks):
                sums = [self.sums[block * config.columns // 2 + r] for r in range(config.columns // 2)]
                left = start + T.uint64(left_step + block * INSTRUCTION_ROWS * LINE_BYTES // 16)
                operands = descriptors[0] + left, descriptors[1] + (start + T.uint64(right_step))
                build.evaluate(instruction(*sums, *operands, T.bool(True), *flags))

    def emit_pairs(self, emit):
        """Emits emit(row, column, sums) for each pair of sums of a thread, side by side in the block's tile."""
        config = self.config
        column_blocks = config.columns // 8
        with unrolled(config.row_blocks) as i, unrolled(2) as h, unrolled(column_blocks) as j:
            row = self.warpgroup_row + i * INSTRUCTION_ROWS + self.warp * 16 + h * 8 + self.lane // 4
            column = j * 8 + self.lane % 4 * 2
            first = (i * column_blocks + j) * 4 + h * 2
            emit(row, column, [self.sums[first + e] for e in range(2)])


def is_matrix(operand):
    """Returns whether TMA can copy an operand: plain matrices with rows at multiples of 16 bytes."""
    if operand.condition is not None or operand.vector * operand.element_bytes != CHUNK_BYTES:
        return False
    return linear_strides(operand) is not None


def takes_operands(task):
    """Returns whether wgmma multiplies a ProductTask's operands: in TF32 only rounded ones that lie along the terms."""
    operands = task.left, task.right
    return task.dtype != "float32" or all(operand.is_rounded and operand.along_terms for operand in operands)


class WgmmaTemplate(StagedTemplate):
    number, parameters, make_config, kernel = 101, PARAMETERS, Config, Kernel

    def is_possible(self, config):
        if config.rows % (INSTRUCTION_ROWS * config.consumers) or config.sums > MAX_SUMS_OF_A_THREAD:
            return False
        return not config.tma or any(self.are_matrices) or self.find_box(config) is not None

    @functools.cached_property
    def are_matrices(self):
        """Whether TMA can copy the left and the right operand."""
        return is_matrix(self.task.left), is_matrix(self.task.right)

    @functools.cached_property
    def windows(self):
        """The Windows of the left operand, None where it is a matrix or TMA cannot copy it."""
        return None if self.are_matrices[0] else find_windows(self.task.left)

    def find_box(self, config):
        """Returns the Box of windows that TMA copies for a tile, None where it does not."""
        return self.windows.box(config.rows) if config.tma and self.windows else None

    def data_bytes(self, config):
        """Returns the bytes of shared memory for the stages, or what takes their place."""
        return super().shared_bytes(config)

    def shared_bytes(self, config):
        return self.data_bytes(config) + 2 * config.stages * MBARRIER_BYTES
