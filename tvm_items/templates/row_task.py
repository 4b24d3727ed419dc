"""A task that reduces rows, such as LayerNorm, RMSNorm or a softmax, with what is elementwise before and after it.

Its tensors are seen as (rows, columns). Each of its steps computes an element for each place of a row, or one for each
row, by a reduction or from what others gave for the row.
"""

import dataclasses
import math

from tvm_items.lowering import is_s_tir
from tvm_items.templates.expressions import contiguous_run, dtype_of, flat_offset, is_load, loads_of, unflatten
from tvm_items.templates.product_task import MAX_ELEMENTS, buffer_shape

MIN_COLUMNS, MAX_COLUMNS = 16, 32768
DTYPES = ("float32", "float16", "bfloat16")  # of what is in memory for each place


@dataclasses.dataclass
class Step:
    """A block of the task's function. Its loops are those of the rows, and of the columns unless it is `of_rows`."""

    row_loops: list  # (TIR variable, extent), the outermost first
    column_loops: list
    reduces: bool
    of_rows: bool  # whether it computes one element for each row from other such elements, and from parameters
    output: object  # the buffer that it writes
    value: object  # TIR: the element; of a reduction: that of the sum so far and one place more
    initial: object  # TIR: what a reduction begins with

    def positions(self, row, column):
        """Returns {variable: expression} at a place: 32-bit expressions."""
        values = {}
        for loops, index in ((self.row_loops, row), (self.column_loops, column)):
            values |= dict(zip([v for v, _ in loops], unflatten(index, [extent for _, extent in loops])))
        return values

    def is_vector(self, load, width):
        """Returns whether `width` elements along the columns, from a multiple of it, can be loaded as one."""
        variable, extent = ([(None, 1)] + [loop for loop in self.column_loops if loop[1] > 1])[-1]
        return contiguous_run(load.indices, buffer_shape(load.source), variable, extent, limit=width) == width


@dataclasses.dataclass
class RowTask:
    """A task that reduces rows; see the top of this file."""

    parameters: list  # of the task's function: buffers
    rows: int
    columns: int
    steps: list[Step]
    whole: list  # parameters that are read at the very place that is computed

    def is_parameter(self, buffer):
        return any(buffer.same_as(parameter) for parameter in self.parameters)

    def loads_of_parts(self):
        """Returns [(step, its load)] of parameters that are larger than rows and columns: a part of them is read."""
        return [
            (step, load)
            for step in self.steps
            for load in loads_of(step.value)
            if self.is_parameter(load.source) and math.prod(buffer_shape(load.source)) > self.rows * self.columns
        ]

    def held(self):
        """Returns the buffers whose elements of a row threads keep in registers."""
        return self.whole + [step.output for step in self.steps if not (step.reduces or step.of_rows)]


def find_row_task(module):
    """Returns the RowTask of a task's IRModule before scheduling, None where it is of another kind."""
    from tvm.s_tir import Schedule
    from tvm.s_tir.transform import StmtSimplify

    function = module["main"]
    if not is_s_tir(function) or function.body.block.name_hint != "root":
        return None
    schedule = Schedule(module)
    inline(schedule, is_scalar)
    task = read_row_task(schedule)
    if task is None:  # it may begin with a slice, which has other loops
        inline(schedule, is_copy)
        task = read_row_task(Schedule(StmtSimplify()(schedule.mod)))
    return task


def read_row_task(schedule):
    """Returns the RowTask of a Schedule's module, None where it is of another kind."""
    from tvm import tirx

    blocks = [schedule.get(block) for block in schedule.get_child_blocks(schedule.get_sblock("root"))]
    if not all(isinstance(block.body, tirx.BufferStore) and has_known_loops(block) for block in blocks):
        return None
    reduction = next((block for block in blocks if block.init is not None), None)
    if reduction is None:
        return None
    kinds = reduction.iter_vars[0]
    rows, columns = (
        math.prod(extent for _, extent in loops_of(reduction, kind)) for kind in (kinds.DataPar, kinds.CommReduce)
    )
    parameters = list(schedule.mod["main"].params)
    sizes = [math.prod(buffer_shape(parameter)) for parameter in parameters]
    if not MIN_COLUMNS <= columns <= MAX_COLUMNS or max(sizes) > MAX_ELEMENTS:
        return None
    task = RowTask(parameters, rows, columns, [], [])
    for block in blocks:
        step = make_step(block, rows, columns)
        if step is None or not add_step(task, step):
            return None
    # What reads no row that lies side by side in memory is better off otherwise.
    return task if task.whole or any(step.is_vector(load, 2) for step, load in task.loads_of_parts()) else None


