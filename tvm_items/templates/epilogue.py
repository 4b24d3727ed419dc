"""What follows a product: the sums of a kernel become elements of the task's output."""

import math

from tvm_items.templates.expressions import (
    argument_of_rounding,
    bytes_of_element,
    contiguous_run,
    dtype_of,
    find,
    is_conditional,
    is_load,
    loads_of,
    rewrite,
)
from tvm_items.templates.product_task import buffer_shape, on_buffers

MAX_VECTOR_BYTES = 16
# Of log2(1 - erf(x)) in x, x², …, for x >= 0: fitted to the least relative error of erf, 8.7e-7, with erf's slope at 0,
# 2 / sqrt(pi). tests/test_mma.py looks at it.
LOG2_ERFC = (-1.6279070286, -0.9183934096, -0.1488804467, 0.0297340911, -0.0029743506)


def output_vector(task):
    """Returns the columns whose elements of the output a thread can write as one."""
    return min(task.output_vector, MAX_VECTOR_BYTES // bytes_of_element(task.value)) * task.pair


def store_outputs(task, buffers, batch, row, column, sums):
    """Emits the epilogue of len(sums) neighbouring columns, a divisor of output_vector(task), and writes them as one.

    buffers: {parameter: buffer}. batch, row, column: expressions; the column of the first sum, a multiple of their
    number. sums: expressions in fp32. What the epilogue reads along the columns is loaded as one too, unless they are
    pairs.
    """
    from tvm.sym import Analyzer
    from tvm.tirx.script.builder import ir as build
    from tvm_ffi import structural_equal

    pair, simplify = task.pair, Analyzer().simplify
    argument, width = argument_of_rounding(task.value), len(sums) // pair
    is_rounded = argument is not None
    value = argument if is_rounded else task.value
    numbers = {task.product: 0} if pair == 1 else {task.product: 0, task.second: 1}  # of a column in a pair
    loads = [load for load in loads_of(value) if find(load.source, numbers) is None]
    # What is loaded under a condition may lie out of bounds where that is not met: nothing is emitted ahead then.
    is_plain = not is_conditional(value)
    vectors = [load for load in loads if is_plain and pair == 1 < width and is_vector(task, load, width)]
    held = []
    for load in vectors:
        copy = build.alloc_buffer((width,), dtype_of(load), scope="local")
        with build.vectorized(width) as j:
            build.buffer_store(copy, on_buffers(load, task.positions(batch, row, column + j), buffers), [j])
        held.append(copy)
    values, takes_short_forms = [], is_plain and (is_rounded or bytes_of_element(value) == 2)
    for j in range(width):
        positions = task.positions(batch, row, column + j * pair)

        def replace(part, j=j, positions=positions):
            if is_load(part):
                number = find(part.source, numbers)
                if number is not None:
                    return sums[j * pair + number].astype(dtype_of(part))
                for load, copy in zip(vectors, held):
                    if structural_equal(part, load):
                        return copy[j]
                return on_buffers(part, positions, buffers)
            emit = short_form(part) if takes_short_forms else None
            if emit is not None:
                return emit(rewrite(part.args[0], replace).astype("float32")).astype(dtype_of(part))
            return find(part, positions)

        values.append(emit_rounding(rewrite(value, replace)) if is_rounded else rewrite(value, replace))
    output = find(task.output, buffers)

    def place(offset):
        positions = task.positions(batch, row, column + offset * pair)
        indices = [on_buffers(index, positions, buffers) for index in task.indices]
        return indices if pair == 1 else [simplify(index) for index in indices]

    if width == 1:
        build.buffer_store(output, values[0], place(0))
        return
    results = build.alloc_buffer((width,), dtype_of(task.value), scope="local")
    for j, value in enumerate(values):
        build.buffer_store(results, value, [j])
    with build.vectorized(width) as j:
        build.buffer_store(output, results[j], place(j))


def short_form(part):
    """Returns the function that emits, in fp32, what a TIR expression calls, None where there is none.

    CUDA's erff(), tanhf(), expf() and a division are right to the last bits of fp32, which are lost where an output is
    rounded to 16 bits or to TF32, and take two to three times the instructions. An activation is one of these for every
    element of an output, while the tensor cores wait. TVM has erf() of fp32 in fp16, and of bf16 in bf16.
    """
    from tvm import ir

    if not isinstance(part, ir.Call):
        return None
    short_forms = {"tirx.erf": emit_erf, "tirx.sigmoid": emit_sigmoid, "tirx.tanh": emit_tanh}
    return short_forms.get(getattr(part.op, "name", None))


def emit_erf(argument):
    """Emits erf() of an expression in fp32, and returns it in fp32, off by less than 1e-6."""
    from tvm import tirx

    value, power = make_registers(2)
    store(value, argument)
    magnitude = tirx.abs(value[0])
    exponent = tirx.const(0, "float32")
    for coefficient in reversed(LOG2_ERFC):
        exponent = (exponent + tirx.const(coefficient, "float32")) * magnitude
    store(power, exponent)
    approximate("ex2", power)
    return tirx.copysign(tirx.const(1, "float32") - power[0], value[0])


def emit_sigmoid(argument):
    """Emits 1 / (1 + exp(-x)) of an expression in fp32, and returns it in fp32, off by less than 1e-6 of itself."""
    from tvm import tirx

    (share,) = make_registers(1)
    store(share, argument * tirx.const(-math.log2(math.e), "float32"))
    approximate("ex2", share)
    store(share, share[0] + tirx.const(1, "float32"))
    approximate("rcp", share)
    return share[0]


def emit_tanh(argument):
    """Emits 1 - 2 / (1 + exp(2 x)), which is tanh(x), of an expression in fp32, and returns it in fp32.

    It is off by less than 1e-6.
    """
    from tvm import tirx

    value, share = make_registers(2)
    store(value, argument)
    store(share, tirx.abs(value[0]) * tirx.const(2 * math.log2(math.e), "float32"))
    approximate("ex2", share)
    store(share, share[0] + tirx.const(1, "float32"))
    approximate("rcp", share)
    return tirx.copysign(tirx.const(1, "float32") - share[0] * tirx.const(2, "float32"), value[0])


def emit_rounding(argument):
    """Emits the rounding of an expression in fp32 to TF32, and returns it in fp32."""
    from tvm.script import tirx as T
    from tvm.tirx.script.builder import ir as build

    rounded = build.alloc_buffer((1,), "uint32", scope="local")
    build.evaluate(T.ptx["cvt.rna.tf32.f32"](rounded[0], argument))
    return T.reinterpret("float32", rounded[0])


def make_registers(count):
    """Returns so many buffers of one fp32 element each."""
    from tvm.tirx.script.builder import ir as build

    return [build.alloc_buffer((1,), "float32", scope="local") for _ in range(count)]


def store(register, value):
    from tvm.tirx.script.builder import ir as build

    build.buffer_store(register, value, [0])


def approximate(operation, register):
    """Emits a PTX instruction of one operand, off by about 1e-7 of the result, which takes the operand's place."""
    from tvm.script import tirx as T
    from tvm.tirx.script.builder import ir as build

    build.evaluate(T.ptx[f"{operation}.approx.ftz.f32"](register[0], register[0]))


def is_vector(task, load, width):
    """Returns whether `width` elements along the columns, from a multiple of it, can be loaded as one."""
    return contiguous_run(load.indices, buffer_shape(load.source), *task.columns.innermost(), limit=width) == width
