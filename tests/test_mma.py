"""The template of mma.sync: its kernels, run on the CPU, are right for odd shapes, layouts and epilogues."""

import json
import math

import numpy as np
import pytest
import torch

from conftest import H200
from cuda_emulator import emulate, generate
from products import make_batched_product, make_convolution, rounded_to_tf32
from tvm_items.kernels import compile_candidate
from tvm_items.lowering import tir_pipeline
from tvm_items.templates.epilogue import LOG2_ERFC
from tvm_items.templates.find import find_templates
from tvm_items.templates.mma import PARAMETERS, Config, MmaTemplate
from tvm_items.templates.product_task import ALLOW_TF32, ROUNDED


def decide(**options):
    """Returns the decisions for these options; the others are those of a small tile."""
    chosen = {
        "rows": 64,
        "columns": 32,
        "chunks": 4,
        "warps_along_rows": 2,
        "warps_along_columns": 1,
        "stages": 3,
        "group": 4,
        "parts": 1,
        "staged": False,
        **options,
    }
    return [values.index(chosen[name]) for name, values in zip(Config.__dataclass_fields__, PARAMETERS, strict=True)]


def check(tvm, task, tolerance=None, **options):
    """Asserts that the kernel of these options gives what is expected, with asynchronous copies late and early."""
    module, arguments, expected = task
    target = tvm.target.Target(json.loads(H200))
    (template, *_) = find_templates(module, target)
    realized = template.realize(decide(**options))
    tolerance = tolerance or {torch.float16: 1e-3, torch.bfloat16: 8e-3}[expected.dtype]
    for values in emulate(realized, target, arguments, tir_pipeline()):
        error = (values[-1].float() - expected.float()).norm() / expected.float().norm()
        assert error < tolerance and all(map(torch.equal, values[:-1], arguments[:-1]))
    return realized


@pytest.mark.parametrize(
    "shape, dtype, transposed, epilogue, options",
    [
        # Neither rows, columns nor terms are multiples of a tile; batch 1 stands in front as in a Linear layer.
        ((1, 70, 40, 104), "float16", False, True, {}),
        pytest.param((1, 70, 40, 104), "bfloat16", True, True, {"stages": 2, "chunks": 8}, marks=pytest.mark.slow),
        # Columns that 8 does not divide, through shared memory; several products.
        ((3, 37, 36, 64), "float16", False, True, {"rows": 32, "warps_along_rows": 1, "staged": True}),
        # Terms that 2 does not divide cannot be copied asynchronously, nor columns be stored as pairs.
        ((2, 37, 33, 37), "float16", True, False, {"rows": 16, "warps_along_rows": 1, "columns": 32}),
        # Sums in three parts of a different number of steps.
        ((1, 70, 72, 264), "bfloat16", False, True, {"parts": 3, "columns": 64, "warps_along_columns": 2}),
        # The same, added up by a cluster of blocks in their shared memory.
        ((1, 70, 72, 264), "float16", False, True, {"parts": 3, "columns": 64, "staged": True}),
    ],
)
def test_products(tvm, shape, dtype, transposed, epilogue, options):
    check(tvm, make_batched_product(shape, dtype, transposed, epilogue), **options)


@pytest.mark.parametrize(
    "activation, dtype",
    [("gelu by tanh", "float16")]
    + [pytest.param("gelu", dtype, marks=pytest.mark.slow) for dtype in ("float16", "bfloat16")],
)
def test_gelu_behind_a_product(tvm, activation, dtype):
    task = make_batched_product((1, 70, 40, 104), dtype, activation=activation)
    check(tvm, task, tolerance={"float16": 1e-3, "bfloat16": 1e-2}[dtype])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "activation, instruction, exact",
    [("gelu", "ex2.approx", "erf"), ("silu", "rcp.approx", "exp"), ("gelu by tanh", "rcp.approx", "tanh")],
)
def test_activations_of_16_bits_are_short(tvm, dtype, activation, instruction, exact):
    module, *_ = make_batched_product((1, 70, 40, 104), dtype, activation=activation)
    target = tvm.target.Target(json.loads(H200))
    (template, *_) = find_templates(module, target)
    source, *_ = generate(template.realize(decide()), target, tir_pipeline())
    kernel = source[source.rindex("__global__") :]
    assert instruction in source and f"{exact}f(" not in kernel and f"h{exact}(" not in kernel


def test_an_activation_that_is_rounded_to_tf32(tvm):
    """It is computed once, though what rounds it reads it five times, and what it reads is loaded in vectors."""
    task = make_batched_product((1, 70, 40, 104), "float32", activation="gelu", rounded=True)
    realized = check(tvm, task, tolerance=1e-4, chunks=8)
    source, *_ = generate(realized, tvm.target.Target(json.loads(H200)), tir_pipeline())
    kernel = source[source.rindex("__global__") :]
    assert "erff" not in kernel and kernel.count("cvt_tf32_f32_rna") == kernel.count("ex2_approx") > 0
    assert "isnan" not in kernel and "(float2*)" in kernel


