#!/usr/bin/env python3
"""Time Hugging Face models with eager PyTorch, torch.compile and TVM, append a CSV row per test item, say which to use.

    python benchmark.py --model microsoft/resnet-50 --batch-size 1

The file reads in the order of the data: arguments -> test items -> compile, warm up, time and check one -> the cases.
docs/methodology.md says what each number means and how we know that it is right; README.md ends with a map of the code.
Exit code: 0 all rows ok, 1 a row is failed, wrong or not written, 2 bad input (nothing written), 130 interrupted.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import importlib
import math
import os
import sys
import tempfile
import time
import typing
from pathlib import Path

gc.disable()  # imports make a million objects, none of them garbage, and looking for it takes 1 s of 8
sys.modules["sklearn"] = None  # transformers would import it where it is installed, 1 s for what no forward pass uses

import huggingface_hub
import numpy as np
import torch
from tqdm import tqdm

from harness.architectures import BUILTIN_ARCHITECTURES
from harness.arguments import OneLineParser, at_least_one, at_least_one_or_all, positive
from harness.case import PRECISIONS, arithmetic
from harness.cases import describe_case, find_models, make_cases
from harness.check import output_arrays
from harness.decode import cache_arrays, step_bytes
from harness.device import Gpu, describe_device, disturbances, process_memory_bytes, reset_peak_memory, synchronize
from harness.errors import UserError, one_line, print_error, report_errors_as, warn
from harness.figures import decode_figures, energy_per_sample, statistics
from harness.processes import Launchers, Worker, WorkerError, end_on_stop_signals, report
from harness.recompiling import finish_compiling, recompiling_fails
from harness.reference import USUAL_ORIGIN, Reference, References, run_on_changed_inputs
from harness.reports.terminal import describe_end, describe_row, describe_title, process_age_s
from harness.rows import (
    LOCAL,
    LOCAL_RESULTS,
    PHASES,
    RESULTS,
    SKIPPED_STATUSES,
    append_row,
    check_results_file,
    find_statuses,
)
from harness.streams import protect_standard_streams
from harness.weights import inputs_on_device, load_on_device
from tvm_items import tuning
from tvm_items.apply import KernelsGone, compile_with_library
from tvm_items.executable import compile_and_bind, load_saved, passes_after_scheduling
from tvm_items.importer import export_for_tvm, import_to_relax
from tvm_items.imports import import_tvm, import_tvm_for_tuning
from tvm_items.measure import build_options
from tvm_items.relax_module import tuned_module
from tvm_items.target import find_target, load_target

gc.enable()

TUNING_DIRS = (LOCAL / "tuning", RESULTS / "tuning")  # a user's own schedules, and those that are published

# ---- Settings that change the numbers -------------------------------------------------------------------------------

TIMING_BUDGET_S = 2.0  # as many timed runs as fit into this,
MIN_ITERATIONS, MAX_ITERATIONS = 20, 10_000  # within these bounds,
SLOW_RUN_S, MIN_SLOW_ITERATIONS = 0.5, 3  # and at least 3 runs where one takes over 0.5 s.
WARMUP_WINDOW_S = 0.1  # Warm is when two windows of runs in a row agree in their mean time:
WARMUP_AGREEMENT = 0.01
WARMUP_LIMIT_S = 3.0  # a machine that never settles is timed all the same, and its row says so (`warnings`).
HOST_ITERATIONS = 20  # of the host's share of an inference: with nothing in the queue, so with a wait before each

# ---- Arguments ------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = OneLineParser(
        prog="benchmark.py",
        description="Time Hugging Face models with eager PyTorch, torch.compile and TVM, and say which to use.",
        epilog=f"Built in, with random weights and no network: {', '.join(BUILTIN_ARCHITECTURES)}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", nargs="+", default=["microsoft/resnet-50"], help="hub ids, or local directories with a config.json")
    add("--batch-size", nargs="+", type=at_least_one, default=[1], help="samples per inference")
    add(
        "--test-items",
        nargs="+",
        choices=[*TEST_ITEMS, "all"],
        metavar="ITEM",
        help=f"what to run: {' '.join(TEST_ITEMS)}, or all (default: all that compile within a minute; tvm_tune where "
        "the device's library has schedules, or a search is asked for)",
    )
    add("--device", default="auto", help="auto (CUDA when there is one), cuda, cuda:N or cpu")
    add("--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="arithmetic of every item")
    add(
        "--weights",
        choices=["auto", "pretrained", "random"],
        default="auto",
        help="auto: pretrained where they can be had, else random weights of the same architecture",
    )
    add("--task", help="the head, by the name that transformers.pipeline uses (default: the one the config names)")
    add("--layers", type=at_least_one_or_all, help="of a built-in model: N or all (default: 4 of a large one)")
    add("--phase", choices=PHASES, default="forward", help="forward, or decode: one token more against a cache")
    add("--context-len", type=at_least_one, default=1024, help="positions of that cache, all but the last one filled")
    add("--seq-len", type=at_least_one, default=128, help="tokens per text, capped by the model's positions")
    add("--image-size", type=at_least_one, help="height and width of the images in pixels (default: the model's own)")
    add("--iterations", type=at_least_one, help=f"timed runs (default: as many as fit into {TIMING_BUDGET_S:g} s)")
    add("--timeout", type=positive, default=900.0, help="seconds after which an item is given up as failed")
    add(
        "--tune-trials",
        type=at_least_one,
        help="tvm_tune: candidates to measure for each task, on average "
        f"(default: {tuning.TUNE_TRIALS}; with --tune-minutes no limit)",
    )
    add("--tune-minutes", type=positive, help=f"tvm_tune: end of a case's search (default: {tuning.TUNE_MINUTES:g})")
    add("--tuning-dir", type=Path, help="where the schedules are (default: results/local/tuning, results/tuning)")
    add("--results", type=Path, default=LOCAL_RESULTS, help="the CSV that rows are appended to")
    add("--expected-calls", type=at_least_one, metavar="N", help="also say who wins by one start and N inferences")
    add(
        "--skip",
        choices=SKIPPED_STATUSES,
        default="nothing",
        help="leave out items whose latest row of the same case, device and versions is there (ended), or is ok",
    )
    add("--concurrent-cases", type=at_least_one, default=1, help="for the row: cases that run on this host at once")
    add("--verbose", action="store_true", help="show what the frameworks print, and whole tracebacks")
    args = parser.parse_args(argv)
    for name in ("model", "batch_size", "precision", "test_items"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or [])))
    if "all" in args.test_items:
        args.test_items = list(TEST_ITEMS)
    return args


# ---- Test items -----------------------------------------------------------------------------------------------------
# Each is a function (model, inputs, case) -> callable without arguments that runs one inference and returns its
# outputs. Model and inputs are already on the device in the case's precision. Nothing but the inference may happen
# inside the callable. It reads the tensors that are in the dict `inputs` when the function returns: they will change.


def eager(model, inputs, case):
    """PyTorch as it is."""
    model, inputs = as_documented(model, inputs, case)
    return functools.partial(model, **inputs)


def inductor(mode, model, inputs, case):
    """torch.compile(model, mode=mode)."""
    model, inputs = as_documented(model, inputs, case)
    return functools.partial(torch.compile(model, mode=mode), **inputs)


def as_documented(model, inputs, case):
    """Returns the model and its inputs as PyTorch's and transformers' documentation tell users to set them.

    A step of decoding has a static cache of its own. Channels last are for convolutional models in half precision on
    CUDA; in fp32 eager is slower by it (docs/methodology.md). The dict `inputs` then holds the new tensors.
    """
    if case.phase == "decode":
        return model.bind(inputs)
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    if case.device == "cpu" or PRECISIONS[case.precision].dtype == torch.float32 or convolutions < 2:
        return model, inputs
    model = model.to(memory_format=torch.channels_last)
    images = {name: tensor.to(memory_format=torch.channels_last) for name, tensor in inputs.items() if tensor.ndim == 4}
    inputs.update(images)
    return model, inputs


def tvm_default(model, inputs, case):
    """torch.export -> Relax -> tvm.compile with TVM's default pipeline -> a closure over inputs and weights."""
    import tvm

    exported = export_for_tvm(model, inputs)
    module, weights = import_to_relax(exported)
    target = tvm.target.Target.from_device(tvm.runtime.device(case.device))
    # No checks of every kernel's arguments at every launch: the shapes are static, and the checks are most of the host
    # code that LLVM would have to compile.
    options = {"tirx.disable_assert": True}
    return compile_and_bind(module, weights, exported, inputs, target, case, "default", options)


