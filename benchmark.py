#!/usr/bin/env python3
"""Time one Hugging Face model with eager PyTorch, torch.compile and TVM, and append one CSV row per test item.

    python benchmark.py --model microsoft/resnet-50 --batch-size 1

The file reads in the order of the data: arguments -> test items -> compile, warm up, time and check one -> the case.
docs/methodology.md says what each number means and how we know that it is right; README.md ends with a map of the code.
Exit code: 0 all rows ok, 1 a row is failed or wrong, 2 bad input (nothing written), 130 interrupted.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import importlib
import importlib.metadata
import math
import os
import signal
import sys
import time
import typing
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import transformers
from tqdm import tqdm

from harness.architectures import BUILTIN_ARCHITECTURES, describe_weights
from harness.case import PRECISIONS, Case, arithmetic
from harness.check import output_arrays, relative_error
from harness.device import Gpu, describe_device, disturbances, process_memory_bytes, reset_peak_memory, synchronize
from harness.errors import UserError, one_line
from harness.inputs import describe_shapes
from harness.models import find_model, find_model_class
from harness.processes import STOP_SIGNALS, TimedOut, Worker, WorkerError, report
from harness.rows import SKIPPED_STATUSES, append_row, check_results_file, find_statuses
from harness.terminal import describe_comparison, describe_row
from harness.weights import load_on_device
from tvm_items import tuning
from tvm_items.apply import apply_database
from tvm_items.database import read_database
from tvm_items.executable import bind_arguments, compile_with_tvm, on_device, passes_after_scheduling
from tvm_items.importer import export_for_tvm, import_to_relax
from tvm_items.imports import import_tvm, import_tvm_for_tuning
from tvm_items.measure import build_options
from tvm_items.relax_module import tuned_module
from tvm_items.target import find_target, load_target

DEFAULT_RESULTS = Path(__file__).resolve().parent / "results" / "benchmark.csv"
DEFAULT_TUNING = DEFAULT_RESULTS.parent / "tuning"

# ---- Settings that change the numbers -------------------------------------------------------------------------------

TIMING_BUDGET_S = 2.0  # as many timed runs as fit into this,
MIN_ITERATIONS, MAX_ITERATIONS = 20, 10_000  # within these bounds,
SLOW_RUN_S, MIN_SLOW_ITERATIONS = 0.5, 3  # and at least 3 runs where one takes over 0.5 s.
WARMUP_WINDOW_S = 0.1  # Warm is when two windows of runs in a row agree in their mean time:
WARMUP_AGREEMENT = 0.01
WARMUP_LIMIT_S = 3.0  # a machine that never settles is timed all the same, and its row says so (`warnings`).
ENERGY_MIN_S = 1.0  # NVML's energy counter ticks every 20 to 100 ms: shorter runs get no energy figure

# ---- Arguments ------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least_one(text):
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return value


def positive(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")
    return value


def parse_args(argv=None):
    parser = OneLineParser(
        prog="benchmark.py",
        description="Time one Hugging Face model with eager PyTorch, torch.compile and TVM.",
        epilog=f"Built in, with random weights and no network: {', '.join(BUILTIN_ARCHITECTURES)}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="microsoft/resnet-50", help="hub id, or a local directory with a config.json")
    add("--batch-size", type=at_least_one, default=1, help="samples per inference")
    add(
        "--test-items",
        nargs="+",
        default=["torch", "torch_compile", "tvm"],
        choices=[*TEST_ITEMS, "all"],
        metavar="ITEM",
        help=f"what to run: {' '.join(TEST_ITEMS)}, or all",
    )
    add("--device", default="auto", help="auto (CUDA when there is one), cuda, cuda:N or cpu")
    add("--precision", choices=PRECISIONS, default="fp32", help="arithmetic of every item")
    add(
        "--weights",
        choices=["auto", "pretrained", "random"],
        default="auto",
        help="auto: pretrained where they can be had, else random weights of the same architecture",
    )
    add("--task", help="the head, by the name that transformers.pipeline uses (default: the one the config names)")
    add("--seq-len", type=at_least_one, default=128, help="tokens per text, capped by the model's positions")
    add("--image-size", type=at_least_one, help="height and width of the images in pixels (default: the model's own)")
    add("--iterations", type=at_least_one, help=f"timed runs (default: as many as fit into {TIMING_BUDGET_S:g} s)")
    add("--timeout", type=positive, default=900.0, help="seconds after which an item is given up as failed")
    add(
        "--tune-trials",
        type=at_least_one,
        help="tvm_tune: candidates to measure for each task, on average "
        f"(default: {tuning.TUNE_TRIALS} without a database)",
    )
    add(
        "--tune-minutes",
        type=positive,
        help=f"tvm_tune: end of the tuning of one case (default: {tuning.TUNE_MINUTES:g})",
    )
    add("--tuning-dir", type=Path, default=DEFAULT_TUNING, help="where the tuning databases are")
    add("--results", type=Path, default=DEFAULT_RESULTS, help="the CSV that rows are appended to")
    add(
        "--skip",
        choices=SKIPPED_STATUSES,
        default="nothing",
        help="leave out items whose latest row of the same case, device and versions is there (ended), or is ok",
    )
    add("--concurrent-cases", type=at_least_one, default=1, help="for the row: cases that run on this host at once")
    add("--verbose", action="store_true", help="show what the frameworks print, and whole tracebacks")
    args = parser.parse_args(argv)
    args.test_items = list(TEST_ITEMS) if "all" in args.test_items else list(dict.fromkeys(args.test_items))
    return args


# ---- Test items -----------------------------------------------------------------------------------------------------
# Each is a function (model, inputs, case) -> callable without arguments that runs one inference and returns its
# outputs. Model and inputs are already on the device in the case's precision. Nothing but the inference may happen
# inside the callable.


def eager(model, inputs, case):
    """PyTorch as it is."""
    return functools.partial(model, **inputs)


def inductor(mode, model, inputs, case):
    """torch.compile(model, mode=mode)."""
    return functools.partial(torch.compile(model, mode=mode), **inputs)


def tvm_default(model, inputs, case):
    """torch.export -> Relax -> tvm.compile with TVM's default pipeline -> a closure over inputs and weights."""
    import tvm

    exported = export_for_tvm(model, inputs)
    module, weights = import_to_relax(exported)
    target = tvm.target.Target.from_device(tvm.runtime.device(case.device))
    # No checks of every kernel's arguments at every launch: the shapes are static, and the checks are most of the host
    # code that LLVM would have to compile.
    vm = compile_with_tvm(module, target, case, "default", {"tirx.disable_assert": True})
    return bind_arguments(vm, exported, inputs, on_device(weights, case))


