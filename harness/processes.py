"""Worker processes: forks that do one job at a time and may crash, hang or be killed without harm to anyone else.

Test items and the tuner's jobs run in them. They are forked, because imports are then paid once and a job still finds
no CUDA context, no compiled code and no thread of another job. So the forking process must have none of these itself:
it computes nothing.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import typing

from harness.errors import UserError, one_line

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerError(Exception):
    """A job gave no result; the message says why in one line."""


class TimedOut(WorkerError):
    """A job gave no result in time; `stage` is what it reported last, or None."""

    def __init__(self, stage):
        self.stage = stage
        super().__init__("no result in time" + while_doing(stage))


class Outcome(typing.NamedTuple):
    """What became of a job: its value, or the UserError or WorkerError that stands for it."""

    value: object = None
    error: Exception | None = None


class Worker:
    """A process that does one job after another; a new one takes its place when it dies, hangs or a job fails in it.

    max_jobs: after so many jobs the process is replaced as well. isolated: its temporary files, compiler caches and
    output go to a directory that no other worker sees and that close() removes; jobs see empty caches only in the first
    process. verbose: its output goes where this process's does, with the traceback of each failed job.
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

    def _fork(self):
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
            return Outcome(error=TimedOut(self.stage))
        # A process may have ended without the end of its pipe: what it had started holds that too.
        if self.process.is_alive() or self.connection.poll():
            return None
        return self._death()

    def _death(self):
        self.process.join(5)
        return Outcome(error=WorkerError(death(self.process.exitcode) + while_doing(self.stage)))


def call(function, *args, timeout_s):
    """Returns function(*args), computed in a process of its own. Raises what Worker.wait() raises."""
    with Worker() as worker:
        return worker.call(function, *args, timeout_s=timeout_s)


def report(stage):
    """Tells the process that waits for the job that this process does what it is doing now, in a few words."""
    if _to_parent is not None:
        _to_parent.send(("stage", stage))


_to_parent = None  # in a worker's process: its connection to the process that has forked it


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
        except UserError as error:
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
