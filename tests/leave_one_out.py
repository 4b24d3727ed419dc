"""What the library is worth to a model that it does not know: on a device whose library has models tuned in full.

    python tests/leave_one_out.py fp16 google/vit-base-patch16-224 google-bert/bert-base-uncased

All that the models' own tuning has found is left out of a copy of the library, one model at a time. Then tvm_tune runs
without a search, after a minute of one, and with the library as it is; `tvm` is what it all starts from. The estimates
of the minute, over its seconds, come after the table.
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT
from harness.names import file_stem
from tvm_items.library import CASES, KERNELS

SEARCH_MINUTES = 1
CURVE_S = (5, 10, 15, 20, 30, 45, 60)


def copy_library(source, target, left_out=None):
    """Copies the libraries of all devices, less the lines that come from tuning the model `left_out`."""
    for file in [*source.glob(f"*/{KERNELS}"), *source.glob(f"*/{CASES}")]:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        if left_out is not None:
            lines = [line for line in lines if not json.loads(line)["case"].startswith(file_stem(left_out) + ".")]
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("".join(lines), encoding="utf-8")


def run(model, precision, library, directory, item, *options):
    """Returns the row, a dict, of one item of a model at batch size 1."""
    results = Path(directory) / "rows.csv"
    command = [sys.executable, ROOT / "benchmark.py", "--model", model, "--precision", precision, "--test-items", item]
    command += ["--weights", "random", "--tuning-dir", library, "--results", results, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    with results.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))[-1]


def estimates(library):
    """Returns [(seconds, estimated milliseconds)] of the one journal in a directory of libraries."""
    (journal,) = library.glob("*/*.journal")
    lines = map(json.loads, journal.read_text(encoding="utf-8").splitlines())
    return [(line["elapsed_s"], line["estimated_ms"]) for line in lines if "estimated_ms" in line]


def main(precision, *models):
    published = ROOT / "results" / "tuning"
    curves = {}
    print("| model | tvm | without a search | after a minute | in full | share of the gain, without and after |")
    print("|---|---|---|---|---|---|", flush=True)
    for model in models:
        with tempfile.TemporaryDirectory() as directory:
            whole, without = Path(directory) / "whole", Path(directory) / "without"
            copy_library(published, whole)
            copy_library(published, without, left_out=model)
            rows = [
                run(model, precision, without, directory, "tvm"),
                run(model, precision, without, directory, "tvm_tune"),
                run(model, precision, without, directory, "tvm_tune", "--tune-minutes", str(SEARCH_MINUTES)),
                run(model, precision, whole, directory, "tvm_tune"),
            ]
            curves[model] = estimates(without)
        default, unsearched, searched, full = (float(row["infer_time_median_ms"]) for row in rows)
        shares = [(default - other) / (default - full) for other in (unsearched, searched)]
        times = (f"{ms:.3f} ms" for ms in (default, unsearched, searched, full))
        print(f"| {model} | {' | '.join(times)} | {shares[0]:.0%}, {shares[1]:.0%} |", flush=True)
    print(f"\n| model | {' | '.join(f'{s} s' for s in CURVE_S)} |\n|{'---|' * (len(CURVE_S) + 1)}")
    for model, curve in curves.items():
        cells = [next((f"{ms:.3f}" for s, ms in reversed(curve) if s <= limit), "") for limit in CURVE_S]
        print(f"| {model} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
