"""Worker processes: forks that do one job at a time and may crash, hang or be killed without harm to anyone else.

Test items and the tuner's jobs run in them. They are forked, because imports are then paid once and a job still finds
no CUDA context, no compiled code and no thread of another job. So the forking process must have none of these itself:
it computes nothing.
"""

import concurrent.futures
import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import typing

from harness.errors import UserError, one_line

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
TERMINATE_S = 2  # that a process has to end the workers of its own before it is killed
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerError(Exception):
    """A job gave no result; the message says why in one line."""


class Outcome(typing.NamedTuple):
    """What became of a job: its value, or the UserError or WorkerError that stands for it."""

    value: object = None
    error: Exception | None = None


class Worker:
    """A process that does one job after another; a new one takes its place when it dies, hangs or a job fails in it.

    max_jobs: after so many jobs the process is replaced as well. isolated: its temporary files, compiler caches and
    output go to a directory that no other worker sees and that close() removes; jobs see empty caches only in the first
    process. verbose: its output goes where this process's does, with the traceback of each failed job. A job may have
    workers of its own: they end with it.
    """

    def __init__(self, *, max_jobs=math.inf, isolated=False, verbose=False):
        self.max_jobs, self.isolated, self.verbose = max_jobs, isolated, verbose
        self.process = self.connection = self.scratch = None
        self.busy, self.label, self.stage = False, None, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def submit(self, function, *args, timeout_s, label=None):
        """Starts function(*args); outcome() or wait() tells how it ended.

        function: a function of a module, which the job calls by its name. label: kept as an attribute, for the caller.
        """
        if self.process is None:
            self._fork()
        self.busy, self.label, self.stage = True, label, None
        self.started = time.monotonic()
        self.deadline = self.started + timeout_s
        self.jobs_left -= 1
        with contextlib.suppress(BrokenPipeError):  # it has died already: outcome() says so
            self.connection.send((function, args))

    def outcome(self):
        """Returns the Outcome of the job, or None while it runs."""
        outcome = self._receive()
        if outcome is not None:
            self.busy = False
            if outcome.error or self.jobs_left <= 0:
                self.kill()  # a job that failed may have broken the CUDA context
        return outcome

    def wait(self, on_stage=None):
        """Returns what the job returns. Raises its UserError; WorkerError for every other end without a result.

        on_stage: called with what the job reports, and again every half a second.
        """
        while (outcome := self.outcome()) is None:
            if on_stage:
                on_stage(self.stage or "starting")
            self.connection.poll(0.5)
        if outcome.error:
            raise outcome.error
        return outcome.value

    def call(self, function, *args, timeout_s, on_stage=None):
        """Returns function(*args), computed in the worker's process. Raises what wait() raises."""
        self.submit(function, *args, timeout_s=timeout_s)
        return self.wait(on_stage)

    def kill(self):
        """Ends the process and all that it has started; the next job gets a new process and the same directory."""
        if self.process is None:
            return
        self._terminate()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the compilers' worker processes too
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.process = None

    def close(self):
        """Ends the process and removes the directory of an isolated worker."""
        self.kill()
        if self.scratch is not None:
            self.scratch.cleanup()
            self.scratch = None

    def _terminate(self):
        """Gives the process the time to end workers of its own, and leaves its id to it until kill() has used that."""
        self.process.terminate()
        deadline = time.monotonic() + TERMINATE_S
        with contextlib.suppress(ChildProcessError):  # its end was noticed before
            options = os.WEXITED | os.WNOWAIT | os.WNOHANG
            while os.waitid(os.P_PID, self.process.pid, options) is None and time.monotonic() < deadline:
                time.sleep(0.002)

    def _fork(self):
        if _to_parent is not None:  # a worker's worker: `with` ends it where this process is terminated
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they would leave a process that nobody knows
        if self.isolated and self.scratch is None:
            self.scratch = tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True)
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        target_args = (theirs, self.scratch and self.scratch.name, self.verbose, os.getpid())
        self.process = context.Process(target=serve, args=target_args)
        self.process.start()
        theirs.close()
        self.jobs_left = self.max_jobs
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        except BaseException:  # what the handler of one that came meanwhile raises
            self.close()
            raise

    def _receive(self):
        while self.connection.poll():
            try:
                kind, value = self.connection.recv()
            except (EOFError, ConnectionResetError):
                return self._death()
            if kind != "stage":
                return Outcome(value) if kind == "result" else Outcome(error=value)
            self.stage = value
        if time.monotonic() > self.deadline:
            limit_s = self.deadline - self.started
            return Outcome(error=WorkerError(f"no result in time ({limit_s:g} s)" + while_doing(self.stage)))
        # A process may have ended without the end of its pipe: what it had started holds that too.
        if self.process.is_alive() or self.connection.poll():
            return None
        return self._death()

    def _death(self):
        self.process.join(5)
        return Outcome(error=WorkerError(death(self.process.exitcode) + while_doing(self.stage)))


