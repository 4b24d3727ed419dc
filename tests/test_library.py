"""What tuning keeps on the disk: the library of schedules, and journals."""

import json
import multiprocessing
import os
import signal
import time

import pytest
from build_published import find_case

from conftest import ROOT
from tvm_items import library
from tvm_items.journal import Journal, journal_path, read_journal
from tvm_items.library import (
    CASES,
    KERNELS,
    add_to_library,
    device_directory,
    merge_kernels,
    read_library,
    read_lines,
    schedule_key,
)
from tvm_items.records import Kernel, TunedCase, TuningFileError

KERNEL = {
    "task": "a",
    "name": "product",
    "arguments": ["float32[2,4]", "float32[]"],
    "space": 1,
    "decisions": [[2, 4], 3, None],
    "seconds": 1e-6,
    "default_seconds": 2e-6,
    "device": "here",
    "arch": "sm_90",
    "tvm": "1",
    "case": "model.x=1.fp32",
}
CASE = {"case": "model.x=1.fp32", "device": "here", "tvm": "1", "tune_time_s": 1.5, "tune_trials": 16}
CASE |= {"asked_trials": 8, "kernels": 1}
TRIAL = {"task": "a", "elapsed_s": 1.5, "space": 1, "decisions": [[2, 4], 3], "seconds": None, "trials": 1}
# What no journal and no library may hold in the place of the design space's number, and so on.
WRONG = {
    "task": [None, 5, ["a"]],
    "space": [-1, "1", 1.5, True, 2**70],
    "decisions": ["12", 5, {}, [-3], [[0]], ["1"], [[1, [2]]], [1.5]],
    "seconds": ["1e-6", -1.0, [], float("inf"), float("nan"), True],
}
WRONG_KERNEL = WRONG | {"arguments": [[5], ["float32"], ["float32[-1]"], ["float32[1,]"], ["[" * 99]], "arch": [None]}


def kernel(seconds, **fields):
    return {**KERNEL, "seconds": seconds, "decisions": [round(1e9 * seconds)], **fields}


def write(directory, kernels, cases=()):
    directory.mkdir(parents=True, exist_ok=True)
    for name, lines in ((KERNELS, kernels), (CASES, cases)):
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- The library ----------------------------------------------------------------------------------------------------


def test_a_library_comes_back_as_it_was_written(tmp_path):
    assert read_library([tmp_path], "here", "1") == ({}, [], {})
    add_to_library(tmp_path / "here", [KERNEL], CASE, set())
    assert read_library([tmp_path], "here", "1") == ({"a": KERNEL}, [], {CASE["case"]: CASE})
    add_to_library(tmp_path / "here", [], CASE | {"tune_trials": 3}, set())
    found = read_library([tmp_path], "here", "1")
    assert found.kernels == {"a": KERNEL} and found.cases[CASE["case"]]["tune_trials"] == 3


def test_two_libraries_merge_to_the_fastest_of_each_kernel():
    one = [kernel(1e-6), kernel(5e-6, task="b"), kernel(2e-6, tvm="2")]
    other = [kernel(3e-6), kernel(4e-6, task="b"), kernel(9e-6, task="c", device="there")]
    merged = merge_kernels(one, other)
    assert merged == merge_kernels(other, one) == merge_kernels(merged, one)
    assert [(k["task"], k["device"], k["tvm"], k["seconds"]) for k in merged] == [
        ("a", "here", "1", 1e-6),
        ("a", "here", "2", 2e-6),
        ("b", "here", "1", 4e-6),
        ("c", "there", "1", 9e-6),
    ]


def test_what_a_run_has_measured_itself_counts_and_what_the_library_said_of_it_does_not():
    claimed, found = kernel(1e-12, decisions=[1]), kernel(3e-6, decisions=[2])
    assert merge_kernels([claimed], [found]) == [claimed]
    assert merge_kernels([claimed], [found], {schedule_key(claimed)}) == [found]
    there = claimed | {"device": "there"}
    assert merge_kernels([there], [found], {schedule_key(claimed)}) == [found, there]


