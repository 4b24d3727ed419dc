"""Rotary positions: queries and keys are turned at once, with the numbers of eager PyTorch."""

import pytest
import torch
from test_attention import BATCH, TOKENS, called_functions, prepare, run_unscheduled

from harness.check import output_arrays, relative_error
from tvm_items.tasks import extract_tasks
from tvm_items.templates.attention_task import read_attention

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16


def rotate_half(x):
    return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


def turn(x, cos, sin):
    return x * cos + rotate_half(x) * sin


class Turned(torch.nn.Module):
    """Attention whose queries and keys are turned in some way, from a product each or from one for all."""

    def __init__(self, turn_both, key_heads=KEY_HEADS, one_product=False):
        super().__init__()
        self.extents = [HEADS * HEAD_DIM, key_heads * HEAD_DIM, key_heads * HEAD_DIM]
        self.linears = torch.nn.ModuleList(torch.nn.Linear(24, extent) for extent in self.extents)
        self.all, self.turn_both = torch.nn.Linear(24, sum(self.extents)), turn_both
        self.register_buffer("angles", torch.outer(torch.arange(TOKENS), torch.rand(HEAD_DIM)))
        self.one_product = one_product

    def forward(self, x):
        if self.one_product:  # as ModernBERT has it, for as many heads of keys as of queries
            parts = self.all(x).view(BATCH, TOKENS, 3, HEADS, HEAD_DIM).unbind(2)
        else:
            parts = (linear(x).view(BATCH, TOKENS, -1, HEAD_DIM) for linear in self.linears)
        query, key, value = (part.transpose(1, 2) for part in parts)
        query, key = self.turn_both(query, key, self.angles.cos(), self.angles.sin())
        key, value = (
            t[:, :, None].expand(-1, -1, HEADS // t.shape[1], -1, -1).reshape(BATCH, HEADS, TOKENS, HEAD_DIM)
            for t in (key, value)
        )
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).reshape(BATCH, TOKENS, -1)


def as_llama(query, key, cos, sin):
    return turn(query, cos, sin), turn(key, cos, sin)


def a_part_of_each_head(query, key, cos, sin):
    half = HEAD_DIM // 2
    cos, sin = cos[:, :half], sin[:, :half]
    turned = (turn(t[..., :half], cos, sin) for t in (query, key))
    return [torch.cat([front, t[..., half:]], -1) for front, t in zip(turned, (query, key))]


def by_other_angles(query, key, cos, sin):
    return turn(query, cos, sin), turn(key, cos, -sin)


def with_other_heads(query, key, *_):
    return query + query.roll(1, 1), key + key.roll(1, 1)


def each_head_by_its_own(query, key, *_):
    scales = torch.arange(1.0, HEADS + 1).view(1, HEADS, 1, 1)
    return query * scales, key * scales


@pytest.mark.parametrize(
    "turn_both, options, launches",
    [
        (as_llama, {}, 3),  # the product, the turning and attention
        (as_llama, {"key_heads": HEADS, "one_product": True}, 3),
        pytest.param(a_part_of_each_head, {}, 3, marks=pytest.mark.slow),
        (by_other_angles, {}, 4),
        pytest.param(with_other_heads, {}, None, marks=pytest.mark.slow),
        pytest.param(each_head_by_its_own, {"key_heads": HEADS}, None, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_queries_and_keys_are_turned_at_once(tvm, turn_both, options, launches):
    torch.manual_seed(0)
    model, x = Turned(turn_both, **options).eval(), torch.randn(BATCH, TOKENS, 24)
    expected = output_arrays(model(x))
    prepared = prepare(tvm, model, x)
    _, module, _, target = prepared
    (attention,) = filter(
        None, (read_attention(tvm.ir.load_json(t.module_json)) for t in extract_tasks(module, target))
    )
    if launches:
        assert len(called_functions(module)) == launches
    is_joined = attention.sources[0].tensor == attention.sources[1].tensor
    assert is_joined == (launches == 3)
    assert relative_error(run_unscheduled(*prepared, x), expected) < 1e-5