def tvm_tuned(model, inputs, case):
    """The same with the graph simplified, operators on weights run once, and each task's best schedule so far."""
    database = read_database(tuning.tuning_path(case), tuning.tuning_origin(case))
    exported = export_for_tvm(model, inputs)
    target = load_target(find_target(case.device))
    module, weights = tuned_module(exported, target)
    module = apply_database(module, target, database)
    vm = compile_with_tvm(module, target, case, passes_after_scheduling(target), build_options(target))
    weights = vm["main_transform_params"](on_device(weights, case))
    return bind_arguments(vm, exported, inputs, weights)


def import_inductor(precision):
    importlib.import_module("torch._inductor.compile_fx")


# name -> (function, what imports its compiler: importing Python modules is not compiling, and is not timed)
TEST_ITEMS = {
    "torch": (eager, None),
    "torch_compile": (functools.partial(inductor, None), import_inductor),
    "torch_compile_reduce_overhead": (functools.partial(inductor, "reduce-overhead"), import_inductor),
    "torch_compile_max_autotune": (functools.partial(inductor, "max-autotune"), import_inductor),
    "tvm": (tvm_default, import_tvm),
    "tvm_tune": (tvm_tuned, import_tvm_for_tuning),
}


# ---- One item: load, compile, warm up, time, check ------------------------------------------------------------------
# In a process of its own, which imports the item's compiler first.


def import_compiler(name, precision):
    """Imports what a test item compiles with. Raises RuntimeError with the remedy where that is not possible."""
    _, import_modules = TEST_ITEMS[name]
    try:
        if import_modules:
            import_modules(precision)
    except Exception as error:
        raise RuntimeError(f"{name} cannot be imported; pip install -r requirements.txt ({error})") from error


@torch.no_grad()
def compute_reference(case):
    """Returns the outputs of eager PyTorch in IEEE fp32 as NumPy arrays, which every item is checked against."""
    report("computing")
    with arithmetic("fp32") as dtype:
        model, inputs = load_on_device(case, dtype)
        return output_arrays(model(**inputs))


