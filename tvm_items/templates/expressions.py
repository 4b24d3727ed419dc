"""TIR expressions, rewritten for a kernel: other variables and buffers, and indices in 32 bits."""

import itertools


def rewrite(expression, replace):
    """Returns a TIR expression with its parts replaced, and 64-bit integer constants as 32-bit ones.

    replace: a function of a part that returns what is put in its place, or None to look into it.
    """
    from tvm import ir, tirx

    replaced = replace(expression)
    if replaced is not None:
        return replaced
    if isinstance(expression, tirx.IntImm):
        return tirx.const(int(expression.value), "int32") if dtype_of(expression) == "int64" else expression
    if isinstance(expression, tirx.Cast):
        return rewrite(expression.value, replace).astype(dtype_of(expression))
    if hasattr(expression, "a") and hasattr(expression, "b"):
        return type(expression)(*of_one_dtype(rewrite(expression.a, replace), rewrite(expression.b, replace)))
    if isinstance(expression, tirx.Not):
        return tirx.Not(rewrite(expression.a, replace))
    if isinstance(expression, tirx.Select):
        values = of_one_dtype(*(rewrite(v, replace) for v in (expression.true_value, expression.false_value)))
        return tirx.Select(rewrite(expression.condition, replace), *values)
    if is_load(expression):
        return expression.source[tuple(rewrite(index, replace) for index in expression.indices)]
    if isinstance(expression, ir.Call):
        arguments = [rewrite(argument, replace) for argument in expression.args]
        return ir.Call(expression.op, arguments, attrs=expression.attrs, ret_ty=expression.ty)
    return expression


def of_one_dtype(a, b):
    """Returns two expressions, cast to 64-bit integers where only one of them is of 32 bits."""
    if dtype_of(a) != dtype_of(b):
        return a.astype("int64"), b.astype("int64")
    return a, b


def substitute(expression, values):
    """Returns a TIR expression with variables replaced: values is {variable: 32-bit expression}."""
    return rewrite(expression, lambda part: find(part, values))


def find(variable, values):
    """Returns the value of a variable in {variable: value}, None where it has none."""
    return next((value for key, value in values.items() if key.same_as(variable)), None)


def loads_of(expression):
    """Returns the loads from buffers in a TIR expression, each once, the inner ones of an index left out."""
    from tvm_ffi import structural_equal

    loads = []

    def collect(part):
        if not is_load(part):
            return None
        if not any(structural_equal(part, load) for load in loads):
            loads.append(part)
        return part

    rewrite(expression, collect)
    return loads


def uses(expression, variable):
    """Returns whether a TIR expression depends on a variable."""
    found = []
    rewrite(expression, lambda part: found.append(part) if variable.same_as(part) else None)
    return bool(found)


def is_conditional(expression):
    """Returns whether parts of a TIR expression are computed only where some condition is met."""
    from tvm import tirx

    found = []

    def look(part):
        if isinstance(part, tirx.Select) or "if_then_else" in str(getattr(part, "op", "")):
            found.append(part)

    rewrite(expression, look)
    return bool(found)


def rounded_to_tf32(value):
    """Returns a TIR expression in fp32, rounded to TF32's 10 bits: to nearest, ties away from zero."""
    from tvm import tirx

    bits = tirx.reinterpret("uint32", value) + tirx.const(0x1000, "uint32")
    rounded = tirx.reinterpret("float32", bits & tirx.const(0xFFFFE000, "uint32"))
    return tirx.Select(tirx.isfinite(value), rounded, value)


def argument_of_rounding(expression):
    """Returns what a TIR expression rounds as rounded_to_tf32() does, None where it is another one."""
    from tvm import tirx
    from tvm.sym import Analyzer
    from tvm_ffi import structural_equal

    if not isinstance(expression, tirx.Select) or dtype_of(expression) != "float32":
        return None
    # TVM's passes turn the condition around.
    simplify, value = Analyzer().simplify, expression.false_value
    return value if structural_equal(simplify(expression), simplify(rounded_to_tf32(value))) else None


