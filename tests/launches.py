"""Counts what one inference of tuned TVM launches, for an H200 and without one: docs/tuning.md has what it printed.

    python tests/launches.py fp16 google/vit-base-patch16-224 google-bert/bert-base-uncased

A task whose best schedule splits sums launches one kernel more than is counted here.
"""

import sys

import torch

from conftest import H200, make_case
from harness.architectures import builtin_config
from harness.case import arithmetic
from harness.inputs import make_inputs
from tvm_items.importer import export_for_tvm
from tvm_items.imports import import_tvm
from tvm_items.relax_module import tuned_module
from tvm_items.target import load_target
from tvm_items.tasks import extract_tasks


@torch.no_grad()
def count_launches(name, precision):
    """Returns (tasks, launches) of a built-in model at batch size 1, whose weights stay as they are created."""
    case = make_case(builtin_config(name), model_name=name, precision=precision)
    case.config.use_cache = False
    with arithmetic(precision) as dtype:
        model = case.model_class(case.config).eval().requires_grad_(False).to(dtype)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in make_inputs(case).items()}
        target = load_target(H200)
        module, _ = tuned_module(export_for_tvm(model, inputs, whole_attention=True), target)
        tasks = extract_tasks(module, target)
    return len(tasks), sum(task.launches for task in tasks)


def main(precision, *names):
    import_tvm(precision)
    print("| model | tasks | launches |\n|---|---|---|")
    for name in names:
        print(f"| {name} | {' | '.join(map(str, count_launches(name, precision)))} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