@torch.no_grad()
def run_item(name, case, reference):
    """Returns the CSV columns that one test item gives, plus `timing_s`: wall seconds of warm-up and timed runs.

    reference: the outputs of compute_reference(). The order of the lines defines the columns.
    """
    build, import_modules = TEST_ITEMS[name]
    compiles = import_modules is not None
    with arithmetic(case.precision) as dtype:
        report("loading")
        gpu = Gpu(case.device)
        memory_before = 0 if case.device == "cpu" else process_memory_bytes(case.device)
        model, inputs = load_on_device(case, dtype)
        synchronize(case.device)

        report("compiling" if compiles else "first run")
        run, first, first_run_s = compile_and_run(build, model, inputs, case)
        del model  # TVM holds its own copy of the weights, and must not be charged for PyTorch's
        reset_peak_memory(case.device)  # what compiling needed is not what running needs

        report("timing")
        start = time.perf_counter()
        timing = time_item(run, case, gpu)
        timing_s = time.perf_counter() - start
        peak_memory = process_memory_bytes(case.device) - memory_before

        report("checking")
        last = output_arrays(timing.outputs)
        return {
            **statistics(timing.times_ms, case.batch_size),
            **check(first, last, reference, PRECISIONS[case.precision].tolerance),
            "compile_time_s": first_run_s if compiles else None,
            "peak_memory_mib": peak_memory / 2**20,
            "energy_mj_per_sample": timing.energy_mj(case.batch_size),
            "warnings": "; ".join(disturbances(timing.times_ms, timing.before, timing.after)),
            "timing_s": timing_s + (0 if compiles else first_run_s),
        }


def compile_and_run(build, model, inputs, case):
    """Returns the item's callable, its first outputs as arrays, and the wall seconds until those were finished."""
    start = time.perf_counter()
    run = build(model, inputs, case)
    outputs = run()
    synchronize(case.device)
    return run, output_arrays(outputs), time.perf_counter() - start


class Timing(typing.NamedTuple):
    """The timed runs of an item, and the Gpu.state() at both ends."""

    times_ms: np.ndarray
    outputs: object  # of the last run
    before: dict
    after: dict

    def energy_mj(self, batch_size):
        """Returns millijoules for each sample, None where the device does not say or the runs were too short."""
        if self.before["energy_mj"] is None or self.times_ms.sum() <= ENERGY_MIN_S * 1e3:
            return None
        return (self.after["energy_mj"] - self.before["energy_mj"]) / (len(self.times_ms) * batch_size)


def time_item(run, case, gpu):
    """Warms up, then times as many runs as the case asks for or the time budget gives; returns a Timing."""
    gc.disable()  # a collection would fall into one run of many; the process ends with this item
    per_run_s = warm_up(run, case.device)
    before = gpu.state()
    times_ms, outputs = time_runs(run, case.iterations or choose_iterations(per_run_s), case.device)
    return Timing(times_ms, outputs, before, gpu.state())


def warm_up(run, device):
    """Calls `run` until two windows of WARMUP_WINDOW_S in a row agree; returns seconds per call in the last one."""
    began = time.perf_counter()
    previous, per_run, count = math.inf, math.inf, 1
    while True:
        start = time.perf_counter()
        for _ in range(count):
            run()
        synchronize(device)
        now = time.perf_counter()
        previous, per_run = per_run, (now - start) / count
        if abs(per_run - previous) <= WARMUP_AGREEMENT * per_run or now - began > WARMUP_LIMIT_S:
            return per_run
        # Windows only grow: a window that a stall ended early must not shorten the next ones.
        count = max(count, math.ceil(WARMUP_WINDOW_S / per_run))


def choose_iterations(per_run_s):
    """Returns the number of timed runs for an inference of `per_run_s` seconds."""
    minimum = MIN_SLOW_ITERATIONS if per_run_s > SLOW_RUN_S else MIN_ITERATIONS
    return min(max(minimum, round(TIMING_BUDGET_S / per_run_s)), MAX_ITERATIONS)


def time_runs(run, iterations, device):
    """Calls `run` `iterations` times; returns the milliseconds of each call, as an array, and the last outputs.

    CUDA: one event before and one after each call on the current stream, no host synchronisation in between.
    CPU: time.perf_counter.
    """
    if device == "cpu":
        times_ms = []
        for _ in range(iterations):
            start = time.perf_counter()
            outputs = run()
            times_ms.append((time.perf_counter() - start) * 1e3)
    else:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iterations)]
        for start, end in pairs:  # the first record() creates the event: that must not fall into the loop
            start.record()
            end.record()
        torch.cuda.synchronize()
        for start, end in pairs:
            start.record()
            outputs = run()
            end.record()
        torch.cuda.synchronize()
        times_ms = [start.elapsed_time(end) for start, end in pairs]
    return np.array(times_ms), outputs


