"""A task's product as tensor cores see it: products of matrices, batched, with all that is fused behind them.

out[…] = epilogue(sum over terms of left[batch, row, term] * right[batch, column, term]). Convolutions are such products
too (implicit GEMM): a row is a position of the output, and a term is a position in the window and an input channel. The
epilogue may make an element of two sums, of a pair of columns, as gates.py has them.
"""

import dataclasses
import math
import typing

from tvm_items.rewrites import UNSPLIT, find_product, rewrite_product
from tvm_items.templates.expressions import (
    bytes_of_element,
    contiguous_run,
    dtype_of,
    find,
    is_load,
    linear_coefficients,
    loads_of,
    replace_variable,
    rewrite,
    substitute,
    unflatten,
    uses,
)

ALLOW_TF32 = "allow_tf32"  # an attribute of a task's function: whether operands in fp32 may be rounded to TF32
ROUNDED = "rounded_to_tf32"  # another one: the numbers of the parameters that are rounded already
MIN_COLUMNS, MIN_TERMS = 8, 8  # with fewer there is little to multiply
MAX_BATCH = 65535  # of a launch's second dimension (CUDA C++ Programming Guide, compute capabilities)
MAX_ELEMENTS = 2**31 - 1  # of a parameter: indices have 32 bits


class Axis(typing.NamedTuple):
    """Loops of the task that a kernel sees as one."""

    variables: list  # TIR variables, the outermost first
    extents: list[int]

    @property
    def extent(self):
        return math.prod(self.extents)

    def innermost(self):
        """Returns (variable, extent) of the loop that changes with each step, (None, 1) where the axis has one step."""
        pairs = [pair for pair in zip(self.variables, self.extents) if pair[1] > 1]
        return pairs[-1] if pairs else (None, 1)

    def values(self, index):
        """Returns {variable: expression} for an index (a 32-bit expression) along the axis."""
        return dict(zip(self.variables, unflatten(index, self.extents)))


@dataclasses.dataclass
class Operand:
    """One of the two factors."""

    load: object  # TIR: an element of a parameter of the task
    condition: object  # TIR: where it is not met the element is 0; None: everywhere
    axes: tuple[Axis, Axis, Axis]  # batch, rows or columns, terms
    along_terms: bool  # whether elements that lie behind one another in memory are terms; else rows or columns
    vector: int  # how many of those can be copied as one
    is_rounded: bool  # whether it has no more than the bits of TF32

    @property
    def element_bytes(self):
        return bytes_of_element(self.load)

    def access(self, buffers, *indices):
        """Returns (load, condition or None) of the element at indices of the three axes.

        buffers: {parameter: buffer}.
        """
        values = {}
        for axis, index in zip(self.axes, indices):
            values |= axis.values(index)
        load, condition = on_buffers(self.load, values, buffers), self.condition
        return load, condition if condition is None else substitute(condition, values)


@dataclasses.dataclass
class ProductTask:
    """A task that is a product; see the top of this file."""

    parameters: list  # of the task's function: buffers
    dtype: str  # of both operands: "float16", "bfloat16" or "float32"
    batch: Axis
    rows: Axis
    columns: Axis
    terms: Axis
    left: Operand
    right: Operand
    product: object  # the buffer that stands for the sums in `value`
    second: object  # the one that stands for those of the second column of each pair; None: there are no pairs
    value: object  # TIR: an element of the output
    output: object  # the parameter that is written
    indices: list  # TIR: where the element is written
    output_vector: int  # how many elements along the columns can be written as one

    @property
    def pair(self):
        """The columns that make an element of the output."""
        return 1 if self.second is None else 2

    def positions(self, batch, row, column):
        """Returns {variable: expression} at a position of the output."""
        return self.batch.values(batch) | self.rows.values(row) | self.columns.values(column)


def on_buffers(expression, values, buffers, known=lambda load: None):
    """Returns a TIR expression with other variables, {variable: expression}, and other buffers, {parameter: buffer}.

    known: a function of a load that returns an expression to put in its place, or None.
    """

    def replace(part):
        if is_load(part):
            value = known(part)
            if value is not None:
                return value
            buffer = find(part.source, buffers)
            return buffer[tuple(rewrite(index, replace) for index in part.indices)]
        return find(part, values)

    return rewrite(expression, replace)


