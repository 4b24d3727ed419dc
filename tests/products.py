"""Tasks that tests of design spaces, templates and the search share."""

import functools
import math

import torch

from tvm_items.decisions import random_decisions
from tvm_items.templates.product_task import ALLOW_TF32, ROUNDED
from tvm_items.tf32 import round_to_tf32


def rounded_to_tf32(tensor):
    """Returns an fp32 tensor of finite numbers rounded to 10 bits behind the point, ties away from zero."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def make_product(rows):
    """A matrix product (rows, 128) x (128, 64), and after it what reads a result twice, as a TIR module."""
    import tvm
    from tvm import te

    shapes = {"x": (rows, 128), "w": (128, 64), "b": (64,)}
    x, w, b = (te.placeholder(shape, name=name) for name, shape in shapes.items())
    k = te.reduce_axis((0, 128), name="k")
    matmul = te.compute((rows, 64), lambda i, j: te.sum(x[i, k] * w[k, j], axis=k), name="matmul")
    biased = te.compute((rows, 64), lambda i, j: matmul[i, j] + b[j], name="biased")
    scaled = te.compute((rows, 64), lambda i, j: te.exp(biased[i, j] * -0.01), name="scaled")
    output = te.compute((rows, 64), lambda i, j: biased[i, j] * scaled[i, j], name="output")
    return tvm.IRModule({"main": te.create_prim_func([x, w, b, output])})


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu by tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
}


def share_of_activation(source, activation, dtype):
    """Returns the tensor expression by which one of ACTIVATIONS multiplies its operand, as TVM has it."""
    from tvm import topi

    def constant(value):
        return topi.full((), dtype, value)

    if activation == "silu":
        return topi.sigmoid(source)
    if activation == "gelu":  # in fp16 with an erf() of fp32, in bf16 with one of bf16
        argument = topi.multiply(source, constant(0.5**0.5))
        odd = topi.cast(topi.erf(topi.cast(argument, "float32") if dtype == "float16" else argument), dtype)
    else:
        cube = topi.multiply(topi.multiply(source, source), source)
        argument = topi.add(source, topi.multiply(cube, constant(0.044715)))
        odd = topi.tanh(topi.multiply(argument, constant((2 / math.pi) ** 0.5)))
    return topi.add(topi.multiply(odd, constant(0.5)), constant(0.5))


def make_batched_product(shape, dtype, transposed=False, epilogue=True, activation="silu", rounded=False):
    """Returns (TIR module, its arguments as tensors, expected output) of a batched matrix product, summed in fp32.

    shape: (batch, rows, columns, terms). transposed: whether the right operand is given as (batch, columns, terms).
    epilogue: behind it come a bias, an activation that reads its operand twice, a layer scale and a residual.
    activation: "silu", "gelu" or "gelu by tanh". rounded: whether operands and output are rounded to TF32.
    """
    import tvm
    from tvm import te, topi

    batch, rows, columns, terms = shape
    x = te.placeholder((batch, rows, terms), dtype, "x")
    w = te.placeholder((batch, columns, terms) if transposed else (batch, terms, columns), dtype, "w")
    bias, scale = (te.placeholder((columns,), dtype, name) for name in ("bias", "scale"))
    residual = te.placeholder((batch, rows, columns), dtype, "residual")
    output = topi.cast(topi.nn.batch_matmul(x, w, out_dtype="float32", transpose_b=transposed), dtype)
    inputs = [x, w]
    generator = torch.Generator().manual_seed(0)
    tensors = [random_tensor(generator, tensor) for tensor in (x, w, bias, scale, residual)]
    tensors[1] /= terms**0.5
    if rounded:
        tensors[:2] = map(rounded_to_tf32, tensors[:2])
    left, right = (tensor.float() for tensor in tensors[:2])
    expected = (left @ (right.mT if transposed else right)).to(tensors[0].dtype)
    if epilogue:
        biased = topi.add(output, bias)
        share = share_of_activation(biased, activation, dtype)
        output = topi.add(topi.multiply(topi.multiply(biased, share), scale), residual)
        inputs += [bias, scale, residual]
        biased = expected + tensors[2]
        activated = ACTIVATIONS[activation](biased)
        expected = activated * tensors[3] + tensors[4]
    else:
        tensors = tensors[:2]
    function = te.create_prim_func([*inputs, round_to_tf32(output) if rounded else output])
    if rounded:
        function, expected = function.with_attr({ALLOW_TF32: True, ROUNDED: [0, 1]}), rounded_to_tf32(expected)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return module, [*tensors, torch.full_like(expected, torch.nan)], expected


def make_gate(shape, dtype, transposed=False, activation="silu", rounded=False):
    """Returns what make_batched_product() does, of a product of pairs of columns that a gate makes one of, with biases.

    shape: (batch, rows, columns of the product, terms).
    """
    import tvm
    from tvm import te, topi

    batch, rows, columns, terms = shape
    x = te.placeholder((batch, rows, terms), dtype, "x")
    w = te.placeholder((batch, columns, terms) if transposed else (batch, terms, columns), dtype, "w")
    bias = te.placeholder((columns,), dtype, "bias")
    product = topi.cast(topi.nn.batch_matmul(x, w, out_dtype="float32", transpose_b=transposed), dtype)
    pairs = topi.reshape(topi.add(product, bias), (batch, rows, columns // 2, 2))
    gate, up = (
        topi.reshape(topi.strided_slice(pairs, [number], [number + 1], [1], [3]), (batch, rows, columns // 2))
        for number in range(2)
    )
    output = topi.multiply(topi.multiply(gate, share_of_activation(gate, activation, dtype)), up)
    generator = torch.Generator().manual_seed(0)
    tensors = [random_tensor(generator, tensor) for tensor in (x, w, bias)]
    tensors[1] /= terms**0.5
    if rounded:
        tensors[:2] = map(rounded_to_tf32, tensors[:2])
    left, right = (tensor.float() for tensor in tensors[:2])
    gate, up = (
        ((left @ (right.mT if transposed else right)).to(tensors[0].dtype) + tensors[2])
        .unflatten(-1, (-1, 2))
        .unbind(-1)
    )
    expected = ACTIVATIONS[activation](gate) * up
    function = te.create_prim_func([x, w, bias, output])
    if rounded:
        function = function.with_attr({ALLOW_TF32: True, ROUNDED: [0, 1]})
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return module, [*tensors, torch.full_like(expected, torch.nan)], expected


def make_convolution(shape, dtype, stride, padding, dilation, groups=1):
    """Returns what make_batched_product() does, of a convolution with a bias and ReLU, channels last.

    shape: (batch, size, input channels, output channels, window). size and window: of a square, or (height, width).
    padding: of all sides, or (vertical, horizontal), or (top, left, bottom, right).
    """
    import tvm
    from tvm import te, topi

    batch, size, channels, features, window = shape
    size, window = (extent if isinstance(extent, tuple) else (extent, extent) for extent in (size, window))
    x = te.placeholder((batch, *size, channels), dtype, "x")
    w = te.placeholder((*window, channels // groups, features), dtype, "w")
    bias = te.placeholder((1, 1, 1, features), dtype, "bias")
    sums = topi.nn.conv(x, w, stride, padding, dilation, groups, "NHWC", "HWIO", "float32")
    output = topi.nn.relu(topi.add(topi.cast(sums, dtype), bias))
    generator = torch.Generator().manual_seed(0)
    tensors = [random_tensor(generator, tensor) for tensor in (x, w, bias)]
    tensors[1] /= (channels // groups * window[0] * window[1]) ** 0.5
    images, filters = tensors[0].float().permute(0, 3, 1, 2), tensors[1].float().permute(3, 2, 0, 1)
    if isinstance(padding, tuple) and len(padding) == 4:
        top, left, bottom, right = padding
        images, padding = torch.nn.functional.pad(images, (left, right, top, bottom)), 0
    sums = torch.nn.functional.conv2d(images, filters, None, stride, padding, dilation, groups)
    expected = torch.relu(sums.permute(0, 2, 3, 1).to(tensors[0].dtype) + tensors[2]).contiguous()
    module = tvm.IRModule({"main": te.create_prim_func([x, w, bias, output]).with_attr("global_symbol", "main")})
    return module, [*tensors, torch.full_like(expected, torch.nan)], expected


def random_tensor(generator, placeholder):
    """Returns standard normal noise with the shape and dtype of a TE placeholder."""
    shape = [int(size) for size in placeholder.shape]
    return torch.randn(shape, generator=generator).to(getattr(torch, str(placeholder.dtype)))


def random_fitting(template, rng):
    """Returns random decisions of a template that fit."""
    decisions = random_decisions(template.choices, rng)
    while not template.fits(decisions):
        decisions = random_decisions(template.choices, rng)
    return decisions