def statistics(times_ms, batch_size):
    """Returns the CSV's timing columns, and the maximum, for an array of milliseconds per inference."""
    return {
        "infer_time_mean_ms": times_ms.mean(),
        "infer_time_median_ms": np.median(times_ms),
        "infer_time_std_ms": times_ms.std(ddof=1) if len(times_ms) > 1 else 0.0,
        "infer_time_min_ms": times_ms.min(),
        "infer_time_max_ms": times_ms.max(),
        "infer_time_p90_ms": np.percentile(times_ms, 90),
        "infer_time_p99_ms": np.percentile(times_ms, 99),
        "iterations": len(times_ms),
        "throughput_samples_per_s": batch_size * 1e3 / times_ms.mean(),
    }


def check(first, last, reference, tolerance):
    """Returns the columns rel_error, status and error of a first and a last output, each a list of arrays.

    Of both: a replayed CUDA graph must give what the first call gave.
    """
    rel_error = max(relative_error(first, reference), relative_error(last, reference))
    if rel_error <= tolerance:
        return {"rel_error": rel_error, "status": "ok", "error": ""}
    return {"rel_error": rel_error, "status": "wrong", "error": f"rel_error {rel_error:.2e} is above {tolerance:g}"}


# ---- The case: its items one after another, and a row for each ------------------------------------------------------


def benchmark(args):
    """Runs the case that the arguments name; returns the exit code.

    Every row that came to an end is in the CSV, whatever happens after it.
    """
    check_results_file(args.results)
    config, weights_dir = find_model(args.model, args.weights)
    model_class = find_model_class(args.model, config, args.task)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(args.test_items), unit="item", leave=False, disable=None))
        made_weights = os.memfd_create("random weights")  # before the forks, so that every process has it
        stack.callback(os.close, made_weights)
        workers = {name: stack.enter_context(start_item(name, args)) for name in args.test_items}
        device = find_device(args, bar)
        case = Case(
            model_name=args.model,
            model_class=model_class,
            config=config,
            weights="pretrained" if weights_dir else "random",
            weights_dir=weights_dir and str(weights_dir),
            batch_size=args.batch_size,
            seq_len=args.seq_len,
            image_size=args.image_size,
            precision=args.precision,
            device=device["device"],
            device_name=device["device_name"],
            tuning_dir=args.tuning_dir,
            iterations=args.iterations,
            made_weights=f"/proc/self/fd/{made_weights}",
        )
        case_columns = {**describe_case(case), "concurrent_cases": args.concurrent_cases, **device}
        title = f"{args.model}, batch size {args.batch_size}, {args.precision}, {case_columns['weights']} weights, "
        title += f"{case.device_name}, {model_class.__name__}: {case_columns['input_shape']}"
        skipped = find_skipped(args, case_columns)
        if skipped:
            there = ", ".join(f"{name} ({status})" for name, status in skipped.items())
            tqdm.write(f"{title}\nalready in {args.results}: {there}")
        workers = {name: worker for name, worker in workers.items() if name not in skipped}
        rows = []
        if workers:
            rows = run_items(workers, case, case_columns, args, bar, title="" if skipped else title)
    if rows:
        print_summary(rows, args)
    return 0 if all(status == "ok" for status in [*skipped.values(), *(row["status"] for row in rows)]) else 1


def start_item(name, args):
    """Returns a worker that imports the item's compiler while others do the same."""
    worker = Worker(isolated=True, verbose=args.verbose)
    worker.submit(import_compiler, name, args.precision, timeout_s=args.timeout)
    return worker


def find_device(args, bar):
    """Returns the CSV's columns on the device, plus `device`. Raises UserError where it cannot be had."""
    with Worker(isolated=True, verbose=args.verbose) as worker:
        try:
            return run_job(worker, "device", bar, describe_device, args.device, timeout_s=args.timeout)
        except WorkerError as error:
            raise UserError(f"--device {args.device}: {error}") from None


def run_job(worker, name, bar, function, *args, timeout_s):
    """Returns function(*args), done by the worker, while the bar shows its stages. Raises what Worker.wait() does."""
    try:
        return worker.call(function, *args, timeout_s=timeout_s, on_stage=show_stage(bar, name))
    except TimedOut as error:
        stage = error.stage or "starting"
        raise WorkerError(f"gave no result in {timeout_s:g} s (--timeout), while {stage}") from None


