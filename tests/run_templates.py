"""Runs random candidates of the templates of small models' tasks on a GPU, against TVM's default schedules.

    python tests/run_templates.py fp16 [COUNT]

COUNT (default: 3) of each template for each task: a ResNet, a BERT and a Llama with grouped heads. Each is built, run
and checked as the tuner does. test_sanitizer.py runs this under compute-sanitizer.
"""

import random
import sys
import tempfile
from pathlib import Path

import tvm_ffi
from transformers import BertConfig, LlamaConfig, ResNetConfig

from conftest import TINY_BERT, TINY_RESNET, make_case
from harness import processes
from harness.case import PRECISIONS
from products import random_fitting
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
    BertConfig(**{name: value for name, value in TINY_BERT.items() if name != "model_type"}),
    LlamaConfig(**TINY_LLAMA, num_hidden_layers=1, vocab_size=100),
]


def build_candidates(task, target, count, rng, directory):
    """Returns (path of the default schedule, [(template's number, decisions, path)]) of a task, built for the GPU."""
    candidates = []
    for number, template in cached_design_spaces(task.module_json, target).templates.items():
        for _ in range(count):
            decisions = random_fitting(template, rng)
            path = str(directory / f"{task.key}.{number}.{len(candidates)}.so")
            candidates.append((number, decisions, build(task.module_json, target, (number, decisions), path)))
    default = build(task.module_json, target, None, str(directory / f"{task.key}.so")) if candidates else None
    return default, candidates


def main(precision, count=3):
    import_tvm_for_tuning(precision)
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_candidate, override=True)
    target = processes.call(find_target, CUDA, timeout_s=TIMEOUT_S)
    tasks = [
        task
        for config in CONFIGS
        for task in processes.call(make_tasks, make_case(config, precision=precision), target, timeout_s=TIMEOUT_S)
    ]
    rng, failed = random.Random(0), 0
    with tempfile.TemporaryDirectory() as directory:
        built = [build_candidates(task, target, count, rng, Path(directory)) for task in tasks]
        for task, (default, candidates) in zip(tasks, built):  # from here on with CUDA in this process
            for number, decisions, library in candidates:
                tolerance = PRECISIONS[precision].tolerance
                measurement = measure(task.arguments, library, default, CUDA, tolerance, best_s=1.0)
                failed += measurement.error is not None
                said = measurement.error or f"{1e6 * measurement.seconds:.1f} µs"
                print(f"{task.name} {number} {decisions}: {said}", flush=True)
    print(f"{failed} of {sum(len(candidates) for _, candidates in built)} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
