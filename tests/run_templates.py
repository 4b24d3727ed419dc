"""Runs random candidates of the templates of small models' tasks on a GPU, against TVM's default schedules.

    python tests/run_templates.py fp16 [COUNT [DIRECTORY]]

COUNT (default: 3) of each template for each task: a ResNet, one whose windows TMA copies, a RegNet (grouped
convolutions), a ConvNeXt (depthwise ones), a BERT, a Llama with grouped heads, and a step of that one. Each is built,
run and checked as the tuner does. With a DIRECTORY they are only built there, for run_built.py.
"""

import json
import multiprocessing
import os
import random
import sys
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, ConvNextConfig, LlamaConfig, RegNetConfig, ResNetConfig

from conftest import TINY_BERT, TINY_RESNET, make_case
from harness import processes
from harness.case import PRECISIONS
from harness.errors import one_line
from products import random_fitting
from run_built import MANIFEST
from tvm_items.imports import import_tvm_for_tuning
from tvm_items.kernels import compile_candidate
from tvm_items.measure import build, measure
from tvm_items.spaces import cached_design_spaces
from tvm_items.target import find_target
from tvm_items.tuning import make_tasks

CUDA, TIMEOUT_S = "cuda:0", 600
TINY_LLAMA = {"num_key_value_heads": 2, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 96}
CONFIGS = [
    ResNetConfig(**{name: value for name, value in TINY_RESNET.items() if name != "model_type"}),
    ResNetConfig(embedding_size=64, hidden_sizes=[64, 128], depths=[1, 1], layer_type="basic"),
    RegNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], groups_width=16),
    ConvNextConfig(hidden_sizes=[32, 64], depths=[1, 1], num_stages=2, image_size=64),
    BertConfig(**{name: value for name, value in TINY_BERT.items() if name != "model_type"}),
    LlamaConfig(**TINY_LLAMA, num_hidden_layers=1, vocab_size=100),
]
CASES = [(config, {}) for config in CONFIGS] + [(CONFIGS[-1], {"phase": "decode", "context_len": 600})]


def draw_candidates(tasks, target, count):
    """Yields (Task, candidate): first TVM's default schedule of a task that has templates, None, then what is drawn."""
    rng = random.Random(0)
    for task in tasks:
        templates = cached_design_spaces(task.module_json, target).templates
        if templates:
            yield task, None
        for number, template in templates.items():
            for _ in range(count):
                yield task, (number, random_fitting(template, rng))


def build_or_none(module_json, target, candidate, path):
    """Returns path, of a built candidate, or None where it does not build; prints why."""
    try:
        return build(module_json, target, candidate, path)
    except Exception as error:
        print(f"{candidate} does not build: {one_line(error)}", flush=True)
        return None


def build_all(precision, count, directory):
    """Returns (Task, candidate, path or None) of all that is drawn, built into an existing directory."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # importing TVM starts no CUDA, which forks could not use then
    import_tvm_for_tuning(precision)
    import tvm_ffi

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_candidate, override=True)
    target = processes.call(find_target, CUDA, timeout_s=TIMEOUT_S)
    tasks = [
        task
        for config, fields in CASES
        for task in processes.call(
            make_tasks, make_case(config, precision=precision, **fields), target, timeout_s=TIMEOUT_S
        )
    ]
    drawn = list(draw_candidates(tasks, target, count))
    jobs = [(task.module_json, target, candidate, f"{directory}/{n}.so") for n, (task, candidate) in enumerate(drawn)]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), torch.set_num_threads, (1,)) as pool:
        libraries = pool.starmap(build_or_none, jobs, chunksize=1)
    return [(*pair, library) for pair, library in zip(drawn, libraries)]


def measure_all(built, precision):
    """Measures what build_all() returns, prints each, and returns how many failed."""
    failed = 0
    with processes.Worker() as measurer:  # its process is replaced after an error, which may have broken CUDA's context
        for task, candidate, library in built:
            if candidate is None:
                default = library
                continue
            said = "does not build"
            if library is not None:
                arguments = task.arguments, library, default, CUDA, PRECISIONS[precision].tolerance, 1.0
                try:
                    measurement = measurer.call(measure, *arguments, timeout_s=TIMEOUT_S)
                    said = measurement.error
                except processes.WorkerError as error:
                    said = str(error)
            failed += said is not None
            print(f"{task.name} {candidate}: {said or f'{1e6 * measurement.seconds:.1f} µs'}", flush=True)
    print(f"{failed} of {sum(candidate is not None for _, candidate, _ in built)} failed")
    return failed


def main(precision, count=3, directory=None):
    if directory is None:
        with tempfile.TemporaryDirectory() as scratch:
            return bool(measure_all(build_all(precision, int(count), scratch), precision))
    built = build_all(precision, int(count), directory)
    candidates = [(task.name, candidate, task.arguments, library) for task, candidate, library in built if candidate]
    (Path(directory) / MANIFEST).write_text(json.dumps(candidates))
    return any(library is None for *_, library in candidates)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
