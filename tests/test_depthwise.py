"""The template for depthwise convolutions: its kernels, run on the CPU, are right for all windows, and read vectors."""

import json
import random

import pytest
import torch

from conftest import H200
from cuda_emulator import emulate, generate
from products import make_convolution, random_fitting
from tvm_items.kernels import compile_candidate
from tvm_items.lowering import tir_pipeline
from tvm_items.target import load_target
from tvm_items.templates.depthwise import PARAMETERS, DepthwiseTemplate
from tvm_items.templates.find import find_templates


def make_depthwise(size, channels, window, dtype, stride, padding, dilation=1):
    """Returns what make_convolution() does, of a depthwise one of two images."""
    return make_convolution((2, size, channels, channels, window), dtype, stride, padding, dilation, channels)


def find_template(module):
    (template,) = find_templates(module, load_target(H200))
    assert isinstance(template, DepthwiseTemplate)
    return template


@pytest.mark.parametrize(
    "convolution, parameters",
    [
        (((8, 14), 24, 7, "float16", 1, 3), (4, 7, 4, 64)),  # as in ConvNeXt; the last block is not full
        ((14, 16, 3, "bfloat16", 2, (0, 0, 1, 1)), (1, 7, 8, 32)),  # as in MobileNetV2
        (((10, 9), 12, 3, "float32", 1, 0), (8, 7, 1, 96)),  # no padding
        (((1, 16), 8, (1, 4), "float32", 1, 0), (1, 1, 2, 32)),  # a window of one dimension
        pytest.param((8, 16, (5, 3), "float16", 1, 1), (2, 2, 8, 128), marks=pytest.mark.slow),
    ],
)
def test_depthwise_convolutions(tvm, convolution, parameters):
    module, arguments, expected = make_depthwise(*convolution)
    decisions = [values.index(value) for values, value in zip(PARAMETERS, parameters, strict=True)]
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6}[convolution[3]]
    for values in emulate(find_template(module).realize(decisions), load_target(H200), arguments, tir_pipeline()):
        error = (values[-1].float() - expected.float()).norm() / expected.float().norm()
        assert error < tolerance and all(map(torch.equal, values[:-1], arguments[:-1]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_it_reads_vectors_and_compiles_for_hopper(tvm, dtype):
    module, *_ = make_depthwise(56, 96, 7, dtype, 1, 3)
    template, target = find_template(module), load_target(H200)
    decisions = random_fitting(template, random.Random(0))
    decisions[2] = PARAMETERS[2].index(4 if dtype == "float32" else 8)
    decisions[:2] = 0, 1
    source, *_ = generate(template.realize(decisions), target, tir_pipeline())
    vector = "float4" if dtype == "float32" else "uint4"
    assert f"= *({vector}*)(argument0" in source and f"= *({vector}*)(argument1" in source
    with target:
        assert bytes(compile_candidate(source)).startswith(b"\x7fELF")


def test_which_tasks_have_it(tvm):
    dense, *_ = make_convolution((1, 8, 16, 16, 3), "float16", 1, 1, 1)
    grouped, *_ = make_convolution((1, 8, 16, 16, 3), "float16", 1, 1, 1, groups=8)
    dilated, *_ = make_depthwise(8, 16, 3, "float16", 1, 2, 2)
    for module in (dense, grouped, dilated):
        assert not any(
            isinstance(template, DepthwiseTemplate) for template in find_templates(module, load_target(H200))
        )
    on_cpu = load_target(json.dumps({"kind": "llvm"}))
    assert find_templates(make_depthwise(8, 16, 3, "float16", 1, 1)[0], on_cpu) == []
