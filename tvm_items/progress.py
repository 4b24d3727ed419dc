"""How far tuning has come, task by task: what was measured, what is on its way, and what another round may save."""

import bisect
import math

from tvm_items.records import describe_argument
from tvm_items.search import Trial

MIN_SETTLED_S = 60.0  # a search is over when so long, and
SETTLED_SHARE = 1 / 3  # for so much of its time so far,
SETTLED_GAIN = 0.01  # it has brought less than that,
UNSEARCHED_SHARE = 0.05  # and what was not searched yet is less than that of an inference.
# Candidates of a task's kin in the rounds of them, before its first search or instead of one. Few of each task come
# first: the best of three is mostly the best of eight (docs/tuning.md), and time may be short.
KIN_ROUNDS = (3, 5)


class Progress:
    """How far one task has come. A round is what is measured of it between two searches."""

    def __init__(self, task, kin=(), is_behind=False):
        self.task = task
        self.kin = list(kin)  # (space, decisions) of the library's records that may be adapted to the task
        self.is_behind = is_behind  # whether some of them did better there
        self.kin_rounds = list(KIN_ROUNDS) if self.kin else []  # that are still to come
        self.default_s = None  # of TVM's default schedule, which is also what candidates are checked against
        self.reference_library = None  # path of that schedule's shared library
        self.trials = []  # Trials
        self.pending = 0  # candidates on their way, or a search
        self.is_searched = False  # in this run
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
    def is_open(self):
        """Whether it may be searched now."""
        return bool(self.best_s_after_rounds) and not self.pending and not self.is_exhausted

    @property
    def is_untried(self):
        """Whether its kin has schedules that may do for it, and none of them nor any other was measured."""
        is_on_its_way = self.pending or self.kin_rounds
        return bool(self.kin and is_on_its_way and not self.trials and not self.is_exhausted)

    @property
    def has_promising_kin(self):
        """Whether its kin is to be tried before any task is searched."""
        return self.is_untried or (self.is_behind and len(self.kin_rounds) == len(KIN_ROUNDS))

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

    def records(self):
        """Returns ([what a library's line says of the best schedule], [what tells each measured schedule apart]).

        The first is empty where no candidate was measured, or no default schedule to compare it with; where that is
        the best one, its space is None.
        """
        if self.default_s is None or not self.trials:
            return [], []
        is_improved = self.best_s < self.default_s
        space, decisions = (self.best.space, self.best.decisions) if is_improved else (None, [])
        record = {
            "task": self.task.key,
            "name": self.task.name,
            "arguments": [describe_argument(*argument) for argument in self.task.arguments],
            "space": space,
            "decisions": decisions,
            "seconds": four_digits(self.best_s),
            "default_seconds": four_digits(self.default_s),
        }
        schedules = [(None, []), *((trial.space, trial.decisions) for trial in self.trials)]
        return [record], [
            {"task": self.task.key, "space": space, "decisions": decisions} for space, decisions in schedules
        ]


def four_digits(seconds):
    """Returns a time with four significant digits, which are more than two measurements have in common."""
    return float(f"{seconds:.4g}")


def restore(progress, case, journal_lines):
    """Puts what a journal's lines say was measured before into `progress`, {task's key: Progress}.

    case: the library's TunedCase, or None. Returns (seconds that it took, number of trials). From both: the library may
    come from another checkout, with a journal that began after it.
    """
    spent_s, trials_done = (case["tune_time_s"], case["tune_trials"]) if case else (0.0, 0)
    for line in journal_lines:
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


def has_settled(estimates, elapsed_s):
    """Returns whether a search has come to its end: for long enough it has gained less than SETTLED_GAIN.

    estimates: (seconds since the search began, estimated milliseconds of an inference) pairs, in their order; the first
    one is where the search begins in earnest. elapsed_s: seconds since it began. Long enough is a third of that, and at
    least a minute: a search that has gone on for long finds the next thing later.
    """
    long_ago_s = elapsed_s - max(MIN_SETTLED_S, SETTLED_SHARE * elapsed_s)
    earlier = bisect.bisect(estimates, long_ago_s, key=lambda pair: pair[0])
    return earlier > 0 and estimates[-1][1] >= (1 - SETTLED_GAIN) * estimates[earlier - 1][1]


def is_mostly_searched(progress):
    """Returns whether the tasks that were not searched in this run are a small part of an inference.

    progress: a collection of Progress.
    """
    unsearched = [state for state in progress if not (state.is_searched or state.is_exhausted)]
    return estimate_ms(unsearched) <= UNSEARCHED_SHARE * estimate_ms(progress)


def describe(progress, trials_done, trials_before, budget, elapsed_s):
    """Returns one line on how far tuning has come.

    progress: a collection of Progress. trials_before: those of earlier runs, which trials_done includes. budget: of
    trials; inf without a search.
    """
    known = sum(math.isfinite(state.best_s) for state in progress)
    rate = (trials_done - trials_before) / max(elapsed_s, 1e-3)
    count = f"{trials_done} of {budget} trials" if math.isfinite(budget) else f"{trials_done} trials"
    text = f"{count}, {rate:.1f} trials/s, estimated {estimate_ms(progress):.3f} ms"
    return text if known == len(progress) else f"{text} ({known} of {len(progress)} tasks)"