def tvm_tuned(model, inputs, case):
    """The same with the graph simplified, operators on weights run once, and each task's best schedule so far."""
    kernels = tuning.find_kernels(case)
    exported = export_for_tvm(model, inputs, whole_attention=True)
    target = load_target(find_target(case.device))
    module, weights = tuned_module(exported, target, PRECISIONS[case.precision].tf32)
    how = weights, exported, inputs, target, case, passes_after_scheduling(target), build_options(target)
    return compile_with_library(module, target, *kernels, lambda scheduled: compile_and_bind(scheduled, *how))


def tvm_saved(inputs, case):
    """What save() has kept of one of these in the temporary directory, weights and all: nothing is compiled."""
    return load_saved(inputs, case, Path(tempfile.gettempdir()))


def import_inductor(precision):
    importlib.import_module("torch._inductor.compile_fx")


class TestItem(typing.NamedTuple):
    build: typing.Callable  # the item's function
    import_compiler: typing.Callable | None = None  # of a precision: importing is not compiling, and is not timed
    load: typing.Callable | None = None  # (inputs, case) -> the same, from what the callable's save() has kept


TEST_ITEMS = {
    "torch": TestItem(eager),
    "torch_compile": TestItem(functools.partial(inductor, None), import_inductor),
    "torch_compile_reduce_overhead": TestItem(functools.partial(inductor, "reduce-overhead"), import_inductor),
    "torch_compile_max_autotune": TestItem(functools.partial(inductor, "max-autotune"), import_inductor),
    "tvm": TestItem(tvm_default, import_tvm, tvm_saved),
    "tvm_tune": TestItem(tvm_tuned, import_tvm_for_tuning, tvm_saved),
}
# max-autotune compiles for minutes; on the CPU reduce-overhead is the default mode: there are no CUDA graphs.
DEFAULT_ITEMS = {
    "cuda": ["torch", "torch_compile", "torch_compile_reduce_overhead", "tvm", "tvm_tune"],
    "cpu": ["torch", "torch_compile", "tvm", "tvm_tune"],
}


