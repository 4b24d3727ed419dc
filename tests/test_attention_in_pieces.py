"""Attention that a model writes as products around a softmax is one task, too, with the numbers of eager PyTorch."""

import math

import pytest
import torch
from test_attention import BATCH, HEADS, TOKENS, biases, called_functions, prepare, run_unscheduled

from harness.check import relative_error
from tvm_items.tasks import extract_tasks
from tvm_items.templates.attention_task import read_attention

HEAD_DIM = 16


class InPieces(torch.nn.Module):
    """A layer of attention whose heads attend() in some way."""

    def __init__(self, attend):
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(24, HEADS * HEAD_DIM) for _ in range(3))
        self.attend = attend
        self.register_buffer("biases", biases(1, HEADS, TOKENS, TOKENS))
        self.register_buffer("factors", torch.linspace(0.5, 2, HEADS).view(HEADS, 1, 1))
        self.register_buffer("mask", torch.where(torch.arange(TOKENS) < TOKENS - 3, 0, -1e9)[None, None, None])

    def forward(self, x):
        heads = (
            linear(x).view(BATCH, TOKENS, HEADS, HEAD_DIM).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        return self.attend(self, *heads).transpose(1, 2).reshape(BATCH, TOKENS, -1)


def plain(layer, query, key, value):
    return torch.matmul(torch.softmax(query @ key.transpose(-1, -2), -1), value)


def with_biases(layer, query, key, value):
    """As MPNet has it: the position's biases, and behind them the mask."""
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(HEAD_DIM) + layer.biases
    weights = torch.nn.functional.dropout(torch.softmax(scores + layer.mask, dim=-1), 0.1, layer.training)
    return torch.matmul(weights, value)


def scaled_before(layer, query, key, value):
    scores = (query * HEAD_DIM**-0.5) @ key.permute(0, 1, 3, 2)
    scores += layer.mask
    return scores.softmax(-1, dtype=torch.float32).type_as(value) @ value


def heads_in_batch(layer, query, key, value):
    """As BART had it: products of three axes, and a mask that is the same for all heads."""
    query, key, value = (heads.reshape(BATCH * HEADS, TOKENS, HEAD_DIM) for heads in (query, key, value))
    scores = torch.bmm(query * HEAD_DIM**-0.5, key.transpose(1, 2)) + layer.biases.expand(BATCH, -1, -1, -1).flatten(
        0, 1
    )
    weights = torch.softmax(scores + layer.mask[0], dim=-1)
    return torch.bmm(weights, value).view(BATCH, HEADS, TOKENS, HEAD_DIM)


def viewed_scores(layer, query, key, value):
    """As OPT had it: heads are apart where the mask is added, and nowhere else."""
    query, key, value = (heads.reshape(BATCH * HEADS, TOKENS, HEAD_DIM) for heads in (query, key, value))
    scores = torch.bmm(query, key.transpose(1, 2)).view(BATCH, HEADS, TOKENS, TOKENS) * HEAD_DIM**-0.5
    scores = scores + layer.biases + layer.mask
    weights = torch.softmax(scores.view(BATCH * HEADS, TOKENS, TOKENS), dim=-1)
    return torch.bmm(weights, value).view(BATCH, HEADS, TOKENS, HEAD_DIM)


class TokensFirst(torch.nn.Module):
    """As WavLM calls it: with three axes, biases of its own for each head, and weights that nobody reads."""

    def __init__(self):
        super().__init__()
        width = HEADS * HEAD_DIM
        self.query, self.key, self.value, self.out = (torch.nn.Linear(width, width) for _ in range(4))
        self.register_buffer("biases", torch.randn(BATCH * HEADS, TOKENS, TOKENS))

    def forward(self, x):
        layers = (self.query, self.key, self.value)
        weights = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), (layer.weight for layer in layers)))
        biases = torch.cat([layer.bias for layer in layers])
        attended, _ = torch.nn.functional.multi_head_attention_forward(
            *(x, x, x, x.shape[-1], HEADS, torch.empty([0]), biases, None, None, False, 0.1),
            *(self.out.weight, self.out.bias, self.training, None, True, self.biases),
            use_separate_proj_weight=True,
            **weights,
        )
        return attended


