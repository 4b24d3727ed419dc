"""The fused kernels of attention: they compile for Hopper, and emulated they compute what PyTorch does."""

import json
import math
import random

import pytest
import torch

from conftest import H200
from cuda_emulator import emulate
from products import make_product, random_fitting
from tvm_items.search import search
from tvm_items.tasks import default_schedule
from tvm_items.templates.attention_task import Attention, Source, define_attention, read_attention
from tvm_items.templates.find import FIRST_TEMPLATE, find_templates
from tvm_items.templates.fma import FmaTemplate

HEAD_DIMS = {"float16": (36, 60, 64, 72, 128, 256), "bfloat16": (64, 96, 132), "float32": (32, 64, 72, 128, 256)}


def make_attention(dtype="float16", head_dim=64, **fields):
    """A task's attention, of ViT-base at batch size 16 but for `fields`."""
    defaults = {
        "batch": 16,
        "query_count": 197,
        "key_count": 197,
        "heads": 12,
        "key_heads": 12,
        "scale": head_dim**-0.5,
    }
    no_mask = {"is_causal": False, "mask_shape": None, "mask_dtype": None}
    all_fields = {**defaults, **no_mask, "dtype": dtype, "head_dim": head_dim, **fields}
    key_heads = all_fields["key_heads"]
    sources = Source(0, all_fields["heads"], 0), Source(1, key_heads, 0), Source(2, key_heads, 0)
    return Attention(**{"sources": sources, **all_fields})


def make_template(tvm, attention, **target):
    module = tvm.IRModule({"main": define_attention(attention)})
    (template,) = find_templates(module, tvm.target.Target({**json.loads(H200), **target}))
    return template


@pytest.mark.parametrize(
    "dtype, head_dim",
    [
        pytest.param(dtype, dim, marks=() if dim in (dims[0], dims[-1]) else pytest.mark.slow)
        for dtype, dims in HEAD_DIMS.items()
        for dim in dims
    ],
)
def test_kernels_compile_for_hopper(tvm, dtype, head_dim):
    rng, target = random.Random(head_dim), tvm.target.Target(json.loads(H200))
    attention = make_attention(dtype, head_dim, is_causal=head_dim == 128, key_heads=4)
    template = make_template(tvm, attention)
    module = template.realize(random_fitting(template, rng))
    task = define_attention(attention)
    types = [[(str(p.ty.dtype), list(map(int, p.ty.shape))) for p in f.params] for f in (module["main"], task)]
    assert types[0] == types[1]
    with target:
        source = tvm.build(module, target=target, pipeline="tirx").imports[0].inspect_source("cuda")
    assert ("mma.sync" in source and "ldmatrix" in source) == (dtype != "float32")
    assert ("cp.async.cg" in source, "cp.async.ca" in source) == ((True, False) if head_dim % 8 == 0 else (False, True))
    assert source.count('extern "C" __global__') == 2  # one kernel, declared and defined


@pytest.mark.parametrize("dtype, head_dim, part", [("float16", 64, 128), ("bfloat16", 128, 64)])
def test_kernels_for_a_cache_compile_for_hopper(tvm, dtype, head_dim, part):
    """16 bytes are loaded at a time. A cluster joins eight parts of the context, a second kernel sixteen."""
    target = tvm.target.Target(json.loads(H200))
    mask = {"mask_shape": (1, 1, 1, 1024), "mask_dtype": "bool"}
    attention = make_attention(dtype, head_dim, **{**CACHE, "heads": 32, "key_heads": 8, "key_count": 1024}, **mask)
    template = make_template(tvm, attention)
    decisions = [values.index(value) for values, value in zip(template.parameters, (4, 4, part, 2))]
    with target:
        module = template.realize(decisions)
        source = tvm.build(module, target=target, pipeline="tirx").imports[0].inspect_source("cuda")
    kernels = source.count('extern "C" __global__') // 2  # each is declared and defined
    assert (kernels, "mapa.shared::cluster" in source) == ((1, True) if part == 128 else (2, False))
    assert "*(uint4*)(loaded" in source


def attend(attention, inputs):
    """Returns what PyTorch computes in float64, in the layout of the task, from the tensors that its function reads."""
    in_order = inputs
    if attention.heads_first:
        in_order = [inputs[0], *(tensor.transpose(1, 2) for tensor in inputs[1:3])]
    queries, keys, values = (
        in_order[source.tensor][:, :, source.first : source.first + heads].double().transpose(1, 2)
        for source, heads in zip(attention.sources, (attention.heads, attention.key_heads, attention.key_heads))
    )
    mask = inputs[-1] if attention.mask_shape else None
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    options = {"is_causal": attention.is_causal, "scale": attention.scale, "enable_gqa": True}
    return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, mask, **options).transpose(1, 2)


