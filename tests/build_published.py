"""Builds each kernel of a library of schedules for run_built.py: for test_sanitizer.py.

    python tests/build_published.py results/tuning/NVIDIA_H200 fp16 DIRECTORY

The library has schedules, and no kernels: those are the tasks of the built-in models that were tuned, in a precision.
"""

import itertools
import json
import multiprocessing
import os
import re
import sys
from pathlib import Path

import torch
from run_templates import CUDA, TIMEOUT_S

from conftest import make_case
from harness import processes
from harness.architectures import builtin_config
from run_built import MANIFEST
from tvm_items.imports import import_tvm_for_tuning
from tvm_items.kernels import compile_candidate
from tvm_items.library import CASES, KERNELS, read_lines
from tvm_items.measure import build
from tvm_items.records import Kernel, TunedCase
from tvm_items.target import find_target
from tvm_items.tuning import make_tasks, tuned_name

# tuned_name()'s: the model, the first input with the batch size, others, what a step has, the precision.
CASE_NAME = re.compile(r"(.+?)\.[a-z_]+=(\d+)x[^.]*(?:\.decode-(\d+)\.layers-(\d+))?\.(\w+)")


def find_case(tuned):
    """Returns the Case of a TunedCase, a dict, with its model on the CPU."""
    name, batch_size, context_len, layers, precision = CASE_NAME.fullmatch(tuned["case"]).groups()
    name = name.replace("--", "/")
    step = {"phase": "decode", "context_len": int(context_len)} if context_len else {}
    config = builtin_config(name, int(layers) if layers else None)
    case = make_case(config, model_name=name, batch_size=int(batch_size), precision=precision, **step)
    assert tuned_name(case) == tuned["case"]
    return case


def main(library, precision, directory):
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # importing TVM starts no CUDA, which forks could not use then
    import_tvm_for_tuning(precision)
    import tvm_ffi

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_candidate, override=True)
    target, library = processes.call(find_target, CUDA, timeout_s=TIMEOUT_S), Path(library)
    schedules = {  # less those kernels for which TVM's default one is the best
        kernel["task"]: (kernel["space"], kernel["decisions"])
        for kernel in read_lines(library / KERNELS, Kernel)
        if kernel["space"] is not None
    }
    cases = [tuned for tuned in read_lines(library / CASES, TunedCase) if tuned["case"].endswith(f".{precision}")]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), torch.set_num_threads, (1,)) as pool:
        of_cases = pool.starmap(make_tasks, [(find_case(tuned), target) for tuned in cases], chunksize=1)
        tasks = {task.key: task for task in itertools.chain(*of_cases) if task.key in schedules}
        tuned = [(tasks[key], schedules[key], f"{directory}/{key}.so") for key in tasks]
        pool.starmap(build, [(task.module_json, target, *rest) for task, *rest in tuned], chunksize=1)
    candidates = [(task.name, schedule, task.arguments, path) for task, schedule, path in tuned]
    (Path(directory) / MANIFEST).write_text(json.dumps(candidates))


if __name__ == "__main__":
    main(*sys.argv[1:])
