"""What is done alike to queries and keys is done to both at once, with the numbers of eager PyTorch."""

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
        self.norms = torch.nn.ParameterList(torch.rand(HEAD_DIM) + 0.5 for _ in range(2))
        self.register_buffer("angles", torch.outer(torch.arange(TOKENS), torch.rand(HEAD_DIM)))
        self.one_product = one_product

    def forward(self, x):
        if self.one_product:  # as ModernBERT has it, for as many heads of keys as of queries
            parts = self.all(x).view(BATCH, TOKENS, 3, HEADS, HEAD_DIM).unbind(2)
        else:
            parts = (linear(x).view(BATCH, TOKENS, -1, HEAD_DIM) for linear in self.linears)
        query, key, value = (part.transpose(1, 2) for part in parts)
        query, key = self.turn_both(query, key, self.angles.cos(), self.angles.sin(), *self.norms)
        key, value = (
            t[:, :, None].expand(-1, -1, HEADS // t.shape[1], -1, -1).reshape(BATCH, HEADS, TOKENS, HEAD_DIM)
            for t in (key, value)
        )
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).reshape(BATCH, TOKENS, -1)


def as_llama(query, key, cos, sin, *_):
    return turn(query, cos, sin), turn(key, cos, sin)


def a_part_of_each_head(query, key, cos, sin, *_):
    half = HEAD_DIM // 2
    cos, sin = cos[:, :half], sin[:, :half]
    turned = (turn(t[..., :half], cos, sin) for t in (query, key))
    return [torch.cat([front, t[..., half:]], -1) for front, t in zip(turned, (query, key))]


def by_other_angles(query, key, cos, sin, *_):
    return turn(query, cos, sin), turn(key, cos, -sin)


def with_other_heads(query, key, *_):
    return query + query.roll(1, 1), key + key.roll(1, 1)


def each_head_by_its_own(query, key, *_):
    scales = torch.arange(1.0, HEADS + 1).view(1, HEADS, 1, 1)
    return query * scales, key * scales[:, : key.shape[1]]


def normalized(x, weight, epsilon=1e-6):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def as_qwen3(query, key, cos, sin, query_norm, key_norm):
    """With norms of heads by other weights."""
    query, key = (  # before the tokens are put behind the heads
        normalized(x.transpose(1, 2), norm).transpose(1, 2) for x, norm in ((query, query_norm), (key, key_norm))
    )
    return turn(query, cos, sin), turn(key, cos, sin)


def as_swin_v2(query, key, cos, sin, query_norm, key_norm):
    """With a number for each head that multiplies queries alone."""
    query, key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
    return query * query_norm[:HEADS, None, None].exp(), key


def normalized_otherwise(query, key, cos, sin, query_norm, key_norm):
    return normalized(query, query_norm), normalized(key, key_norm, 1e-5)


def by_what_is_no_constant(query, key, *_):
    return query * query.mean((1, 2), keepdim=True), key * key.mean((1, 2), keepdim=True)


def keys_as_they_are(query, key, cos, sin, *_):
    return turn(query, cos, sin), key


JOINED = [  # what is done, options, launches: the product, what is done to both, and attention
    (as_llama, {}, 3),
    (as_llama, {"key_heads": HEADS, "one_product": True}, 3),
    pytest.param(a_part_of_each_head, {}, 3, marks=pytest.mark.slow),
    (each_head_by_its_own, {}, 3),
    (as_qwen3, {}, 4),  # the norm and the turning are one each
    (as_swin_v2, {"key_heads": HEADS}, 3),
    pytest.param(by_other_angles, {}, 3, marks=pytest.mark.slow),
]
APART = [
    (normalized_otherwise, {}),
    (by_what_is_no_constant, {}),
    (keys_as_they_are, {}),
    pytest.param(with_other_heads, {}, marks=pytest.mark.slow),
]


def run(tvm, turn_both, options):
    """Returns (the names of what is launched, whether attention reads queries and keys in one tensor).

    After a look at the numbers that it gives.
    """
    torch.manual_seed(0)
    model, x = Turned(turn_both, **options).eval(), torch.randn(BATCH, TOKENS, 24)
    expected = output_arrays(model(x))
    prepared = prepare(tvm, model, x)
    assert relative_error(run_unscheduled(*prepared, x), expected) < 1e-5
    _, module, _, target = prepared
    (attention,) = filter(
        None, (read_attention(tvm.ir.load_json(t.module_json)) for t in extract_tasks(module, target))
    )
    return called_functions(module), attention.sources[0].tensor == attention.sources[1].tensor


@pytest.mark.parametrize("turn_both, options, launches", JOINED)
@torch.no_grad()
def test_queries_and_keys_are_computed_at_once(tvm, turn_both, options, launches):
    names, is_joined = run(tvm, turn_both, options)
    assert is_joined and len(names) == launches, names


@pytest.mark.parametrize("turn_both, options", APART)
@torch.no_grad()
def test_what_is_not_alike_is_computed_apart(tvm, turn_both, options):
    assert not run(tvm, turn_both, options)[1]
