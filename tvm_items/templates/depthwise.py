"""A template for depthwise convolutions: each channel has a window of its own, so that tensor cores have no product.

A thread computes a small tile of positions for a few neighbouring channels. It goes down the lines of input that the
tile's windows see, reads each once as vectors along the channels, and adds to all outputs that have a term in it.
"""

import dataclasses
import math
import typing

from tvm_items.target import MAX_BLOCK_THREADS
from tvm_items.templates.epilogue import MAX_VECTOR_BYTES, output_vector, store_outputs
from tvm_items.templates.expressions import (
    bytes_of_element,
    contiguous_run,
    dtype_of,
    replace_variable,
    substitute,
    unflatten,
    uses,
    zero,
)
from tvm_items.templates.product_module import make_module, make_sums
from tvm_items.templates.product_task import Axis, buffer_shape, on_buffers
from tvm_items.templates.template import Template, unrolled

MAX_SUMS, MAX_LINE = 128, 128  # of a thread: outputs, and elements of a line of input. It has 255 registers

# The options of each parameter.
TILE_ROWS, TILE_COLUMNS = (1, 2, 4, 7, 8), (1, 2, 4, 7, 8, 14, 16)  # positions of a thread
VECTOR = (1, 2, 4, 8)  # channels of a thread
BLOCK_THREADS = (32, 64, 96, 128, 192, 256, 512)
PARAMETERS = (TILE_ROWS, TILE_COLUMNS, VECTOR, BLOCK_THREADS)


class Window(typing.NamedTuple):
    """One dimension of the window: the input's position is stride * position + term, less what is padded."""

    positions: int  # of the output
    terms: int
    stride: int
    position: object = None  # TIR variables; None: the window has no such dimension
    term: object = None

    def seen(self, tile):
        """Returns how many positions of the input the windows of a tile of positions of the output see."""
        return (tile - 1) * self.stride + self.terms


@dataclasses.dataclass
class DepthwiseTask:
    """A task that is a depthwise convolution, with all that is fused behind it."""

    parameters: list  # of the task's function: buffers
    data: object  # TIR: an element of the input, a parameter of the task
    condition: object  # TIR: where it is not met the element is 0; None: everywhere
    weight: object  # TIR: an element of the windows, likewise
    vector: int  # how many channels of both can be read as one
    others: Axis  # of the output: neither channels nor a dimension of the window
    columns: Axis  # the channels
    rows: Window
    along: Window  # the innermost dimension
    product: object  # the buffer that stands for the sums in `value`
    value: object  # TIR: an element of the output
    output: object  # the parameter that is written
    indices: list  # TIR: where the element is written
    output_vector: int  # how many channels of the output can be written as one
    pair: typing.ClassVar[int] = 1  # as a ProductTask has it

    def positions(self, _, place, channel):
        """Returns {variable: expression} at a position of the output; place: the same of all loops but the channels."""
        return place | self.columns.values(channel)


@dataclasses.dataclass
class DepthwiseTemplate(Template):
    number, parameters = 106, PARAMETERS

    task: DepthwiseTask

    def fits(self, decisions):
        """Returns whether the kernel of these decisions can be made and is no obvious waste."""
        rows, columns, vector, threads = self.read(decisions)
        task = self.task
        if task.rows.positions % rows or task.along.positions % columns or task.vector % vector:
            return False
        if vector * bytes_of_element(task.data) > MAX_VECTOR_BYTES or threads > MAX_BLOCK_THREADS:
            return False
        return rows * columns * vector <= MAX_SUMS and task.along.seen(columns) * vector <= MAX_LINE

    def make(self, *values):
        return make_module(self.task, 1, lambda buffers, _: Kernel(self.task, buffers, *values).emit())


