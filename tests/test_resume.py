"""Sweeps that survive and scale: resuming, killing, several slots and several hosts at once."""

import collections
import itertools
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import pytest

from conftest import QUICK, ROOT, TINY_RESNET, process_list, read_csv

KILLS = int(os.environ.get("KILLS", 1))  # docs/sweeps.md has what KILLS=200 gave
VARIABLES = {"PYTHON": sys.executable, "RESULTS": "rows.csv"}


@pytest.fixture
def sweep(command, write_model):
    """Gives a function that runs benchmark_all.sh on a small model at batch sizes 1 and 2."""
    model = write_model()

    def run(*arguments, **variables):
        return command(
            "benchmark_all.sh",
            *(arguments or QUICK),
            **{"MODELS": model, "BATCH_SIZES": "1 2", **VARIABLES, **variables},
        )

    return run


def batch_sizes(path):
    return [row["batch_size"] for row in read_csv(path)]


def test_resume_and_retry(sweep, tmp_path):
    rows = tmp_path / "rows.csv"
    assert sweep().returncode == 0 and batch_sizes(rows) == ["1", "2"]
    rows.write_text(rows.read_text().replace(",ok,", ",failed,", 1))
    assert sweep(BATCH_SIZES="1").returncode == 1 and batch_sizes(rows) == ["1", "2"]  # there, and still not ok
    done = sweep(RETRY="failed")
    assert done.returncode == 0 and batch_sizes(rows) == ["1", "2", "1"]
    assert f"already in {rows}: torch (ok)" in done.stdout


def test_list_prints_a_command_line_a_case(sweep, write_model, tmp_path):
    assert "--skip ended" in sweep("--list").stdout
    assert "--skip ok" in sweep("--list", RETRY="failed").stdout
    assert "--skip" not in sweep("--list", FORCE="1").stdout
    done = sweep("--list", *QUICK, MODELS=write_model(name="a_model"), PRECISIONS="fp32 bf16")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 4 and not (tmp_path / "rows.csv").exists()
    assert shlex.split(lines[0])[:2] == [sys.executable, str(ROOT / "benchmark.py")]
    subprocess.run(["bash", "-c", lines[3]], cwd=tmp_path, check=True, capture_output=True)
    (row,) = read_csv(tmp_path / "rows.csv")
    assert (row["batch_size"], row["precision"]) == ("2", "bf16")


def gnu_parallel():
    try:
        done = subprocess.run(["parallel", "--version"], capture_output=True, text=True)
    except FileNotFoundError:
        return False
    return done.stdout.startswith("GNU parallel")


needs_parallel = pytest.mark.skipif(not gnu_parallel(), reason="no GNU parallel")


