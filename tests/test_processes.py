"""Workers: what becomes of a job that fails, dies or hangs, and that the next one is not the worse for it."""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.processes import Launchers, Worker, WorkerError, call, report


def process_id():
    return os.getpid()


def fail(error):
    raise error


def die(number):
    report("dying")
    os.kill(os.getpid(), number)


def leave(code):
    os._exit(code)


def hang(file):
    report("hanging")
    if os.fork() == 0:  # a compiler's own worker
        Path(file).write_text(str(os.getpid()))
    time.sleep(1000)


def temporary_directory():
    return tempfile.gettempdir(), os.environ["TRITON_CACHE_DIR"]


def test_one_process_for_many_jobs_until_one_fails():
    with Worker(max_jobs=3) as worker:
        first = [worker.call(process_id, timeout_s=10) for _ in range(3)]
        assert len(set(first)) == 1 and first[0] != os.getpid()
        assert worker.call(process_id, timeout_s=10) != first[0]  # max_jobs
        with pytest.raises(WorkerError, match=r"^ValueError: a reason$"):
            worker.call(fail, ValueError("a\nreason"), timeout_s=10)
        with pytest.raises(UserError, match=r"^yours$"):
            worker.call(fail, UserError("yours"), timeout_s=10)
        assert worker.call(process_id, timeout_s=10) not in first


@pytest.mark.parametrize(
    "function, argument, says",
    [
        (die, signal.SIGSEGV, "the process died of SIGSEGV, exit code -11 while dying"),
        (die, signal.SIGKILL, r"SIGKILL, exit code -9 \(out of memory\?\)"),
        (leave, 3, "the process ended with exit code 3"),
    ],
)
def test_a_death_is_one_line(function, argument, says):
    with pytest.raises(WorkerError, match=says):
        call(function, argument, timeout_s=10)


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path):
    file, stages = tmp_path / "process id", []
    with Worker() as worker:
        worker.submit(hang, file, timeout_s=1)
        with pytest.raises(WorkerError, match=r"no result in time \(1 s\) while hanging"):
            worker.wait(stages.append)
        assert "hanging" in stages
        status = Path(f"/proc/{file.read_text()}/stat")
        deadline = time.monotonic() + 5
        while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert worker.call(process_id, timeout_s=10)


def test_an_isolated_worker_keeps_its_directory_until_it_is_closed():
    with Worker(isolated=True) as worker:
        directory, cache = worker.call(temporary_directory, timeout_s=10)
        assert cache.startswith(directory) and Path(directory).is_dir()
        worker.kill()
        assert worker.call(temporary_directory, timeout_s=10) == (directory, cache)
    assert not Path(directory).exists()


def import_something(name):
    sys.modules[name] = sys


def run_in_a_fork(name, function, *args):
    assert name in sys.modules
    with Worker(isolated=True) as worker:
        return worker.call(function, *args, timeout_s=30)


def test_a_launcher_imports_once_and_its_forks_die_alone(tmp_path):
    with Launchers() as launchers:
        launchers.start("one", import_something, "imported_once", timeout_s=10)
        launchers.start("one", fail, ValueError("it is there already"), timeout_s=10)
        launchers.start("broken", fail, ImportError("no such thing"), timeout_s=10)
        launchers.wait()
        first, second = (launchers.call("one", run_in_a_fork, "imported_once", process_id) for _ in range(2))
        assert first != second and "imported_once" not in sys.modules
        with pytest.raises(WorkerError, match="SIGSEGV"):
            launchers.call("one", run_in_a_fork, "imported_once", die, signal.SIGSEGV)


def test_a_workers_worker_and_its_files_go_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = tmp_path.parent / f"{tmp_path.name} process id"
    with Worker(isolated=True) as worker:
        import_something("imported_here")
        worker.submit(run_in_a_fork, "imported_here", hang, file, timeout_s=30)
        deadline = time.monotonic() + 10
        while not file.exists() or not file.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    status = Path(f"/proc/{file.read_text()}/stat")
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []
