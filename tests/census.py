#!/usr/bin/env python3
"""The census: what every model type of transformers makes of each test item, as a small instance on the CPU.

    HF_HUB_OFFLINE=1 python tests/census.py                      # hours on two cores; it goes on where it was stopped
    HF_HUB_OFFLINE=1 python tests/census.py --tests torch tvm --types falcon mamba --again
    python tests/census.py --publish  # results/families.csv -> docs/families.md; superseded rows leave it

The instances are small_configs.py's. `torch`, `torch_compile` and `tvm` run in fp32 and are checked as benchmark.py
checks them; `tvm_tune` is that item with nothing in its library: the graph that is tuned. `cuda fp16` and `cuda bf16`
are `tvm`'s way up to machine code for Hopper, which needs no GPU. Each type runs in a process of its own with limits of
time and memory, and each test of each type is a row; the latest one counts.
"""

import argparse
import copy
import csv
import datetime
import functools
import gzip
import importlib
import io
import json
import logging
import re
import resource
import sys
import time
import unittest.mock
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import benchmark
from conftest import H200, make_case
from harness.case import PRECISIONS
from harness.cases import version
from harness.errors import UserError, one_line
from harness.inputs import change_inputs, describe_shapes
from harness.processes import Worker, WorkerError
from harness.reference import compute_reference
from harness.reports.history import compress, replace
from harness.rows import RESULTS
from harness.version import harness_version
from harness.weights import load_on_device
from small_configs import SIZES, default_config, small_config
from tvm_items import tuning
from tvm_items.executable import compile_module
from tvm_items.importer import export_for_tvm, import_to_relax
from tvm_items.kernels import compile_kernels

FAMILIES, HISTORY = RESULTS / "families.csv", RESULTS / "families_history.csv.gz"
DOCS = RESULTS.parent / "docs"
STATUSES = ("ok", "wrong", "failed", "no case")
REASON_LENGTH = 160  # characters in the table; the whole line is in the CSV
TESTS = ("torch", "tvm", "tvm_tune", "cuda fp16", "cuda bf16", "torch_compile")
COLUMNS = """
model_type test status error rel_error is_part model_class instance parameters input_shape duration_s
torch_version tvm_version transformers_version harness_version timestamp_utc
""".split()
LIMIT_S = dict.fromkeys(TESTS, 300) | {"torch": 240}
MAX_MEMORY_BYTES = 14 * 2**30  # of address space; importing takes some 4 of it
MAX_PARAMETERS = 1e9  # counted before any is made
SEQ_LEN = 32  # tokens of a text
MISSING_LIBRARY = re.compile(r"requires the (\S+) library|No module named")
NO_CLASS = re.compile(r"has no forward\(\)|names no model class")
HUB = re.compile(r"huggingface\.co|offline mode|OfflineModeIsEnabled|HF_HUB_OFFLINE|LocalEntryNotFound|from the hub")
NO_CASE = re.compile("|".join(p.pattern for p in (MISSING_LIBRARY, HUB, NO_CLASS)))
NO_SIZE_HELPS = re.compile(f"{NO_CASE.pattern}|does not know how to make")


def find_parts():
    """Returns the config classes that are a part of another's: the library marks them so, or another one names them."""
    classes = {CONFIG_MAPPING[name] for name in CONFIG_MAPPING}
    named = {
        getattr(part, "__name__", "") for c in classes for part in (getattr(c, "sub_configs", None) or {}).values()
    }
    return {c for c in classes if getattr(c, "base_config_key", "") or c.__name__ in named}


# ---- One test of one type, in a process of its own ------------------------------------------------------------------


def find_instance(model_type):
    """Returns the row's columns of the test `torch`: those of the first of SIZES that eager PyTorch runs."""
    limit_resources()
    errors = []
    for size in SIZES:
        try:
            columns = run_test("torch", model_type, size)
            return {**columns, "instance": size.name}
        except Exception as error:
            errors.append((size.name, one_line(error)))
            if NO_SIZE_HELPS.search(errors[-1][1]):
                break
    # The least change says most, but for a size that is only too large.
    instance, error = next((e for e in reversed(errors) if "parameters" not in e[1]), errors[-1])
    status = "no case" if NO_CASE.search(error) else "failed"
    return {"status": status, "error": error, "instance": instance}


def run_known(test, model_type, instance):
    """Returns the row's columns of a test on the instance that eager PyTorch has run."""
    limit_resources()
    return run_test(test, model_type, next(size for size in SIZES if size.name == instance))


