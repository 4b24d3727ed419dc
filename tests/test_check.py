"""The relative error, and which outputs count."""

import numpy as np
import pytest
import torch

from harness.check import output_arrays, relative_error


def test_relative_error():
    reference = [np.array([3.0, 4.0], np.float32), np.array([[1.0]], np.float32)]
    assert relative_error(reference, reference) == 0
    assert relative_error([reference[0], reference[1] * 1.5], reference) == 0.5  # the worst output counts
    assert relative_error([np.array([3.0, 4.5], np.float32), reference[1]], reference) == pytest.approx(0.1)
    assert relative_error([np.full(2, np.nan, np.float32), reference[1]], reference) == np.inf
    assert relative_error(reference[:1], reference) == np.inf
    zeros = np.zeros(3, np.float32)
    assert relative_error([*reference, zeros], [*reference, zeros]) == 0
    assert relative_error([*reference, zeros + 1e-9], [*reference, zeros]) == np.inf
    masked = [np.array([3.0, -np.inf, 4.0], np.float32), np.array(1.0, np.float32)]
    assert relative_error(masked, masked) == 0
    assert relative_error([masked[0] * 1.1, masked[1]], masked) == pytest.approx(0.1)
    for wrong in ([3, 0, 4], [3, np.inf, 4], [-np.inf, -np.inf, 4]):
        assert relative_error([np.array(wrong, np.float32), masked[1]], masked) == np.inf
    nothing, not_a_number = np.full(3, -np.inf, np.float32), np.array([1, np.nan], np.float32)
    for useless in ([], [np.zeros(3, np.float32)], [nothing], [*masked, nothing], [not_a_number]):
        with pytest.raises(ValueError, match="the reference"):
            relative_error(useless, useless)


def test_output_arrays_takes_every_floating_point_output_in_order():
    class Output(dict):
        pass

    outputs = Output(
        logits=torch.ones(2, dtype=torch.bfloat16),
        none=None,
        sizes=(2, 3.0),
        ids=torch.ones(1, dtype=torch.long),
        hidden=(torch.zeros(1), [torch.full((3,), 2.0)]),
    )
    assert [array.tolist() for array in output_arrays(outputs)] == [[1, 1], [0], [2, 2, 2]]