class Sums(typing.NamedTuple):
    """A task that adds up products of two factors, taken apart."""

    parameters: list  # of the task's function: buffers
    factors: list  # (load, condition or None) of each
    axes: list[Axis]  # loops over what is in both factors, in the first or the second one alone, and over terms
    product: object  # the buffer that stands for the sums in `value`
    second: object  # as a ProductTask has it
    value: object  # TIR: an element of the output
    output: object  # the parameter that is written
    indices: list  # TIR: where the element is written
    rounded: list  # parameters that have no more than the bits of TF32


def find_sums(module):
    """Returns the Sums of a task's IRModule before scheduling, None where it is something else."""
    from tvm.s_tir import Schedule

    schedule = Schedule(module)
    if find_product(schedule) is None:
        return None
    try:
        product, epilogue = separate(schedule)
    except Exception:  # what is fused with the product is of a kind that cannot be inlined
        return None
    factors = find_factors(product)
    if factors is None or not is_elementwise(epilogue):
        return None
    axes = sort_loops(product, factors)
    if axes is None:
        return None
    store, pairs = epilogue.body, find_pairs(epilogue, product.body.buffer, product.body.indices)
    if pairs is not None:
        renamed, second, value = pairs
    else:  # what its loops are called in the product: they are those of the product's buffer
        renamed = {loop.var: index for loop, index in zip(epilogue.iter_vars, product.body.indices, strict=True)}
        second, value = None, store.value
    indices, value = [keep_dtype(index, renamed) for index in store.indices], keep_dtype(value, renamed)
    groups = find_groups(axes, factors)
    if groups is not None:
        axes, replace = groups
        factors = [tuple(part if part is None else rewrite(part, replace) for part in factor) for factor in factors]
        indices, value = [rewrite(index, replace) for index in indices], rewrite(value, replace)
    parameters = list(schedule.mod["main"].params)
    if any(math.prod(buffer_shape(p)) > MAX_ELEMENTS for p in parameters):
        return None
    rounded = [parameters[number] for number in module["main"].attrs.get(ROUNDED, ())]
    return Sums(parameters, factors, axes, product.body.buffer, second, value, store.buffer, indices, rounded)


def find_pairs(epilogue, sums, places):
    """Returns what a block is in other loops, where it makes one column of each pair of a product's columns.

    sums: the buffer that it reads them from. places: TIR: an element of that, in the other loops. Returns ({variable of
    a loop of the block: expression}, the buffer that stands for the second columns, the element that it writes); None
    where it reads the product in another way.
    """
    from tvm import tirx
    from tvm.sym import Analyzer

    analyzer = Analyzer()
    loops = [loop.var for loop in epilogue.iter_vars]
    for loop in epilogue.iter_vars:
        analyzer.bind(loop.var, loop.dom)
    second = tirx.decl_buffer(sums.shape, sums.dtype, "second")
    # A loop of one step is none.
    renamed = {loop.var: tirx.const(0, dtype_of(loop.var)) for loop in epilogue.iter_vars if int(loop.dom.extent) == 1}
    numbers = set()
    for load in loads_of(epilogue.body.value):
        if not load.source.same_as(sums):
            continue
        *outer, last = (analyzer.simplify(index) for index in load.indices)
        for index, place in zip(outer, places):
            if any(index.same_as(loop) for loop in loops):
                renamed[index] = place
            elif not is_number(index, 0):
                return None
        coefficients = linear_coefficients(last, loops) or [0]
        (*steps, number), halved = coefficients, [loop for loop, step in zip(loops, coefficients) if step == 2]
        if len(halved) != 1 or sum(steps) != 2 or number not in (0, 1):
            return None
        renamed[halved[0]] = tirx.floordiv(places[-1], tirx.const(2, dtype_of(places[-1])))
        numbers.add(number)
    if numbers != {0, 1} or len(renamed) != len(loops):
        return None

    def replace(part):
        if isinstance(part, tirx.IntImm):
            return part
        if is_load(part) and part.source.same_as(sums):
            is_second = linear_coefficients(analyzer.simplify(part.indices[-1]), loops)[-1]
            return (second if is_second else sums)[tuple(places)]
        return None

    return renamed, second, rewrite(epilogue.body.value, replace)


