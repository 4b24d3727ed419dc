"""tvm_tune as a user runs it: what a killed run leaves, what another one needs, and which libraries are refused."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, TINY_RESNET, make_case, process_list, read_csv
from harness.models import find_model
from tvm_items import tuning
from tvm_items.search import candidate_key

ONE_BLOCK = TINY_RESNET | {"hidden_sizes": [32], "depths": [1]}


class Tuned:
    """A small model that is tuned in a directory of its own: killed once, then to its end."""

    def __init__(self, directory):
        self.directory = directory
        (directory / "model").mkdir()
        (directory / "model" / "config.json").write_text(json.dumps(ONE_BLOCK))
        running = self.start("--test-items", "tvm_tune", "--tune-trials", "4")
        deadline = time.monotonic() + 120
        while len(self.journal()) < 20 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        time.sleep(1)
        self.processes = [line for line in process_list() if str(directory) in line]
        self.before = self.journal()
        self.done = self.run("--test-items", "tvm", "tvm_tune", "--tune-trials", "4")

    def start(self, *options):
        return subprocess.Popen(
            [sys.executable, str(ROOT / "benchmark.py"), "--model", "model", "--weights", "random"]
            + ["--results", "rows.csv", "--tuning-dir", "tuning", *options],
            cwd=self.directory,
            # One thread: of two, one would wait where the tests beside this one have its core.
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TVM_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *options):
        running = self.start(*options)
        stdout, stderr = running.communicate(timeout=240)
        return subprocess.CompletedProcess(options, running.returncode, stdout, stderr)

    def files(self, end):
        return list((self.directory / "tuning").glob(f"*/*{end}"))

    def journal(self):
        """Returns its whole lines; a line that is being written is left out."""
        text = "".join(file.read_text() for file in self.files(".journal"))
        return text[: text.rfind("\n") + 1].splitlines()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return Tuned(tmp_path_factory.mktemp("tuned"))


@pytest.mark.timeout(400)
def test_a_killed_run_goes_on_and_tuning_pays(tuned):
    assert len(tuned.before) >= 20 and tuned.processes == []
    assert tuned.done.returncode == 0, tuned.done.stdout + tuned.done.stderr
    untuned, row = read_csv(tuned.directory / "rows.csv")
    assert row["status"] == "ok" and float(row["rel_error"]) < 1e-5
    assert float(row["infer_time_median_ms"]) < 0.7 * float(untuned["infer_time_median_ms"])
    journal = tuned.journal()
    assert journal[: len(tuned.before)] == tuned.before
    lines = list(map(json.loads, journal))
    trials = [line for line in lines if "space" in line]
    defaults = [line for line in lines[: lines.index(trials[0])] if "default_seconds" in line]
    assert {line["task"] for line in defaults} == {line["task"] for line in lines[1:]}  # each before the first search
    assert trials[0]["task"] == max(defaults, key=lambda line: line["default_seconds"])["task"]
    assert len({candidate_key(t["task"], [t["space"], t["decisions"]]) for t in trials}) == len(trials)
    assert int(row["tune_trials"]) == len(trials) and 0 < float(row["tune_time_s"]) < 200
    assert f"({len(trials)} trials)" in tuned.done.stdout
    untuned_ms, *_ = [line["estimated_ms"] for line in lines if "estimated_ms" in line]
    estimates = [line["estimated_ms"] for line in lines[len(tuned.before) :] if "estimated_ms" in line]
    assert untuned_ms > estimates[0]  # what the killed run found counts
    assert estimates[-1] > 0 and estimates == sorted(estimates, reverse=True)
    (file,) = tuned.files("kernels.jsonl")
    kernels = list(map(json.loads, file.read_text().splitlines()))
    assert {kernel["task"] for kernel in kernels} <= {line["task"] for line in lines[1:]}
    assert file.stat().st_size < 600 * len(kernels)


def test_another_run_measures_nothing(tuned):
    """Though one of the schedules fits no more, and another device's library is damaged."""
    (file,) = tuned.files("kernels.jsonl")
    content, (first, *rest) = file.read_text(), file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | {"space": 9999}), *rest]))
    other = file.parent.parent / "NVIDIA_H200" / file.name
    other.parent.mkdir()
    other.write_text("{}")
    journal, rows = tuned.journal(), len(read_csv(tuned.directory / "rows.csv"))
    done = tuned.run("--test-items", "tvm_tune")
    assert done.returncode == 0 and "NVIDIA_H200/kernels.jsonl is damaged" in done.stderr
    assert "is left out: ValueError: the target forbids this candidate" in done.stdout
    assert tuned.journal() == journal
    assert len(read_csv(tuned.directory / "rows.csv")) == rows + 1
    other.unlink()
    file.write_text(content)


def test_kernels_that_another_version_does_not_have_get_a_round(tuned):
    """Without a search, though the case was tuned to its last kernel."""
    (file,) = tuned.files("kernels.jsonl")
    kept, gone = [], []
    for line in file.read_text().splitlines():
        (kept if gone or json.loads(line)["space"] is None else gone).append(line)
    file.write_text("\n".join(kept))
    trials = len([line for line in map(json.loads, tuned.journal()) if "space" in line])
    done = tuned.run("--test-items", "tvm_tune")
    assert done.returncode == 0 and "searching" in done.stdout
    assert {json.loads(line)["task"] for line in file.read_text().splitlines()} == {
        json.loads(line)["task"] for line in [*kept, *gone]
    }
    assert int(read_csv(tuned.directory / "rows.csv")[-1]["tune_trials"]) >= trials


def test_kin_is_tuned_without_a_search(tuned, monkeypatch):
    """The same model at another batch size, on which nothing was tuned: what the library has is adapted."""
    monkeypatch.chdir(tuned.directory)
    (file,) = tuned.files("kernels.jsonl")
    before, device = file.read_text().splitlines(), json.loads(file.read_text().splitlines()[0])["device"]
    fields = {"model_name": str(tuned.directory / "model"), "batch_size": 2, "device_name": device}
    case = make_case(find_model("model", "random")[0], tuning_dirs=(tuned.directory / "tuning",), **fields)
    assert tuning.runs_unasked(case) and tuning.plan_tuning(case, None, None) == (None, tuning.ROUND_LIMIT_S)
    assert tuning.plan_tuning(case, None, 1) == (math.inf, 60)
    assert not tuning.runs_unasked(dataclasses.replace(case, precision="fp16"))

    done = tuned.run("--batch-size", "2", "--test-items", "tvm_tune", "--iterations", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    row = read_csv(tuned.directory / "rows.csv")[-1]
    assert row["status"] == "ok" and int(row["tune_trials"]) > 0
    assert 0 < float(row["tune_time_s"]) <= tuning.ROUND_LIMIT_S + 1
    found = [json.loads(line) for line in set(file.read_text().splitlines()) - set(before)]
    found_here = [line for line in found if line["case"] == tuning.tuned_name(case)]
    assert {line["task"] for line in found_here}.isdisjoint(json.loads(line)["task"] for line in before)
    assert any(line["space"] is not None and line["seconds"] < 0.8 * line["default_seconds"] for line in found_here)
    assert tuning.plan_tuning(case, None, None) is None  # what it has found is there
    library = tuning.find_library(case)
    found_here = library.cases[tuning.tuned_name(case)]
    monkeypatch.setattr(tuning, "find_library", lambda *_, **__: library)
    assert found_here["untried"] == 0
    found_here |= {"untried": 3}
    assert tuning.plan_tuning(case, None, None) == (None, tuning.ROUND_LIMIT_S)  # its time was over before it had all
    found_here |= {"asked_trials": 100, "untried": 0}
    assert tuning.plan_tuning(case, 100, 1) is None and tuning.plan_tuning(case, 101, 1) == (101, 60)
    assert tuning.plan_tuning(case, None, 1) == (math.inf, 60)  # this version may have kernels that were not tried


def test_a_damaged_library_is_refused(tuned):
    (file,) = tuned.files("kernels.jsonl")
    content, rows = file.read_bytes(), read_csv(tuned.directory / "rows.csv")
    file.write_bytes(content[:-20])
    done = tuned.run("--test-items", "torch", "tvm_tune")
    assert done.returncode == 2 and "is damaged" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert file.read_bytes() == content[:-20] and read_csv(tuned.directory / "rows.csv") == rows
    file.write_bytes(content)