def test_readers_take_the_faster_of_two_lines_that_git_has_put_side_by_side(tmp_path):
    slow = {**CASE, "tune_trials": 5}
    write(tmp_path / "here", [kernel(2e-6), kernel(1e-6), kernel(3e-6)], [slow, CASE, slow])
    found = read_library([tmp_path], "here", "1")
    assert found.kernels == {"a": kernel(1e-6)} and found.cases == {CASE["case"]: CASE}
    assert found.others == [kernel(2e-6), kernel(3e-6)]


def test_what_was_measured_here_goes_before_what_is_published_and_before_other_devices(tmp_path, capsys):
    own, published = tmp_path / "own", tmp_path / "published"
    write(own / "here", [kernel(3e-6), kernel(1e-6, task="old", tvm="0")])
    write(published / "here", [kernel(2e-6), kernel(2e-6, task="b")], [CASE])
    write(published / "there", [kernel(1e-9, device="there"), kernel(1e-9, task="c", device="there")])
    write(published / "broken", [{}])
    found = read_library([own, published], "here", "1")
    assert found.kernels == {"a": kernel(3e-6), "b": kernel(2e-6, task="b")} and CASE["case"] in found.cases
    assert sorted(k["task"] + k["device"] + k["tvm"] for k in found.others) == [
        "ahere1",
        "athere1",
        "cthere1",
        "oldhere0",
    ]
    assert "broken/kernels.jsonl is damaged" in capsys.readouterr().err
    assert read_library([published], "there", "1").kernels.keys() == {"a", "c"}


def add_kernels(directory, number):
    for i in range(10):
        case = {**CASE, "case": f"model{number}.x=1.fp32"}
        add_to_library(directory, [kernel(1e-6, task=f"{number}-{i}"), kernel(1e-6 * (1 + i + number))], case, set())


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add_kernels, args=(tmp_path / "here", number)) for number in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        read_library([tmp_path], "here", "1")  # whole at every moment
    assert [writer.exitcode for writer in writers] == [0] * 4
    found = read_library([tmp_path], "here", "1")
    assert len(found.kernels) == 4 * 10 + 1 and len(found.cases) == 4
    assert found.kernels["a"]["seconds"] == 1e-6 and found.others == []


def hang(_):
    time.sleep(100)


def add_and_hang(directory):
    library.os.fsync = hang  # the new file is written and not yet in its place
    add_to_library(directory, [kernel(1e-9)], CASE, set())


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    add_to_library(tmp_path / "here", [KERNEL], CASE, set())
    writer = multiprocessing.get_context("fork").Process(target=add_and_hang, args=(tmp_path / "here",))
    writer.start()
    while not (tmp_path / "here" / "kernels.new").exists() or not (tmp_path / "here" / "kernels.new").stat().st_size:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert read_library([tmp_path], "here", "1").kernels == {"a": KERNEL}
    add_to_library(tmp_path / "here", [kernel(1e-7)], CASE, set())  # neither its lock nor its file is in the way
    assert read_library([tmp_path], "here", "1").kernels == {"a": kernel(1e-7)}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG_KERNEL.items() for value in values])
def test_values_of_another_type(tmp_path, name, value):
    write(tmp_path / "here", [KERNEL, {**KERNEL, name: value}])
    with pytest.raises(TuningFileError, match="damaged"):
        read_library([tmp_path], "here", "1")
    with pytest.raises(TuningFileError, match="damaged"):
        add_to_library(tmp_path / "here", [KERNEL], CASE, set())
    if name in TRIAL:
        lines = [{"origin": "here"}, TRIAL, {**TRIAL, name: value}]
        journal_path(tmp_path / "case").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(TuningFileError, match="damaged"):
            read_journal(tmp_path / "case", "here")


@pytest.mark.parametrize("line", [[], 5, None, {}, {**CASE, "more": 1}, {**CASE, "tune_time_s": "1.5"}])
def test_a_case_of_another_shape(tmp_path, line):
    write(tmp_path / "here", [], [CASE, line])
    with pytest.raises(TuningFileError, match=r"cases\.jsonl is damaged"):
        read_library([tmp_path], "here", "1")