class Kernel:
    """One kernel while it is emitted."""

    def __init__(self, task, buffers, rows, columns, vector, block_threads):
        self.task, self.buffers, self.rows, self.columns, self.vector = task, buffers, rows, columns, vector
        self.block_threads = block_threads
        self.line = task.along.seen(columns)  # positions of the input in a line

    def emit(self):
        from tvm import tirx
        from tvm.tirx.script.builder import ir as build

        task = self.task
        tiles = task.others.extent, task.rows.positions // self.rows, task.along.positions // self.columns
        vectors = task.columns.extent // self.vector
        threads = math.prod(tiles) * vectors
        with (
            build.launch_thread("blockIdx.x", -(-threads // self.block_threads)) as block,
            build.launch_thread("threadIdx.x", self.block_threads) as thread,
        ):
            # Threads that are too many compute what the last one does, and write the same.
            number = block * self.block_threads + thread
            number = build.Bind(tirx.Min(number, threads - 1) if threads % self.block_threads else number)
            self.channel = build.Bind(number % vectors * self.vector)
            other, row, column = unflatten(number // vectors, tiles)
            self.first_row, self.first_column = build.Bind(row * self.rows), build.Bind(column * self.columns)
            self.others = task.others.values(build.Bind(other))
            self.sums = make_sums(self.rows * self.columns * self.vector)
            self.data, self.weights = (
                build.alloc_buffer((size * self.vector,), "float32", scope="local")
                for size in (self.line, task.along.terms)
            )
            self.loaded = build.alloc_buffer((self.vector,), dtype_of(task.data), scope="local")
            with build.serial(task.rows.seen(self.rows)) as line:
                self.load_line(line)
                for tile_row in range(self.rows):
                    self.add_line(tile_row, line - tile_row * task.rows.stride)
            with unrolled(self.rows) as tile_row, unrolled(self.columns) as tile_column:
                self.store(tile_row, tile_column)

    def place(self, row, column, row_term=None, term=None):
        """Returns {variable: expression} of all loops but the channels, at a position of the output and a term."""
        place = dict(self.others)
        for window, index, of_window in ((self.task.rows, row, row_term), (self.task.along, column, term)):
            if window.position is not None:
                place[window.position] = index
                place[window.term] = of_window
        return place

    def load_line(self, line):
        """Emits the loads of a line of the input: what the tile's windows see of it, as fp32.

        line: an expression; the number of the line among those that the tile's windows see. As a term of the tile's
        first position each place of the input has a name, though there may be no such term.
        """
        from tvm import tirx
        from tvm.tirx.script.builder import ir as build

        task, dtype = self.task, dtype_of(self.task.data)
        with unrolled(self.line) as i:
            place = self.place(self.first_row, self.first_column, line, i)

            def load():
                with build.vectorized(self.vector) as j:
                    values = task.positions(None, place, self.channel + j)
                    build.buffer_store(self.loaded, on_buffers(task.data, values, self.buffers), [j])

            if task.condition is None:
                load()
            else:
                with build.vectorized(self.vector) as j:
                    build.buffer_store(self.loaded, tirx.const(0, dtype), [j])
                with build.If(substitute(task.condition, place)), build.Then():
                    load()
            with unrolled(self.vector) as j:
                build.buffer_store(self.data, self.loaded[j].astype("float32"), [i * self.vector + j])

    def add_line(self, tile_row, row_term):
        """Emits what a line of the input adds to a row of the tile. row_term: of the window, which may have no such."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as build

        task, vector = self.task, self.vector

        def add():
            with unrolled(task.along.terms) as term:
                place = self.place(zero(), zero(), row_term, term)
                with build.vectorized(vector) as j:
                    values = task.positions(None, place, self.channel + j)
                    build.buffer_store(self.loaded, on_buffers(task.weight, values, self.buffers), [j])
                with unrolled(vector) as j:
                    build.buffer_store(self.weights, self.loaded[j].astype("float32"), [term * vector + j])
            with (
                unrolled(task.along.terms) as term,
                unrolled(self.columns) as column,
                unrolled(vector) as j,
            ):
                at = (tile_row * self.columns + column) * vector + j
                seen = self.data[(column * task.along.stride + term) * vector + j]
                build.buffer_store(self.sums, self.sums[at] + seen * self.weights[term * vector + j], [at])

        if self.rows == 1:  # all lines are terms of its windows
            add()
        else:
            with build.If(tirx.all(row_term >= 0, row_term < task.rows.terms)), build.Then():
                add()

    def store(self, tile_row, tile_column):
        """Emits what becomes of the sums of one position."""
        place = self.place(self.first_row + tile_row, self.first_column + tile_column, zero(), zero())
        first = (tile_row * self.columns + tile_column) * self.vector
        width = min(output_vector(self.task), self.vector)
        for e in range(0, self.vector, width):
            sums = [self.sums[first + e + j] for j in range(width)]
            store_outputs(self.task, self.buffers, None, place, self.channel + e, sums)


def find_depthwise_task(sums):
    """Returns the DepthwiseTask of product_task.Sums, None where these are none."""
    from tvm import tirx

    (channels, positions, alone, terms), (data, weight) = sums.axes, sums.factors
    if positions.extent == 1:
        positions, alone, data, weight = alone, positions, weight, data
    (data, condition), (weight, of_weight) = data, weight
    if alone.extent > 1 or of_weight is not None or sum(extent > 1 for extent in channels.extents) != 1:
        return None
    if dtype_of(data) != dtype_of(weight) or dtype_of(data) not in ("float16", "bfloat16", "float32"):
        return None
    for variable, extent in zip(terms.variables, terms.extents):
        if extent == 1:  # such as that over a group's input channels
            unit = tirx.const(0, dtype_of(variable))
            data, weight, condition = (
                part if part is None else replace_variable(part, variable, unit) for part in (data, weight, condition)
            )
    loops = list(zip(positions.variables, positions.extents))
    dimensions = [pair for pair in zip(terms.variables, terms.extents) if pair[1] > 1]
    windows = [find_window(data, *dimension, loops) for dimension in dimensions]
    if None in windows or not 1 <= len(windows) <= 2:
        return None
    others = [pair for pair in loops if not any(pair[0].same_as(window.position) for window in windows)]
    if len(others) + len(windows) != len(loops):  # two dimensions of the window along one of the output
        return None
    channel = channels.innermost()
    reads = (data, condition), (weight, None)
    runs = [contiguous_run(load.indices, buffer_shape(load.source), *channel, where) for load, where in reads]
    return DepthwiseTask(
        parameters=sums.parameters,
        data=data,
        condition=condition,
        weight=weight,
        vector=min(runs),
        others=Axis([variable for variable, _ in others], [extent for _, extent in others]),
        columns=channels,
        rows=windows[0] if len(windows) == 2 else Window(1, 1, 1),
        along=windows[-1],
        product=sums.product,
        value=sums.value,
        output=sums.output,
        indices=sums.indices,
        output_vector=contiguous_run(sums.indices, buffer_shape(sums.output), *channel),
    )


def find_window(data, term, terms, positions):
    """Returns the Window of a loop over terms, None where it is no dimension of a window.

    data: TIR: an element of the input. term, terms: the loop's variable and extent. positions: [(variable, extent)] of
    the loops over positions of the output.
    """
    from tvm.sym import detect_linear_equation

    indices = [index for index in data.indices if uses(index, term)]
    variables = [variable for variable, _ in positions]
    coefficients = detect_linear_equation(indices[0], [term, *variables]) if len(indices) == 1 else []
    if not coefficients or int(coefficients[0]) != 1:
        return None
    strides = [(int(c), *pair) for c, pair in zip(coefficients[1:], positions) if int(c) and pair[1] > 1]
    if len(strides) != 1 or strides[0][0] < 1:
        return None
    ((stride, variable, extent),) = strides
    return Window(extent, terms, stride, variable, term)
