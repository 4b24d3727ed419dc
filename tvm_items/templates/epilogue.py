"""What follows a product: the sums of a kernel become elements of the task's output."""

from tvm_items.templates.expressions import contiguous_run, dtype_of, find, is_conditional, is_load, loads_of, rewrite
from tvm_items.templates.product_task import buffer_shape, on_buffers

MAX_VECTOR_BYTES = 16


def output_vector(task):
    """Returns how many elements of the output along the columns a thread can write as one."""
    element_bytes = 4 if dtype_of(task.value) == "float32" else 2
    return min(task.output_vector, MAX_VECTOR_BYTES // element_bytes)


def store_outputs(task, buffers, batch, row, column, sums):
    """Emits the epilogue of len(sums) neighbouring columns, a divisor of output_vector(task), and writes them as one.

    buffers: {parameter: buffer}. batch, row, column: expressions; the column of the first sum, a multiple of their
    number. sums: expressions in fp32. What the epilogue reads along the columns is loaded as one too.
    """
    from tvm.tirx.script.builder import ir as build
    from tvm_ffi import structural_equal

    width = len(sums)
    loads = [load for load in loads_of(task.value) if not load.source.same_as(task.product)]
    # What is loaded under a condition may lie out of bounds where that is not met.
    can_load_ahead = width > 1 and not is_conditional(task.value)
    vectors = [load for load in loads if can_load_ahead and is_vector(task, load, width)]
    held = []
    for load in vectors:
        copy = build.alloc_buffer((width,), dtype_of(load), scope="local")
        with build.vectorized(width) as j:
            build.buffer_store(copy, on_buffers(load, task.positions(batch, row, column + j), buffers), [j])
        held.append(copy)
    values = []
    for j in range(width):
        positions = task.positions(batch, row, column + j)

        def replace(part, j=j, positions=positions):
            if is_load(part):
                if part.source.same_as(task.product):
                    return sums[j].astype(dtype_of(part))
                for load, copy in zip(vectors, held):
                    if structural_equal(part, load):
                        return copy[j]
                return on_buffers(part, positions, buffers)
            return find(part, positions)

        values.append(rewrite(task.value, replace))
    output = find(task.output, buffers)

    def place(offset):
        return [on_buffers(index, task.positions(batch, row, column + offset), buffers) for index in task.indices]

    if width == 1:
        build.buffer_store(output, values[0], place(0))
        return
    results = build.alloc_buffer((width,), dtype_of(task.value), scope="local")
    for j, value in enumerate(values):
        build.buffer_store(results, value, [j])
    with build.vectorized(width) as j:
        build.buffer_store(output, results[j], place(j))


def is_vector(task, load, width):
    """Returns whether `width` elements along the columns, from a multiple of it, can be loaded as one."""
    return contiguous_run(load.indices, buffer_shape(load.source), *task.columns.innermost(), limit=width) == width
