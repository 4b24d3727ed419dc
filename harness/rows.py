"""The rows: the CSV's columns, what makes two rows comparable, the order of the items, appending and looking up."""

import contextlib
import csv
import fcntl
import io
import math
import os
import stat
import tempfile
from pathlib import Path

from harness.errors import UserError, warn

RESULTS = Path(__file__).resolve().parent.parent / "results"
PUBLISHED_RESULTS, PUBLISHED_COVERAGE = RESULTS / "benchmark.csv", RESULTS / "coverage.csv"
PUBLISHED_DECODE = RESULTS / "decode.csv"
PUBLISHED_HISTORY = RESULTS / "history.csv.gz"  # rows that were published once: harness/reports/history.py
LOCAL = RESULTS / "local"  # a user's own rows, pictures and schedules; ignored by git
LOCAL_RESULTS = LOCAL / "benchmark.csv"

PHASES = ("forward", "decode")  # a forward pass over whole inputs, or one token more against a cache: decode.py

# New columns go to the end.
COLUMNS = """
model_name test_item batch_size compile_time_s infer_time_mean_ms infer_time_median_ms infer_time_std_ms
infer_time_min_ms infer_time_p90_ms infer_time_p99_ms iterations throughput_samples_per_s peak_memory_mib rel_error
precision device_name weights input_shape status error torch_version tvm_version transformers_version cuda_version
driver_version timestamp_utc energy_mj_per_sample warnings concurrent_cases tune_time_s tune_trials
warm_start_time_s host_time_ms model_class config_hash cpu_threads harness_version reference
phase context_len tokens_per_s bandwidth_share layers
""".split()
# What makes two rows runs of the same thing by different items, in two parts: the case, and what it was measured with.
CASE = "model_name model_class config_hash batch_size input_shape".split()
SETTING = """
device_name precision weights cpu_threads torch_version tvm_version transformers_version harness_version
phase context_len
""".split()
KEY = CASE + SETTING
HOST_BOUND_SHARE = 0.9  # a row waits for the host whose host_time_ms is at least so much of its median

# In tables and pictures; what is not named here comes last.
PRECISION_ORDER = ("fp32", "tf32", "fp16", "bf16")
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


def precision_order(precision):
    """Returns the same for precisions."""
    return PRECISION_ORDER.index(precision) if precision in PRECISION_ORDER else len(PRECISION_ORDER), precision


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
    """Raises UserError unless rows can be appended to `path`; makes nothing but the default's own directory."""
    try:
        if path == LOCAL_RESULTS:
            LOCAL.mkdir(exist_ok=True)
        try:
            kind = stat.S_IFMT(path.stat().st_mode)
        except FileNotFoundError:
            kind = None
        if kind == stat.S_IFDIR:
            raise UserError(f"--results {path} is a directory; give the path of a CSV file")
        if kind not in (stat.S_IFREG, None):
            raise UserError(f"--results {path} is not a regular file; give the path of a CSV file")
        if not path.parent.is_dir():
            raise UserError(f"--results {path}: there is no directory {path.parent}; make it first")
        with path.open("r+b") if kind else tempfile.TemporaryFile(dir=path.parent) as file:
            header = file.readline()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        raise UserError(f"--results {path} is not writable: {getattr(error, 'strerror', error)}") from None
    if header and not is_header(header):
        raise UserError(f"--results {path} has another header than this version's rows; give another path")


def is_header(line):
    """Returns whether a line of a file, in bytes, is the header of this version's rows."""
    return line.rstrip(b"\r\n") == ",".join(COLUMNS).encode()


def append_row(path, row, unless=()):
    """Appends one row, a dict, and the header where the file is empty, with one write under a lock: rows never mix.

    The row is on the disk when this returns; where that cannot be, an OSError says why, and the file is as it was. The
    lock holds between hosts too, where the file system has locks (NFS 4 has); without locks there is a warning. What a
    writer that lost its power left half written, a last line without its end and with fewer cells than the header, is
    cut off. Nothing is appended where the item's latest row, which another process may have written meanwhile, has one
    of the statuses in `unless`.
    """
    with open_locked(path) as file:
        file.seek(0)
        content = file.read()
        if unless and find_statuses_in(content, row).get(row["test_item"]) in unless:
            return
        header, _, _ = content.partition(b"\n")
        if content and not is_header(header):
            raise OSError("its header is no longer that of this version's rows")
        _, _, last = content.rpartition(b"\n")
        text = "" if content else csv_line(COLUMNS)
        end = len(content)
        if last and len(read_cells(last) or ()) >= len(COLUMNS):
            text = "\n"  # a whole row: an editor saved the file without the last line's end
        elif last:
            end -= len(last)
            file.truncate(end)
        try:
            write_all(file, (text + csv_line(row.get(name) for name in COLUMNS)).encode())
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)  # a disk that is full may have taken a part
            raise


def open_locked(path):
    """Returns a file opened for appending, and made where there is none, with the lock on it.

    Where another process has put a new file in its place before the lock was had, it is that one.
    """
    while True:
        file = path.open("a+b", buffering=0)
        try:
            lock(file, path)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def lock(file, path):
    """Takes the lock on an open file, which ends when that is closed; warns, once, where its file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if path not in _without_locks:
            _without_locks.add(path)
            warn(f"{path} cannot be locked ({error.strerror}): let no other process append to it")


_without_locks = set()  # of the results files: those whose file system has been found to have no locks


def write_all(file, data):
    """Writes all the bytes to an unbuffered file, of which one write may take a part."""
    while data:
        data = data[file.write(data) :]


def csv_line(values):
    """Returns the values as one line of CSV, with its end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow([cell_text(value) for value in values])
    return buffer.getvalue()


def cell_text(value):
    """Returns what a cell holds for a value: text without line breaks that UTF-8 has.

    A byte of a path that is not UTF-8, and a line break in one, stand there as Python escapes them: every row is one
    line, whatever a directory is called.
    """
    if value is None:
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.encode(errors="backslashreplace").decode().replace("\r", "\\r").replace("\n", "\\n")


def read_cells(line):
    """Returns the cells of a line, in bytes; None where it is no CSV."""
    try:
        return next(csv.reader([line.decode(errors="replace").rstrip("\r\n")]), [])
    except csv.Error:  # a cell larger than the module takes
        return None


def find_statuses(path, row):
    """Returns {test item: status of its latest row in `path`} over the rows that have the KEY of `row`.

    Nothing where the file is not there, cannot be read, or has another header: nothing is known to have run then.
    """
    try:
        return find_statuses_in(path.read_bytes(), row)
    except OSError:
        return {}


def find_statuses_in(content, row):
    """Returns the same as find_statuses() for what a file holds, in bytes. What is no whole row is passed over."""
    header, *lines = content.split(b"\n")
    if not is_header(header):
        return {}
    key = [cell_text(row[name]) for name in KEY]
    rows = (dict(zip(COLUMNS, cells)) for cells in map(read_cells, lines) if cells and len(cells) == len(COLUMNS))
    return {other["test_item"]: other["status"] for other in rows if [other[name] for name in KEY] == key}