# ---- One item: load, compile, warm up, time, check, start again -----------------------------------------------------


def import_compiler(name, precisions):
    """Imports what a test item compiles with. Raises RuntimeError with the remedy where that is not possible."""
    item = TEST_ITEMS[name]
    gc.disable()
    try:
        for precision in precisions if item.import_compiler else ():
            item.import_compiler(precision)
    except Exception as error:
        raise RuntimeError(f"{name} cannot be imported; pip install -r requirements.txt ({error})") from error
    finally:
        gc.freeze()
        gc.enable()


def run_in_forks(name, case, reference, timeout_s, verbose):
    """Runs a test item in a process of its own, and then starts it again in another one; returns the row's columns.

    The second process has the caches and files that the first one left, and nothing else of it. This one, which forks
    both, has imported the item's compiler.
    """
    try:
        import_compiler(name, [case.precision])
        with Worker(isolated=True, verbose=verbose) as worker:
            columns = worker.call(run_item, name, case, reference, timeout_s=timeout_s, on_stage=report)
            worker.kill()
            if columns["status"] == "ok" and TEST_ITEMS[name].import_compiler and "warm_start_error" not in columns:
                with report_errors_as(columns, "warm_start_error"):
                    columns |= worker.call(start_again, name, case, reference, timeout_s=timeout_s, on_stage=report)
            return columns
    except UserError:
        raise
    except Exception as error:
        text = str(error) if isinstance(error, WorkerError) else one_line(error)
        return {"status": "failed", "error": text, "kernels_gone": isinstance(error, KernelsGone)}


