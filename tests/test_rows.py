"""Rows: appended whole from several processes, and found again by their key."""

import csv
import multiprocessing
import time

from harness.rows import COLUMNS, KEY, append_row, find_statuses


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
