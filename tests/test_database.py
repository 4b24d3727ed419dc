"""What tuning keeps on the disk."""

import gzip
import json
import time

import pytest

from tvm_items.database import (
    DatabaseError,
    Journal,
    database_path,
    journal_path,
    read_database,
    read_journal,
    read_siblings,
    write_database,
)

RECORD = {"task": "a", "name": "product", "space": 1, "decisions": [[2, 4], 3, None], "seconds": 1e-6}
RECORD |= {"default_seconds": 2e-6}
DATABASE = {"origin": "here", "tune_time_s": 1.5, "tune_trials": 16, "asked_trials": 8, "records": [RECORD]}
TRIAL = {"task": "a", "elapsed_s": 1.5, "space": 1, "decisions": [[2, 4], 3], "seconds": None, "trials": 1}
# What no journal and no database may hold in the place of the design space's number, and so on.
WRONG = {
    "task": [None, 5, ["a"]],
    "space": [-1, "1", 1.5, True, None, 2**70],
    "decisions": ["12", 5, {}, [-3], [[0]], ["1"], [[1, [2]]], [1.5]],
    "seconds": ["1e-6", -1.0, [], float("inf"), float("nan"), True],
}


def test_a_journal_survives_its_writer(tmp_path):
    path = tmp_path / "device" / "case"
    journal = Journal(path, "here")
    journal.append({"task": "a", "seconds": 1.5})
    with pytest.raises(DatabaseError, match="another process"):
        Journal(path, "here")
    journal.file.close()
    with journal_path(path).open("a") as file:
        file.write('{"task": "b", "sec')  # what a power failure leaves
    again = Journal(path, "here")
    assert again.trials == [{"task": "a", "seconds": 1.5}]
    again.append({"task": "c"})
    assert read_journal(path, "here") == [{"task": "a", "seconds": 1.5}, {"task": "c"}]
    with pytest.raises(DatabaseError, match="is of here"):
        read_journal(path, "there")
    journal_path(path).write_text("not JSON\n")
    with pytest.raises(DatabaseError, match="damaged"):
        read_journal(path, "here")


def test_a_database_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "model.x=1.fp32"
    assert read_database(path, "here") is None
    write_database(path, DATABASE)
    assert read_database(path, "here") == DATABASE
    with pytest.raises(DatabaseError, match="is of here"):
        read_database(path, "there")


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_values_of_another_type(tmp_path, name, value):
    path = tmp_path / "model.x=1.fp32"
    write_database(path, {**DATABASE, "records": [{**RECORD, name: value}]})
    with pytest.raises(DatabaseError, match="damaged"):
        read_database(path, "here")
    assert read_siblings([path.with_name("model.x=2.fp32")], "here") == {}
    lines = [{"origin": "here"}, TRIAL, {**TRIAL, name: value}]
    journal_path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DatabaseError, match="damaged"):
        read_journal(path, "here")


@pytest.mark.parametrize(
    "content",
    [[], 5, None, {}, {**DATABASE, "more": 1}, {**DATABASE, "tune_time_s": "1.5"}, {**DATABASE, "asked_trials": -1}]
    + [{**DATABASE, "records": {}}, {**DATABASE, "records": [5]}, {**DATABASE, "origin": 5}],
)  # fmt: skip
def test_a_database_of_another_shape(tmp_path, content):
    write_database(tmp_path / "case", content)
    with pytest.raises(DatabaseError, match="damaged"):
        read_database(tmp_path / "case", "here")


@pytest.mark.parametrize("content", ["[" * 100_000, "\xff", "", '{"origin": "here"', "9" * 5000])
def test_a_database_that_is_no_json(tmp_path, content):
    database_path(tmp_path / "case").write_bytes(gzip.compress(content.encode("latin-1")))
    with pytest.raises(DatabaseError, match="damaged"):
        read_database(tmp_path / "case", "here")
    journal_path(tmp_path / "case").write_bytes(content.encode("latin-1") + b"\n")
    with pytest.raises(DatabaseError, match="damaged"):
        read_journal(tmp_path / "case", "here")


def test_a_small_file_that_expands_to_gigabytes(tmp_path):
    block = gzip.compress(bytes(2**26), 9)
    database_path(tmp_path / "case").write_bytes(block * 50)
    start = time.monotonic()
    with pytest.raises(DatabaseError, match="larger than 64 MiB"):
        read_database(tmp_path / "case", "here")
    assert time.monotonic() - start < 5


def test_directories_in_the_place_of_files(tmp_path):
    path = tmp_path / "case"
    for file in (database_path(path), journal_path(path)):
        file.mkdir()
    with pytest.raises(DatabaseError, match="cannot be read: Is a directory"):
        read_database(path, "here")
    with pytest.raises(DatabaseError, match="cannot be read: Is a directory"):
        read_journal(path, "here")
    with pytest.raises(DatabaseError, match="cannot be written: Is a directory"):
        Journal(path, "here")
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseError, match="cannot be written"):
        Journal(tmp_path / "file" / "case", "here")


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("tvm_items.database.fcntl.flock", refuse)
    Journal(tmp_path / "case", "here").append({"task": "a", "error": "not UTF-8: \udcff"})
    assert "cannot be locked" in capsys.readouterr().err
    assert read_journal(tmp_path / "case", "here") == [{"task": "a", "error": "not UTF-8: ?"}]
