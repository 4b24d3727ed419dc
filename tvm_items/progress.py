"""How far tuning has come, task by task: what was measured, what is on its way, and what another round may save."""

import math

from tvm_items.database import RECORD
from tvm_items.search import Trial


class Progress:
    """How far one task has come. A round is what is measured of it between two searches."""

    def __init__(self, task):
        self.task = task
        self.default_s = None  # of TVM's default schedule, which is also what candidates are checked against
        self.reference_library = None  # path of that schedule's shared library
        self.trials = []  # Trials
        self.pending = 0  # candidates on their way, or a search
        self.is_exhausted = False  # nothing new can be drawn, or there is nothing to check against
        self.best_s_after_rounds = []

    @property
    def best(self):
        """The fastest Trial, None where none has succeeded."""
        return min((trial for trial in self.trials if trial.seconds), key=lambda trial: trial.seconds, default=None)

    @property
    def best_s(self):
        """The seconds of the fastest schedule, TVM's default one included; inf where none has succeeded."""
        return min(self.default_s or math.inf, self.best.seconds if self.best else math.inf)

    @property
    def is_improved(self):
        """Whether a trial is faster than TVM's default schedule."""
        return self.default_s is not None and self.best_s < self.default_s

    @property
    def is_open(self):
        """Whether it may be searched now."""
        return bool(self.best_s_after_rounds) and not self.pending and not self.is_exhausted

    def forget(self, candidate):
        """Drops the trials of a Candidate."""
        self.trials = [trial for trial in self.trials if (trial.space, trial.decisions) != candidate[:2]]

    def end_round(self):
        if math.isfinite(self.best_s):
            self.best_s_after_rounds.append(self.best_s)

    def expected_saving_s(self):
        """Returns the seconds per inference that another round may save: Ansor's estimate (arXiv:2006.06762).

        As in TVM's own scheduler: a weighted mean of the slope over the last three rounds and of best / rounds.
        """
        best_s, rounds = self.best_s_after_rounds[-1], len(self.best_s_after_rounds)
        slope = (self.best_s_after_rounds[-4] - best_s) / 3 if rounds > 3 else best_s / rounds
        return self.task.launches * (0.2 * slope + 0.8 * best_s / rounds)

    def best_record(self):
        """Returns the database's record of the best trial."""
        best = self.best
        values = (self.task.key, self.task.name, best.space, best.decisions, best.seconds, self.default_s)
        return dict(zip(RECORD, values))


def restore(progress, database, journal_lines):
    """Puts what was measured before into `progress`, {task's key: Progress}.

    Returns (seconds that it took, number of trials). From both: the database may come from another checkout, with a
    journal that began after it.
    """
    records = database["records"] if database else []
    spent_s, trials_done = (database["tune_time_s"], database["tune_trials"]) if database else (0.0, 0)
    for line in [*records, *journal_lines]:
        spent_s = max(spent_s, line.get("elapsed_s", 0.0))
        trials_done = max(trials_done, line.get("trials", 0))
        if "space" in line and line["task"] in progress:
            progress[line["task"]].trials.append(Trial(line["space"], line["decisions"], line["seconds"], None))
    return spent_s, trials_done


def estimate_ms(progress):
    """Returns the milliseconds of one inference: the sum of the launches' best times so far.

    progress: an iterable of Progress. Tasks that are not measured yet do not count.
    """
    return sum(state.task.launches * state.best_s for state in progress if math.isfinite(state.best_s)) * 1e3


def describe(progress, trials_done, trials_before, budget, elapsed_s):
    """Returns one line on how far tuning has come.

    progress: a collection of Progress. trials_before: those of earlier runs, which trials_done includes.
    """
    known = sum(math.isfinite(state.best_s) for state in progress)
    rate = (trials_done - trials_before) / max(elapsed_s, 1e-3)
    text = f"{trials_done} of {budget} trials, {rate:.1f} trials/s, estimated {estimate_ms(progress):.3f} ms"
    return text if known == len(progress) else f"{text} ({known} of {len(progress)} tasks)"