def tune_in_fork(case, options, timeout_s, verbose):
    """Tunes a case with plan_tuning()'s options in a process of its own, a fork; returns the seconds that it took."""
    start = time.monotonic()
    with Worker(isolated=True, verbose=verbose) as worker:
        worker.call(tuning.tune_case, case, *options, timeout_s=timeout_s + options[1], on_stage=report)
    return time.monotonic() - start


@torch.no_grad()
def run_item(name, case, reference):
    """Returns the CSV columns that one test item gives, plus `timing_s`: wall seconds of warm-up and timed runs.

    reference: the case's Reference. The order of the lines defines the columns.
    """
    item = TEST_ITEMS[name]
    compiles = item.import_compiler is not None
    with arithmetic(case.precision) as dtype:
        report("loading")
        gpu = Gpu(case.device)
        memory_before = 0 if case.device == "cpu" else process_memory_bytes(case.device)
        model, inputs = load_on_device(case, dtype)
        moved_bytes = step_bytes(model, inputs) if case.phase == "decode" else 0
        synchronize(case.device)
        with inference_mode(name):
            report("compiling" if compiles else "first run")
            build = functools.partial(item.build, model, inputs, case)
            run, first, first_run_s = compile_and_run(build, case.device)
            first += cache_arrays(inputs)
            del model, build  # TVM holds its own copy of the weights, and must not be charged for PyTorch's
            memory_is_known = reset_peak_memory(case.device)  # what compiling needed is not what running needs

            report("timing")
            with recompiling_fails():
                start = time.perf_counter()
                timing = time_item(run, case, gpu)
                timing_s = time.perf_counter() - start
                peak_memory = process_memory_bytes(case.device) - memory_before if memory_is_known else None

                report("checking")
                last = output_arrays(timing.outputs) + cache_arrays(inputs)  # before a CUDA graph overwrites them
                changed = run_on_changed_inputs(functools.partial(run_once, run, case.device), inputs, case)
        columns = {
            **statistics(timing.times_ms, case.batch_size),
            **(decode_figures(timing.times_ms, case, moved_bytes) if case.phase == "decode" else {}),
            **reference.check(PRECISIONS[case.precision].tolerance, first, last, changed),
            "compile_time_s": first_run_s if compiles else None,
            "host_time_ms": timing.host_ms,
            "peak_memory_mib": peak_memory and peak_memory / 2**20,
            "energy_mj_per_sample": energy_per_sample(timing, case.batch_size),
            "warnings": "; ".join(disturbances(timing.times_ms, timing.before, timing.after)),
            "timing_s": timing_s + (0 if compiles else first_run_s),
            **getattr(run, "schedule_columns", {}),
        }
        if item.load:
            report("saving")
            with report_errors_as(columns, "warm_start_error"):
                run.save(Path(tempfile.gettempdir()))
        return columns


@torch.no_grad()
def start_again(name, case, reference):
    """Returns {"warm_start_time_s": ...} of a test item that has run before with the same temporary directory.

    From the loaded model, or for an item that keeps its compiled form from that, to the first finished output. Raises
    RuntimeError where that output is wrong.
    """
    report("starting again")
    item = TEST_ITEMS[name]
    with arithmetic(case.precision) as dtype:
        if item.load:  # it has weights of its own
            inputs = inputs_on_device(case, dtype)
            build = functools.partial(item.load, inputs, case)
        else:
            model, inputs = load_on_device(case, dtype)
            build = functools.partial(item.build, model, inputs, case)
        synchronize(case.device)
        with inference_mode(name):
            _, outputs, seconds = compile_and_run(build, case.device)
            outputs += cache_arrays(inputs)
    columns = reference.check(PRECISIONS[case.precision].tolerance, outputs)
    if columns["error"]:
        raise RuntimeError(columns["error"])
    return {"warm_start_time_s": seconds}


def inference_mode(name):
    """Returns the context that PyTorch's documentation tells users to run inference in; TVM's export cannot have it."""
    return contextlib.nullcontext() if TEST_ITEMS[name].load else torch.inference_mode()


