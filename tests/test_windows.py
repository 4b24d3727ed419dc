"""Convolutions by TMA: which windows it can copy, and that wgmma's kernels are right with them, run on the CPU."""

import json

import pytest
from test_wgmma import check, decide, find_template

from conftest import H200
from cuda_emulator import generate
from products import make_batched_product, make_convolution
from tvm_items.kernels import compile_candidate
from tvm_items.lowering import tir_pipeline
from tvm_items.templates.windows import Spatial, Windows


def windows_of(tvm, *task):
    return find_template(tvm, make_convolution(*task)[0]).windows


def test_which_windows_tma_can_copy(tvm):
    vertical, horizontal = Spatial(9, 5, 3, 2, 1, -1), Spatial(11, 6, 3, 2, 1, -1)
    assert windows_of(tvm, (2, (9, 11), 64, 64, 3), "float16", 2, 1, 1) == Windows(2, vertical, horizontal, 64)
    assert windows_of(tvm, (1, 8, 64, 64, (1, 3)), "bfloat16", 1, (0, 2), (1, 2)).horizontal == Spatial(
        8, 8, 3, 1, 2, -2
    )
    assert windows_of(tvm, (2, 8, 64, 64, 1), "float16", 2, 0, 1).vertical == Spatial(8, 4, 1, 2, 1, 0)
    assert windows_of(tvm, (2, 8, 64, 64, 1), "float16", 1, 0, 1) is None  # a matrix
    assert windows_of(tvm, (2, 8, 40, 64, 3), "float16", 1, 1, 1) is None  # a line of 128 bytes has two places
    assert windows_of(tvm, (1, (8, 300), 64, 64, 3), "float16", 1, 1, 1) is None  # more than a box has
    assert windows_of(tvm, (1, 8, 128, 128, 3), "float16", 1, 1, 1, 2) is None  # groups
    module, *_ = make_batched_product((2, 64, 64, 64), "float16")
    assert find_template(tvm, module).windows is None


def test_boxes_of_a_tile():
    def box(images, size, rows):
        spatial = Spatial(size, size, 3, 1, 1, -1)
        windows = Windows(images, spatial, spatial, 64)
        found = windows.box(rows)
        return found and (found.images, found.lines, found.count)

    assert box(16, 56, 64) == (1, 1, 16 * 56) and box(16, 56, 128) == (1, 2, 16 * 28) and box(16, 56, 32) is None
    assert box(16, 14, 128) == (1, 7, 32)  # not nine lines and five
    assert box(16, 7, 64) == (1, 7, 16) and box(16, 7, 128) == (2, 7, 8) and box(3, 7, 256) == (3, 7, 1)


@pytest.mark.parametrize(
    "task, options",
    [
        # Five of nine lines a tile; two tiles of the columns.
        (((2, 9, 64, 72, 3), "float16", 1, 1, 1), {}),
        # Every other line and column, zeros behind the last; two steps for each place; sums through shared memory.
        (((1, (18, 17), 128, 64, 3), "bfloat16", 2, (0, 0, 1, 1), 1), {"stages": 2, "staged": True}),
        # Two whole images a tile, of three; dilated; sums in two parts that a cluster adds up.
        (((3, 5, 64, 64, 3), "float16", 1, 2, 2), {"parts": 2, "stages": 4, "staged": True}),
        pytest.param(
            ((5, 6, 64, 64, 3), "float16", 1, 1, 1), {"rows": 128, "consumers": 2, "stages": 2}, marks=pytest.mark.slow
        ),
        pytest.param(((2, 8, 64, 128, 1), "float16", 2, 0, 1), {"columns": 128, "stages": 2}, marks=pytest.mark.slow),
    ],
)
def test_convolutions_by_tma(tvm, task, options):
    made = make_convolution(*task)
    assert find_template(tvm, made[0]).windows is not None
    check(tvm, made, tma=True, **options)


def test_they_compile_for_hopper(tvm):
    target = tvm.target.Target(json.loads(H200))
    module, *_ = make_convolution((16, 14, 256, 256, 3), "bfloat16", 1, 1, 1)
    template = find_template(tvm, module)
    realized = template.realize(decide(rows=128, columns=128, consumers=2, stages=4, staged=True))
    source, *_ = generate(realized, target, tir_pipeline())
    assert "bulk_tensor_4d" in source and "cp_async_cg" not in source
    with target:
        assert bytes(compile_candidate(source)).startswith(b"\x7fELF")
