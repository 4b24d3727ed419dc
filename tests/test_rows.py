"""Rows: appended whole from several processes, and found again by their key."""

import csv
import errno
import multiprocessing
import os
import resource
import time
from pathlib import Path

import pytest

from conftest import read_csv
from harness import rows
from harness.errors import UserError
from harness.rows import COLUMNS, KEY, append_row, check_results_file, find_statuses


def append_many(path, writer, count):
    finished = path.with_name(f"finished-{writer}").open("a")
    for number in range(count):
        append_row(path, {"model_name": f"{writer}", "batch_size": number, "error": 'a "quoted", ' * 20})
        print(number, file=finished, flush=True)


def test_rows_from_sixteen_processes_stay_whole(tmp_path):
    """1,000 appends at once, some writers killed: every row that was finished is there, whole, once."""
    path = tmp_path / "rows.csv"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(path, writer, 63)) for writer in range(16)]
    for process in writers:
        process.start()
    for victim in (3, 7, 12):
        while not path.with_name(f"finished-{victim}").exists():
            time.sleep(0.01)
        writers[victim].kill()
    for process in writers:
        process.join()
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == COLUMNS
    assert all(len(row) == len(header) and row[19] == 'a "quoted", ' * 20 for row in rows)
    there = [(int(row[0]), int(row[2])) for row in rows]
    finished = {(writer, int(number)) for writer in range(16) for number in path.with_name(f"finished-{writer}").open()}
    assert len(set(there)) == len(there) and finished <= set(there)
    assert len(finished) > 13 * 63 and len(there) - len(finished) <= 3  # at most the append that the kill interrupted


def test_what_counts_as_the_same_run(tmp_path):
    path = tmp_path / "rows.csv"
    row = {name: f"a {name}" for name in COLUMNS} | {"test_item": "torch", "status": "failed"}
    assert find_statuses(path, row) == {}
    append_row(path, row)
    append_row(path, row | {"status": "ok"}, unless=("failed",))  # another process was first
    append_row(path, row | {"test_item": "tvm"})
    assert find_statuses(path, row) == {"torch": "failed", "tvm": "failed"}
    append_row(path, row | {"status": "ok", "infer_time_mean_ms": 1.5}, unless=("ok",))
    assert find_statuses(path, row) == {"torch": "ok", "tvm": "failed"}
    for name in KEY:
        assert find_statuses(path, row | {name: "other"}) == {}
    for name in ("compile_time_s", "timestamp_utc", "warnings", "concurrent_cases", "driver_version"):
        assert find_statuses(path, row | {name: "other"}) != {}


def test_a_half_written_line_is_cut_off_and_a_whole_one_is_kept(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [{name: f"{name} {number}" for name in COLUMNS} for number in range(3)]
    append_row(path, rows[0])
    whole = path.read_text()
    path.write_text(whole.rstrip("\n"))  # as an editor may save it
    append_row(path, rows[1])
    assert path.read_text() == whole + whole.splitlines()[1].replace(" 0", " 1") + "\n"
    kept = path.read_text()
    for end in (1, len(whole) // 4, 2):  # of the line that the power failure left
        path.write_text(kept + whole.splitlines()[1][:-end])
        assert find_statuses(path, rows[0]) == {"test_item 0": "status 0"}
        append_row(path, rows[2])
        lines = path.read_text().splitlines()
        assert path.read_text().endswith(" 2\n")
        assert [line.count(",") for line in lines] == [lines[0].count(",")] * len(lines)


ROW = {name: f"a {name}" for name in COLUMNS}
HEADER = ",".join(COLUMNS)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "rows.csv"
    append_row(path, ROW)
    whole = path.read_bytes()

    def append_on_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, len(whole) + 20))  # the kernel takes 20 bytes more
        try:
            append_row(path, ROW)
        except OSError as error:
            os._exit(error.errno)

    process = multiprocessing.get_context("fork").Process(target=append_on_a_full_disk)
    process.start()
    process.join()
    assert process.exitcode == errno.EFBIG and path.read_bytes() == whole


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_one_warning(tmp_path, monkeypatch, capsys, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rows.fcntl, "flock", no_locks)
    path = tmp_path / "rows.csv"
    for _ in range(3):
        append_row(path, ROW)
    assert len(path.read_text().splitlines()) == 4
    assert capsys.readouterr().err.count("cannot be locked") == 1


@pytest.mark.parametrize(
    "content",
    [
        f"{HEADER},new_column\n{'x,' * len(COLUMNS)}y",  # a whole row that lacks its newline, of a later version
        f"{HEADER.rpartition(',')[0]}\nx{',x' * (len(COLUMNS) - 2)}",  # of an earlier one
        "a,b\n1,2\n",
        "somebody's notes",
    ],
)
def test_a_file_whose_header_has_changed_stays_as_it_is(tmp_path, content):
    path = tmp_path / "rows.csv"
    check_results_file(path)
    path.write_text(content)
    with pytest.raises(OSError, match="header"):
        append_row(path, ROW)
    assert path.read_text() == content
    assert find_statuses(path, ROW) == {}


def test_a_whole_last_line_with_more_cells_than_the_header_stays(tmp_path):
    path = tmp_path / "rows.csv"
    content = f"{HEADER}\nx{',x' * len(COLUMNS)}"
    path.write_text(content)
    append_row(path, ROW)
    assert path.read_text().startswith(content + "\n") and find_statuses(path, ROW) == {"a test_item": "a status"}


@pytest.mark.parametrize("name", ["/tmp/\udcff\udc80", "line\nbreak", "carriage\rreturn\r\n", '"', "a,b", "\0", "é☃"])
def test_any_name_makes_a_row_of_one_line_that_is_found_again(tmp_path, name):
    path = tmp_path / "rows.csv"
    row = ROW | {"model_name": name}
    append_row(path, ROW)
    append_row(path, row)
    append_row(path, row, unless=("a status",))
    append_row(path, ROW | {"test_item": "next"})
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4
    assert find_statuses(path, row) == {"a test_item": "a status"}
    assert [set(other) for other in read_csv(path)] == [set(COLUMNS)] * 3


@pytest.mark.parametrize("damage", [b'"\n', b"\xff\n", b"," * 99 + b"\n", b"x" * 200_000 + b"\n", b"\0\r\n", b"\n\n"])
def test_a_damaged_line_hides_no_other_row(tmp_path, damage):
    path = tmp_path / "rows.csv"
    append_row(path, ROW)
    path.write_bytes(path.read_bytes() + damage)
    append_row(path, ROW | {"test_item": "next"})
    assert find_statuses(path, ROW) == {"a test_item": "a status", "next": "a status"}


def test_what_rows_cannot_be_appended_to(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    names = ["x" * 300, "x/" * 3000 + "y", "nul\0byte", "fifo", "loop", "file/rows.csv", "missing/rows.csv", "."]
    before = sorted(tmp_path.iterdir())
    for path in [*(tmp_path / name for name in names), Path("/dev/full"), Path("nul\0byte")]:
        with pytest.raises(UserError, match="--results"):
            check_results_file(path)
    assert sorted(tmp_path.iterdir()) == before