def test_the_error_of_erf():
    """In fp32, as the kernels compute it: what it adds to erf is lost where the result is rounded to 16 bits."""
    x = np.linspace(0, 6, 100001, dtype=np.float32)
    exponent = np.float32(0)
    for coefficient in reversed(LOG2_ERFC):
        exponent = (exponent + np.float32(coefficient)) * x
    error = np.abs(1 - np.exp2(exponent) - np.array([math.erf(value) for value in x]))
    assert error.max() < 1e-6 and error[x < 0.1].max() < 3e-7


def test_the_error_of_tanh():
    x = np.linspace(0, 12, 100001, dtype=np.float32)
    share = 1 / (1 + np.exp2(x * np.float32(2 * math.log2(math.e))))
    assert np.abs(1 - 2 * share - np.array([math.tanh(value) for value in x])).max() < 1e-6


@pytest.mark.parametrize(
    "shape, dtype, geometry, options",
    [
        ((2, 9, 16, 40, 3), "float16", (2, 1, 1), {}),
        ((2, 9, 32, 48, 3), "float16", (2, 1, 1, 4), {}),  # four groups, each a product
        pytest.param((1, 11, 8, 32, 3), "bfloat16", (1, 2, 2), {"staged": True, "stages": 4}, marks=pytest.mark.slow),
        ((1, 14, 3, 24, 4), "float16", (4, 0, 1), {"rows": 16, "warps_along_rows": 1}),  # three channels: one by one
        ((1, 9, 1, 24, 3), "float16", (2, 0, 1), {"rows": 16, "warps_along_rows": 1, "stages": 2}),  # nine terms
        pytest.param(
            (2, 6, 40, 32, 1), "float16", (2, 0, 1), {"rows": 32, "chunks": 8, "stages": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_convolutions(tvm, shape, dtype, geometry, options):
    check(tvm, make_convolution(shape, dtype, *geometry), **options)


@pytest.mark.parametrize(
    "shape, transposed",
    [((1, 70, 40, 104), False), pytest.param((2, 37, 33, 37), True, marks=pytest.mark.slow)],
)
def test_tf32_where_it_is_allowed(tvm, shape, transposed):
    """Operands are rounded to the nearest, as PyTorch does, and not cut off."""
    module, arguments, _ = make_batched_product(shape, "float32", transposed, epilogue=False)
    function = module["main"].with_attr(ALLOW_TF32, True)
    x, w = (rounded_to_tf32(tensor) for tensor in arguments[:2])
    expected = x @ (w.mT if transposed else w)
    check(tvm, (tvm.IRModule({"main": function}), arguments, expected), tolerance=1e-6, chunks=8)
    # What is known to be rounded is not rounded again.
    target, count = tvm.target.Target(json.loads(H200)), []
    for rounded in ((), (1,), (0, 1)):
        marked = tvm.IRModule({"main": function.with_attr(ROUNDED, rounded)})
        (template, *_) = find_templates(marked, target)
        count.append(generate(template.realize(decide(chunks=8)), target, tir_pipeline())[0].count("cvt_tf32_f32_rna"))
    assert count[0] > count[1] > count[2] == 0
    check(tvm, (marked, [x, w, arguments[2]], expected), tolerance=1e-6, chunks=8)


def test_what_fits_and_what_does_not(tvm):
    target = tvm.target.Target(json.loads(H200))
    (template, *_) = find_templates(make_batched_product((1, 3152, 3072, 768), "float16")[0], target)
    big = {"rows": 128, "columns": 256, "chunks": 8, "warps_along_rows": 2, "warps_along_columns": 4}
    assert template.choices == [len(options) for options in PARAMETERS]
    assert template.fits(decide(**big, stages=4))
    for wrong in ({"stages": 5}, {"parts": 16}, {"warps_along_columns": 1, "stages": 2}):  # memory, steps, registers
        decisions = decide(**(big | wrong))
        assert not template.fits(decisions)
        with pytest.raises(ValueError):
            template.realize(decisions)
    small = tvm.target.Target(json.loads(H200) | {"arch": "sm_86"})
    (template, *_) = find_templates(make_batched_product((1, 3152, 3072, 768), "float16")[0], small)
    assert not template.fits(decide(**big, stages=4)) and template.fits(decide(**big, stages=2))
    assert not template.fits(decide(parts=2, staged=True))  # which has no clusters
    old = tvm.target.Target(json.loads(H200) | {"arch": "sm_75"})
    assert find_templates(make_batched_product((1, 3152, 3072, 768), "float16")[0], old) == []
    (template,) = find_templates(make_batched_product((1, 3152, 3072, 768), "float32")[0], target)
    assert not isinstance(template, MmaTemplate)  # it would round to TF32


def test_kernels_compile_for_hopper(tvm):
    target = tvm.target.Target(json.loads(H200))
    (template, *_) = find_templates(make_batched_product((1, 197, 768, 3072), "bfloat16")[0], target)
    big = {"rows": 128, "columns": 128, "chunks": 8, "warps_along_rows": 2, "warps_along_columns": 2}
    for options in ({"staged": True}, {"parts": 2}, {"parts": 2, "staged": True}):
        realized = template.realize(decide(**big, **options))
        source, *_ = generate(realized, target, tir_pipeline())
        with target:
            assert bytes(compile_candidate(source)).startswith(b"\x7fELF")
