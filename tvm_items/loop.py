"""The tuning loop: processes that search, build and measure at the same time, and a journal of what they find.

MetaSchedule's own loop is replaced: its builder starts its processes anew for every batch, it waits for the slowest of
a batch, and it loses what it measured in its first round through the tasks when it is stopped.
"""

import collections
import itertools
import math
import multiprocessing.connection
import os
import random
import statistics
import time
import typing

from harness import processes
from tvm_items.journal import Journal
from tvm_items.kin import Start
from tvm_items.measure import build, measure
from tvm_items.progress import KIN_ROUNDS, Progress, describe, estimate_ms, has_settled, is_mostly_searched, restore
from tvm_items.search import ROUND_SIZE, Candidate, Trial, adapt, search

BUILD_TIMEOUT_S, MEASURE_TIMEOUT_S, SEARCH_TIMEOUT_S = 30.0, 20.0, 180.0
ASSUMED_BUILDS_PER_SEARCH = 4  # candidates that a worker builds in the time of a search, until both have been timed
REPORT_INTERVAL_S = 0.5
JOBS_PER_BUILDER = 200  # then it is replaced by a fresh fork: TVM and NVRTC leak


def tune(tasks, starts, target_json, device, path, origin, case, tolerance, asked_trials, limit_s, workers, scratch):
    """Searches until tasks have `asked_trials` on average, `limit_s` seconds have passed, or there is no more to gain.

    tasks: list of Tasks. starts: {task's key: Start}, what the library has for some of them. target_json:
    find_target()'s. device: "cpu" or "cuda:N". path, origin: of the journal, as in read_journal(). case: the library's
    TunedCase as it is now, or None. tolerance: the largest relative error of a task's outputs. asked_trials: inf for as
    many as there is time for; None for no search: what `starts` has is measured and that is all. workers: the number of
    processes that search and build. scratch: an existing directory for what they build. No thread and no CUDA context
    may be in the calling process.

    Returns a Tuned. Raises TuningFileError where the journal cannot be used, RuntimeError where TVM's default schedule
    works for no task.
    """
    loop = TuningLoop(
        tasks, starts, target_json, device, path, origin, case, tolerance, asked_trials, limit_s, workers, scratch
    )
    try:
        loop.run()
        return loop.result()
    finally:
        loop.close()


class Tuned(typing.NamedTuple):
    """What tuning gave, by the names of a library's fields, without what they say of the device and the case."""

    records: list  # dicts of a Kernel's fields, one for each task of which a candidate was measured
    measured: list  # task, space and decisions of all that was, in this run and in those that the journal is of
    spent: dict  # a TunedCase's fields


class Job(typing.NamedTuple):
    """What a worker does for a task."""

    kind: str  # "adapt", "search", "build" or "measure"
    state: Progress
    candidate: Candidate | None = None  # None: TVM's default schedule, or a search
    library: str | None = None  # path of what is measured


