"""What `tvm_tune` needs before its turn: what the library has for a case, whether to tune, and tuning in a process."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import re
import tempfile

import torch

from harness import processes
from harness.architectures import layer_count
from harness.case import PRECISIONS, arithmetic
from harness.errors import UserError, warn
from harness.inputs import describe_shapes
from harness.names import file_stem
from harness.weights import load_on_device
from tvm_items.importer import export_for_tvm
from tvm_items.imports import import_tvm_for_tuning
from tvm_items.journal import read_journal
from tvm_items.kernels import compile_candidate
from tvm_items.kin import find_starts
from tvm_items.library import add_to_library, device_directory, read_library, schedule_key
from tvm_items.loop import tune
from tvm_items.records import TuningFileError
from tvm_items.relax_module import tuned_module
from tvm_items.target import find_target, load_target
from tvm_items.tasks import extract_tasks

TUNE_TRIALS, TUNE_MINUTES = 100, 10.0  # trials for each task on average, and the end of tuning a case
ROUND_LIMIT_S = 30.0  # of building and measuring where no search is asked for
ROUND = None, ROUND_LIMIT_S  # what plan_tuning() returns then
MAKE_TASKS_TIMEOUT_S = 600


def tuned_name(case):
    """Returns the case's name in a library and in its journal's: the model, its input shapes and the precision.

    Of a step of decoding also the context's length, and the layers that run: each name stands for one set of kernels.
    """
    shapes = re.sub(r"[^\w.=-]+", "_", describe_shapes(case)).strip("_")
    step = [f"decode-{case.context_len}", f"layers-{layer_count(case.config)}"] if case.phase == "decode" else []
    return ".".join((file_stem(case.model_name), shapes, *step, case.precision))


def tvm_version():
    """Returns the version of TVM, None where there is none: the item's own failure says that."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("apache-tvm")
    return None


def find_library(case, with_others=False):
    """Returns the Library of the case's device. Raises TuningFileError where it cannot be used.

    with_others: whether to read what other devices' libraries have, too.
    """
    return read_library(case.tuning_dirs, case.device_name, tvm_version(), with_others)


def journal_of(case):
    """Returns the path and the origin of the case's journal, as read_journal() takes them."""
    path = device_directory(case.tuning_dirs[0], case.device_name) / tuned_name(case)
    return path, f"{case.device_name}, TVM {tvm_version()}"


def has_schedules(case, library):
    """Returns whether the library has anything for the case: it was tuned, or others of its precision on its device."""
    return tuned_name(case) in library.cases or any(
        kernel["case"].endswith(f".{case.precision}") for kernel in library.kernels.values()
    )


def runs_unasked(case):
    """Returns whether tvm_tune needs no search; a library that cannot be used is warned of."""
    try:
        return has_schedules(case, find_library(case))
    except TuningFileError as error:
        warn(str(error))
        return False


def describe_search(case):
    """Returns the command that searches for the case's schedules, and for how long."""
    step = f"--phase decode --context-len {case.context_len} " if case.phase == "decode" else ""
    return (
        f"{TUNE_MINUTES:g} minutes of search on {case.device_name}: python benchmark.py --model {case.model_name} "
        f"--batch-size {case.batch_size} --precision {case.precision} {step}--tune-minutes {TUNE_MINUTES:g}"
    )


def plan_tuning(case, tune_trials, tune_minutes):
    """Returns (trials for each task on average, seconds) to tune the case with, None where there is nothing to do.

    tune_trials, tune_minutes: what the user asks for, or None. With minutes alone a search has as many trials as fit,
    whatever was tuned before: another version may have other kernels. Without both there is nothing to do for a case
    that was tuned to its last kernel, and one short round, with None for the trials, where that was cut off or others
    were tuned; a search where none was. Raises UserError where the library or the case's journal cannot be used.
    """
    try:
        library = find_library(case, with_others=True)  # now, so that a warning is seen
        read_journal(*journal_of(case))
    except TuningFileError as error:
        raise UserError(str(error)) from None
    tuned = library.cases.get(tuned_name(case))
    if tune_trials or tune_minutes or not has_schedules(case, library):
        asked_trials = tune_trials or (math.inf if tune_minutes else TUNE_TRIALS)
        is_done = tuned and tuned["asked_trials"] >= asked_trials
        return None if is_done else (asked_trials, 60 * (tune_minutes or TUNE_MINUTES))
    return None if tuned and not tuned.get("untried") else ROUND


def tune_case(case, asked_trials, limit_s):
    """Looks for the case's best schedules and adds them to the user's library.

    asked_trials: for each task on average; None for one round of what the library has for its kernels and their kin.
    Runs in an isolated worker's process, which computes nothing itself: it forks those that do.
    """
    processes.report("importing")
    import_tvm_for_tuning(case.precision)
    if asked_trials is not None:
        importlib.import_module("xgboost")
    import tvm_ffi

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_candidate, override=True)
    processes.report("looking for kernels")
    target_json = processes.call(find_target, case.device, timeout_s=MAKE_TASKS_TIMEOUT_S)
    tasks = processes.call(make_tasks, case, target_json, timeout_s=MAKE_TASKS_TIMEOUT_S)
    library, name, (path, origin) = find_library(case, with_others=True), tuned_name(case), journal_of(case)
    target = json.loads(target_json)
    arch = target.get("arch") or target.get("mcpu") or target["kind"]
    cores = len(os.sched_getaffinity(0))
    tuned = tune(
        tasks,
        find_starts(tasks, library, arch, searches=asked_trials is not None),
        target_json,
        case.device,
        path,
        origin,
        library.cases.get(name),
        tolerance=PRECISIONS[case.precision].tolerance,
        asked_trials=asked_trials,
        limit_s=limit_s,
        workers=cores if case.device == "cpu" else max(1, cores - 1),  # one launches what the GPU measures
        scratch=tempfile.gettempdir(),
    )
    here = {"device": case.device_name, "tvm": tvm_version()}
    kernels = [{**record, **here, "arch": arch, "case": found_by(record, library, name)} for record in tuned.records]
    measured = {schedule_key({**measured, **here}) for measured in tuned.measured}
    known = library.kernels.keys() | {kernel["task"] for kernel in kernels}
    spent = {**tuned.spent, "kernels": sum(task.key in known for task in tasks)}
    add_to_library(path.parent, kernels, {"case": name, **here, **spent}, measured)


def found_by(record, library, name):
    """Returns the case whose tuning found a record's schedule: that of the library's, where it was measured again."""
    known = library.kernels.get(record["task"])
    is_same = known and (known["space"], known["decisions"]) == (record["space"], record["decisions"])
    return known["case"] if is_same else name


def make_tasks(case, target_json):
    """Returns the Tasks of the case's model."""
    with arithmetic(case.precision) as dtype, torch.no_grad():
        model, inputs = load_on_device(dataclasses.replace(case, device="cpu"), dtype, with_values=False)
        exported = export_for_tvm(model, inputs, whole_attention=True)
    target = load_target(target_json)
    module, _ = tuned_module(exported, target, PRECISIONS[case.precision].tf32)
    return extract_tasks(module, target)


def tuning_columns(case):
    """Returns the row's columns on what all the tuning of the case took."""
    tuned = find_library(case).cases[tuned_name(case)]
    return {name: tuned[name] for name in ("tune_time_s", "tune_trials")}


def find_kernels(case):
    """Returns ({task's key: Kernel} of the case's device, how many of its tasks should be among them)."""
    library = find_library(case)
    return library.kernels, library.cases[tuned_name(case)]["kernels"]