def make_inputs(attention):
    """Returns the tensors that the task's function reads; by the mask, where there is one, one query sees no key."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape, _ in attention.inputs]
    if attention.mask_shape:
        visible = torch.rand(attention.mask_shape) > 0.4
        if attention.mask_shape[2] > 1:
            visible[:, :, 3] = False
        inputs[-1] = visible if attention.mask_dtype == "bool" else torch.where(visible, inputs[-1], -math.inf)
    return [tensor.to(getattr(torch, dtype)) for tensor, (_, dtype) in zip(inputs, attention.inputs)]


def check_emulated(module, target, attention, pipeline):
    """Checks what a scheduled module computes from random inputs, and that it leaves them as they are."""
    inputs = make_inputs(attention)
    expected = attend(attention, inputs)
    arguments = [*inputs, torch.full(expected.shape, math.nan, dtype=inputs[0].dtype)]
    tolerance = {"float16": 1e-3, "bfloat16": 5e-3, "float32": 1e-6}[attention.dtype]
    for results in emulate(module, target, arguments, pipeline):
        assert all(torch.equal(before, after) for before, after in zip(inputs, results))
        assert (results[-1].double() - expected).norm() <= tolerance * expected.norm()


# Of two heads of queries that share one of keys and values: side by side, and keys and values in another order.
ONE_TENSOR = (Source(0, 4, 0), Source(0, 4, 2), Source(0, 4, 3))
TWO_TENSORS = (Source(1, 2, 0), Source(0, 2, 1), Source(0, 2, 0))
SMALL = {"batch": 1, "heads": 2, "key_heads": 2}
CACHE = {"query_count": 1, "heads_first": True, "batch": 2}
# kind -> (fields of the attention, parameters of the kernel: see attention_mma.py and attention_fma.py)
KERNELS = {
    "one stage": ({"query_count": 37, "key_count": 37, "head_dim": 32}, (2, 1, 16, 1, 1)),
    "causal, two tiles": ({"query_count": 80, "key_count": 80, "is_causal": True, "head_dim": 40}, (2, 2, 32, 2, 1)),
    # of the first queries only the first of four groups sees a key
    "causal, groups of warps": ({"query_count": 80, "key_count": 80, "is_causal": True}, (1, 1, 16, 2, 4)),
    "mask of keys, three stages": (
        {"query_count": 37, "key_count": 80, "batch": 2, "mask_shape": (2, 1, 1, 80), "mask_dtype": "bool"},
        (3, 1, 16, 3, 2),
    ),
    "biases, grouped": (
        {"query_count": 37, "key_count": 45, "heads": 4, "mask_shape": (1, 4, 37, 45), "mask_dtype": "float16"},
        (1, 1, 16, 1, 2),
    ),
    "bf16, one tensor": (
        {"query_count": 37, "key_count": 37, "key_heads": 1, "dtype": "bfloat16", "sources": ONE_TENSOR},
        (3, 1, 32, 2, 1),
    ),
    # Of heads of 36 and 60 a row begins at a multiple of 8 bytes only, and its last piece of 8 columns is half a piece.
    "heads of 36, mask, two stages": (
        {"query_count": 21, "key_count": 37, "head_dim": 36, "mask_shape": (1, 2, 21, 37), "mask_dtype": "bool"},
        (2, 1, 16, 2, 1),
    ),
    "heads of 60, bf16, one tensor": (
        {"query_count": 21, "key_count": 21, "key_heads": 1, "head_dim": 60, "dtype": "bfloat16"}
        | {"sources": ONE_TENSOR},
        (1, 2, 16, 2, 1),
    ),
    "heads of 60, groups of warps": ({"query_count": 21, "key_count": 37, "head_dim": 60}, (1, 1, 16, 1, 2)),
    # Queries of more than 128 elements are in shared memory.
    "heads of 256, causal, two stages": (
        {"query_count": 37, "key_count": 37, "is_causal": True, "key_heads": 1, "head_dim": 256},
        (2, 1, 16, 2, 1),
    ),
    "heads of 132, groups of warps": (
        {"query_count": 41, "key_count": 37, "head_dim": 132, "dtype": "bfloat16"},
        (1, 2, 16, 1, 2),
    ),
    "fp32, one stage": ({"query_count": 37, "key_count": 37, "dtype": "float32", "head_dim": 32}, (4, 8, 2, 16, 1)),
    "fp32, causal, grouped": (
        {"query_count": 80, "key_count": 80, "is_causal": True, "key_heads": 1, "dtype": "float32"}
        | {"sources": TWO_TENSORS},
        (8, 8, 4, 32, 2),
    ),
    "fp32, mask": (
        {"query_count": 37, "key_count": 37, "mask_shape": (1, 2, 37, 37), "mask_dtype": "bool", "dtype": "float32"},
        (16, 4, 3, 16, 3),
    ),
    # see attention_decode.py
    "cache, grouped": (
        CACHE | {"key_count": 64, "heads": 4, "mask_shape": (1, 1, 1, 64), "mask_dtype": "bool"},
        (2, 2, 32, 2),
    ),
    "cache, biases, cut": (
        CACHE
        | {"key_count": 77, "heads": 4, "key_heads": 1, "head_dim": 128}
        | {"mask_shape": (2, 4, 1, 77), "mask_dtype": "float16"},
        (1, 4, 32, 2),
    ),
    "cache, more parts than a cluster has blocks": (
        CACHE | {"key_count": 300, "mask_shape": (2, 1, 1, 300), "mask_dtype": "bool"},
        (1, 1, 32, 2),
    ),
    "cache, fp32": (CACHE | {"key_count": 50, "head_dim": 32, "dtype": "float32"}, (1, 1, 32, 4)),
    # of 16 lanes that share a key four have nothing of it
    "cache, heads of 96": (
        CACHE | {"key_count": 70, "heads": 4, "head_dim": 96, "mask_shape": (1, 1, 1, 70), "mask_dtype": "bool"},
        (2, 2, 32, 2),
    ),
    "cache, heads of 256": (CACHE | {"key_count": 40, "head_dim": 256, "dtype": "bfloat16"}, (2, 1, 32, 2)),
    "cache, bf16, one part": (
        CACHE | {"key_count": 70, "dtype": "bfloat16", "mask_shape": (1, 1, 1, 70), "mask_dtype": "bool"},
        (4, 1, 128, 1),
    ),
}


# Others have what these leave out, too.
REPEATED = (
    "one stage",
    "causal, two tiles",
    "fp32, one stage",
    "fp32, mask",
    "bf16, one tensor",
    "cache, fp32",
    "cache, grouped",
)


@pytest.mark.parametrize(
    "fields, parameters",
    [pytest.param(*of_kind, marks=[pytest.mark.slow] * (kind in REPEATED)) for kind, of_kind in KERNELS.items()],
    ids=KERNELS,
)
def test_an_emulated_kernel_computes_attention(tvm, fields, parameters):
    """With asynchronous copies as late and as early as they may be; 37 is neither a multiple of a tile nor of a row."""
    attention = make_attention(**{**SMALL, **fields})
    template = make_template(tvm, attention)
    decisions = [values.index(value) for values, value in zip(template.parameters, parameters)]
    target = tvm.target.Target(json.loads(H200))
    check_emulated(template.realize(decisions), target, attention, "tirx")


@pytest.mark.parametrize("kind", ["biases, grouped", pytest.param("bf16, one tensor", marks=pytest.mark.slow)])
def test_what_kernels_are_checked_against_computes_attention(tvm, kind):
    """TVM's default schedule of the task, which is several launches."""
    attention, target = make_attention(**{**SMALL, **KERNELS[kind][0]}), tvm.target.Target(json.loads(H200))
    module = default_schedule(tvm.IRModule({"main": define_attention(attention)}), target)
    check_emulated(module, target, attention, pipeline=None)