@pytest.mark.slow
@needs_parallel
def test_two_slots_share_the_cores(sweep, tmp_path):
    done = sweep(JOBS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_csv(tmp_path / "rows.csv")
    assert sorted(row["batch_size"] for row in rows) == ["1", "2"]
    assert {row["concurrent_cases"] for row in rows} == {"2"}
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all(f", {threads} threads" in row["device_name"] for row in rows) or threads == 1
    assert "2 cases" in done.stdout and "0 with rows" in done.stdout


@pytest.fixture
def interpreter(tmp_path):
    """Returns a script in python's place that says where benchmark.py would run, and fails at batch size 2."""
    script = tmp_path / "python"
    script.write_text(
        f"""#!/bin/sh
[ "$1" = -c ] && exec {sys.executable} "$@"
case "$1" in */plot.py) exit 0 ;; esac
echo "host=$HOST gpu=$CUDA_VISIBLE_DEVICES $*"; sleep 2
case "$*" in *"--batch-size 2"*) exit 1 ;; esac
"""
    )
    script.chmod(0o755)
    return script


def said(line):
    return " ".join(line.partition("\t")[2].split()[:2])


@needs_parallel
def test_slots_have_a_gpu_each_and_failures_are_named(sweep, interpreter):
    done = sweep(GPUS="5 7", BATCH_SIZES="1 2 3 4", PYTHON=interpreter, HOST="")
    lines = [line for line in done.stdout.splitlines() if "gpu=" in line]
    assert done.returncode == 1 and len(lines) == 4
    assert sorted(map(said, lines)) == ["host= gpu=5"] * 2 + ["host= gpu=7"] * 2
    assert all(line.endswith("--concurrent-cases 2") for line in lines)
    assert "4 cases" in done.stdout and "1 with rows" in done.stdout and "exit code 1" in done.stdout


@needs_parallel
def test_hosts_have_slots_of_their_own(sweep, tmp_path, interpreter):
    # Stands for a network: "ssh HOST -- COMMAND" runs here, with HOST in its environment and SHELL as a login sets it.
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\nexport HOST=$1 SHELL=/bin/sh\nshift 2  # the host and --\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    path = f"{ssh.parent}:{os.environ['PATH']}"
    done = sweep(HOSTS="one two", GPUS="5 7", BATCH_SIZES="1 2 3 4", PYTHON=interpreter, PATH=path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert {said(line) for line in done.stdout.splitlines() if "gpu=" in line} == {
        f"host={host} gpu={gpu}" for host in ("one", "two") for gpu in (5, 7)
    }


@pytest.mark.parametrize(
    "variables, says",
    [
        ({"RETRY": "wrong"}, "RETRY"),
        ({"JOBS": "two"}, "JOBS"),
        ({"JOBS": "3", "GPUS": "0 1"}, "GPUS names 2"),
        ({"GPUS": "0"}, "GNU parallel"),
        ({"HOSTS": "a"}, "GNU parallel"),
    ],
)
def test_bad_variables_are_one_line(sweep, tmp_path, variables, says):
    other = tmp_path / "bin" / "parallel"  # that of moreutils, which has the same name
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho 'parallel from moreutils'\n")
    other.chmod(0o755)
    done = sweep(**variables, PATH=f"{other.parent}:{os.environ['PATH']}")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and says in done.stderr
    assert not (tmp_path / "rows.csv").exists()


def descendants(pid):
    """Returns process ids of the tree under `pid`, itself included."""
    found = [pid]
    for process in found:
        try:
            for thread in os.listdir(f"/proc/{process}/task"):
                with open(f"/proc/{process}/task/{thread}/children") as file:
                    found += map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def start_sweep(model, tmp_path, jobs):
    environment = {
        **os.environ,
        **VARIABLES,
        "MODELS": str(model),
        "BATCH_SIZES": "1 2 3",
        "TMPDIR": str(tmp_path / "t"),
    }
    environment |= {"JOBS": str(jobs), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "t").mkdir(exist_ok=True)
    return subprocess.Popen(
        ["bash", str(ROOT / "benchmark_all.sh"), *QUICK],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    "to_group, jobs", [(True, 0), pytest.param(False, 2, marks=[needs_parallel, pytest.mark.slow])]
)
def test_interrupt_leaves_nothing_behind(write_model, tmp_path, to_group, jobs):
    running = start_sweep(write_model(), tmp_path, jobs)
    deadline = time.monotonic() + 60
    while not any((tmp_path / "t").glob("benchmark-*")) and time.monotonic() < deadline:  # an item's scratch directory
        time.sleep(0.05)
    time.sleep(1)
    (os.killpg if to_group else os.kill)(running.pid, signal.SIGINT)  # Ctrl-C reaches the group of the terminal
    assert running.wait(timeout=30) == 130
    left = [path for path in os.listdir(tmp_path / "t") if not path.startswith("torchinductor")]  # torch's own, empty
    assert left == []
    assert not any(str(tmp_path) in line for line in process_list())


@pytest.mark.timeout(300 + 60 * KILLS)
def test_kills_lose_and_double_nothing(write_model, tmp_path):
    """kill -9 of a random process of the sweep, again and again; then the rows are complete and each is there once."""
    generator = random.Random(0)
    modes = itertools.cycle([0, 2] if gnu_parallel() else [0])
    results, killed, sweeps = tmp_path / "rows.csv", collections.Counter(), 0
    model = write_model(TINY_RESNET)
    while sum(killed.values()) < KILLS:
        running, sweeps = start_sweep(model, tmp_path, next(modes)), sweeps + 1
        time.sleep(generator.uniform(0, 12))
        if running.poll() is None:
            victim = generator.choice(descendants(running.pid))
            try:
                with open(f"/proc/{victim}/cmdline") as file:
                    command = file.read()
                name = next((n for n in ("benchmark.py", "benchmark_all.sh", "parallel") if n in command), "other")
                os.kill(victim, signal.SIGKILL)
                killed[name] += 1
            except (FileNotFoundError, ProcessLookupError):
                pass
        elif results.exists():
            results.unlink()  # all rows are there: begin anew
        if generator.random() < 0.5:  # let it come to its end or start the next one beside what is left of it
            running.wait(timeout=120)
        check_rows(results, complete=False)
    assert start_sweep(model, tmp_path, 0).wait(timeout=120) in (0, 1)
    check_rows(results, complete=True)
    print(f"\n{sum(killed.values())} kills in {sweeps} sweeps: {dict(killed)}")


def check_rows(results, complete):
    rows = read_csv(results) if results.exists() else []
    # Half of the cores is another device on a CPU: a case has a row for each.
    cases = [(row["batch_size"], row["device_name"]) for row in rows]
    assert len(set(cases)) == len(cases), cases
    for row in rows:
        assert None not in row and None not in row.values() and row["status"] in ("ok", "failed")
    if complete:
        full = f", {len(os.sched_getaffinity(0))} threads"
        assert sorted(size for size, device in cases if device.endswith(full)) == ["1", "2", "3"]