class Launchers:
    """Workers that have imported something each, by a name, and fork further workers from there.

    So imports are paid once, at the same time as one another, and a job that dies leaves the others alone.
    """

    def __init__(self, verbose=False):
        self.verbose, self.workers = verbose, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.workers.values():
            worker.close()

    def start(self, name, function, *args, timeout_s):
        """Begins function(*args), which imports something, in a launcher of that name, unless there is one already."""
        if name not in self.workers:
            self.workers[name] = Worker(isolated=True, verbose=self.verbose)
            self.workers[name].submit(function, *args, timeout_s=timeout_s)

    def wait(self, on_stage=None):
        """Waits until all that has begun has ended; an error is left to the job that needs what is missing then."""
        for worker in self.workers.values():
            if worker.busy:
                with contextlib.suppress(WorkerError):
                    worker.wait(on_stage)

    def call(self, name, function, *args, on_stage=None):
        """Returns function(*args), done by the launcher of that name. Raises what Worker.wait() raises."""
        return self.workers[name].call(function, *args, timeout_s=math.inf, on_stage=on_stage)


def call(function, *args, timeout_s):
    """Returns function(*args), computed in a process of its own. Raises what Worker.wait() raises."""
    with Worker() as worker:
        return worker.call(function, *args, timeout_s=timeout_s)


def map_in_forks(function, jobs):
    """Returns the list of function(*job) for each of `jobs`, computed in forks of this process on every core at once.

    For what holds Python's lock, so that threads would wait for one another, and needs nothing but what is imported. A
    job that crashes is an error here, too: what may do so is a Worker's. jobs: a list of tuples of arguments.
    """
    if not jobs:
        return []
    workers, forks = min(len(jobs), len(os.sched_getaffinity(0))), multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(workers, forks) as pool:
        return list(pool.map(function, *zip(*jobs)))


def report(stage):
    """Tells the process that waits for the job that this process does what it is doing now, in a few words."""
    if _to_parent is not None:
        _to_parent.send(("stage", stage))


_to_parent = None  # in a worker's process: its connection to the process that has forked it


def end_on_stop_signals():
    """Makes SIGTERM and SIGHUP end this process as an exception does, so that `with` ends its workers."""

    def stop(number, _):
        for other in STOP_SIGNALS:  # no second one interrupts that
            signal.signal(other, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)


def serve(connection, scratch, verbose, parent):
    """Does the jobs that come over `connection`, one after another, until the forking process closes it or ends."""
    global _to_parent
    _to_parent = connection
    os.setsid()  # a group that can be killed as a whole; Ctrl-C reaches the first process alone, which does that
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives a process that was killed
    if os.getppid() != parent:
        os._exit(1)
    if scratch:
        move_into(scratch, verbose)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("result", function(*args)))
        except (UserError, WorkerError) as error:
            connection.send(("error", error))
        except Exception as error:
            if verbose:
                traceback.print_exc()
            connection.send(("error", WorkerError(one_line(error))))


def move_into(scratch, verbose):
    """Sends this process's temporary files, compiler caches and, unless `verbose`, its output to a directory."""
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    for variable in CACHE_VARIABLES:
        os.environ[variable] = os.path.join(scratch, variable.lower())
    if not verbose:
        log = os.open(os.path.join(scratch, "log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)


def death(exit_code):
    """Returns how a process ended, in words; a negative exit code is the number of a signal."""
    if exit_code is None or exit_code >= 0:
        return f"the process ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"the process died of {name}, exit code {exit_code}" + (" (out of memory?)" if name == "SIGKILL" else "")


def while_doing(stage):
    return f" while {stage}" if stage else ""
