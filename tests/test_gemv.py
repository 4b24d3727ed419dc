"""The template for products with a few rows: its kernels, run on the CPU, are right for odd shapes and epilogues."""

import json
import random

import pytest
import torch

from conftest import H200
from cuda_emulator import emulate, generate
from products import make_batched_product, random_fitting
from tvm_items.kernels import compile_candidate
from tvm_items.lowering import tir_pipeline
from tvm_items.templates.find import find_templates
from tvm_items.templates.gemv import PARAMETERS, PARAMETERS_ALONG_TERMS, GemvAlongTermsTemplate, GemvTemplate
from tvm_items.templates.mma import MmaTemplate


def decide(*parameters):
    return [values.index(value) for values, value in zip(PARAMETERS, parameters, strict=True)]


@pytest.mark.parametrize(
    "shape, dtype, epilogue, parameters",
    [
        ((1, 1, 72, 200), "float16", True, (4, 16, 2, 1)),  # neither columns nor terms are multiples of a block's
        ((1, 3, 40, 96), "bfloat16", True, (8, 4, 4, 1)),  # one warp
        ((1, 1, 64, 264), "float16", True, (2, 32, 1, 3)),  # parts of sums
        ((2, 2, 36, 64), "float16", False, (2, 32, 2, 1)),  # 4 columns at a time; several products
        ((1, 8, 64, 50), "float32", True, (8, 16, 1, 1)),
    ],
)
def test_products_with_few_rows(tvm, shape, dtype, epilogue, parameters):
    module, arguments, expected = make_batched_product(shape, dtype, epilogue=epilogue)
    target = tvm.target.Target(json.loads(H200))
    template = find_templates(module, target)[0]
    assert isinstance(template, GemvTemplate)
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6}[dtype]
    for values in emulate(template.realize(decide(*parameters)), target, arguments, tir_pipeline()):
        error = (values[-1].float() - expected.float()).norm() / expected.float().norm()
        assert error < tolerance and all(map(torch.equal, values[:-1], arguments[:-1]))


@pytest.mark.parametrize(
    "shape, dtype, parameters",
    [
        ((1, 1, 73, 200), "float16", (8, 2, 2)),  # neither columns nor terms are multiples of a block's
        ((1, 3, 33, 264), "bfloat16", (32, 1, 4)),
        pytest.param((2, 2, 40, 72), "float32", (4, 1, 1), marks=pytest.mark.slow),  # several products
    ],
)
def test_weights_along_terms(tvm, shape, dtype, parameters):
    module, arguments, expected = make_batched_product(shape, dtype, transposed=True)
    target = tvm.target.Target(json.loads(H200))
    template = find_templates(module, target)[0]
    assert isinstance(template, GemvAlongTermsTemplate)
    decisions = [values.index(value) for values, value in zip(PARAMETERS_ALONG_TERMS, parameters, strict=True)]
    assert template.fits(decisions)
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6}[dtype]
    for values in emulate(template.realize(decisions), target, arguments, tir_pipeline()):
        error = (values[-1].float() - expected.float()).norm() / expected.float().norm()
        assert error < tolerance and all(map(torch.equal, values[:-1], arguments[:-1]))


@pytest.mark.parametrize("transposed", [False, True])
def test_it_loads_16_bytes_and_compiles_for_hopper(tvm, transposed):
    target = tvm.target.Target(json.loads(H200))
    (template,) = find_templates(make_batched_product((1, 1, 8192, 2048), "float16", transposed)[0], target)
    source, *_ = generate(template.realize(random_fitting(template, random.Random(0))), target, tir_pipeline())
    assert "= *(uint4*)(argument1" in source
    with target:
        assert bytes(compile_candidate(source)).startswith(b"\x7fELF")


def test_which_products_have_it(tvm):
    target = tvm.target.Target(json.loads(H200))
    kinds = {
        rows: [
            type(template) for template in find_templates(make_batched_product((1, rows, 64, 64), "float16")[0], target)
        ]
        for rows in (1, 4, 16)
    }
    assert kinds[1] == [GemvTemplate] and kinds[4] == [GemvTemplate, MmaTemplate] and GemvTemplate not in kinds[16]
    (by_terms,) = find_templates(make_batched_product((1, 1, 64, 64), "float16", transposed=True)[0], target)
    assert isinstance(by_terms, GemvAlongTermsTemplate)
