"""Time a built-in model's items by the benchmark's timer and by others -> a JSON list of rows on stdout.

    python tests/timers.py microsoft/resnet-50 torch tvm

A process of its own for test_evidence.py, because NVBench runs its benchmarks once in a process: they are one benchmark
here, with an axis of cases.
"""

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import benchmark
from conftest import make_case
from harness.architectures import builtin_config
from harness.case import arithmetic
from harness.weights import load_on_device

CUDA = "cuda:0"


def median_ms(run):
    """Returns the median that the benchmark would report for `run`, in milliseconds."""
    iterations = benchmark.choose_iterations(benchmark.warm_up(run, CUDA))
    return np.median(benchmark.time_runs(run, iterations, CUDA)[0])


def build(model, batch_size, item):
    torch._dynamo.reset()
    benchmark.import_compiler(item, ["fp32"])
    case = make_case(builtin_config(model), batch_size=batch_size, device=CUDA)
    run = benchmark.TEST_ITEMS[item].build(*load_on_device(case, torch.float32), case)
    run()
    torch.cuda.synchronize()
    return run


def time_case(model, batch_size, item, nvbench):
    """Returns one row: what each timer says, in milliseconds."""
    import triton

    with benchmark.inference_mode(item):
        run = build(model, batch_size, item)
        time.sleep(1)  # the clock falls, as it does while a compiler works
        row = {"model": model, "batch": batch_size, "item": item}
        row["first 5 runs"] = benchmark.time_runs(run, 5, CUDA)[0].mean()
        row["ours"] = median_ms(run)
        row["do_bench"] = triton.testing.do_bench(run, warmup=100, rep=1000, return_mode="median")
        nvbench(run)
        row["ours again"] = median_ms(run)
        row["host"] = benchmark.time_host(run)
        row["bound by"] = "host" if row["host"] > 0.9 * row["ours"] else "GPU"
    return row


class CurrentStream:
    def __cuda_stream__(self):
        return 0, torch.cuda.current_stream().cuda_stream


def time_with_nvbench(cases):
    """Returns the rows of `cases`, with NVBench's mean over a batch of runs back to back, without an L2 flush."""
    import cuda.bench

    rows = []

    def time_one(state):
        def nvbench(run):
            def launch(_):
                run()

            state.set_stream(CurrentStream())
            state.exec(launch, batched=True)

        rows.append(time_case(*cases[state.get_int64("case")], nvbench))

    cuda.bench.register(time_one).add_int64_axis("case", range(len(cases)))
    with tempfile.TemporaryDirectory() as directory:
        output = os.path.join(directory, "nvbench.json")
        cuda.bench.run_all_benchmarks(["timers", "--json", output, "--quiet"])
        states = json.loads(Path(output).read_text())["benchmarks"][0]["states"]
    for row, state in zip(rows, states, strict=True):
        (mean,) = (summary for summary in state["summaries"] if summary["tag"] == "nv/batch/time/gpu/mean")
        row["NVBench"] = 1e3 * float(mean["data"][0]["value"])
    return rows


def main(model, *items):
    import triton

    # Triton's L2 flush between runs is taken out: the benchmark does not flush.
    triton.runtime.driver.active.clear_cache = lambda cache: None
    cases = [(model, batch_size, item) for batch_size in (1, 16) for item in items]
    with torch.no_grad(), arithmetic("fp32"):
        try:
            rows = time_with_nvbench(cases)
        except ImportError:  # no cuda-bench
            rows = [time_case(*case, lambda run: None) | {"NVBench": math.nan} for case in cases]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
