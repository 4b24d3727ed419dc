"""A model's tasks: its distinct fused operators, each of which is tuned once however often an inference launches it."""

import contextlib
import dataclasses
import math

import torch

from tvm_items.lowering import rules_that_decline
from tvm_items.relax_rewrites import WRITE, find_calls


@dataclasses.dataclass(frozen=True)
class Task:
    """One distinct fused operator of a model, with its shapes and dtypes."""

    key: str  # MetaSchedule's structural hash of the module
    name: str
    launches: int  # per inference
    module_json: str  # the IRModule before scheduling, in TVM's JSON
    arguments: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, shape) each: inputs and weights, then outputs
    flops: float = 0.0  # of a launch, as TVM counts them; 0 where it cannot
    # The numbers of those arguments that no kernel of an inference computes: inputs, weights, what was made of weights
    # once, and a cache of which a kernel writes one position.
    given: tuple[int, ...] = ()

    @property
    def given_bytes(self):
        """The bytes of these arguments."""
        return sum(bytes_of(*self.arguments[number]) for number in self.given)


def bytes_of(dtype, shape):
    """Returns the bytes of a tensor."""
    return math.prod(shape) * getattr(torch, dtype).itemsize


def extract_tasks(module, target):
    """Returns the Tasks of a prepared Relax module, in TVM's order.

    What runs once for the weights is left out, and what has a shape that is not known before it runs.
    """
    import tvm
    from tvm import relax
    from tvm.s_tir.meta_schedule.relax_integration import extract_tasks

    of_inference = {name: f for name, f in module.functions.items() if name.name_hint != "main_transform_params"}
    module = relax.transform.DeadCodeElimination(["main"])(tvm.IRModule(of_inference))
    given, tasks = find_given(module["main"]), []
    for task in extract_tasks(module, target):
        sizes = [size for parameter in task.mod["main"].params for size in parameter.ty.shape]
        if all(isinstance(size, tvm.tirx.IntImm) for size in sizes):
            tasks.append(make_task(task.mod, task.task_name, int(task.weight), given.get(task.task_name, ())))
    return tasks


def find_given(main):
    """Returns {name of a TIR function: Task.given, of each of its calls} of a Relax function."""
    given, found = {*main.params, *find_calls(main, [WRITE])}, {}
    for call in find_calls(main).values():
        numbers = {number for number, argument in enumerate(call.args[1]) if argument in given}
        name = call.args[0].name_hint
        found[name] = found.get(name, numbers) & numbers
    return {name: tuple(sorted(numbers)) for name, numbers in found.items()}


def make_task(module, name, launches, given=()):
    """Returns the Task of an IRModule whose "main" is one fused operator, before scheduling."""
    import tvm
    from tvm.s_tir.analysis import estimate_tir_flops
    from tvm.s_tir.meta_schedule.utils import shash2hex

    parameters, flops = module["main"].params, 0.0
    with contextlib.suppress(Exception):  # a loop whose length depends on data
        flops = float(estimate_tir_flops(module))
    arguments = tuple((str(p.ty.dtype), tuple(int(size) for size in p.ty.shape)) for p in parameters)
    return Task(shash2hex(module), name, launches, tvm.ir.save_json(module), arguments, flops, given)


def default_schedule(module, target):
    """Returns the module with what has no schedule yet scheduled by TVM's default rules.

    On the CPU there are none: its loops stay plain.
    """
    import tvm
    from tvm.s_tir import dlight

    if target.kind.name == "llvm":
        return module
    rules = ("Matmul", "GEMV", "Reduction", "GeneralReduction", "Fallback")  # as in TVM's default pipeline for CUDA
    with target, tvm.transform.PassContext(opt_level=3), rules_that_decline():
        return dlight.ApplyDefaultSchedule(*(getattr(dlight.gpu, rule)() for rule in rules))(module)