@torch.no_grad()
def run_test(test, model_type, size):
    """Returns the row's columns of one test of one size of a model type. Raises whatever goes wrong."""
    config = small_config(default_config(model_type), size)
    precision = test.removeprefix("cuda ") if test.startswith("cuda") else "fp32"
    model_class = benchmark_class(model_type, config)
    case = make_case(config, model_name=model_type, model_class=model_class, precision=precision, seq_len=SEQ_LEN)
    columns = {"model_class": model_class.__name__, "input_shape": describe_shapes(case)}
    columns["parameters"] = count_parameters(model_class, config)
    if test.startswith("cuda"):
        try:
            generate_cuda(case)
        except Exception:
            eager_error = run_eager(case)
            if eager_error:  # such as a mask in fp32 that reaches a weight in fp16
                return {**columns, "status": "no case", "error": f"eager PyTorch does not run it: {eager_error}"}
            raise
        return {**columns, "status": "ok"}
    reference = compute_reference(case, "fp32", "device")
    model, inputs = load_on_device(case, PRECISIONS[precision].dtype)
    item = benchmark.TEST_ITEMS[test]
    with benchmark.inference_mode(test), unittest.mock.patch.object(tuning, "find_kernels", lambda case: ({}, 0)):
        run, first, _ = benchmark.compile_and_run(functools.partial(item.build, model, inputs, case), case.device)
        last = benchmark.run_once(run, case.device)
        change_inputs(inputs, case)
        changed = benchmark.run_once(run, case.device)
    return columns | reference.check(PRECISIONS[precision].tolerance, first, last, changed)


def benchmark_class(model_type, config):
    from harness.models import find_model_class

    return find_model_class(model_type, config)


def generate_cuda(case):
    """Compiles a case's model as the item `tvm` does, for Hopper, up to linked machine code.

    Where there is no CUDA runtime TVM keeps the kernels as source, and calls no compiler.
    """
    import tvm

    target = tvm.target.Target(json.loads(H200))
    model, inputs = load_on_device(case, PRECISIONS[case.precision].dtype)
    module, _ = import_to_relax(export_for_tvm(model, inputs))
    options = {"relax.backend.use_cuda_graph": True, "tirx.disable_assert": True}
    executable = compile_module(module, target, "default", options)
    (host,) = executable.mod.imports
    with target:
        for kernels in host.imports:
            compile_kernels(kernels.inspect_source("cuda"))


def run_eager(case):
    """Returns what goes wrong in one line, "" for nothing, where eager PyTorch runs a case on the CPU."""
    model, inputs = load_on_device(case, PRECISIONS[case.precision].dtype)
    try:
        model(**inputs)
    except Exception as error:
        return one_line(error)
    return ""


def count_parameters(model_class, config):
    """Returns the number of a model's parameters, "" where it computes with values while it is built.

    Raises ValueError where there are more than MAX_PARAMETERS.
    """
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    except Exception as error:
        if isinstance(error, NotImplementedError) or re.search(r"meta|item\(\)", str(error)):
            return ""
        raise
    if count > MAX_PARAMETERS:
        raise ValueError(f"{count / 1e9:.1f} billion parameters")
    return count


def limit_resources():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# ---- All types ------------------------------------------------------------------------------------------------------