def show_stage(bar, name):
    """Returns a function that shows on the bar which stage `name` is in."""
    return lambda stage: bar.set_description_str(f"{name}: {stage}")


def describe_case(case):
    """Returns the CSV's columns that all rows of the case share, but for those on the device."""
    try:
        input_shape = describe_shapes(case)
    except (AttributeError, ValueError) as error:  # a config of a kind that input_shapes() has not met
        raise UserError(f"{case.model_name}: its config does not say what it takes: {one_line(error)}") from None
    return {
        "model_name": case.model_name,
        "batch_size": case.batch_size,
        "precision": case.precision,
        "weights": describe_weights(case.model_name, case.config, case.weights),
        "input_shape": input_shape,
        "torch_version": torch.__version__,
        "tvm_version": version("apache-tvm"),
        "transformers_version": transformers.__version__,
    }


def version(package):
    """Returns the version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_skipped(args, case_columns):
    """Returns {item: status} of the items that --skip leaves out."""
    statuses = find_statuses(args.results, case_columns) if args.skip != "nothing" else {}
    return {name: statuses[name] for name in args.test_items if statuses.get(name) in SKIPPED_STATUSES[args.skip]}


def run_items(workers, case, case_columns, args, bar, title):
    """Runs the items in their workers, one after another; returns their rows, which are in the CSV by then."""
    tune_options = tuning.plan_tuning(case, args.tune_trials, args.tune_minutes) if "tvm_tune" in workers else None
    reference, reference_error = None, None
    with Worker(isolated=True, verbose=args.verbose) as worker:
        try:
            reference = run_job(worker, "reference", bar, compute_reference, case, timeout_s=args.timeout)
        except WorkerError as error:
            reference_error = WorkerError(f"no reference to check against: {error}")
    if title:
        tqdm.write(title)
    import_errors = {}
    for name, worker in workers.items():  # nothing is timed while another item still imports its compiler
        try:
            worker.wait(show_stage(bar, name))
        except WorkerError as error:
            import_errors[name] = error
    rows = []
    for name, worker in workers.items():
        try:
            if error := reference_error or import_errors.get(name):
                raise error
            if name == "tvm_tune" and tune_options:
                search_schedules(case, *tune_options, args, bar)
            with worker:
                columns = run_job(worker, name, bar, run_item, name, case, reference, timeout_s=args.timeout)
            if name == "tvm_tune":
                columns |= tuning.tuning_columns(case)
        except WorkerError as error:
            columns = {"status": "failed", "error": str(error)}
        timestamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"test_item": name, "timestamp_utc": timestamp, **case_columns, **columns}
        append_row(args.results, row, unless=SKIPPED_STATUSES[args.skip])
        rows.append(row)
        tqdm.write(describe_row(row))
        bar.update()
    return rows


def search_schedules(case, asked_trials, limit_s, args, bar):
    """Tunes the case in a worker of its own."""
    with Worker(isolated=True, verbose=args.verbose) as worker:
        arguments = (tuning.tune_case, case, asked_trials, limit_s)
        run_job(worker, "tvm_tune", bar, *arguments, timeout_s=limit_s + args.timeout)


def print_summary(rows, args):
    """Prints who was faster than whom, and where the time of this process went."""
    if sum(row["status"] == "ok" for row in rows) > 1:
        print(describe_comparison(rows))
    compiling_s = sum(row.get("compile_time_s") or 0 for row in rows)
    timing_s = sum(row.get("timing_s") or 0 for row in rows)
    total_s = process_age_s()
    print(
        f"{total_s:.1f} s: {compiling_s:.1f} s compiling, {timing_s:.1f} s timing, "
        f"{total_s - compiling_s - timing_s:.1f} s for all else; rows in {args.results}"
    )
    if any(row["status"] == "failed" for row in rows) and not args.verbose:
        print("--verbose shows the whole traceback of what failed")


def process_age_s():
    """Returns the seconds since this process was started, its imports included.

    man 5 proc: field 22 of stat is the start in clock ticks after boot.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def stop(number, _):
    """Ends as an exception does, so that `with` kills the workers, and lets no second signal interrupt that."""
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def main(argv=None):
    sys.stdout.reconfigure(line_buffering=True)  # a log shows each row as it ends
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    tqdm.monitor_interval = 0  # no thread in the process that forks
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    try:
        return benchmark(parse_args(argv))
    except UserError as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark.py: interrupted; the rows of the items that had ended are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
