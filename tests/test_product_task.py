"""Which tasks are products, and what a kernel is told of them."""

import json

import torch

from conftest import H200
from cuda_emulator import emulate, generate
from products import make_batched_product, make_convolution
from tvm_items.lowering import tir_pipeline
from tvm_items.templates.find import find_templates
from tvm_items.templates.product_task import find_product_task, find_sums


def read_product(module):
    """Returns the ProductTask of a task's IRModule, None where it is none."""
    sums = find_sums(module)
    return sums and find_product_task(sums)


def describe(task):
    """Returns the extents of a ProductTask's axes, and how many elements of each operand and of the output are one."""
    extents = [axis.extents for axis in (task.batch, task.rows, task.columns, task.terms)]
    return extents, (task.left.vector, task.right.vector, task.output_vector)


def test_products_are_found_with_their_axes(tvm):
    module, *_ = make_batched_product((2, 70, 40, 108), "float16")
    assert describe(read_product(module)) == ([[2], [70], [40], [108]], (4, 8, 8))
    module, *_ = make_convolution((2, 9, 16, 40, 3), "bfloat16", 2, 1, 1)
    task = read_product(module)
    assert describe(task) == ([[], [2, 5, 5], [40], [3, 3, 16]], (8, 8, 8))
    assert task.left.condition is not None and task.left.along_terms and not task.right.along_terms


def test_what_is_read_under_a_condition_is_read_where_it_is_met(tvm):
    """Two biases one behind the other, each of half of the columns: as vectors they would be read out of bounds."""
    from tvm import te, tirx, topi

    shapes = {"x": (16, 32), "w": (32, 64), "first": (32,), "second": (32,)}
    x, w, first, second = (te.placeholder(shape, "float16", name) for name, shape in shapes.items())
    sums = topi.nn.matmul(x, w, out_dtype="float32")
    output = te.compute(
        (16, 64),
        lambda i, j: sums[i, j].astype("float16") + tirx.if_then_else(j < 32, first[j], second[j - 32]),
    )
    function = te.create_prim_func([x, w, first, second, output]).with_attr("global_symbol", "main")
    target = tvm.target.Target(json.loads(H200))
    (template, *_) = find_templates(tvm.IRModule({"main": function}), target)
    source, *_ = generate(template.realize([0, 0, 0, 0, 0, 0, 0, 0, 1]), target, tir_pipeline())
    # The arguments are kernel parameters in some order; a vector of eight is an uint4, and only the output is one.
    assert source.count("*(uint4*)(argument") == 1 and source.count("argument2_ptr[") >= 8


def test_what_is_no_product_or_too_thin_is_left_alone(tvm):
    from tvm import te, topi

    x, w = te.placeholder((64, 128), "float16", "x"), te.placeholder((128, 64), "float16", "w")
    images, window = (
        te.placeholder((1, 14, 14, 32), "float16", "images"),
        te.placeholder((3, 3, 32, 1), "float16", "window"),
    )
    sums = topi.nn.matmul(x, w, out_dtype="float32")
    for arguments in (
        [x, topi.sum(x, axis=1)],
        [images, window, topi.nn.depthwise_conv2d_nhwc(images, window, 1, 1, 1, "float32")],
        [x, w, topi.nn.softmax(sums)],  # more than one sum
        [x, w, te.compute((32, 64), lambda i, j: sums[2 * i, j])],  # of every other row
        [x, w, te.compute((63, 64), lambda i, j: sums[i, j])],  # of all rows but the last
    ):
        assert read_product(tvm.IRModule({"main": te.create_prim_func(arguments)})) is None
    for shape in ((1, 64, 4, 64), (1, 64, 64, 4), (65536, 8, 8, 16)):
        assert read_product(make_batched_product(shape, "float16", epilogue=False)[0]) is None


def test_the_output_may_lie_in_another_order(tvm):
    """As heads of attention, (heads, rows, columns of a head), or transposed: then rows and columns change places."""
    from tvm import te, topi

    x, w = te.placeholder((70, 104), "float16", "x"), te.placeholder((104, 48), "float16", "w")
    sums = topi.nn.matmul(x, w, out_dtype="float32")
    values = torch.randn(70, 104).half(), torch.randn(104, 48).half()
    product = (values[0].float() @ values[1].float()).half()
    heads = te.compute((2, 70, 24), lambda h, i, d: sums[i, h * 24 + d].astype("float16"))
    transposed = te.compute((48, 70), lambda j, i: sums[i, j].astype("float16"))
    target = tvm.target.Target(json.loads(H200))
    for output, expected, vector in (
        (heads, product.view(70, 2, 24).transpose(0, 1), 8),
        (transposed, product.T, 2),
    ):
        function = te.create_prim_func([x, w, output]).with_attr("global_symbol", "main")
        (template, *_) = find_templates(tvm.IRModule({"main": function}), target)
        assert template.task.output_vector == vector
        realized = template.realize([1, 0, 0, 0, 0, 0, 0, 0, 1])  # sums go through shared memory
        for _, _, result in emulate(realized, target, [*values, torch.empty(expected.shape).half()], tir_pipeline()):
            torch.testing.assert_close(result, expected.contiguous(), rtol=2e-3, atol=2e-2)
