"""The case: what every test item of one run shares, and the arithmetic that its precision allows."""

import contextlib
import dataclasses
import typing
from pathlib import Path

import torch
import transformers

SEED = 0  # of random weights and of inputs


class Precision(typing.NamedTuple):
    dtype: torch.dtype  # of weights and floating-point inputs
    tf32: bool  # whether PyTorch may use TF32 in matrix products and convolutions
    tolerance: float  # the largest rel_error that is still `ok`


PRECISIONS = {
    "fp32": Precision(torch.float32, False, 1e-4),
    "tf32": Precision(torch.float32, True, 5e-3),
    "fp16": Precision(torch.float16, False, 2e-2),
    "bf16": Precision(torch.bfloat16, False, 5e-2),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model with its inputs, precision and device."""

    model_name: str
    model_class: type
    config: transformers.PretrainedConfig
    weights: str  # "pretrained", "pretrained, random head" or "random"
    weights_dir: str | None  # holds the safetensors of pretrained weights
    batch_size: int
    seq_len: int
    image_size: int | None
    precision: str
    device: str  # "cpu" or "cuda:N"
    device_name: str
    tuning_dirs: tuple[Path, ...]  # hold the libraries of schedules of all devices; the first is written to
    iterations: int | None  # timed runs; None: as many as the time budget gives
    made_weights: str | None = None  # path of the random weights, which the first process that needs them makes
    phase: str = "forward"  # of rows.PHASES
    context_len: int | None = None  # positions of the cache that a step decodes against; None in a forward pass


@contextlib.contextmanager
def arithmetic(precision):
    """Allows or forbids TF32 everywhere while it lasts; gives the dtype of weights and floating-point inputs."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = PRECISIONS[precision].tf32
        yield PRECISIONS[precision].dtype
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed
