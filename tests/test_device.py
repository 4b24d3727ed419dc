"""What says that the device did not keep still."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from harness import device
from harness.device import CpuTimes, Gpu, disturbances, process_memory_bytes, reset_peak_memory

CALM = {"energy_mj": None, "sm_clock_mhz": 1980, "limits": set(), "processes": 1, "cpu_times": None}


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
    found = disturbances(times_ms, {**CALM, **before}, {**CALM, **after})
    assert found == ([says] if says else [])


def test_one_run_alone_disturbs_nothing():
    assert disturbances(np.array([5.0]), CALM, CALM) == []


# ---- The CPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wall_s, busy_s, steal_s, own_s, says",
    [
        (2.0, 4.0, 0.0, 4.0, []),  # this process on two of four CPUs, and nobody else
        (2.0, 4.1, 0.0, 4.0, []),  # the kernel, and ticks
        (2.0, 6.0, 0.0, 4.0, ["other processes used 1.0 of 4 CPUs"]),
        (2.0, 4.0, 0.4, 4.0, ["the hypervisor took 5% of the CPU time"]),
        (2.0, 6.0, 0.4, 4.0, ["other processes used 1.0 of 4 CPUs", "the hypervisor took 5% of the CPU time"]),
        (0.01, 0.02, 0.0, 0.01, []),  # one tick of a short row
        (2.0, 3.9, 0.0, 4.0, []),  # ticks that were not counted yet
    ],
)
def test_others_on_the_cpu(monkeypatch, wall_s, busy_s, steal_s, own_s, says):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    before = CpuTimes(100.0, 1000.0, 50.0, 7.0)
    after = CpuTimes(100.0 + wall_s, 1000.0 + busy_s, 50.0 + steal_s, 7.0 + own_s)
    times_ms = np.full(100, 1.0)
    assert disturbances(times_ms, {**CALM, "cpu_times": before}, {**CALM, "cpu_times": after}) == says


def test_a_busy_neighbour_is_noticed():
    """Another process that computes on every CPU this one may use; whatever else is there only adds to it."""
    burn = "import time\nprint(flush=True)\nend = time.time() + 60\nwhile time.time() < end: pass"
    neighbours = [
        subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE) for _ in os.sched_getaffinity(0)
    ]
    try:
        for neighbour in neighbours:
            neighbour.stdout.readline()
        gpu = Gpu("cpu")
        before, times_ms = gpu.state(), []
        while len(times_ms) < 20:
            start = time.perf_counter()
            sum(range(1_000_000))
            times_ms.append((time.perf_counter() - start) * 1e3)
        found = disturbances(np.array(times_ms), before, gpu.state())
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.communicate()
    assert any(text.startswith("other processes used") for text in found)


def test_a_kernel_that_tells_no_cpu_times(monkeypatch):
    for text in ("", "intr 5\n", "cpu0 1 2 3\n", "cpu0 a b c d e f g h\n"):
        monkeypatch.setattr(Path, "read_text", lambda _, text=text: text)
        assert CpuTimes.read() is None


def test_peak_memory_starts_anew_where_the_kernel_allows_it(monkeypatch):
    block = b"x" * 2**28
    with_block = process_memory_bytes("cpu")
    del block
    if reset_peak_memory("cpu"):
        assert process_memory_bytes("cpu") < with_block - 2**27

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert reset_peak_memory("cpu") is False


def test_the_memory_of_a_control_group(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "1000" if path.name == "memory.max" else "max")
    assert device.host_memory_bytes() == 1000
    monkeypatch.setattr(Path, "read_text", lambda _: "max")
    assert device.host_memory_bytes() > 1000
