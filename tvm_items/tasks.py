"""A model's tasks: its distinct fused operators, each of which is tuned once however often an inference launches it."""

import contextlib
import dataclasses

from tvm_items.lowering import rules_that_decline


@dataclasses.dataclass(frozen=True)
class Task:
    """One distinct fused operator of a model, with its shapes and dtypes."""

    key: str  # MetaSchedule's structural hash of the module
    name: str
    launches: int  # per inference
    module_json: str  # the IRModule before scheduling, in TVM's JSON
    arguments: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, shape) each: inputs and weights, then outputs
    flops: float = 0.0  # of a launch, as TVM counts them; 0 where it cannot


def extract_tasks(module, target):
    """Returns the Tasks of a prepared Relax module, in TVM's order.

    What runs once for the weights is left out, and what has a shape that is not known before it runs.
    """
    import tvm
    from tvm import relax
    from tvm.s_tir.meta_schedule.relax_integration import extract_tasks

    of_inference = {name: f for name, f in module.functions.items() if name.name_hint != "main_transform_params"}
    module = relax.transform.DeadCodeElimination(["main"])(tvm.IRModule(of_inference))
    tasks = []
    for task in extract_tasks(module, target):
        sizes = [size for parameter in task.mod["main"].params for size in parameter.ty.shape]
        if all(isinstance(size, tvm.tirx.IntImm) for size in sizes):
            tasks.append(make_task(task.mod, task.task_name, int(task.weight)))
    return tasks


def make_task(module, name, launches):
    """Returns the Task of an IRModule whose "main" is one fused operator, before scheduling."""
    import tvm
    from tvm.s_tir.analysis import estimate_tir_flops
    from tvm.s_tir.meta_schedule.utils import shash2hex

    parameters, flops = module["main"].params, 0.0
    with contextlib.suppress(Exception):  # a loop whose length depends on data
        flops = float(estimate_tir_flops(module))
    arguments = tuple((str(p.ty.dtype), tuple(int(size) for size in p.ty.shape)) for p in parameters)
    return Task(shash2hex(module), name, launches, tvm.ir.save_json(module), arguments, flops)


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
