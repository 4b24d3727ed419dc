"""Scheduling a model by a library of schedules."""

import os
import tempfile

from harness import processes
from harness.errors import one_line
from tvm_items.measure import build, schedule_candidate
from tvm_items.relax_rewrites import CALL, WRITE, find_calls
from tvm_items.tasks import default_schedule


class KernelsGone(processes.WorkerError):
    """The library has fewer of a model's kernels than tuning it left there: the others are of another version."""


def compile_with_library(module, target, kernels, expected, compile_module):
    """Returns what compile_module() makes of a prepared Relax module that is scheduled by the best known schedules.

    kernels: a Library's, {task's key: fields of a Kernel}. expected: how many of the model's tasks were among them when
    it was tuned; raises KernelsGone, before it compiles, where fewer are and a task has none. compile_module: takes a
    scheduled module, returns a callable with attributes. A task without a schedule, or with one that cannot be built
    here, gets TVM's default one. The callable's dict `schedule_columns` has a `schedule_warning` of the latter.
    """
    tasks, unfit = find_tasks(module, kernels), {}
    called = {call.args[0].name_hint for call in find_calls(module["main"], (CALL, WRITE)).values()}
    without = called - {name.name_hint for name in tasks}  # none where another version has fused more into fewer
    if without and len(set(tasks.values())) < expected:
        raise KernelsGone(f"{len(without)} of the kernels have no schedule; {expected} had one when it was tuned")
    scheduled = schedule(module, target, tasks, kernels, unfit)
    try:
        run = compile_module(scheduled)
    except Exception:
        found_before = len(unfit)
        find_unbuildable(module, target, tasks, kernels, unfit)
        if len(unfit) == found_before:
            raise
        run = compile_module(schedule(module, target, tasks, kernels, unfit))
    warnings = [f"the schedule of {kernels[key]['name']} is left out: {error}" for key, error in unfit.items()][:1]
    if len(unfit) > 1:
        warnings.append(f"and those of {len(unfit) - 1} more kernels")
    run.schedule_columns = {"schedule_warning": ", ".join(warnings)}
    return run


def find_tasks(module, kernels):
    """Returns {name of a TIR function: its task's key} for those functions of a Relax module that `kernels` has."""
    import tvm
    from tvm.s_tir.meta_schedule.utils import shash2hex

    functions = {name: f for name, f in module.functions.items() if isinstance(f, tvm.tirx.PrimFunc)}
    keys = {name: shash2hex(as_task(function)) for name, function in functions.items()}
    return {name: key for name, key in keys.items() if key in kernels}


def as_task(function):
    """Returns a TIR function as the IRModule that a Task has."""
    import tvm

    return tvm.get_global_func("tvm.s_tir.meta_schedule.normalize_mod")(function)


def schedule(module, target, tasks, kernels, unfit):
    """Returns the Relax module with its tasks scheduled by `kernels`, and by TVM's default rules where that has none.

    tasks: find_tasks()'s. unfit: {task's key: error} of those to leave out; what does not fit is added.
    """
    import tvm

    functions, candidates = dict(module.functions.items()), find_candidates(module, tasks, kernels, unfit)
    # MetaSchedule's design spaces take a third of a second each, most of it under Python's lock.
    jobs = [(task_json, str(target), *candidate) for task_json, candidate in candidates.values()]
    for name, (scheduled, error) in zip(candidates, processes.map_in_forks(schedule_as_json, jobs)):
        if error:
            unfit[tasks[name]] = error
        else:
            function = tvm.ir.load_json(scheduled)["main"]
            functions[name] = function.without_attr("global_symbol").with_attr("tirx.is_scheduled", True)
    return default_schedule(tvm.IRModule(functions, attrs=module.attrs), target)


def schedule_as_json(task_json, target_json, space, decisions):
    """Returns (a task as a candidate schedules it, in TVM's JSON, None), or (None, one line on why it cannot be).

    It cannot by decisions of another version of TVM's, or by damaged ones.
    """
    import tvm

    try:
        return tvm.ir.save_json(schedule_candidate(task_json, target_json, space, decisions)), None
    except Exception as error:
        return None, one_line(error)


def find_unbuildable(module, target, tasks, kernels, unfit):
    """Adds to `unfit` those tasks that cannot be built by their schedules, each alone; the rest is as in schedule()."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "kernel.so")
        for name, (task_json, candidate) in find_candidates(module, tasks, kernels, unfit).items():
            try:
                build(task_json, str(target), candidate, path)
            except Exception as error:
                unfit[tasks[name]] = one_line(error)


def find_candidates(module, tasks, kernels, unfit):
    """Returns {name of a function: (its task in TVM's JSON, (space, decisions))}, less TVM's default schedules.

    The rest is as in schedule().
    """
    import tvm

    return {
        name: (tvm.ir.save_json(as_task(module[name])), (kernels[key]["space"], kernels[key]["decisions"]))
        for name, key in tasks.items()
        if kernels[key]["space"] is not None and key not in unfit
    }
