"""Tunes a model's tasks with TVM's own tuner, without end: what tvm_tune's trials a second are compared with.

    python tests/stock_tuner.py [MODEL] [DEVICE]

The same tasks, target and candidates a round as tvm_tune's; all else is TVM's default. Its log says how many
candidates it sends to its builder and to its runner.
"""

import importlib
import sys
import tempfile

import torch

from conftest import make_case
from harness.inputs import make_inputs
from harness.models import find_model
from harness.weights import load_model
from tvm_items.importer import export_for_tvm
from tvm_items.imports import import_tvm_for_tuning
from tvm_items.relax_module import tuned_module
from tvm_items.search import ROUND_SIZE
from tvm_items.target import find_target, load_target


def main(model="microsoft/resnet-50", device="cuda:0"):
    import_tvm_for_tuning("fp32")
    for needed in ("xgboost", "cloudpickle"):
        importlib.import_module(needed)
    import tvm_ffi
    from tvm.s_tir import meta_schedule
    from tvm.support import nvcc

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", nvcc.tvm_callback_cuda_compile, override=True)
    config, _ = find_model(model, "random")
    case = make_case(config)
    with torch.no_grad():
        exported = export_for_tvm(load_model(case), make_inputs(case))
    target = load_target(find_target(device))
    module, _ = tuned_module(exported, target)
    print("tuning", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        meta_schedule.relax_integration.tune_relax(
            module, {}, target, directory, max_trials_global=1_000_000, num_trials_per_iter=ROUND_SIZE
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
