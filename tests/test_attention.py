"""Attention as one operator: through export and import, one task, with the numbers of eager PyTorch."""

import math
import re

import pytest
import torch
from transformers import ResNetConfig

from conftest import make_case
from harness.check import output_arrays, relative_error
from tvm_items.attention import can_be_whole
from tvm_items.executable import compile_and_bind, passes_after_scheduling
from tvm_items.importer import export_for_tvm
from tvm_items.measure import build_options
from tvm_items.relax_module import tuned_module
from tvm_items.tasks import extract_tasks
from tvm_items.templates.attention_task import read_attention

BATCH, TOKENS, HEADS = 2, 11, 4
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


class SelfAttention(torch.nn.Module):
    """Attention between the projections of a Transformer; `mask` and `options` are PyTorch's."""

    def __init__(self, key_heads=HEADS, head_dim=32, repeat=False, crossed=False, mask=None, sees=None, **options):
        super().__init__()
        self.query, self.out = torch.nn.Linear(24, HEADS * head_dim), torch.nn.Linear(HEADS * head_dim, 24)
        self.key, self.value = (torch.nn.Linear(24, key_heads * head_dim) for _ in range(2))
        self.head_dim, self.repeat, self.crossed, self.options = head_dim, repeat, crossed, options
        self.register_buffer("mask", mask)
        self.sees = sees

    def forward(self, x):
        others = x.flip(1) if self.crossed else x
        query, key, value = (
            linear(source).view(BATCH, TOKENS, -1, self.head_dim).transpose(1, 2)
            for linear, source in ((self.query, x), (self.key, others), (self.value, others))
        )
        if self.repeat:  # as transformers does where there is a mask
            key, value = (
                t[:, :, None].expand(-1, -1, HEADS // t.shape[1], -1, -1).reshape(query.shape) for t in (key, value)
            )
        mask, positions = self.mask, torch.arange(TOKENS)
        if self.sees:  # a mask that does not depend on the input, as transformers makes it
            mask = self.sees(positions[:, None], positions)[None, None].expand(BATCH, -1, TOKENS, TOKENS)
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, **self.options)
        return self.out(attended.transpose(1, 2).contiguous().view(BATCH, TOKENS, -1))


def padding(*shape):
    """A mask that hides the last keys of the first sample, and of another query, where it has them, all."""
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0, ..., -4:] = False
    if shape[-2] > 1:
        mask[-1, ..., 3, :] = False
    return mask


def biases(*shape):
    """A mask of numbers to add, of which some hide a key in one or the other of the two usual ways."""
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask[..., 1], mask[..., 2] = -math.inf, torch.finfo(mask.dtype).min
    return mask


WHOLE = {
    "no mask": {},
    "scale": {"scale": -0.3},
    "causal": {"is_causal": True},
    "mask of keys": {"mask": padding(BATCH, 1, 1, TOKENS).expand(BATCH, 1, TOKENS, TOKENS)},
    "mask of queries and keys": {"mask": padding(BATCH, HEADS, TOKENS, TOKENS)},
    "mask without batch": {"mask": padding(1, TOKENS, TOKENS)[0]},
    "biases": {"mask": biases(1, HEADS, TOKENS, TOKENS)},
    "grouped": {"key_heads": 2, "enable_gqa": True},
    "repeated": {"key_heads": 2, "repeat": True, "mask": padding(BATCH, 1, TOKENS, TOKENS)},
    "mask of all": {"sees": lambda query, key: query >= 0},
    "mask of causality": {"sees": lambda query, key: key <= query},
    "mask of a window": {"sees": lambda query, key: (key <= query) & (key > query - 3)},
    "crossed": {"crossed": True, "mask": padding(BATCH, 1, 1, TOKENS)},
    "one key head": {"key_heads": 1, "repeat": True, "is_causal": True},
}
SIMILAR = ("scale", "mask of keys", "mask without batch", "mask of a window", "one key head")


def prepare(tvm, model, x):
    """Returns (exported program, Relax module, weights, target) as tvm_tune has them before it schedules."""
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    exported = export_for_tvm(model, {"x": x}, whole_attention=True)
    return exported, *tuned_module(exported, target), target


def run_unscheduled(exported, module, weights, target, x):
    """Returns what tvm_tune computes without a library on the CPU."""
    case, pipeline = make_case(ResNetConfig()), passes_after_scheduling(target)
    run = compile_and_bind(module, weights, exported, {"x": x}, target, case, pipeline, build_options(target))
    return output_arrays(run())


