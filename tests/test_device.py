"""What says that the device did not keep still."""

import numpy as np
import pytest

from harness.device import disturbances

CALM = {"energy_mj": None, "sm_clock_mhz": 1980, "limits": set(), "processes": 1}


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
