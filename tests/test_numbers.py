"""The arithmetic: statistics, relative error, warnings, and rows that are appended from several processes."""

import csv
import multiprocessing
import time

import numpy as np
import pytest
import torch

import benchmark

CALM = {"energy_mj": None, "sm_clock_mhz": 1980, "limits": set(), "processes": 1}


def test_statistics_against_numpy():
    times_ms = np.random.default_rng(0).gamma(9, 0.3, 1001)
    columns = benchmark.statistics(times_ms, batch_size=4)
    ordered = np.sort(times_ms)
    assert columns["infer_time_median_ms"] == ordered[500]
    assert columns["infer_time_min_ms"] == ordered[0] and columns["infer_time_max_ms"] == ordered[-1]
    assert columns["infer_time_p90_ms"] == pytest.approx(ordered[900])
    assert columns["infer_time_p99_ms"] == pytest.approx(ordered[990])
    assert columns["infer_time_mean_ms"] == pytest.approx(sum(times_ms) / 1001)
    variance = sum((times_ms - sum(times_ms) / 1001) ** 2) / 1000
    assert columns["infer_time_std_ms"] == pytest.approx(variance**0.5)
    assert columns["throughput_samples_per_s"] == pytest.approx(4 * 1001 / (sum(times_ms) / 1e3))
    assert columns["iterations"] == 1001
    assert benchmark.statistics(np.array([2.0]), 1)["infer_time_std_ms"] == 0


def test_relative_error():
    reference = [np.array([3.0, 4.0], np.float32), np.array([[1.0]], np.float32)]
    assert benchmark.relative_error(reference, reference) == 0
    assert benchmark.relative_error([reference[0], reference[1] * 1.5], reference) == 0.5  # the worst output counts
    assert benchmark.relative_error([np.array([3.0, 4.5], np.float32), reference[1]], reference) == pytest.approx(0.1)
    assert benchmark.relative_error([np.full(2, np.nan, np.float32), reference[1]], reference) == np.inf
    assert benchmark.relative_error(reference[:1], reference) == np.inf
    for useless in ([], [np.zeros(3, np.float32)], [np.array([1, np.inf], np.float32)]):
        with pytest.raises(ValueError, match="the reference"):
            benchmark.relative_error(useless, useless)


def test_output_arrays_takes_every_floating_point_output_in_order():
    class Output(dict):
        pass

    outputs = Output(
        logits=torch.ones(2, dtype=torch.bfloat16),
        none=None,
        ids=torch.ones(1, dtype=torch.long),
        hidden=(torch.zeros(1), [torch.full((3,), 2.0)]),
    )
    assert [array.tolist() for array in benchmark.output_arrays(outputs)] == [[1, 1], [0], [2, 2, 2]]


def test_iterations_follow_the_budget():
    assert benchmark.choose_iterations(0.01) == 200
    assert benchmark.choose_iterations(0.4) == benchmark.MIN_ITERATIONS
    assert benchmark.choose_iterations(5.0) == benchmark.MIN_SLOW_ITERATIONS
    assert benchmark.choose_iterations(1e-6) == benchmark.MAX_ITERATIONS


def test_warm_up_goes_on_until_it_is_warm(monkeypatch):
    """A run that gets faster for its first 60 calls is timed only after those, and a made-up clock proves it."""
    clock, calls = [0.0], [0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def run():
        calls[0] += 1
        clock[0] += 0.01 * (1 + max(0, 60 - calls[0]) / 60)

    assert benchmark.warm_up(run, "cpu") == pytest.approx(0.01, rel=0.02)
    assert 60 <= calls[0] < 150

    def never_settles():
        clock[0] += 0.01 * (1 + clock[0])

    start = clock[0]
    benchmark.warm_up(never_settles, "cpu")
    assert clock[0] - start < 2 * benchmark.WARMUP_LIMIT_S


def test_slow_runs_are_warmed_up_once_or_twice(monkeypatch):
    clock, calls = [0.0], [0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def run():
        calls[0] += 1
        clock[0] += 5

    assert benchmark.warm_up(run, "cpu") == 5
    assert calls[0] == 1


@pytest.mark.parametrize(
    "make, before, after, says",
    [
        (lambda noise: 1 + 0.01 * noise, {}, {}, None),
        (
            lambda noise: np.where(np.arange(1000) % 50 == 0, 3, 1 + 0.01 * noise),
            {},
            {},
            "2.0% of the runs are outliers",
        ),
        (lambda noise: np.linspace(1, 1.1, 1000), {}, {}, "the second half is +4.9% against the first"),
        (lambda noise: 1 + 0.01 * noise, {}, {"limits": {"power cap"}}, "GPU clock limited by power cap"),
        (lambda noise: 1 + 0.01 * noise, {}, {"sm_clock_mhz": 1200}, "SM clock fell from 1980 to 1200 MHz"),
        (lambda noise: 1 + 0.01 * noise, {"processes": 2}, {}, "another process was on the GPU"),
        (lambda noise: 1 + 0.01 * noise, {"sm_clock_mhz": None}, {"sm_clock_mhz": None}, None),
    ],
)
def test_warnings(make, before, after, says):
    times_ms = make(np.random.default_rng(0).standard_normal(1000))
    found = benchmark.disturbances(times_ms, {**CALM, **before}, {**CALM, **after})
    assert found == ([says] if says else [])


def test_one_run_alone_disturbs_nothing():
    assert benchmark.disturbances(np.array([5.0]), CALM, CALM) == []


@pytest.mark.parametrize("precision, tf32", [("fp32", False), ("tf32", True), ("fp16", False), ("bf16", False)])
def test_precision_switches_are_set_and_restored(precision, tf32):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    assert before != [tf32, tf32]  # else the assertions below would show nothing
    with pytest.raises(ZeroDivisionError), benchmark.arithmetic(precision) as dtype:
        assert [backend.allow_tf32 for backend in backends] == [tf32, tf32]
        assert dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        1 / 0
    assert [backend.allow_tf32 for backend in backends] == before


def append_many(path, writer, count):
    finished = path.with_name(f"finished-{writer}").open("a")
    for number in range(count):
        benchmark.append_row(path, {"model_name": f"{writer}", "batch_size": number, "error": 'a "quoted", ' * 20})
        print(number, file=finished, flush=True)


def test_rows_from_sixteen_processes_stay_whole(tmp_path):
    """1,000 appends at once, some writers killed: every row that was finished is there, whole, once."""
    path = tmp_path / "rows.csv"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(path, writer, 63)) for writer in range(16)]
    for process in writers:
        process.start()
    for victim in (3, 7, 12):
        while not path.with_name(f"finished-{victim}").exists():
            time.sleep(0.01)
        writers[victim].kill()
    for process in writers:
        process.join()
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == benchmark.COLUMNS
    assert all(len(row) == len(header) and row[19] == 'a "quoted", ' * 20 for row in rows)
    there = [(int(row[0]), int(row[2])) for row in rows]
    finished = {(writer, int(number)) for writer in range(16) for number in path.with_name(f"finished-{writer}").open()}
    assert len(set(there)) == len(there) and finished <= set(there)
    assert len(finished) > 13 * 63 and len(there) - len(finished) <= 3  # at most the append that the kill interrupted
