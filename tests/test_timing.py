"""Warm-up, the number of runs, and the statistics of their times, on a made-up clock."""

import numpy as np
import pytest

import benchmark
from harness.figures import statistics


def test_statistics_against_numpy():
    times_ms = np.random.default_rng(0).gamma(9, 0.3, 1001)
    columns = statistics(times_ms, batch_size=4)
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
    assert statistics(np.array([2.0]), 1)["infer_time_std_ms"] == 0


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
