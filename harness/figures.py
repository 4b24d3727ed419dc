"""A row's figures: what times of single inferences add up to, and how close they come to the device's memory."""

import functools
import time

import numpy as np
import torch

from harness.device import synchronize

COPIED_BYTES = {"cuda": 2**29, "cpu": 2**28}  # many times what any cache of a processor holds
ROUNDS, COPIES = 5, 4  # the best of so many rounds counts, of so many copies in a row
ENERGY_MIN_MS = 1000.0  # NVML's energy counter ticks every 20 to 100 ms: shorter runs get no energy figure


def statistics(times_ms, batch_size):
    """Returns the CSV's timing columns, and the maximum, for an array of milliseconds per inference."""
    return {
        "infer_time_mean_ms": times_ms.mean(),
        "infer_time_median_ms": np.median(times_ms),
        "infer_time_std_ms": times_ms.std(ddof=1) if len(times_ms) > 1 else 0.0,
        "infer_time_min_ms": times_ms.min(),
        "infer_time_max_ms": times_ms.max(),
        "infer_time_p90_ms": np.percentile(times_ms, 90),
        "infer_time_p99_ms": np.percentile(times_ms, 99),
        "iterations": len(times_ms),
        "throughput_samples_per_s": batch_size * 1e3 / times_ms.mean(),
    }


def energy_per_sample(timing, batch_size):
    """Returns millijoules a sample of a Timing, None where the device does not say or the runs were too short."""
    before, after = timing.before["energy_mj"], timing.after["energy_mj"]
    if before is None or timing.times_ms.sum() <= ENERGY_MIN_MS:
        return None
    return (after - before) / (len(timing.times_ms) * batch_size)


def decode_figures(times_ms, case, moved_bytes):
    """Returns the CSV's columns on a step of decoding, by its median: tokens a second, and share of the memory's rate.

    moved_bytes: step_bytes()'s, the least that a step reads and writes.
    """
    median_s = np.median(times_ms) / 1e3
    return {
        "tokens_per_s": case.batch_size / median_s,
        "bandwidth_share": moved_bytes / median_s / copy_rate(case.device),
    }


@functools.cache
def copy_rate(device):
    """Returns the bytes a second, read and written ones, at which the device copies within its memory: the best run."""
    size = COPIED_BYTES[torch.device(device).type]
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = []
    for _ in range(ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size * COPIES / min(seconds)
