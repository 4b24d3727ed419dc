"""What an interrupted run of the tuner goes on from, and when a search is over."""

import math
from types import SimpleNamespace

from tvm_items.loop import Job, TuningLoop
from tvm_items.progress import KIN_ROUNDS, Progress, has_settled, is_mostly_searched, restore
from tvm_items.search import Trial
from tvm_items.tasks import Task


def make_progress(keys):
    return {key: Progress(Task(key, key, 1, "", ())) for key in keys}


def test_the_library_and_a_later_journal_are_both_restored():
    progress = make_progress("ab")
    case = {"tune_time_s": 50.0, "tune_trials": 500}
    journal = [{"task": "a", "space": 0, "decisions": [2], "seconds": 3e-6, "elapsed_s": 52.0, "trials": 501}]
    journal += [{"task": "b", "elapsed_s": 53.0, "error": "search: timeout"}]
    assert restore(progress, case, journal) == (53.0, 501)
    assert progress["a"].best_s == 3e-6 and progress["b"].trials == []
    assert restore({}, None, []) == (0.0, 0)


def end_of(curve, limit_s=600):
    """Returns the second at which a search ends whose estimate falls along a curve, a function of the second."""
    estimates = []
    for second in range(limit_s):
        if has_settled(estimates, second):
            return second
        estimates.append((second, curve(second)))
    return limit_s


def test_a_search_ends_when_it_has_gained_nothing_for_long_enough():
    assert end_of(lambda s: 5.0) == 60  # nothing to find
    assert end_of(lambda s: 5 - 0.04 * (s // 30)) == 60  # what dribbles in is less than 1 % a minute
    assert end_of(lambda s: 5 - 4 * min(s, 60) / 60) == 120  # all of it found in the first minute
    assert end_of(lambda s: 1 + 4 * math.exp(-s / 10)) == 120  # 1 % of 1 is left after 60 s of e-folds of 10 s
    assert 440 < end_of(lambda s: 1 + 4 * math.exp(-s / 50)) < 460  # and after 300 s of 50 s: two thirds of 450
    assert end_of(lambda s: 5 * (s + 1) ** -0.3) == 600  # never done: only the time ends it
    assert end_of(lambda s: 5 - (s >= 50) - (s >= 100)) == 160  # each find gives it another minute,
    assert end_of(lambda s: 5 - sum(s >= at for at in (50, 100, 150, 200, 250))) == 375  # and then a third
    assert not has_settled([], 1e6) and not has_settled([(550.0, 5.0)], 600)


def test_a_search_does_not_end_before_what_matters_was_searched():
    progress = make_progress("abc")
    for state, seconds in zip(progress.values(), (90e-6, 8e-6, 2e-6)):
        state.default_s = seconds
    assert not is_mostly_searched(progress.values())
    progress["a"].is_searched = True
    assert not is_mostly_searched(progress.values())
    progress["b"].is_exhausted = True
    assert is_mostly_searched(progress.values())


def test_what_its_kin_has_schedules_for_is_tried_before_anything_is_searched_for_long():
    slow, fast, alone = states = [Progress(Task(key, key, 1, "", ()), kin) for key, kin in zip("abc", ("s", "s", ""))]
    for state, seconds in zip(states, (90e-6, 2e-6, 40e-6)):
        state.default_s = seconds
        state.end_round()
    loop = SimpleNamespace(progress=dict(zip("abc", states)), trials_done=0, budget=math.inf, searches=True)
    slow.kin_rounds, slow.trials = [KIN_ROUNDS[1]], [Trial(100, [1], 50e-6, None)]
    assert [state.is_untried for state in states] == [False, True, False]
    assert TuningLoop.most_promising(loop) is fast
    fast.kin_rounds, fast.pending = [], 3
    assert fast.is_untried and TuningLoop.most_promising(loop) is slow  # a search may end before they are measured
    fast.pending = 0
    assert not fast.is_untried and TuningLoop.most_promising(loop) is slow
    fast.is_behind, fast.kin_rounds = True, list(KIN_ROUNDS)  # than kin on the same extents, of another case since
    fast.trials = [Trial(100, [1], 2e-6, None)]
    assert not fast.is_untried and TuningLoop.most_promising(loop) is fast
    fast.kin_rounds.pop(0)
    assert TuningLoop.most_promising(loop) is slow
    slow.pending = 16
    assert TuningLoop.most_promising(loop) is alone


def test_few_of_its_kin_are_adapted_first_and_the_rest_if_any_of_these_fit():
    loop = SimpleNamespace(target_json="", trials_done=0, progress={}, will_build=lambda *_: None)
    jobs = []
    builder = SimpleNamespace(submit=lambda work, *arguments, **_: jobs.append((work.__name__, arguments[4])))

    def submit_after(state, candidates):
        TuningLoop.end_search(loop, Job("adapt", state), candidates, None)
        TuningLoop.submit_search(loop, builder, state)

    fitting, other = (Progress(Task(key, key, 1, "", ()), ["kin"]) for key in "ab")
    TuningLoop.submit_search(loop, builder, fitting)
    submit_after(fitting, ["candidate"] * 3)
    submit_after(fitting, ["candidate"] * 5)
    TuningLoop.submit_search(loop, builder, other)
    submit_after(other, [])
    assert jobs == [("adapt", 3), ("adapt", 5), ("search", 16), ("adapt", 3), ("search", 16)]