def inline(schedule, condition):
    """Puts what blocks compute, of which a condition is true, into their users' place."""
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        if condition(schedule.get(block)) and schedule.get_consumers(block):
            schedule.compute_inline(block)


def is_scalar(block):
    """Returns whether a block computes of scalars, such as the limit of a clamp: all rows have the same."""
    return len(block.writes) == 1 and not block.writes[0].source.shape


def is_copy(block):
    """Returns whether a block brings elements to another place, as slices and reshapes do."""
    return block.init is None and is_load(getattr(block.body, "value", None))


def has_known_loops(block):
    from tvm.tirx import IntImm

    return bool(block.iter_vars) and all(isinstance(loop.dom.extent, IntImm) for loop in block.iter_vars)


def loops_of(block, kind):
    """Returns (variable, extent) of a block's loops of a kind: spatial (DataPar) or reducing (CommReduce)."""
    return [(loop.var, int(loop.dom.extent)) for loop in block.iter_vars if loop.iter_type == kind]


def make_step(block, rows, columns):
    """Returns the Step of a block, None where its loops are not those of rows and columns, in this order."""
    kinds = block.iter_vars[0]
    spatial, reduced = (loops_of(block, kind) for kind in (kinds.DataPar, kinds.CommReduce))
    if len(spatial) + len(reduced) != len(block.iter_vars):
        return None
    store, reduces = block.body, block.init is not None
    initial = block.init.value if reduces else None
    extent = math.prod(extent for _, extent in spatial)
    if reduces:
        if extent != rows or math.prod(extent for _, extent in reduced) != columns:
            return None
        step = Step(spatial, reduced, True, False, store.buffer, store.value, initial)
        return step if is_reduction(step) and is_at(store, spatial) else None
    if not is_at(store, spatial):
        return None
    if extent == rows:
        return Step(spatial, [], False, True, store.buffer, store.value, None)
    inner = len(spatial)
    while inner and math.prod(extent for _, extent in spatial[inner:]) < columns:
        inner -= 1
    is_split = math.prod(extent for _, extent in spatial[inner:]) == columns and extent == rows * columns
    return Step(spatial[:inner], spatial[inner:], False, False, store.buffer, store.value, None) if is_split else None


def is_reduction(step):
    """Returns whether a step adds up, multiplies, or takes the largest or smallest, in a dtype of 32 or 16 bits."""
    from tvm import tirx

    value = step.value
    if not isinstance(value, tirx.Add | tirx.Mul | tirx.Max | tirx.Min):
        return False
    is_sum = is_load(value.a) and value.a.source.same_as(step.output)
    of_others = [load.source for load in loads_of(value.b)]
    known_dtype = dtype_of(value) in ("float32", "int32", "float16", "bfloat16")
    return is_sum and known_dtype and not any(source.same_as(step.output) for source in of_others)


def is_at(access, loops):
    """Returns whether a load or a store is of the element that has the loops' place, counted over all of them."""
    from tvm import ir
    from tvm.sym import Analyzer

    buffer = access.source if is_load(access) else access.buffer
    if math.prod(buffer_shape(buffer)) != math.prod(extent for _, extent in loops):
        return False
    analyzer = Analyzer()
    for variable, extent in loops:
        analyzer.bind(variable, ir.Range(0, extent))
    if not loops:
        return True
    place = flat_offset([variable for variable, _ in loops], [extent for _, extent in loops])
    return analyzer.can_prove_equal(flat_offset(access.indices, buffer.shape), place)


def add_step(task, step):
    """Adds a step to the task; returns whether it reads only what the kernel has at the place that it computes."""
    whole_row = step.row_loops + step.column_loops
    for load in loads_of(step.value):
        source = load.source
        if source.same_as(step.output):
            continue
        writer = next((other for other in task.steps if other.output.same_as(source)), None)
        if writer is not None:
            of_row = writer.reduces or writer.of_rows
            if not is_at(load, step.row_loops if of_row else whole_row) or (step.of_rows and not of_row):
                return False
        elif not task.is_parameter(source):
            return False
        elif not step.of_rows and math.prod(buffer_shape(source)) == task.rows * task.columns:
            if not is_at(load, whole_row) or str(source.dtype) not in DTYPES:
                return False  # the kernel has a row's elements in the threads that have their places
            if not any(source.same_as(other) for other in task.whole):
                task.whole.append(source)
    task.steps.append(step)
    writes_rows = task.is_parameter(step.output) and not (step.reduces or step.of_rows)
    return not writes_rows or str(step.output.dtype) in DTYPES
