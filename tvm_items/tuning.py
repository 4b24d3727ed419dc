"""What `tvm_tune` needs before its turn: where a case's database is, whether it is good, and tuning in a process."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import os
import re
import tempfile

import torch

from harness import processes
from harness.case import PRECISIONS, arithmetic
from harness.errors import UserError, warn
from harness.inputs import describe_shapes
from harness.names import file_stem
from harness.weights import load_on_device
from tvm_items.database import DatabaseError, database_path, read_database, read_journal, read_siblings
from tvm_items.importer import export_for_tvm
from tvm_items.imports import import_tvm_for_tuning
from tvm_items.kernels import compile_candidate
from tvm_items.loop import tune
from tvm_items.relax_module import tuned_module
from tvm_items.target import find_target, load_target
from tvm_items.tasks import extract_tasks

TUNE_TRIALS, TUNE_MINUTES = 100, 10.0  # trials for each task on average, and the end of tuning a case
MAKE_TASKS_TIMEOUT_S = 600


def tuning_paths(case):
    """Returns where the case's tuning database may be, without the ends of its files' names: where it is written first.

    One path for each of the case's tuning_dirs.
    """
    device, shapes = (re.sub(r"[^\w.=-]+", "_", text).strip("_") for text in (case.device_name, describe_shapes(case)))
    name = ".".join((file_stem(case.model_name), shapes, case.precision))
    return [directory / device / name for directory in case.tuning_dirs]


def find_database(case):
    """Returns the case's tuning database, or None where there is none. Raises DatabaseError where it cannot be used."""
    databases = (read_database(path, tuning_origin(case)) for path in tuning_paths(case))
    return next((database for database in databases if database), None)


def tuning_origin(case):
    """Returns what a database must have been made on to be good for the case."""
    version = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # the item's own failure says that it is missing
        version = importlib.metadata.version("apache-tvm")
    return f"{case.device_name}, TVM {version}"


def has_database(case):
    """Returns whether tvm_tune can run without a search; a database that cannot be used is warned of."""
    try:
        return find_database(case) is not None
    except DatabaseError as error:
        warn(str(error))
        return False


def describe_search(case):
    """Returns the command that searches for the case's schedules, and for how long."""
    return (
        f"{TUNE_MINUTES:g} minutes of search on {case.device_name}: python benchmark.py --model {case.model_name} "
        f"--batch-size {case.batch_size} --precision {case.precision} --tune-minutes {TUNE_MINUTES:g}"
    )


def plan_tuning(case, tune_trials, tune_minutes):
    """Returns (trials for each task on average, seconds) to tune the case with, None where its database will do.

    tune_trials, tune_minutes: what the user asks for, or None; without both any database will do. Raises UserError
    where the case's database or journal cannot be used.
    """
    try:
        database = find_database(case)
        read_journal(tuning_paths(case)[0], tuning_origin(case))
    except DatabaseError as error:
        raise UserError(str(error)) from None
    paths = map(database_path, tuning_paths(case))
    databases = {
        (other.parent.name, path.parent.name) for path in paths for other in path.parent.parent.glob(f"*/{path.name}")
    }
    if of_others := sorted({other for other, own in databases if other != own}):
        there = ", ".join(of_others)
        warn(f"tuning databases of other devices are not used here: {there}; this is {case.device_name}")
    asked_trials = tune_trials or TUNE_TRIALS
    if database and (database["asked_trials"] >= asked_trials or not (tune_trials or tune_minutes)):
        return None
    return asked_trials, 60 * (tune_minutes or TUNE_MINUTES)


def tune_case(case, asked_trials, limit_s):
    """Searches for the case's best schedules and writes its database.

    asked_trials: for each task on average. Runs in an isolated worker's process, which computes nothing itself: it
    forks those that do.
    """
    processes.report("importing")
    import_tvm_for_tuning(case.precision)
    importlib.import_module("xgboost")
    import tvm_ffi

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_candidate, override=True)
    processes.report("looking for kernels")
    target_json = processes.call(find_target, case.device, timeout_s=MAKE_TASKS_TIMEOUT_S)
    tasks = processes.call(make_tasks, case, target_json, timeout_s=MAKE_TASKS_TIMEOUT_S)
    cores = len(os.sched_getaffinity(0))
    tune(
        tasks,
        target_json,
        case.device,
        tuning_paths(case)[0],
        tuning_origin(case),
        find_database(case),
        read_siblings(tuning_paths(case), tuning_origin(case)),
        tolerance=PRECISIONS[case.precision].tolerance,
        asked_trials=asked_trials,
        limit_s=limit_s,
        workers=cores if case.device == "cpu" else max(1, cores - 1),  # one launches what the GPU measures
        scratch=tempfile.gettempdir(),
    )


def make_tasks(case, target_json):
    """Returns the Tasks of the case's model."""
    with arithmetic(case.precision) as dtype, torch.no_grad():
        model, inputs = load_on_device(dataclasses.replace(case, device="cpu"), dtype)
        exported = export_for_tvm(model, inputs, whole_attention=True)
    target = load_target(target_json)
    module, _ = tuned_module(exported, target, PRECISIONS[case.precision].tf32)
    return extract_tasks(module, target)


def tuning_columns(case):
    """Returns the row's columns on what all the tuning behind the case's database took."""
    database = find_database(case)
    return {name: database[name] for name in ("tune_time_s", "tune_trials")}