@pytest.mark.parametrize("content", ["[" * 100_000, "\xff", "\n", '{"task": "a"', "9" * 5000, "<<<<<<< ours"])
def test_what_is_no_json(tmp_path, content):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / KERNELS).write_bytes(content.encode("latin-1"))
    with pytest.raises(TuningFileError, match="damaged"):
        read_library([tmp_path], "here", "1")
    journal_path(tmp_path / "case").write_bytes(content.encode("latin-1") + b"\n")
    with pytest.raises(TuningFileError, match="damaged"):
        read_journal(tmp_path / "case", "here")


def test_a_file_of_gigabytes(tmp_path):
    (tmp_path / "here").mkdir()
    with (tmp_path / "here" / KERNELS).open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(TuningFileError, match="larger than 64 MiB"):
        read_library([tmp_path], "here", "1")


def test_directories_in_the_place_of_files(tmp_path):
    path = tmp_path / "case"
    for file in (tmp_path / "here" / KERNELS, journal_path(path)):
        file.mkdir(parents=True)
    with pytest.raises(TuningFileError, match="cannot be read: Is a directory"):
        read_library([tmp_path], "here", "1")
    with pytest.raises(TuningFileError, match="cannot be read: Is a directory"):
        read_journal(path, "here")
    with pytest.raises(TuningFileError, match="cannot be written: Is a directory"):
        Journal(path, "here")
    (tmp_path / "file").touch()
    with pytest.raises(TuningFileError, match="cannot be written"):
        Journal(tmp_path / "file" / "case", "here")
    with pytest.raises(TuningFileError, match="cannot be written"):
        add_to_library(tmp_path / "file", [KERNEL], CASE, set())


def test_the_published_libraries_can_be_read():
    devices = {file.parent.name for file in (ROOT / "results" / "tuning").glob(f"*/{KERNELS}")}
    assert "NVIDIA_H200" in devices
    for device in devices:
        kernels = read_lines(ROOT / "results" / "tuning" / device / KERNELS, Kernel)
        cases = read_lines(ROOT / "results" / "tuning" / device / CASES, TunedCase)
        # A case whose kernels are other ones now is gone; one that was not searched may have found all of them here.
        assert {case["case"] for case in cases if case["asked_trials"]} <= {kernel["case"] for kernel in kernels}
        assert {device_directory(ROOT, line["device"]).name for line in (*kernels, *cases)} == {device}


def test_published_cases_are_found_by_their_names():
    published = read_lines(ROOT / "results" / "tuning" / "NVIDIA_H200" / CASES, TunedCase)
    for tuned in published:
        find_case(tuned)  # asserts that the case has that name
    step = find_case({"case": "meta-llama--Llama-3.2-1B.input_ids=2x1.decode-1024.layers-16.fp16"})
    assert (step.batch_size, step.context_len, step.config.num_hidden_layers) == (2, 1024, 16)


# ---- Journals -------------------------------------------------------------------------------------------------------


def test_a_journal_survives_its_writer(tmp_path):
    path = tmp_path / "device" / "case"
    journal = Journal(path, "here")
    journal.append({"task": "a", "seconds": 1.5})
    with pytest.raises(TuningFileError, match="another process"):
        Journal(path, "here")
    journal.file.close()
    with journal_path(path).open("a") as file:
        file.write('{"task": "b", "sec')  # what a power failure leaves
    again = Journal(path, "here")
    assert again.trials == [{"task": "a", "seconds": 1.5}]
    again.append({"task": "c"})
    assert read_journal(path, "here") == [{"task": "a", "seconds": 1.5}, {"task": "c"}]
    with pytest.raises(TuningFileError, match="is of here"):
        read_journal(path, "there")
    journal_path(path).write_text("not JSON\n")
    with pytest.raises(TuningFileError, match="damaged"):
        read_journal(path, "here")


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("tvm_items.journal.fcntl.flock", refuse)
    Journal(tmp_path / "case", "here").append({"task": "a", "error": "not UTF-8: \udcff"})
    assert "cannot be locked" in capsys.readouterr().err
    assert read_journal(tmp_path / "case", "here") == [{"task": "a", "error": "not UTF-8: ?"}]
    add_to_library(tmp_path / "here", [KERNEL], CASE, set())
    assert "cannot be locked" in capsys.readouterr().err
    assert read_library([tmp_path], "here", "1").kernels == {"a": KERNEL}