def compile_and_run(build, device):
    """Returns the callable that build() returns, its first outputs as arrays, and the wall seconds of compiling."""
    start = time.perf_counter()
    run = build()
    outputs = run()
    synchronize(device)
    first_run_s = time.perf_counter() - start  # without copying the outputs to the host
    return run, output_arrays(outputs), first_run_s + finish_compiling(run, device)  # which writes new outputs


def run_once(run, device):
    """Returns the finished outputs of one inference as arrays."""
    outputs = run()
    synchronize(device)
    return output_arrays(outputs)


class Timing(typing.NamedTuple):
    """The timed runs of an item, and the Gpu.state() at both ends."""

    times_ms: np.ndarray
    outputs: object  # of the last run
    before: dict
    after: dict
    host_ms: float | None  # that the host needs to hand over one inference; None on the CPU, which runs it itself


def time_item(run, case, gpu):
    """Warms up, then times as many runs as the case asks for or the time budget gives; returns a Timing."""
    gc.disable()  # a collection would fall into one run of many; the process ends with this item
    per_run_s = warm_up(run, case.device)
    before = gpu.state()
    times_ms, outputs = time_runs(run, case.iterations or choose_iterations(per_run_s), case.device)
    return Timing(times_ms, outputs, before, gpu.state(), None if case.device == "cpu" else time_host(run))


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


def time_host(run):
    """Returns the median milliseconds that the host needs to hand over one inference to an idle GPU."""
    times_ms = []
    for _ in range(HOST_ITERATIONS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times_ms.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return float(np.median(times_ms))


# ---- The cases, one after another: their items, and a row for each --------------------------------------------------


def benchmark(args):
    """Runs the cases that the arguments name; returns the exit code.

    Every row that came to an end is in the CSV, whatever happens after it.
    """
    check_results_file(args.results)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(unit="item", leave=False, disable=None))
        session = Session(args, bar, stack.enter_context(Launchers(args.verbose)))
        session.import_compilers(args.test_items or DEFAULT_ITEMS["cpu"][:-1])
        looks_at_device = stack.enter_context(Worker(isolated=True, verbose=args.verbose))
        looks_at_device.submit(describe_device, args.device, timeout_s=args.timeout)
        models = find_models(args.model, args.weights, args.task, args.layers)  # the hub answers meanwhile
        try:
            device = looks_at_device.wait(session.show("device"))
        except WorkerError as error:
            raise UserError(f"--device {args.device}: {error}") from None
        looks_at_device.close()
        tuning_dirs = (args.tuning_dir,) if args.tuning_dir else TUNING_DIRS
        cases = make_cases(models, args, device, tuning_dirs, stack)
        case_columns = [{**describe_case(case), "concurrent_cases": args.concurrent_cases, **device} for case in cases]
        exit_codes = []
        start = time.monotonic() - process_age_s()  # the first case's time has the imports in it
        for case, columns in zip(cases, case_columns):
            exit_codes.append(session.run_case(case, columns, start))
            start = time.monotonic()
    return 2 if 2 in exit_codes else max(exit_codes)


