"""Counts what one inference of tuned TVM launches, for an H200 and without one: docs/tuning.md has what it printed.

    python tests/launches.py fp16 google/vit-base-patch16-224 google-bert/bert-base-uncased

A task whose best schedule splits sums launches one kernel more than is counted here.
"""

import sys

import torch

from conftest import H200, make_case
from harness.architectures import builtin_config
from harness.case import PRECISIONS, arithmetic
from harness.inputs import make_inputs
from tvm_items.importer import export_for_tvm
from tvm_items.imports import import_tvm
from tvm_items.relax_module import tuned_module
from tvm_items.target import load_target
from tvm_items.tasks import extract_tasks


@torch.no_grad()
def find_tasks(name, precision, batch_size=1):
    """Returns the Tasks of a built-in model on an H200; its weights stay as they are created."""
    case = make_case(builtin_config(name), model_name=name, precision=precision, batch_size=batch_size)
    case.config.use_cache = False
    with arithmetic(precision) as dtype:
        model = case.model_class(case.config).eval().requires_grad_(False).to(dtype)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in make_inputs(case).items()}
        exported, target = export_for_tvm(model, inputs, whole_attention=True), load_target(H200)
        module, _ = tuned_module(exported, target, PRECISIONS[precision].tf32)
        return extract_tasks(module, target)


def main(precision, *names):
    import_tvm(precision)
    print("| model | tasks | launches |\n|---|---|---|")
    for name in names:
        tasks = find_tasks(name, precision)
        print(f"| {name} | {len(tasks)} | {sum(task.launches for task in tasks)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
