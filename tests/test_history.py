"""Superseded rows on their way from the published CSV to the history: none is lost, none is there twice."""

import gzip
import threading

import pytest

from harness.reports import history
from harness.rows import COLUMNS, append_row, csv_line
from made_up_rows import row, write_csv


def sweep(year, *items):
    """Returns the rows of one sweep, with the versions of its year."""
    fields = {"harness_version": f"1.0.0+{year}", "timestamp_utc": f"{year}-01-01T00:00:00+00:00"}
    return [row(item, 1, 2.0, **fields) for item in items or ("torch", "tvm")]


@pytest.fixture
def files(tmp_path):
    """Gives the paths of a CSV with the sweeps of two years, and of its history, which is not there yet."""
    return write_csv(tmp_path / "rows.csv", [*sweep("2026"), *sweep("2027")]), tmp_path / "history.csv.gz"


def lines(path):
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    header, *rows = text.splitlines(keepends=True)
    assert header == csv_line(COLUMNS) and header not in rows
    return rows


def years(path):
    return [line.partition("-01-01T")[0][-4:] for line in lines(path)]


def test_rows_move_as_they_are_and_stay_in_the_order_of_their_time(files):
    results, past = files
    everything = lines(results)
    history.move_superseded(results, past)
    assert (years(results), years(past)) == (["2027"] * 2, ["2026"] * 2)
    for late in (sweep("2028"), sweep("2025")):  # the second is of a branch that was merged late
        for new in late:
            append_row(results, new)
        everything += [csv_line(new.get(name) for name in COLUMNS) for new in late]
        history.move_superseded(results, past)
    assert (years(results), years(past)) == (["2028"] * 2, ["2025"] * 2 + ["2026"] * 2 + ["2027"] * 2)
    assert sorted(lines(results) + lines(past)) == sorted(everything)


def test_a_row_that_was_repeated_keeps_its_first_run_in_the_history(files):
    results, past = files
    again = {**sweep("2027")[1], "timestamp_utc": "2027-01-01T09:00:00+00:00"}
    append_row(results, again)
    history.move_superseded(results, past)
    assert years(past) == ["2026", "2026", "2027"] and "T09:00" in lines(results)[1]


def test_nothing_to_move_changes_nothing(tmp_path):
    results, past = write_csv(tmp_path / "rows.csv", sweep("2026")), tmp_path / "history.csv.gz"
    results.write_text(results.read_text().replace("\r\n", "\n"))
    before = results.stat()
    history.move_superseded(results, past)
    assert not past.exists() and results.stat() == before


def test_the_same_rows_make_the_same_bytes(files, tmp_path, monkeypatch):
    results, past = files
    rows = results.read_bytes()
    history.move_superseded(results, past)
    monkeypatch.setattr("time.time", lambda: 1e9)
    other = tmp_path / "other.csv"
    other.write_bytes(rows)
    history.move_superseded(other, tmp_path / "other.csv.gz")
    assert (tmp_path / "other.csv.gz").read_bytes() == past.read_bytes()
    assert past.read_bytes()[4:8] == bytes(4)  # RFC 1952: the time


@pytest.mark.parametrize("stopped_at", ["history", "rows"])
@pytest.mark.parametrize("half_written", [False, True])
def test_a_stop_at_any_time_loses_nothing(files, monkeypatch, stopped_at, half_written):
    results, past = files
    history.move_superseded(results, past)
    for new in sweep("2028"):
        append_row(results, new)
    everything = {*lines(results), *lines(past)}
    replace = history.replace

    def stop(path, data):
        if path.name.startswith(stopped_at):
            path.with_name(f"{path.name}.new").write_bytes(data[: len(data) // 2] if half_written else data)
            raise KeyboardInterrupt
        replace(path, data)

    monkeypatch.setattr(history, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        history.move_superseded(results, past)
    assert {*lines(results), *lines(past)} == everything
    monkeypatch.undo()
    history.move_superseded(results, past)
    assert sorted(lines(results) + lines(past)) == sorted(everything)
    assert not list(past.parent.glob("*.new"))


def test_a_row_that_is_appended_meanwhile_is_not_lost(files, monkeypatch):
    """It waits for the lock, and then finds that another file stands in its file's place."""
    results, past = files
    writers, replace = [], history.replace

    def replace_while_one_appends(path, data):
        if path == results:
            writers.append(threading.Thread(target=append_row, args=(results, sweep("2028")[0])))
            writers[0].start()
            writers[0].join(0.2)
            assert writers[0].is_alive()
        replace(path, data)

    monkeypatch.setattr(history, "replace", replace_while_one_appends)
    history.move_superseded(results, past)
    writers[0].join()
    assert (years(results), years(past)) == (["2027", "2027", "2028"], ["2026"] * 2)