class Session:
    """What the cases of one process share: the options, the progress bar, compilers that are imported, a reference."""

    def __init__(self, args, bar, launchers):
        self.args, self.bar, self.launchers = args, bar, launchers
        self.references = References(self.call_isolated)

    def run_case(self, case, columns, start):
        """Runs the items of one case and prints its rows and the verdict; returns 0, 1 for a row that is not ok, or 2.

        columns: those that all rows of the case share. start: of the case's time, by time.monotonic().
        """
        args, says = self.args, []
        items = args.test_items or DEFAULT_ITEMS["cpu" if case.device == "cpu" else "cuda"]
        if not (args.test_items or args.tune_trials or args.tune_minutes or tuning.runs_unasked(case)):
            items = [name for name in items if name != "tvm_tune"]  # no search starts unasked
            says.append(f"tvm_tune is left out: no schedules for this case yet; {tuning.describe_search(case)}")
        statuses = find_statuses(args.results, columns) if args.skip != "nothing" else {}
        skipped = {name: statuses[name] for name in items if statuses.get(name) in SKIPPED_STATUSES[args.skip]}
        if skipped:
            there = ", ".join(f"{name} ({status})" for name, status in skipped.items())
            says.append(f"already in {args.results}: {there}")
        items = [name for name in items if name not in skipped]
        try:
            tune_options = "tvm_tune" in items and tuning.plan_tuning(case, args.tune_trials, args.tune_minutes)
            self.import_compilers(items)
            reference = self.references.find(case) if items else None
            if isinstance(reference, Reference) and reference.origin != USUAL_ORIGIN:
                says.append(f"the reference is {reference.origin}: {USUAL_ORIGIN} does not fit the memory")
            self.launchers.wait(self.show("compilers"))  # nothing is timed while a compiler is still imported
            tqdm.write("\n".join([describe_title(case, columns), *says]))
            self.bar.reset(total=len(items))
            rows = [self.run_item(name, case, columns, reference, tune_options) for name in items]
        except UserError as error:
            print_error(error)
            return 2
        if rows:
            print(describe_end(rows, time.monotonic() - start, args))
        good = [row["status"] == "ok" and "not_saved" not in row for row in rows]
        return 0 if all(good) and all(status == "ok" for status in skipped.values()) else 1

    def run_item(self, name, case, columns, reference, tune_options):
        """Returns the row of one item, which is in the CSV by then, or has `not_saved`: why it is not."""
        search_s = 0.0
        try:
            if isinstance(reference, WorkerError):
                raise reference
            limits = self.args.timeout, self.args.verbose
            if name == "tvm_tune" and tune_options:
                search_s = self.launch(name, tune_in_fork, case, tune_options, *limits)
            item_columns = self.launch(name, run_in_forks, name, case, reference, *limits)
            if item_columns.get("kernels_gone"):
                search_s += self.launch(name, tune_in_fork, case, tuning.ROUND, *limits)
                item_columns = self.launch(name, run_in_forks, name, case, reference, *limits)
            if name == "tvm_tune" and item_columns["status"] == "ok":
                item_columns |= {**tuning.tuning_columns(case), "search_s": search_s}
        except WorkerError as error:
            item_columns = {"status": "failed", "error": str(error)}
        timestamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"test_item": name, "timestamp_utc": timestamp, **columns, **item_columns}
        with report_errors_as(row, "not_saved"):
            append_row(self.args.results, row, unless=SKIPPED_STATUSES[self.args.skip])
        tqdm.write(describe_row(row))
        if "not_saved" in row:
            print_error(f"{self.args.results}: the row of {name} is not written: {row['not_saved']}")
        self.bar.update()
        return row

    def launch(self, name, function, *arguments):
        """Returns function(*arguments), done in a fork of the process that has the item's compiler."""
        return self.launchers.call(TEST_ITEMS[name].import_compiler, function, *arguments, on_stage=self.show(name))

    def import_compilers(self, items):
        """Begins to import what the items need, each compiler in a process of its own, unless that has begun."""
        for name in items:
            arguments = (import_compiler, name, self.args.precision)
            self.launchers.start(TEST_ITEMS[name].import_compiler, *arguments, timeout_s=self.args.timeout)

    def call_isolated(self, function, *args):
        """Returns function(*args), of the reference, done in a process of its own; raises what Worker.wait() raises."""
        with Worker(isolated=True, verbose=self.args.verbose) as worker:
            return worker.call(function, *args, timeout_s=self.args.timeout, on_stage=self.show("reference"))

    def show(self, who):
        """Returns a function that shows on the bar which stage `who` is in."""
        return lambda stage: self.bar.set_description_str(f"{who}: {stage}")


def main(argv=None):
    gc.freeze()  # what is imported by now is never garbage: no fork looks through it
    # The compilers' modules ask whether there is a GPU. By NVML, then: by CUDA, no fork of theirs could use one.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    protect_standard_streams(on_loss=lambda error: warn(f"the terminal's lines are lost: {error.strerror}"))
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    tqdm.monitor_interval = 0  # no thread in the process that forks
    end_on_stop_signals()
    try:
        return benchmark(parse_args(argv))
    except UserError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("benchmark.py: interrupted; the rows of the items that had ended are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
