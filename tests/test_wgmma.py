"""The template of wgmma: its kernels, run on the CPU, are right with copies by TMA and by cp.async."""

import json
import re
import subprocess

import pytest
import torch
from cuda.pathfinder import find_nvidia_binary_utility

from conftest import H200
from cuda_emulator import emulate, generate
from products import make_batched_product, make_convolution, rounded_to_tf32
from tvm_items.kernels import compile_candidate
from tvm_items.lowering import tir_pipeline
from tvm_items.templates.find import find_templates
from tvm_items.templates.product_task import ALLOW_TF32, ROUNDED
from tvm_items.templates.wgmma import PARAMETERS, Config


def decide(**options):
    """Returns the decisions for these options; the others are those of a small tile."""
    chosen = {
        "rows": 64,
        "columns": 64,
        "consumers": 1,
        "stages": 3,
        "group": 4,
        "parts": 1,
        "staged": False,
        "tma": True,
        **options,
    }
    return [values.index(chosen[name]) for name, values in zip(Config.__dataclass_fields__, PARAMETERS, strict=True)]


def find_template(tvm, module, arch="sm_90"):
    """Returns the template of wgmma for a task, None where there is none."""
    target = tvm.target.Target(json.loads(H200) | {"arch": arch})
    templates = find_templates(module, target)
    return next((template for template in templates if type(template).__name__ == "WgmmaTemplate"), None)


def check(tvm, task, tolerance=None, **options):
    """Asserts that the kernel of these options gives what is expected, with everything asynchronous late and early."""
    module, arguments, expected = task
    realized = find_template(tvm, module).realize(decide(**options))
    tolerance = tolerance or {torch.float16: 1e-3, torch.bfloat16: 8e-3}[expected.dtype]
    for values in emulate(realized, tvm.target.Target(json.loads(H200)), arguments, tir_pipeline()):
        error = (values[-1].float() - expected.float()).norm() / expected.float().norm()
        assert error < tolerance and all(map(torch.equal, values[:-1], arguments[:-1]))


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize(
    "shape, dtype, transposed, options",
    [
        # Neither rows, columns nor terms are multiples of a tile; the weight lies as (columns, terms).
        ((1, 70, 72, 264), "float16", True, {"columns": 128, "stages": 4}),
        # Two warpgroups multiply, two stages, several products, sums through shared memory; as (terms, columns).
        (
            (2, 130, 72, 200),
            "bfloat16",
            False,
            {"rows": 128, "columns": 128, "consumers": 2, "stages": 2, "staged": True},
        ),
        # Two instructions for the rows of a warpgroup; sums in two parts of a different number of steps.
        pytest.param((1, 120, 40, 328), "float16", False, {"rows": 128, "parts": 2}, marks=pytest.mark.slow),
        # Parts that a cluster adds up.
        pytest.param((2, 70, 72, 328), "float16", True, {"parts": 2, "staged": True}, marks=pytest.mark.slow),
    ],
)
def test_products(tvm, shape, dtype, transposed, options, tma):
    check(tvm, make_batched_product(shape, dtype, transposed), tma=tma, **options)


def test_a_convolution(tvm):
    task = make_convolution((2, 9, 16, 40, 3), "float16", 2, 1, 1)
    assert find_template(tvm, task[0]).are_matrices == (False, True)  # a window is none, the weights are
    for tma in (True, False):
        check(tvm, task, tma=tma)
    task = make_convolution((2, 7, 64, 64, 1), "bfloat16", 1, 0, 1)
    check(tvm, task, rows=128, consumers=2, stages=2, tma=True)  # one of 1 x 1 is, and needs no detour


