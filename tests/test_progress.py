"""What an interrupted run of the tuner goes on from."""

from tvm_items.database import RECORD
from tvm_items.progress import Progress, restore
from tvm_items.tasks import Task


def test_a_database_and_a_later_journal_are_both_restored():
    progress = {key: Progress(Task(key, key, 1, "", ())) for key in "ab"}
    record = dict(zip(RECORD, ("a", "a", 0, [1], 1e-6, 2e-6)))
    database = {"tune_time_s": 50.0, "tune_trials": 500, "records": [record]}
    journal = [{"task": "a", "space": 0, "decisions": [2], "seconds": 3e-6, "elapsed_s": 52.0, "trials": 501}]
    journal += [{"task": "b", "elapsed_s": 53.0, "error": "search: timeout"}]
    assert restore(progress, database, journal) == (53.0, 501)
    assert progress["a"].best_s == 1e-6 and progress["b"].trials == []
    assert restore({}, None, []) == (0.0, 0)