def find_product_task(sums):
    """Returns the ProductTask of Sums, None where these are no such product."""
    (batch, rows, columns, terms), factors = sums.axes, sums.factors
    place = sums.indices, buffer_shape(sums.output)
    if sums.second is not None:
        if columns.innermost()[1] % 2:
            return None
        output_vector = run_of_pairs(*place, *columns.innermost())
    else:
        if contiguous_run(*place, *rows.innermost()) > contiguous_run(*place, *columns.innermost()):
            rows, columns, factors = columns, rows, factors[::-1]
        output_vector = contiguous_run(*place, *columns.innermost())
    if columns.extent < MIN_COLUMNS or terms.extent < MIN_TERMS or batch.extent > MAX_BATCH:
        return None
    left, right = (
        make_operand(*factor, (batch, axis, terms), sums.rounded) for factor, axis in zip(factors, (rows, columns))
    )
    dtypes = {dtype_of(left.load), dtype_of(right.load)}
    if len(dtypes) != 1 or not dtypes <= {"float16", "bfloat16", "float32"}:
        return None
    return ProductTask(
        parameters=sums.parameters,
        dtype=dtypes.pop(),
        batch=batch,
        rows=rows,
        columns=columns,
        terms=terms,
        left=left,
        right=right,
        product=sums.product,
        second=sums.second,
        value=sums.value,
        output=sums.output,
        indices=sums.indices,
        output_vector=output_vector,
    )


