"""Vectors divided by their length: one launch each with what is around it, and the numbers of eager PyTorch."""

import pytest
import torch
from test_attention import BATCH, HEADS, TOKENS, called_functions, prepare, run_unscheduled

from harness.check import output_arrays, relative_error

HEAD_DIM = 16


class Cosines(torch.nn.Module):
    """Attention by the cosine of queries and keys, as Swin V2 has it: windows of some images, shifted against masks."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(24, HEADS * HEAD_DIM) for _ in range(3))
        self.scale = torch.nn.Parameter(torch.linspace(0.5, 2, HEADS).view(HEADS, 1, 1))
        self.biases = torch.nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))
        self.register_buffer("mask", torch.randn(BATCH, TOKENS, TOKENS).sign() * 3)

    def forward(self, x):
        query, key, value = (
            linear(x).view(-1, TOKENS, HEADS, HEAD_DIM).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        query, key = (torch.nn.functional.normalize(vectors, dim=-1) for vectors in (query, key))
        scores = torch.matmul(query, key.transpose(-2, -1)) * self.scale.clamp(max=1.5).exp() + self.biases
        scores = scores.view(-1, BATCH, HEADS, TOKENS, TOKENS) + self.mask[None, :, None]
        weights = (scores + self.mask[None, :, None]).view(-1, HEADS, TOKENS, TOKENS).softmax(-1)
        return torch.matmul(weights, value).transpose(1, 2).reshape(-1, TOKENS, HEADS * HEAD_DIM)


@torch.no_grad()
def test_attention_by_cosines_is_a_product_a_normalization_and_attention(tvm):
    torch.manual_seed(0)
    model, x = Cosines().eval(), torch.randn(3 * BATCH, TOKENS, 24)
    prepared = prepare(tvm, model, x)
    names = called_functions(prepared[1])
    assert len(names) == 3 and "rsqrt" in names[1] and "attention" in names, names
    assert relative_error(run_unscheduled(*prepared, x), output_arrays(model(x))) < 1e-5


class Divided(torch.nn.Module):
    def __init__(self, divide):
        super().__init__()
        self.divide = divide

    def forward(self, x):
        return self.divide(x)


def as_clip(x):
    return x / x.norm(p=2, dim=-1, keepdim=True) * 3


def factors_of_rows(x):
    return torch.arange(1.0, TOKENS + 1)[:, None] * torch.nn.functional.normalize(x, dim=2)


def length_too(x):
    length = x.norm(dim=-1, keepdim=True)
    return torch.cat([x / length.clamp(min=1e-3), length], -1)


def of_no_length(x):
    return torch.nn.functional.normalize(x * (torch.arange(TOKENS) > 2)[:, None], dim=-1)


def too_short_to_square(x):
    return torch.nn.functional.normalize(x * 1e-25, dim=-1, eps=1e-24)


def along_another_axis(x):
    return torch.nn.functional.normalize(x, dim=1)


def of_another_order(x):
    return torch.nn.functional.normalize(x, p=1, dim=-1)


def by_another_length(x):
    return x / x.flip(1).norm(dim=-1, keepdim=True)


def limited_below_nothing(x):
    return x / x.norm(dim=-1, keepdim=True).clamp(min=-9.0)


def limited_above(x):
    return x / x.norm(dim=-1, keepdim=True).clamp(1e-3, 2.0)


@pytest.mark.parametrize(
    "divide, is_rewritten",
    [
        (as_clip, True),
        (factors_of_rows, True),
        (length_too, True),
        (of_no_length, True),
        (too_short_to_square, False),
        (along_another_axis, False),
        (of_another_order, False),
        (by_another_length, False),
        (limited_below_nothing, False),
        (limited_above, False),
    ],
)
@torch.no_grad()
def test_what_is_divided_by_its_length_is_multiplied_by_a_root(tvm, divide, is_rewritten):
    x = torch.randn(BATCH, TOKENS, 24, generator=torch.Generator().manual_seed(0))
    model = Divided(divide)
    prepared = prepare(tvm, model, x)
    assert any("rsqrt" in name for name in called_functions(prepared[1])) == is_rewritten
    assert relative_error(run_unscheduled(*prepared, x), output_arrays(model(x))) < 1e-5
