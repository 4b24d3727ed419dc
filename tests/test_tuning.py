"""tvm_tune as a user runs it: what a killed run leaves, what another one needs, and which databases are refused."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, TINY_RESNET, process_list, read_csv
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
    (file,) = tuned.files(".json.gz")
    assert file.stat().st_size < 4096


def test_another_run_measures_nothing(tuned):
    (file,) = tuned.files(".json.gz")
    other = file.parent.parent / "NVIDIA_H200" / file.name
    other.parent.mkdir()
    other.write_bytes(file.read_bytes())
    journal, rows = tuned.journal(), len(read_csv(tuned.directory / "rows.csv"))
    done = tuned.run("--test-items", "tvm_tune")
    assert done.returncode == 0 and "not used here: NVIDIA_H200" in done.stderr
    assert tuned.journal() == journal
    assert len(read_csv(tuned.directory / "rows.csv")) == rows + 1


@pytest.mark.parametrize("what", ["damaged", "is of NVIDIA H200"])
def test_a_damaged_or_foreign_database_is_refused(tuned, what):
    (file,) = [file for file in tuned.files(".json.gz") if "H200" not in str(file)]
    content, rows = file.read_bytes(), read_csv(tuned.directory / "rows.csv")
    database = json.loads(gzip.decompress(content)) | {"origin": "NVIDIA H200, TVM 0.27"}
    file.write_bytes(content[:-20] if what == "damaged" else gzip.compress(json.dumps(database).encode()))
    refused = file.read_bytes()
    done = tuned.run("--test-items", "torch", "tvm_tune")
    assert done.returncode == 2 and what in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert file.read_bytes() == refused and read_csv(tuned.directory / "rows.csv") == rows
    file.write_bytes(content)
