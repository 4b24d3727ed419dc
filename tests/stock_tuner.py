"""Tune a model's kernels with TVM's own tuner, without end: what tvm_tune's trials a second are compared with.

    python tests/stock_tuner.py [MODEL] [DEVICE]

The same kernels, target and candidates a round as tvm_tune's; all else is TVM's default. Its log says how many
candidates it sends to its builder and to its runner.
"""

import importlib
import json
import sys
import tempfile

import torch
from test_model import make_case

import benchmark
import tuning


def main(model="microsoft/resnet-50", device="cuda:0"):
    benchmark.import_tvm_for_tuning("fp32")
    for needed in ("xgboost", "cloudpickle"):
        importlib.import_module(needed)
    import tvm
    import tvm_ffi
    from tvm.s_tir import meta_schedule
    from tvm.support import nvcc

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", nvcc.tvm_callback_cuda_compile, override=True)
    config, _ = benchmark.find_model(model, "random")
    case = make_case(config)
    with torch.no_grad():
        exported = benchmark.export_for_tvm(benchmark.load_model(case), benchmark.make_inputs(case))
    target = tvm.target.Target(json.loads(tuning.find_target(device)))
    module, _ = benchmark.tuned_module(exported, target)
    print("tuning", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        meta_schedule.relax_integration.tune_relax(
            module, {}, target, directory, max_trials_global=1_000_000, num_trials_per_iter=tuning.ROUND
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
