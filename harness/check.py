"""Whether an output is right: its relative error against that of eager PyTorch in fp32."""

import math

import numpy as np
import torch


def output_arrays(outputs):
    """Returns the floating-point tensors of a model's outputs, in order, as fp32 NumPy arrays of their own.

    outputs: a tensor of PyTorch or TVM on any device, or a dict or sequence of outputs. Integers, Python's own numbers
    and None are left out.
    """
    if outputs is None or isinstance(outputs, (int, float, str)):
        return []
    if hasattr(outputs, "__dlpack__"):
        tensor = torch.from_dlpack(outputs)
        return [tensor.detach().float().cpu().numpy().copy()] if tensor.is_floating_point() else []
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return [array for part in parts for array in output_arrays(part)]


def relative_error(outputs, reference):
    """Returns the largest ||out - ref|| / ||ref|| over pairs of arrays, in float64; inf where shapes or values are off.

    An output of zeros among others must be one of zeros. Where a reference is infinite, as a detector's scores of words
    that its text does not have, the output must be so too. Raises ValueError where a reference says nothing: none at
    all, not a number, nothing finite, or all zero.
    """
    if not reference:
        raise ValueError("the reference has no floating-point output")
    if [array.shape for array in outputs] != [array.shape for array in reference]:
        return math.inf
    if all(np.isfinite(array).all() and not array.any() for array in reference):
        raise ValueError("the reference is all zero")
    errors = []
    for out, ref in zip(outputs, reference, strict=True):
        is_infinite = np.isinf(ref)
        if np.isnan(ref).any() or (is_infinite.all() and ref.size):
            raise ValueError("the reference is not finite")
        if not np.array_equal(out[is_infinite], ref[is_infinite]):
            errors.append(math.inf)
            continue
        out, ref = out[~is_infinite], ref[~is_infinite]
        norm = np.linalg.norm(ref.astype(np.float64))
        difference = np.linalg.norm(out.astype(np.float64) - ref)
        error = difference / norm if norm else (0 if difference == 0 else math.inf)
        errors.append(error if np.isfinite(error) else math.inf)
    return float(max(errors))