def take(test, model_type, known):
    """Returns a row's columns of one test of one type; known: the row of its test `torch`, None where that is this."""
    try:
        with Worker(isolated=True) as worker:
            if test == "torch":
                return worker.call(find_instance, model_type, timeout_s=LIMIT_S[test])
            return worker.call(run_known, test, model_type, known["instance"], timeout_s=LIMIT_S[test])
    except (UserError, WorkerError) as error:
        return {"status": "failed", "error": str(error)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="write docs/families.md from the rows, run nothing")
    parser.add_argument("--csv", type=Path, default=FAMILIES)
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=TESTS)
    parser.add_argument("--types", nargs="+", help="only these (default: all that transformers knows)")
    parser.add_argument("--again", action="store_true", help="rows that are there are made anew")
    parser.add_argument("--failed", action="store_true", help="only those whose row is not ok, anew")
    args = parser.parse_args()
    if args.publish:
        publish(read_rows(args.csv), DOCS / "families.md")
        move_superseded(args.csv, HISTORY)
        return 0
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    parts = find_parts()
    names = args.types or sorted(CONFIG_MAPPING, key=lambda name: CONFIG_MAPPING[name] in parts)
    importlib.import_module("transformers.models.bert.modeling_bert")  # and what all model types share, once
    compilers = {"torch": None, "torch_compile": "torch_compile"}
    for name in dict.fromkeys(compilers.get(test, "tvm_tune") for test in args.tests):
        if name:
            benchmark.import_compiler(name, ["fp16"])
    if "torch_compile" in args.tests:
        importlib.import_module("torch._inductor.cpu_vec_isa").pick_vec_isa()  # 10 s: what this CPU's vectors are
    durations = {name: float(row["duration_s"]) for (name, test), row in read_rows(args.csv).items() if test == "torch"}
    for test in args.tests:
        names.sort(key=lambda name: durations.get(name, 0))  # the quickest first: most rows in a given time
        for model_type in names:
            rows = read_rows(args.csv)
            known, row = rows.get((model_type, "torch")), rows.get((model_type, test))
            if test != "torch" and (known is None or known["status"] != "ok"):
                continue
            if row and not args.again and not (args.failed and row["status"] != "ok"):
                continue
            start = time.monotonic()
            columns = take(test, model_type, known)
            row = {
                "model_type": model_type,
                "test": test,
                "is_part": CONFIG_MAPPING[model_type] in parts,
                "instance": known and known["instance"],
                **columns,
                "duration_s": f"{time.monotonic() - start:.1f}",
                "torch_version": torch.__version__,
                "tvm_version": version("apache-tvm"),
                "transformers_version": transformers.__version__,
                "harness_version": harness_version(),
                "timestamp_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            append(args.csv, row)
            print(model_type, test, row["status"], row.get("error", ""), flush=True)
    return 0


def publish(rows, path):
    """Writes the two tables of docs/families.md between their marks: how many came out how, and a line a type."""
    parts = find_parts()
    whole = [name for name in CONFIG_MAPPING if CONFIG_MAPPING[name] not in parts]
    counts = [("test", *STATUSES, "not reached")]
    for test in TESTS:
        found = [rows[name, test]["status"] if (name, test) in rows else "not reached" for name in whole]
        counts.append((test, *(found.count(status) for status in counts[0][1:])))
    lines = [("model type", "class", *TESTS, "why not")]
    for name in sorted(CONFIG_MAPPING):
        of_type = {test: rows[name, test] for test in TESTS if (name, test) in rows}
        if not of_type and CONFIG_MAPPING[name] in parts:
            continue
        reasons = [f"{test}: {row['error']}" for test, row in of_type.items() if row["error"]]
        reason = reasons[0].replace("|", "/")[:REASON_LENGTH] if reasons else ""
        statuses = [of_type[test]["status"] if test in of_type else "" for test in TESTS]
        model_class = of_type.get("torch", {}).get("model_class", "")
        lines.append((name, model_class, *statuses, reason))
    text = path.read_text(encoding="utf-8")
    for mark, table in (("counts", counts), ("families", lines)):
        before, _, rest = text.partition(f"<!-- {mark}: tests/census.py writes this part -->\n")
        _, end, after = rest.partition(f"<!-- end of {mark} -->")
        marked = f"{before}<!-- {mark}: tests/census.py writes this part -->\n"
        text = f"{marked}\n{markdown(table)}\n\n{end}{after}"
    path.write_text(text, encoding="utf-8")


def markdown(table):
    """Returns a table, a list of tuples of which the first is the header, in markdown."""
    header, *lines = [f"| {' | '.join(map(str, line))} |" for line in table]
    return "\n".join([header, "|" + "---|" * len(table[0]), *lines])


def move_superseded(path, history):
    """Moves the rows that do not count any more to the compressed CSV `history`, behind those that are there."""
    rows, before = read_all_rows(path), read_all_rows(history)
    kept = find_latest(rows)
    superseded = [row for row in rows if kept[row["model_type"], row["test"]] is not row and row not in before]
    for target, lines in ((history, [*before, *superseded]), (path, kept.values())):
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
        data = text.getvalue().encode()
        replace(target, compress(data) if target.suffix == ".gz" else data)


def read_rows(path):
    """Returns {(model type, test): its latest row}."""
    return find_latest(read_all_rows(path))


def find_latest(rows):
    """Returns {(model type, test): the last row of it}."""
    return {(row["model_type"], row["test"]): row for row in rows}


def read_all_rows(path):
    """Returns the rows of a CSV, which may be compressed, as dicts of text; none where there is no file."""
    if not path.exists():
        return []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def without_directories(text):
    """Returns a text with the files in it by their last names, or from site-packages on: the rest is of one machine."""
    return re.sub(r"/?(?:[\w.+-]+/)*site-packages/|(?<![\w./-])/(?:[\w.+-]+/)+", "", text)


def append(path, row):
    row, is_new = row | {"error": without_directories(row.get("error", ""))}, not path.exists()
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