@pytest.mark.parametrize("fields", [fields for fields, _ in KERNELS.values()], ids=KERNELS)
def test_a_task_tells_its_attention(tvm, fields):
    attention = make_attention(**{**SMALL, **fields})
    assert read_attention(tvm.IRModule({"main": define_attention(attention)})) == attention


def test_what_does_not_fit_is_refused(tvm):
    attention = make_attention(head_dim=128)
    devices = [make_template(tvm, attention, arch=arch) for arch in ("sm_89", "sm_90")]
    assert [template.max_shared_bytes for template in devices] == [99 * 1024, 227 * 1024]
    large = [values.index(value) for values, value in zip(devices[0].parameters, (8, 1, 64, 3, 1))]
    assert [template.fits(large) for template in devices] == [False, True]
    with pytest.raises(ValueError):
        devices[0].realize(large)


def test_other_tasks_and_devices_do_not_have_these_templates(tvm):
    hopper, attention = json.loads(H200), tvm.IRModule({"main": define_attention(make_attention())})
    (of_product,) = find_templates(make_product(16), tvm.target.Target(hopper))
    assert isinstance(of_product, FmaTemplate)
    assert find_templates(attention, tvm.target.Target({**hopper, "arch": "sm_75"})) == []
    assert find_templates(attention, tvm.target.Target({"kind": "llvm", "num-cores": 2})) == []


def test_attention_is_searched(tvm):
    """MetaSchedule's rules take no such function: TVM raises an error for some, and what is left are the templates."""
    attention = make_attention("float16", 32, batch=1, heads=2, key_heads=2, query_count=37, key_count=37)
    module = tvm.IRModule({"main": define_attention(attention).with_attr("global_symbol", "main")})
    found = search(tvm.ir.save_json(module), H200, [], [], 16, 1)
    assert len(found) == 16 and any(candidate.space >= FIRST_TEMPLATE for candidate in found)