class TuningLoop:
    """One run of the tuner over the tasks of a case: tune() says what it is given.

    A builder searches or builds; the measurer has the device for itself. On the CPU, what is built disturbs what is
    measured: there the two take turns.
    """

    def __init__(
        self, tasks, starts, target_json, device, path, origin, case, tolerance, asked_trials, limit_s, workers, scratch
    ):
        self.target_json, self.device, self.tolerance, self.scratch = target_json, device, tolerance, scratch
        self.asked_trials, self.limit_s, self.searches = asked_trials, limit_s, asked_trials is not None
        self.given_bytes = sum(task.launches * task.given_bytes for task in tasks)
        self.journal = Journal(path, origin)
        if not self.searches:  # the time may not do for all
            tasks = sorted(tasks, key=lambda task: -task.launches * task.flops)
        starts = {task.key: starts.get(task.key, Start([], [])) for task in tasks}
        self.progress = {task.key: Progress(task, starts[task.key].kin, starts[task.key].is_behind) for task in tasks}
        self.spent_before_s, self.trials_before = restore(self.progress, case, self.journal.trials)
        self.trials_done = self.trials_before
        self.budget = asked_trials * len(tasks) if self.searches else math.inf
        self.start, self.next_report = time.monotonic(), 0.0
        self.builders = [processes.Worker(max_jobs=JOBS_PER_BUILDER) for _ in range(workers)]
        self.measurer = processes.Worker()
        self.to_build = collections.deque((state, None) for state in self.progress.values())
        # A record may be of another device, another version or another day: it is measured beside TVM's default.
        self.known = {key: [Candidate(*schedule, None) for schedule in start.known] for key, start in starts.items()}
        self.to_measure = collections.deque()
        self.library_numbers = itertools.count()
        self.takes_turns = device == "cpu"
        self.measures_until_none_is_left = False  # where they take turns
        self.durations_s = {kind: collections.deque(maxlen=ROUND_SIZE * workers) for kind in ("build", "search")}
        self.estimates = []  # (seconds of this run, estimated milliseconds), once each task's default was measured

    def run(self):
        """Runs until the trials are done, the time is over, nothing is left to do, or the search has settled."""
        while self.elapsed_s() < self.limit_s and self.trials_done < self.budget and not self.is_settled():
            self.submit_jobs()
            busy = [worker for worker in (*self.builders, self.measurer) if worker.busy]
            if not busy:
                break  # every task is exhausted, or there is no search
            multiprocessing.connection.wait([worker.connection for worker in busy], timeout=0.2)
            for worker in busy:
                if outcome := worker.outcome():
                    self.end_job(worker, outcome)
            if time.monotonic() > self.next_report:
                states = self.progress.values()
                processes.report(describe(states, self.trials_done, self.trials_before, self.budget, self.elapsed_s()))
                self.next_report = time.monotonic() + REPORT_INTERVAL_S

    def close(self):
        for worker in (*self.builders, self.measurer):
            worker.close()

    def elapsed_s(self):
        return time.monotonic() - self.start

    def is_settled(self):
        """Whether the search has come to its end before its time and its trials have."""
        if not self.searches or not has_settled(self.estimates, self.elapsed_s()):
            return False
        return is_mostly_searched(self.progress.values())

    def result(self):
        """Returns the Tuned of all that was measured, in this run and before."""
        is_complete = self.trials_done >= self.budget or self.elapsed_s() < self.limit_s
        states = self.progress.values()
        if all(state.is_exhausted and not state.default_s for state in states):
            raise RuntimeError("no kernel of the model could be built and measured by TVM's default rules")
        records, measured = [], []
        for state in states:
            of_task, measured_of_task = state.records()
            records += of_task
            measured += measured_of_task
        spent = {
            "tune_time_s": round(self.spent_before_s + self.elapsed_s(), 1),
            "tune_trials": self.trials_done,
            "asked_trials": self.asked_trials if math.isfinite(self.budget) and is_complete else 0,
            "untried": sum(state.is_untried for state in states),
        }
        return Tuned(records, measured, spent)

    # ---- Jobs that begin ----

    def submit_jobs(self):
        """Gives each idle worker something to do, as far as there is something and its turn has come."""
        if self.takes_turns:
            turn = ROUND_SIZE if self.searches else len(self.builders)
            is_round = self.measures_until_none_is_left or len(self.to_measure) >= turn
            self.measures_until_none_is_left = bool(self.to_measure) and is_round
        for builder in self.builders:
            measuring = self.takes_turns and (self.measures_until_none_is_left or self.measurer.busy)
            if not builder.busy and not measuring:
                self.submit_search_or_build(builder)
        building = self.takes_turns and any(builder.busy for builder in self.builders)
        if self.to_measure and not self.measurer.busy and not building:
            self.submit_measurement()

    def submit_search_or_build(self, builder):
        """Gives an idle builder a candidate to build or, where few are left, the task that promises most to search.

        Not before, because what is measured until then says which task it is, and makes its search a better one.
        """
        searching = sum(other.busy and other.label.kind in ("adapt", "search") for other in self.builders)
        if not self.searches or len(self.to_build) + ROUND_SIZE * searching < self.builds_per_search():
            state = self.most_promising()
            if state is not None:
                self.submit_search(builder, state)
                return
        if self.to_build:
            self.submit_build(builder, *self.to_build.popleft())

    def builds_per_search(self):
        """Returns how many candidates all builders finish in the time of a search, and one more for each."""
        per_builder = ASSUMED_BUILDS_PER_SEARCH
        if self.durations_s["search"]:
            per_builder = statistics.fmean(self.durations_s["search"]) / statistics.fmean(self.durations_s["build"])
        return len(self.builders) * (per_builder + 1)

    def most_promising(self):
        """Returns the Progress to search next, None where none may be: each default schedule is measured first.

        What has nothing but its default schedule goes first, if it has kin, and so does what is slower than such kin: a
        round of each task is more than a short search has time for. Without a search, it is one of those as soon as its
        own default schedule is measured.
        """
        states = self.progress.values()
        pending = sum(state.pending for state in states)
        if self.trials_done + pending >= self.budget:
            return None
        if self.searches and not all(state.best_s_after_rounds or state.is_exhausted for state in states):
            return None
        may_be_next = [state for state in states if state.is_open and (self.searches or state.kin_rounds)]
        first = [state for state in may_be_next if state.has_promising_kin]
        return max(first or may_be_next, key=Progress.expected_saving_s, default=None)

    def submit_search(self, builder, state):
        """Gives an idle builder the search of a task; what it has of kin is adapted first."""
        state.pending = ROUND_SIZE
        if state.kin_rounds:
            count = state.kin_rounds.pop(0)
            arguments = (state.task.module_json, self.target_json, state.trials, state.kin, count)
            builder.submit(adapt, *arguments, timeout_s=SEARCH_TIMEOUT_S, label=Job("adapt", state))
            return
        state.is_searched = True
        others = [other.best for other in self.progress.values() if other is not state and other.best]
        relatives = [(best.space, best.decisions) for best in others]
        random.Random(self.trials_done).shuffle(relatives)
        relatives = state.kin[: sum(KIN_ROUNDS)] + relatives  # no more: what this run has found is nearer
        arguments = (state.task.module_json, self.target_json, state.trials, relatives, ROUND_SIZE, len(state.trials))
        builder.submit(search, *arguments, timeout_s=SEARCH_TIMEOUT_S, label=Job("search", state))

    def submit_build(self, builder, state, candidate):
        file = os.path.join(self.scratch, f"{next(self.library_numbers)}.so")
        decided = candidate and (candidate.space, candidate.decisions)
        arguments = (state.task.module_json, self.target_json, decided, file)
        builder.submit(build, *arguments, timeout_s=BUILD_TIMEOUT_S, label=Job("build", state, candidate))

    def submit_measurement(self):
        job = self.to_measure.popleft()
        state, best_s = job.state, job.state.best_s if math.isfinite(job.state.best_s) else None
        libraries, given = (job.library, state.reference_library), (state.task.given, self.given_bytes)
        arguments = (state.task.arguments, *libraries, self.device, self.tolerance, best_s, *given)
        self.measurer.submit(measure, *arguments, timeout_s=MEASURE_TIMEOUT_S, label=job)

    def will_build(self, state, candidates):
        """Puts a task's candidates in the queue; without a search in front, so that one task after another is done."""
        of_task = [(state, candidate) for candidate in candidates]
        self.to_build = collections.deque([*self.to_build, *of_task] if self.searches else [*of_task, *self.to_build])

    # ---- Jobs that end ----

    def end_job(self, worker, outcome):
        job = worker.label
        if job.kind in self.durations_s:
            self.durations_s[job.kind].append(time.monotonic() - worker.started)
        end = {
            "adapt": self.end_search,
            "search": self.end_search,
            "build": self.end_build,
            "measure": self.end_measurement,
        }[job.kind]
        end(job, outcome.value, outcome.error and str(outcome.error))

    def end_search(self, job, candidates, error):
        candidates = candidates or []
        job.state.pending = len(candidates)
        job.state.is_exhausted = job.kind == "search" and not candidates
        if job.kind == "adapt" and not candidates:  # no more of its kin fits
            job.state.kin_rounds.clear()
        if error:
            self.journal.append({"task": job.state.task.key, "error": f"search: {error}"})
        self.will_build(job.state, candidates)

    def end_build(self, job, library, error):
        if error:
            self.record(job, None, error)
            return
        if job.candidate is None:
            job.state.reference_library = library
        self.to_measure.append(Job("measure", job.state, job.candidate, library))

    def end_measurement(self, job, measurement, error):
        if error:
            self.record(job, None, error)
        else:
            self.record(job, measurement.seconds, measurement.error)
        if job.candidate is not None:
            os.remove(job.library)

    def record(self, job, seconds, error):
        """Puts the end of a trial, or of a default schedule, into the journal and the task's Progress."""
        state, candidate = job.state, job.candidate
        line = {"task": state.task.key, "elapsed_s": round(self.spent_before_s + self.elapsed_s(), 3)}
        if candidate is None:
            state.default_s, state.is_exhausted = seconds, seconds is None
            line["default_seconds"] = seconds
            known = self.known.pop(state.task.key) if seconds else []
            state.pending += len(known)
            self.will_build(state, known)
        else:
            if candidate.features is None:  # a known one: what it took before counts no more
                state.forget(candidate)
            state.trials.append(Trial(candidate.space, candidate.decisions, seconds, candidate.features))
            state.pending -= 1
            self.trials_done += 1
            line |= {"space": candidate.space, "decisions": candidate.decisions, "seconds": seconds}
            line["trials"] = self.trials_done
        if error:
            line["error"] = error
        if candidate is None or state.pending == 0:
            state.end_round()
        if all(other.default_s or other.is_exhausted for other in self.progress.values()):
            line["estimated_ms"] = round(estimate_ms(self.progress.values()), 4)
            self.estimates.append((self.elapsed_s(), line["estimated_ms"]))
        self.journal.append(line)
