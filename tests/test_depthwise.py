"""The template for depthwise convolutions: its kernels, run on the CPU, are right for all windows, and read vectors."""

import json
import random

import pytest
import torch

from conftest import H200
from cuda_emulator import emulate, generate
from products import make_convolution, random_fitting, random_tensor
from tvm_items.kernels import compile_candidate
from tvm_items.lowering import tir_pipeline
from tvm_items.target import load_target
from tvm_items.templates.depthwise import PARAMETERS, DepthwiseTemplate
from tvm_items.templates.find import find_templates


def make_depthwise(shape, dtype, stride, padding, dilation=1):
    """Returns (TIR module, its arguments as tensors, expected output) of a depthwise convolution with bias and ReLU.

    shape: (batch, height, width, channels, window's height, window's width); channels last.
    """
    import tvm
    from tvm import te, topi

    batch, height, width, channels, *window = shape
    x = te.placeholder((batch, height, width, channels), dtype, "x")
    w = te.placeholder((*window, 1, channels), dtype, "w")
    bias = te.placeholder((1, 1, 1, channels), dtype, "bias")
    layouts = {"data_layout": "NHWC", "kernel_layout": "HWIO", "out_dtype": "float32"}
    sums = topi.nn.conv(x, w, stride, padding, dilation, channels, **layouts)
    output = topi.nn.relu(topi.add(topi.cast(sums, dtype), bias))
    generator = torch.Generator().manual_seed(0)
    tensors = [random_tensor(generator, tensor) for tensor in (x, w, bias)]
    images, filters = tensors[0].float().permute(0, 3, 1, 2), tensors[1].float().permute(3, 2, 0, 1)
    sums = torch.nn.functional.conv2d(images, filters, None, stride, padding, dilation, channels)
    expected = torch.relu(sums.permute(0, 2, 3, 1).to(tensors[0].dtype) + tensors[2]).contiguous()
    module = tvm.IRModule({"main": te.create_prim_func([x, w, bias, output]).with_attr("global_symbol", "main")})
    return module, [*tensors, torch.full_like(expected, torch.nan)], expected


def find_template(module):
    (template,) = find_templates(module, load_target(H200))
    assert isinstance(template, DepthwiseTemplate)
    return template


@pytest.mark.parametrize(
    "shape, dtype, stride, padding, parameters",
    [
        ((2, 8, 14, 24, 7, 7), "float16", 1, 3, (4, 7, 4, 64)),  # as in ConvNeXt; the last block is not full
        ((1, 14, 14, 16, 3, 3), "bfloat16", 2, 1, (1, 7, 8, 32)),
        ((1, 10, 9, 12, 3, 3), "float32", 1, 0, (8, 7, 1, 96)),  # no padding
        ((2, 1, 16, 8, 1, 4), "float32", 1, 0, (1, 1, 2, 32)),  # a window of one dimension
        pytest.param((1, 8, 8, 16, 5, 3), "float16", 1, 1, (2, 2, 8, 128), marks=pytest.mark.slow),
    ],
)
def test_depthwise_convolutions(tvm, shape, dtype, stride, padding, parameters):
    module, arguments, expected = make_depthwise(shape, dtype, stride, padding)
    decisions = [values.index(value) for values, value in zip(PARAMETERS, parameters, strict=True)]
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6}[dtype]
    for values in emulate(find_template(module).realize(decisions), load_target(H200), arguments, tir_pipeline()):
        error = (values[-1].float() - expected.float()).norm() / expected.float().norm()
        assert error < tolerance and all(map(torch.equal, values[:-1], arguments[:-1]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_it_reads_vectors_and_compiles_for_hopper(tvm, dtype):
    module, *_ = make_depthwise((1, 56, 56, 96, 7, 7), dtype, 1, 3)
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
    dilated, *_ = make_depthwise((1, 8, 8, 16, 3, 3), "float16", 1, 2, 2)
    for module in (dense, dilated):
        assert not any(
            isinstance(template, DepthwiseTemplate) for template in find_templates(module, load_target(H200))
        )
    on_cpu = load_target(json.dumps({"kind": "llvm"}))
    assert find_templates(make_depthwise((1, 8, 8, 16, 3, 3), "float16", 1, 1)[0], on_cpu) == []