def is_load(expression):
    return type(expression).__name__ == "TensorLoad"


def dtype_of(expression):
    return str(expression.ty.dtype)


def unflatten(index, extents):
    """Returns the indices of dimensions of these extents (ints) for an index of all of them as one, as expressions."""
    indices = []
    for extent in reversed(extents):
        is_outermost = all(outer == 1 for outer in extents[: len(extents) - 1 - len(indices)])
        if extent == 1:
            indices.append(zero())
        elif is_outermost:
            indices.append(index)
            index = zero()
        else:
            indices.append(index % extent)
            index = index // extent
    return indices[::-1]


def bytes_of_element(expression):
    """Returns the bytes of an expression's dtype, which has 32 bits or 16."""
    return 4 if dtype_of(expression) == "float32" else 2


def zero():
    from tvm import tirx

    return tirx.const(0, "int32")


def flat_offset(indices, shape):
    """Returns the offset of an element in a row-major buffer, as an expression: of a scalar 0."""
    offset = indices[0] if indices else zero()
    for index, size in zip(indices[1:], shape[1:]):
        offset = offset * int(size) + index
    return offset


def linear_coefficients(expression, variables):
    """Returns [coefficient of each variable, …, constant] of a TIR expression, as ints; None where it is not linear."""
    from tvm.sym import detect_linear_equation

    coefficients = detect_linear_equation(expression, variables)
    if len(coefficients) != len(variables) + 1 or not all(hasattr(c, "value") for c in coefficients):
        return None
    return [int(coefficient.value) for coefficient in coefficients]


def linear_strides(operand):
    """Returns the strides, in elements, of an operand along its axes: batch, rows or columns, terms.

    operand: a product_task.Operand. None where it has none, or begins behind the beginning of its buffer.
    """
    variables = [variable for axis in operand.axes for variable in axis.variables]
    offset = linear_coefficients(flat_offset(operand.load.indices, operand.load.source.shape), variables)
    if offset is None:
        return None
    (*coefficients, base), strides, first = offset, [], 0
    for axis in operand.axes:
        steps = [(stride, extent) for stride, extent in zip(coefficients[first:], axis.extents) if extent > 1]
        first += len(axis.extents)
        if any(outer != inner * extent for (outer, _), (inner, extent) in itertools.pairwise(steps)):
            return None
        strides.append(steps[-1][0] if steps else 0)
    return None if base else strides


def contiguous_run(indices, shape, variable, extent, condition=None, limit=8):
    """Returns how many elements, a power of two up to `limit`, can be accessed as one along a variable.

    They lie behind one another, the first at a multiple of their number, for every multiple of it that the variable
    takes, and all of them meet the condition or none. 1 where that is not known. extent: of the variable.
    """
    from tvm import ir, tirx
    from tvm.sym import Analyzer

    if variable is None or (condition is not None and uses(condition, variable)):
        return 1
    offset = flat_offset(indices, shape)
    dtype = dtype_of(variable)
    number, within = tirx.Var("number", dtype), tirx.Var("within", dtype)
    run = limit
    while run > 1:
        analyzer, first = Analyzer(), number * run
        analyzer.bind(number, ir.Range(0, max(1, extent // run)))
        analyzer.bind(within, ir.Range(0, run))
        start, element = (replace_variable(offset, variable, value) for value in (first, first + within))
        alignment = analyzer.modular_set(analyzer.simplify(start))
        is_contiguous = analyzer.can_prove_equal(element, start + within)
        if extent % run == 0 and is_contiguous and alignment.coeff % run == 0 and alignment.base % run == 0:
            break
        run //= 2
    return run


def replace_variable(expression, variable, value):
    """Returns a TIR expression with a variable replaced by a value of the same dtype; constants keep theirs."""
    from tvm import tirx

    def replace(part):
        return value if variable.same_as(part) else part if isinstance(part, tirx.IntImm) else None

    return rewrite(expression, replace)
