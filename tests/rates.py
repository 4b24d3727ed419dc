"""Tunes single products on a GPU and compares them with cuBLAS: how near the tuner comes to the machine's rate.

    python tests/rates.py [MINUTES [DTYPE]]

Each product has behind it what models have: a bias, an activation, a layer scale and a residual; the last has nothing.
cuBLAS, by torch.matmul in a CUDA graph, computes the product alone. All are tuned together for MINUTES (default: 4).
"""

import collections
import math
import os
import sys
import tempfile
from pathlib import Path

import torch

from harness import processes
from harness.case import PRECISIONS
from products import make_batched_product
from tvm_items.imports import import_tvm_for_tuning
from tvm_items.journal import read_journal
from tvm_items.kernels import compile_candidate
from tvm_items.loop import tune
from tvm_items.target import find_target
from tvm_items.tasks import make_task

CUDA, TIMEOUT_S = "cuda:0", 300
# (rows, columns, terms), and whether something follows
PRODUCTS = {
    (3152, 3072, 768): True,  # ViT-base at batch 16
    (3152, 768, 3072): True,
    (3152, 768, 768): True,
    (197, 3072, 768): True,  # at batch 1
    (197, 768, 3072): True,
    (128, 3072, 768): True,  # BERT-base
    (128, 768, 3072): True,
    (3136, 1536, 384): True,  # ConvNeXt-tiny at batch 16
    (4096, 4096, 4096): False,
}


def make_tasks(dtype):
    """Returns the Tasks of PRODUCTS, which are named by their extents."""
    return [
        make_task(make_batched_product((1, *extents), dtype, epilogue=epilogue)[0], describe(extents), 1)
        for extents, epilogue in PRODUCTS.items()
    ]


def describe(extents):
    return " x ".join(map(str, extents))


def time_cublas(dtype):
    """Returns {extents: seconds of torch.matmul}."""
    from triton.testing import do_bench_cudagraph

    seconds = {}
    for rows, columns, terms in PRODUCTS:
        left = torch.randn(rows, terms, device=CUDA).to(getattr(torch, dtype))
        right = torch.randn(terms, columns, device=CUDA).to(getattr(torch, dtype))
        seconds[rows, columns, terms] = do_bench_cudagraph(lambda a=left, b=right: a @ b, return_mode="median") / 1e3
    return seconds


def main(minutes=4.0, dtype="float16"):
    precision = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # importing TVM starts no CUDA, which forks could not use then
    import_tvm_for_tuning(precision)
    import tvm_ffi

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_candidate, override=True)
    target = processes.call(find_target, CUDA, timeout_s=TIMEOUT_S)
    tasks = processes.call(make_tasks, dtype, timeout_s=TIMEOUT_S)
    cublas_s = processes.call(time_cublas, dtype, timeout_s=TIMEOUT_S)
    with tempfile.TemporaryDirectory() as directory:
        path, tolerance = Path(directory) / "products.x.fp16", PRECISIONS[precision].tolerance
        workers = max(1, len(os.sched_getaffinity(0)) - 1)
        found = tune(tasks, {}, target, CUDA, path, "here", None, tolerance, 10**6, 60 * minutes, workers, directory)
        records = {record["name"]: record for record in found.records}
        trials = [line for line in read_journal(path, "here") if "space" in line]
    print(f"{len(trials)} trials, without a time:")
    failed = collections.Counter((line["space"], line["error"][:200]) for line in trials if "error" in line)
    for (space, error), count in failed.most_common(10):
        print(f"{count} of design space {space}: {error}")
    columns = ["rows x columns x terms", "cuBLAS, µs", "tuned, µs", "TFLOP/s", "design space", "decisions"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for extents, alone_s in cublas_s.items():
        record = records[describe(extents)]
        values = [
            describe(extents),
            f"{1e6 * alone_s:.1f}",
            f"{1e6 * record['seconds']:.1f}",
            f"{2e-12 * math.prod(extents) / record['seconds']:.0f}",
            record["space"],
            record["decisions"],
        ]
        print(f"| {' | '.join(map(str, values))} |")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]), *sys.argv[2:3])
