"""What all templates for products share: the module around a kernel, and which tile of the output a block computes."""

from tvm_items.templates.output_tile import emit_reduction
from tvm_items.templates.template import unrolled

MIN_STEPS_OF_A_PART = 2  # of a sum that is split
MAX_PARTIAL_SUMS = 2**22  # of a task: 16 MiB, which stay in the L2 cache until they are added up


def make_module(task, parts, emit_kernel):
    """Returns an IRModule whose "main" launches a task's kernel and, where a product's sums are split, their addition.

    task: a ProductTask, or with one part a RowTask. parts: of each sum. emit_kernel(buffers, partial) emits the launch;
    buffers: {parameter: buffer}; partial: a buffer for parts of sums, as (part, batch, row, column), None where there
    is one part only.
    """
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as build

    with IRBuilder() as builder, build.prim_func():
        build.func_name("main")
        build.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "global_symbol": "main"})
        buffers = {}
        for number, parameter in enumerate(task.parameters):
            shape = [int(size) for size in parameter.shape]
            buffers[parameter] = build.arg(f"argument{number}", build.buffer(shape, str(parameter.dtype)))
        partial = None
        if parts > 1:
            outputs = task.batch.extent * task.rows.extent * task.columns.extent
            partial = build.alloc_buffer((parts * outputs,), "float32", scope="global")
        emit_kernel(buffers, partial)
        if parts > 1:
            emit_reduction(task, parts, buffers, partial)
    return tvm.IRModule({"main": builder.get()})


def make_sums(count):
    """Emits the registers of a thread for `count` sums in fp32, zeros at first, and returns them as a buffer."""
    from tvm import tirx
    from tvm.tirx.script.builder import ir as build

    sums = build.alloc_buffer((count,), "float32", scope="local")
    with unrolled(count) as i:
        build.buffer_store(sums, tirx.const(0, "float32"), [i])
    return sums


def is_oversized(tile, extent, options):
    """Returns whether a smaller tile of the options would hold the extent as well."""
    return any(extent <= option < tile for option in options)


def steps_of_part(steps, parts, part):
    """Returns (first step, number of steps) of a part of a sum; part: an expression. The number may be one, or an int.

    steps: in which a block would go through all terms.
    """
    from tvm import tirx

    per_part = -(-steps // parts)
    left_over = steps - per_part * (parts - 1)
    count = per_part if left_over == per_part else tirx.Select(part < parts - 1, per_part, left_over)
    return part * per_part, count


def parts_fit(task, steps, parts):
    """Returns whether sums in so many steps can be split: each part has enough of them, and they are not too many."""
    outputs = task.batch.extent * task.rows.extent * task.columns.extent
    smallest = steps - -(-steps // parts) * (parts - 1)
    return parts == 1 or (smallest >= MIN_STEPS_OF_A_PART and outputs * parts <= MAX_PARTIAL_SUMS)


def locate(tile_number, row_tiles, column_tiles, group):
    """Returns (row of tiles, column of tiles) of a block: down the rows of a group, then to the next column.

    So blocks that run at once find their operands in the L2 cache. tile_number: an expression; group: rows of tiles.
    """
    from tvm import tirx
    from tvm.tirx.script.builder import ir as build

    group = min(group, row_tiles)
    first = build.Bind(tile_number // (group * column_tiles) * group)
    within = build.Bind(tile_number % (group * column_tiles))
    rows = group if row_tiles % group == 0 else build.Bind(tirx.Min(row_tiles - first, group))
    return first + within % rows, within // rows