def called_functions(module):
    return re.findall(r"call_tir\((\w+),", module["main"].script())


# In half precision one that has all that there is, on request: LLVM takes 10 s or more for each.
@pytest.mark.parametrize(
    "kind, dtype",
    [
        *(pytest.param(kind, torch.float32, marks=[pytest.mark.slow] * (kind in SIMILAR)) for kind in WHOLE),
        *(pytest.param("repeated", dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.bfloat16)),
    ],
)
@torch.no_grad()
def test_attention_is_one_task_without_transpositions(tvm, kind, dtype):
    options = WHOLE[kind]
    torch.manual_seed(0)
    model, x = SelfAttention(**options).eval(), torch.randn(BATCH, TOKENS, 24)
    expected = model(x).numpy()
    model, x = model.to(dtype), x.to(dtype)
    prepared = _, module, _, target = prepare(tvm, model, x)
    assert relative_error(run_unscheduled(*prepared, x), [expected]) < TOLERANCES[dtype]
    names = called_functions(module)
    assert not any(word in name for name in names for word in ("transpose", "split", "slice"))
    is_crossed = options.get("crossed", False)
    # One product for queries, keys and values, or for keys and values where queries are of another input.
    assert sum("matmul" in name for name in names) == (3 if is_crossed else 2)
    attentions = [read_attention(tvm.ir.load_json(task.module_json)) for task in extract_tasks(module, target)]
    (attention,) = filter(None, attentions)
    assert len({source.tensor for source in attention.sources}) == (2 if is_crossed else 1)
    assert attention.heads == HEADS and attention.key_heads == options.get("key_heads", HEADS)
    assert attention.is_causal == (kind == "mask of causality" or options.get("is_causal", False))
    assert (attention.mask_dtype is not None) == ("mask" in options or kind == "mask of a window")


APART = {
    "no mask": {"head_dim": 20},
    "causal": {"head_dim": 20, "is_causal": True},
    "mask": {"head_dim": 20, "mask": padding(BATCH, 1, TOKENS, TOKENS)},
    "biases": {"head_dim": 20, "mask": biases(1, HEADS, TOKENS, TOKENS)},
    "grouped": {"head_dim": 20, "key_heads": 2, "enable_gqa": True},
}


@pytest.mark.parametrize("kind", APART)
@torch.no_grad()
def test_attention_of_other_head_dims_stays_apart(tvm, kind):
    torch.manual_seed(0)
    model, x = SelfAttention(**APART[kind]).eval(), torch.randn(BATCH, TOKENS, 24)
    outputs = run_unscheduled(*prepare(tvm, model, x), x)
    assert relative_error(outputs, [model(x).numpy()]) < TOLERANCES[torch.float32]


@torch.no_grad()
def test_attention_that_stays_apart_is_in_its_dtype(tvm):
    """So that tensor cores can have its products; and it has no kernel for a mask that is not there."""
    model, x = SelfAttention(head_dim=18).eval().half(), torch.randn(BATCH, TOKENS, 24).half()
    _, module, _, target = prepare(tvm, model, x)
    operands = [task.arguments[0] for task in extract_tasks(module, target) if "matmul" in task.name]
    assert [dtype for dtype, shape in operands if shape[0] == BATCH * HEADS] == ["float16", "float16"]
    assert not any("where" in name or "equal" in name for name in called_functions(module))


@torch.no_grad()
def test_which_heads_stay_whole(tvm):
    """Of 36, as MobileViT has them, on tensor cores alone, and of more than one query, which may be over a cache.

    Of 256, as Gemma has them, but for one query in fp32.
    """
    model, x = SelfAttention(head_dim=36).eval().half(), torch.randn(BATCH, TOKENS, 24).half()
    assert called_functions(prepare(tvm, model, x)[1]).count("attention") == 1
    for dtype, head_dim, query_count, is_whole in (
        (torch.float16, 36, TOKENS, True),
        (torch.bfloat16, 36, TOKENS, True),
        (torch.float32, 36, TOKENS, False),
        (torch.float16, 36, 1, False),
        (torch.float16, 256, TOKENS, True),
        (torch.float16, 256, 1, True),
        (torch.float32, 256, TOKENS, True),
        (torch.float32, 256, 1, False),
        (torch.float16, 260, TOKENS, False),
    ):
        keys = torch.empty(BATCH, HEADS, TOKENS, head_dim, dtype=dtype)
        assert can_be_whole(keys[:, :, :query_count], keys, keys, None, 0.0) == is_whole