@pytest.mark.parametrize(
    "attend",
    [pytest.param(plain, marks=pytest.mark.slow), with_biases, scaled_before, heads_in_batch, viewed_scores, None],
)
@torch.no_grad()
def test_it_is_one_task_without_transpositions(tvm, attend):
    torch.manual_seed(0)
    model = InPieces(attend) if attend else TokensFirst()
    x = torch.randn(BATCH, TOKENS, 24) if attend else torch.randn(TOKENS, BATCH, HEADS * HEAD_DIM)
    prepared = _, module, _, target = prepare(tvm, model.eval(), x)
    names = called_functions(module)
    assert not any(word in name for name in names for word in ("transpose", "split", "softmax")), names
    assert relative_error(run_unscheduled(*prepared, x), [model(x).numpy()]) < 1e-5
    attentions = [read_attention(tvm.ir.load_json(task.module_json)) for task in extract_tasks(module, target)]
    (attention,) = filter(None, attentions)
    assert attention.scale == pytest.approx(1 if attend is plain else HEAD_DIM**-0.5)
    assert not attend or len({source.tensor for source in attention.sources}) == 1


def factors_of_heads(layer, query, key, value):
    """A number for each head multiplies scores, of products of three axes."""
    query, key = (heads.reshape(BATCH * HEADS, TOKENS, HEAD_DIM) for heads in (query, key))
    scores = torch.bmm(query, key.transpose(1, 2)).view(BATCH, HEADS, TOKENS, TOKENS) * layer.factors
    weights = (scores + layer.mask).view(BATCH * HEADS, TOKENS, TOKENS).softmax(-1)
    return (weights @ value.reshape(BATCH * HEADS, TOKENS, HEAD_DIM)).view(BATCH, HEADS, TOKENS, HEAD_DIM)


def masked_by_vmap(layer, query, key, value):
    """As transformers makes some masks: a function of a query and a key, for all of them."""
    positions = torch.arange(TOKENS)
    sees = torch.vmap(torch.vmap(lambda i, j: j.new_ones((), dtype=torch.bool) & (j <= i), (None, 0)), (0, None))
    mask = torch.where(sees(positions, positions), 0.0, -1e9)
    return ((query @ key.transpose(-1, -2) + mask).softmax(-1)) @ value


@pytest.mark.parametrize("attend", [factors_of_heads, masked_by_vmap])
@torch.no_grad()
def test_it_is_attention_with_something_before_it(tvm, attend):
    torch.manual_seed(0)
    model, x = InPieces(attend).eval(), torch.randn(BATCH, TOKENS, 24)
    prepared = prepare(tvm, model, x)
    assert "attention" in called_functions(prepared[1])
    assert relative_error(run_unscheduled(*prepared, x), [model(x).numpy()]) < 1e-5


def weights_too(layer, query, key, value):
    weights = (query @ key.transpose(-1, -2)).softmax(-1)
    return weights @ value + weights.amax()


def over_queries(layer, query, key, value):
    return (query @ key.transpose(-1, -2)).softmax(-2) @ value


def limited(layer, query, key, value):
    return torch.tanh(query @ key.transpose(-1, -2)).softmax(-1) @ value


def multiplied_mask(layer, query, key, value):
    return ((query @ key.transpose(-1, -2) + layer.biases) * 2).softmax(-1) @ value


def other_head_dims(layer, query, key, value):
    return ((query @ key.transpose(-1, -2)).softmax(-1) @ value[..., :8]).repeat(1, 1, 1, 2)


def larger_mask(layer, query, key, value):
    mask = layer.biases.expand(BATCH, -1, -1, -1)
    return (query[:1] @ key[:1].transpose(-1, -2) + mask).softmax(-1) @ value[:1]


SIMILAR = (over_queries, limited, other_head_dims)


@pytest.mark.parametrize(
    "attend",
    [weights_too, multiplied_mask, larger_mask, *(pytest.param(each, marks=pytest.mark.slow) for each in SIMILAR)],
)
@torch.no_grad()
def test_what_is_no_attention_is_left_alone(tvm, attend):
    torch.manual_seed(0)
    model, x = InPieces(attend).eval(), torch.randn(BATCH, TOKENS, 24)
    prepared = prepare(tvm, model, x)
    assert "attention" not in called_functions(prepared[1])
    assert relative_error(run_unscheduled(*prepared, x), [model(x).numpy()]) < 1e-5