def run_of_pairs(indices, shape, column, columns):
    """Returns what contiguous_run() does along the pairs of columns, of which the indices have column // 2."""
    from tvm import tirx

    pair = tirx.Var("pair", dtype_of(column))
    first = pair * tirx.const(2, dtype_of(column))
    return contiguous_run([replace_variable(index, column, first) for index in indices], shape, pair, columns // 2)


def separate(schedule):
    """Makes two blocks of a task, the product and what follows it, in place; returns both."""
    rewrite_product(schedule, UNSPLIT)
    product, _ = find_product(schedule)

    name = schedule.get(product).name_hint

    def inline_producers(block):
        for producer in schedule.get_producers(block):
            if schedule.get(producer).name_hint != name:
                inline_producers(producer)
                schedule.compute_inline(producer)

    inline_producers(product)
    consumers = schedule.get_consumers(product)
    for consumer in consumers:  # what a residual passes through
        inline_producers(consumer)
    store = schedule.get(product).body
    if len(consumers) == 1 and find_pairs(schedule.get(consumers[0]), store.buffer, store.indices) is not None:
        (copy,) = consumers
    else:
        copy = schedule.cache_write(product, 0, "local")
    while consumers := schedule.get_consumers(copy):
        schedule.reverse_compute_inline(consumers[0])
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    if len(blocks) != 2:
        raise ValueError("more than a product and what follows it")
    for block in (product, copy):
        (*_, innermost) = schedule.get_loops(block)
        if not is_number(schedule.get(innermost).body.predicate, 1):  # as where a part of the product is cut off
            raise ValueError("a block that is left out for some of its iterations")
    return schedule.get(product), schedule.get(copy)


def find_factors(product):
    """Returns [(load, condition or None), (load, condition or None)] of a product's block, None where it is none."""
    from tvm import tirx

    update, initial = getattr(product.body, "value", None), getattr(product.init, "value", None)
    if not isinstance(update, tirx.Add) or not isinstance(update.b, tirx.Mul) or not is_number(initial, 0):
        return None
    factors = []
    for factor in (update.b.a, update.b.b):
        if isinstance(factor, tirx.Cast):
            if dtype_of(factor) != "float32":  # it may round
                return None
            factor = factor.value
        condition = None
        if "if_then_else" in str(getattr(factor, "op", "")):
            condition, factor, otherwise = factor.args
            if not is_number(otherwise, 0):
                return None
        if not is_load(factor):
            return None
        factors.append((factor, condition))
    return factors


def is_number(expression, number):
    """Returns whether a TIR expression is a constant of that value."""
    return float(getattr(expression, "value", math.nan)) == number


def is_elementwise(block):
    """Returns whether a block writes one element of a buffer in each iteration, and does nothing else."""
    from tvm import tirx

    return isinstance(block.body, tirx.BufferStore) and block.init is None


def sort_loops(product, factors):
    """Returns the Axes (batch, rows, columns, terms) of a product's block, None where it has no such loops."""
    spatial = [loop.var for loop in product.iter_vars if loop.iter_type == loop.DataPar]
    indices = product.body.indices
    if len(spatial) != len(indices) or not all(a.same_as(b) for a, b in zip(spatial, indices)):
        return None
    axes = {name: Axis([], []) for name in ("batch", "left", "right", "terms")}
    for loop in product.iter_vars:
        extent = int(loop.dom.extent)
        in_left, in_right = (
            any(uses(part, loop.var) for part in (*load.indices, condition) if part is not None)
            for load, condition in factors
        )
        if loop.iter_type == loop.CommReduce:
            name = "terms"
            if extent > 1 and not (in_left and in_right):
                return None
        elif in_left and in_right:
            name = "batch"
        else:
            name = "right" if in_right else "left"
        axes[name].variables.append(loop.var)
        axes[name].extents.append(extent)
    return list(axes.values())


def find_groups(axes, factors):
    """Returns the axes of a grouped convolution and how to rewrite its expressions for them, None where it is none.

    TVM loops over all output channels, and reads input channels by the group that one is of, channel // size of a
    group. That is one loop over groups, in both factors, and one over the channels of a group, in the weights alone.
    The second result is for rewrite().
    """
    from tvm import tirx

    both, *alone, terms = axes
    pairs = list(zip(both.variables, both.extents))
    for number, (channel, extent) in enumerate(pairs):
        for in_data, (load, condition) in enumerate(factors):
            sizes, others = find_divisors((*load.indices, condition), channel)
            if others or len(sizes) != 1 or alone[1 - in_data].extent > 1:
                continue
            (size,) = sizes
            if extent % size:
                continue
            group, within = (tirx.Var(name, dtype_of(channel)) for name in ("group", "within"))

            def replace(part, channel=channel, size=size, group=group, within=within):
                if isinstance(part, tirx.IntImm):
                    return part
                if isinstance(part, tirx.FloorDiv) and channel.same_as(part.a):
                    return group
                return group * size + within if channel.same_as(part) else None

            pairs[number] = group, extent // size
            both = Axis(*map(list, zip(*pairs)))
            alone[1 - in_data] = Axis([within], [size])
            return [both, *alone, terms], replace
    return None


def find_divisors(expressions, variable):
    """Returns (divisors of `variable // divisor` in TIR expressions, whether it is in them otherwise, too)."""
    from tvm import tirx

    divisors, others = set(), []

    def look(part):
        if isinstance(part, tirx.FloorDiv) and variable.same_as(part.a) and isinstance(part.b, tirx.IntImm):
            divisors.add(int(part.b.value))
            return part
        if variable.same_as(part):
            others.append(part)
        return None

    for expression in expressions:
        if expression is not None:
            rewrite(expression, look)
    return divisors, bool(others)


def make_operand(load, condition, axes, rounded):
    """Returns the Operand that reads `load` where the condition is met; axes: batch, rows or columns, terms.

    rounded: as Sums have it.
    """
    limit = 16 // bytes_of_element(load)  # an asynchronous copy has at most 16 bytes
    shape = buffer_shape(load.source)
    runs = [contiguous_run(load.indices, shape, *axis.innermost(), condition, limit) for axis in axes[1:]]
    along_terms = runs[1] >= runs[0]
    is_rounded = any(load.source.same_as(parameter) for parameter in rounded)
    return Operand(load, condition, axes, along_terms, max(runs), is_rounded)


def buffer_shape(buffer):
    return [int(size) for size in buffer.shape]


def keep_dtype(expression, values):
    """Returns a TIR expression with variables replaced by others of the same dtype."""
    from tvm import tirx

    def replace(part):
        return part if isinstance(part, tirx.IntImm) else find(part, values)

    return rewrite(expression, replace)
