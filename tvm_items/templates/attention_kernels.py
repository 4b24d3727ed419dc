"""The templates of a task of attention."""

import dataclasses
import functools
import typing

from tvm_items.target import MAX_BLOCK_THREADS, WARP_THREADS
from tvm_items.templates.attention_decode import decode_kernel, decode_resources, is_decode, lanes_of_key
from tvm_items.templates.attention_fma import VECTOR, fma_kernel, fma_resources
from tvm_items.templates.attention_mma import TILE, mma_kernel, mma_resources
from tvm_items.templates.attention_task import Attention
from tvm_items.templates.clusters import MAX_BLOCKS
from tvm_items.templates.template import Template

MMA, FMA, DECODE = 110, 111, 112  # the templates' numbers
# Of a thread, and of all threads that a multiprocessor has at once (CUDA C++ Programming Guide, compute capabilities).
MAX_THREAD_REGISTERS, MAX_REGISTERS = 255, 64 * 1024
WARPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
ROW_TILES = (1, 2)
KEY_TILES = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 208, 256)
STAGES = (1, 2, 3)
KEY_GROUPS = (1, 2, 4, 8)
THREAD_COLUMNS, THREAD_ROWS, THREAD_ROW_TILES = (2, 4, 8, 16, 32), (4, 8, 16, 32, 64), (1, 2, 3, 4, 6, 8)
FMA_KEY_TILES = (16, 32, 64, 96, 128)
DECODE_WARPS, GROUPS, PARTS, KEYS = (1, 2, 4, 8), (1, 2, 4, 8), (32, 64, 128, 256, 512, 1024), (1, 2, 4, 8)


def attention_templates(attention, limit, has_clusters):
    """Returns the templates for an Attention; limit: bytes of shared memory that a block of threads may have."""
    if attention.heads_first:
        return [decode_template(attention, limit, has_clusters)] if is_decode(attention) else []
    return [(fma_template if attention.dtype == "float32" else mma_template)(attention, limit)]


@dataclasses.dataclass
class AttentionTemplate(Template):
    """One kind of kernel for a task's attention."""

    number: int  # among a task's design spaces
    attention: Attention
    make_kernel: typing.Callable  # of the attention and the parameters: the scheduled TIR function
    find_resources: typing.Callable  # of the same: threads of a block, registers of a thread, bytes of shared memory
    is_useful: typing.Callable  # of the parameters: whether the kernel can be made, and has nothing that never works
    parameters: list[tuple[int, ...]]  # options of each
    max_shared_bytes: int

    def fits(self, decisions):
        values = self.read(decisions)
        if not self.is_useful(*values):
            return False
        threads, registers, shared_bytes = self.find_resources(self.attention, *values)
        return (
            threads % WARP_THREADS == 0
            and threads <= MAX_BLOCK_THREADS
            and registers <= MAX_THREAD_REGISTERS
            and threads * registers <= MAX_REGISTERS
            and shared_bytes <= self.max_shared_bytes
        )

    def make(self, *values):
        import tvm

        return tvm.IRModule({"main": self.make_kernel(self.attention, *values)})


def mma_template(attention, limit):
    """Returns the template for tensor cores; limit: bytes of shared memory that a block of threads may have."""

    def is_useful(warps, row_tiles, key_tile, stages, key_groups):
        has_idle_warp = (warps - 1) * row_tiles * TILE >= attention.query_count
        return not has_idle_warp and is_useful_step(attention, key_tile * key_groups, stages)

    options = [WARPS, ROW_TILES, KEY_TILES, STAGES, KEY_GROUPS]
    return AttentionTemplate(MMA, attention, mma_kernel, mma_resources, is_useful, options, limit)


def fma_template(attention, limit):
    """Returns the template for fp32; limit: bytes of shared memory that a block of threads may have."""

    def is_useful(thread_columns, thread_rows, row_tile, key_tile, stages):
        return (
            (thread_rows - 1) * row_tile < attention.query_count
            and attention.head_dim % (VECTOR * thread_columns) == 0
            and key_tile % thread_columns == 0
            and is_useful_step(attention, key_tile, stages)
        )

    options = [THREAD_COLUMNS, THREAD_ROWS, THREAD_ROW_TILES, FMA_KEY_TILES, STAGES]
    return AttentionTemplate(FMA, attention, fma_kernel, fma_resources, is_useful, options, limit)


def decode_template(attention, limit, has_clusters):
    """Returns the template for one query over a cache; limit: bytes of shared memory that a block may have."""
    make_kernel = functools.partial(decode_kernel, max_cluster_blocks=MAX_BLOCKS if has_clusters else 1)

    def is_useful(warps, group, part, keys):
        step = warps * WARP_THREADS // lanes_of_key(attention) * keys
        return (
            attention.heads // attention.key_heads % group == 0
            and step <= part
            and (part < 2 * attention.key_count or part == PARTS[0])
        )

    options = [DECODE_WARPS, GROUPS, PARTS, KEYS]
    return AttentionTemplate(DECODE, attention, make_kernel, decode_resources, is_useful, options, limit)


def is_useful_step(attention, key_tile, stages):
    """Returns whether a step of so many keys has no other 16 for nothing, and no stage stays empty."""
    return key_tile < attention.key_count + TILE and (stages - 1) * key_tile < attention.key_count