@pytest.mark.parametrize("tma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tf32_where_both_operands_are_rounded(tvm, tma):
    module, arguments, _ = make_batched_product((2, 70, 72, 104), "float32", transposed=True, epilogue=False)
    function = module["main"].with_attr(ALLOW_TF32, True)
    for rounded in ((), (1,)):
        assert find_template(tvm, tvm.IRModule({"main": function.with_attr(ROUNDED, rounded)})) is None
    x, w = map(rounded_to_tf32, arguments[:2])
    task = tvm.IRModule({"main": function.with_attr(ROUNDED, (0, 1))}), [x, w, arguments[2]], x @ w.mT
    check(tvm, task, tolerance=1e-6, tma=tma, columns=128, stages=4)
    check(tvm, task, tolerance=1e-6, tma=tma, rows=128, consumers=2, stages=2, staged=True)
    module, *_ = make_batched_product((2, 70, 72, 104), "float32", epilogue=False)  # the weight along the columns
    marked = module["main"].with_attr(ALLOW_TF32, True).with_attr(ROUNDED, (0, 1))
    assert find_template(tvm, tvm.IRModule({"main": marked})) is None


def test_a_grouped_convolution(tvm):
    task = make_convolution((1, 5, 32, 80, 3), "bfloat16", 1, 1, 1, groups=2)
    assert find_template(tvm, task[0]).are_matrices == (False, True)  # a group's columns of the weights are one, too
    check(tvm, task, tma=True)


def test_only_hopper_has_it(tvm):
    module, *_ = make_batched_product((1, 3152, 3072, 768), "float16")
    big = {"rows": 128, "columns": 256, "consumers": 2}
    assert find_template(tvm, module).fits(decide(**big, stages=4))
    for wrong in ({"stages": 5}, {"consumers": 1, "stages": 2}, {"rows": 64}):  # memory, registers, rows
        assert not find_template(tvm, module).fits(decide(**(big | wrong)))
    assert find_template(tvm, module, "sm_80") is None and find_template(tvm, module, "sm_100") is None


@pytest.mark.parametrize("tma", [True, False])
def test_kernels_compile_for_hopper(tvm, tma):
    module, *_ = make_batched_product((1, 3152, 3072, 768), "bfloat16")
    target = tvm.target.Target(json.loads(H200))
    realized = find_template(tvm, module).realize(decide(rows=128, columns=128, consumers=2, staged=True, tma=tma))
    source, *_ = generate(realized, target, tir_pipeline())
    with target:
        assert bytes(compile_candidate(source)).startswith(b"\x7fELF")


@pytest.mark.parametrize(
    "dtype, columns, stages", [("float16", 128, 4), ("float16", 64, 8), ("float32", 128, 4), ("float32", 64, 8)]
)
def test_no_sum_is_read_before_its_wait(tvm, tmp_path, dtype, columns, stages):
    """In machine code: ptxas moved half of the conversions of these kernels' sums in front of the wait for them."""
    module, *_ = make_batched_product((1, 3152, 768, 3072), dtype, transposed=True)
    function = module["main"].with_attr(ALLOW_TF32, True).with_attr(ROUNDED, (0, 1))
    target = tvm.target.Target(json.loads(H200))
    template = find_template(tvm, tvm.IRModule({"main": function}))
    source, *_ = generate(
        template.realize(decide(rows=128, columns=columns, stages=stages, group=1)), target, tir_pipeline()
    )
    with target:
        (tmp_path / "kernel.cubin").write_bytes(bytes(compile_candidate(source)))
    disassemble = [find_nvidia_binary_utility("nvdisasm"), "-c", tmp_path / "kernel.cubin"]
    code = subprocess.run(disassemble, check=True, capture_output=True, text=True).stdout
    assert code.count("HGMMA") >= 8 and "WARPGROUP.DEPBAR.LE gsb0, 0x0" in code
    assert not find_early_uses(code)


def find_early_uses(code):
    """Returns the lines of SASS that name a register which a wgmma before them may still write."""
    pending, found = set(), []
    for line in code.splitlines():
        product = re.search(r"HGMMA\.64x(\d+)x(?:16|8)\.\S+ R(\d+),", line)
        if product:
            columns, first = map(int, product.groups())
            pending |= {f"R{register}" for register in range(first, first + columns // 2)}
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line:
            pending.clear()
        elif pending & set(re.findall(r"\bR\d+\b", line)):
            found.append(line)
    return found
