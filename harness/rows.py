"""The rows: the CSV's columns, what makes two rows comparable, the order of the items, appending and looking up."""

import csv
import fcntl
import io
import math
import os
import tempfile
from pathlib import Path

from harness.errors import UserError

RESULTS = Path(__file__).resolve().parent.parent / "results"
PUBLISHED_RESULTS, PUBLISHED_COVERAGE = RESULTS / "benchmark.csv", RESULTS / "coverage.csv"
LOCAL = RESULTS / "local"  # a user's own rows, pictures and tuning databases; ignored by git
LOCAL_RESULTS = LOCAL / "benchmark.csv"

# New columns go to the end.
COLUMNS = """
model_name test_item batch_size compile_time_s infer_time_mean_ms infer_time_median_ms infer_time_std_ms
infer_time_min_ms infer_time_p90_ms infer_time_p99_ms iterations throughput_samples_per_s peak_memory_mib rel_error
precision device_name weights input_shape status error torch_version tvm_version transformers_version cuda_version
driver_version timestamp_utc energy_mj_per_sample warnings concurrent_cases tune_time_s tune_trials
warm_start_time_s host_time_ms model_class config_hash cpu_threads harness_version
""".split()
# What makes two rows runs of the same thing by different items, in two parts: the case, and what it was measured with.
CASE = "model_name model_class config_hash batch_size input_shape".split()
SETTING = """
device_name precision weights cpu_threads torch_version tvm_version transformers_version harness_version
""".split()
KEY = CASE + SETTING
HOST_BOUND_SHARE = 0.9  # a row waits for the host whose host_time_ms is at least so much of its median

# In tables and pictures; items that are not named here come last.
ITEM_ORDER = (
    "torch",
    "torch_compile",
    "torch_compile_reduce_overhead",
    "torch_compile_max_autotune",
    "tvm",
    "tvm_tune",
)
# --skip -> the statuses of a row that need no second run
SKIPPED_STATUSES = {"nothing": (), "ended": ("ok", "wrong", "failed"), "ok": ("ok",)}


def item_order(item):
    """Returns what test items are sorted by: their place in ITEM_ORDER, then their name."""
    return ITEM_ORDER.index(item) if item in ITEM_ORDER else len(ITEM_ORDER), item


def number(row, name):
    """Returns a column of a row, read from a CSV or not yet written, as a float; None where the cell is empty."""
    value = row.get(name)
    if value is None or value == "":
        return None
    value = float(value)
    return None if math.isnan(value) else value


def waits_for_host(row):
    """Returns whether the host's share binds the row's time: it says more about the host than about the compiler."""
    host_ms, median_ms = number(row, "host_time_ms"), number(row, "infer_time_median_ms")
    return host_ms is not None and median_ms is not None and host_ms >= HOST_BOUND_SHARE * median_ms


def check_results_file(path):
    """Raises UserError unless rows can be appended to `path`; writes nothing."""
    if path.is_dir():
        raise UserError(f"--results {path} is a directory; give the path of a CSV file")
    if not path.parent.is_dir():
        raise UserError(f"--results {path}: there is no directory {path.parent}; make it first")
    try:
        with path.open("r+b") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--results {path} is not writable: {error.strerror}") from None
    if path.exists() and path.stat().st_size:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            if file.readline().rstrip("\r\n") != ",".join(COLUMNS):
                raise UserError(f"--results {path} has another header than this version's rows; give another path")


def append_row(path, row, unless=()):
    """Appends one row, a dict, and the header where the file is empty, with one write under a lock: rows never mix.

    The row is on the disk when this returns. The lock holds between hosts too, where the file system has locks (NFS 4
    has). What a writer that lost its power left half written, a last line without its end, is cut off. Nothing is
    appended where the item's latest row, which another process may have written meanwhile, has one of the statuses in
    `unless`.
    """
    values = [f"{row[name]:.6g}" if isinstance(row.get(name), float) else row.get(name) for name in COLUMNS]
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if unless and find_statuses(path, row).get(row["test_item"]) in unless:
            return
        file.seek(0)
        _, _, last = file.read().rpartition(b"\n")
        if last and len(next(csv.reader([last.decode(errors="replace")]))) == len(COLUMNS):
            file.write(b"\n")  # a whole row: an editor saved the file without the last line's end
        elif last:
            file.truncate(file.tell() - len(last))
        header = csv_line(COLUMNS) if file.seek(0, os.SEEK_END) == 0 else ""
        file.write((header + csv_line(values)).encode())
        file.flush()
        os.fsync(file.fileno())


def csv_line(values):
    """Returns the values as one line of CSV, with its end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def find_statuses(path, row):
    """Returns {test item: status of its latest row in `path`} over the rows that have the KEY of `row`."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        whole = (other for other in csv.DictReader(file) if None not in other.values())  # all but a half written line
        same = (other for other in whole if all(other[name] == str(row[name] or "") for name in KEY))
        return {other["test_item"]: other["status"] for other in same}
