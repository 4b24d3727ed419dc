"""The template for products in IEEE fp32: its kernels, run on the CPU, are right for odd shapes and layouts."""

import json

import pytest
import torch

from conftest import H200
from cuda_emulator import emulate, generate
from products import make_batched_product, make_convolution
from tvm_items.kernels import compile_candidate
from tvm_items.lowering import tir_pipeline
from tvm_items.target import load_target
from tvm_items.templates.find import find_templates
from tvm_items.templates.fma import PARAMETERS, Config, FmaTemplate
from tvm_items.templates.gemv import GemvTemplate


def decide(**options):
    """Returns the decisions for these options; the others are those of a small tile."""
    chosen = {
        "rows": 32,
        "columns": 32,
        "chunks": 4,
        "thread_rows": 4,
        "thread_columns": 4,
        "stages": 3,
        "group": 4,
        "parts": 1,
        "staged": False,
        **options,
    }
    return [values.index(chosen[name]) for name, values in zip(Config.__dataclass_fields__, PARAMETERS, strict=True)]


def find_template(module):
    (template,) = find_templates(module, load_target(H200))
    assert isinstance(template, FmaTemplate)
    return template


def check(task, **options):
    """Asserts that the kernel of these options gives what is expected, with asynchronous copies late and early."""
    module, arguments, expected = task
    realized = find_template(module).realize(decide(**options))
    for values in emulate(realized, load_target(H200), arguments, tir_pipeline()):
        error = (values[-1] - expected).norm() / expected.norm()
        assert error < 1e-6 and all(map(torch.equal, values[:-1], arguments[:-1]))


@pytest.mark.parametrize(
    "shape, transposed, options",
    [
        # Neither rows, columns nor terms are multiples of a tile; 8 by 8 sums a thread.
        ((1, 70, 104, 72), False, {"rows": 64, "columns": 64, "thread_rows": 8, "thread_columns": 8, "stages": 2}),
        ((2, 37, 36, 40), True, {"rows": 16, "chunks": 8}),  # the right operand has terms side by side
        ((2, 37, 33, 37), True, {"rows": 64, "columns": 64, "thread_columns": 8}),  # nothing to copy as vectors
        pytest.param((1, 70, 72, 264), False, {"parts": 3, "columns": 64}, marks=pytest.mark.slow),
        pytest.param((1, 70, 72, 264), True, {"parts": 3, "columns": 64, "chunks": 2}, marks=pytest.mark.slow),
        ((1, 37, 40, 64), False, {"staged": True, "columns": 64}),
        pytest.param((1, 37, 33, 264), False, {"parts": 3, "staged": True}, marks=pytest.mark.slow),
    ],
)
def test_products(tvm, shape, transposed, options):
    check(make_batched_product(shape, "float32", transposed), **options)


@pytest.mark.parametrize(
    "shape, geometry",
    [((1, 9, 8, 48, 3), (2, 1, 1)), pytest.param((1, 10, 3, 40, 7), (2, 3, 1), marks=pytest.mark.slow)],
)
def test_convolutions(tvm, shape, geometry):
    check(make_convolution(shape, "float32", *geometry))


def test_an_operand_may_have_rows_side_by_side(tvm):
    from tvm import te

    x, w = (te.placeholder(shape, name=name) for name, shape in (("x", (48, 72)), ("w", (48, 40))))
    k = te.reduce_axis((0, 48), name="k")
    product = te.compute((72, 40), lambda i, j: te.sum(x[k, i] * w[k, j], axis=k), name="matmul")
    module = tvm.IRModule({"main": te.create_prim_func([x, w, product]).with_attr("global_symbol", "main")})
    arguments = [torch.randn(48, 72), torch.randn(48, 40)]
    expected = arguments[0].T @ arguments[1]
    check((module, [*arguments, torch.full_like(expected, torch.nan)], expected), thread_rows=8)


def test_its_loop_is_multiply_adds_on_vectors_and_compiles_for_hopper(tvm):
    module, *_ = make_batched_product((1, 3136, 384, 1536), "float32")
    big = {"rows": 128, "columns": 128, "thread_rows": 8, "thread_columns": 8}
    target = load_target(H200)
    source, *_ = generate(find_template(module).realize(decide(**big)), target, tir_pipeline())
    with target:
        assert bytes(compile_candidate(source)).startswith(b"\x7fELF")
    assert "cp.async" in source and "mma" not in source


def test_which_products_have_it(tvm):
    def kinds(rows, arch="sm_90"):
        target = load_target(json.dumps(json.loads(H200) | {"arch": arch}))
        return [
            type(template) for template in find_templates(make_batched_product((1, rows, 64, 64), "float32")[0], target)
        ]

    assert kinds(64) == [FmaTemplate] == kinds(64, "sm_86") and kinds(64, "sm_75") == []
    assert kinds(4) == [GemvTemplate, FmaTemplate] and kinds(1) == [GemvTemplate]
    template = find_template(make_batched_product((1, 3152, 3072, 768), "float32")[0])
    big = {"rows": 256, "columns": 256, "thread_rows": 8, "thread_columns": 8}
    assert template.fits(decide(**big, stages=2)) and not template.fits(decide(**big, stages=4, chunks=8))
    assert not template.fits(decide(**(big | {"thread_columns": 4, "thread_rows": 4})))  # 4096 threads
