"""A product that is rewritten before MetaSchedule sees it."""

import torch

from products import make_product
from tvm_items.rewrites import find_rewrites, rewrite_product


def test_rewriting_a_product_changes_no_result(tvm):
    from tvm.s_tir import Schedule

    product = make_product(rows=32)
    assert find_rewrites(product) == [0, 1, 2]  # a sum of 128 gives two of 64, not more
    x, w, b = (torch.randn(shape) for shape in ((32, 128), (128, 64), (64,)))
    expected = (x @ w + b) * torch.exp((x @ w + b) * -0.01)
    for split, blocks in ((0, 4), (1, 2), (2, 3), (8, 3)):
        schedule = rewrite_product(Schedule(product), split)
        script = schedule.mod.script()
        assert script.count("with T.sblock(") == blocks + 1 and ("matmul_rf" in script) == (split > 1)
        output = torch.empty(32, 64)
        tvm.compile(schedule.mod, target="llvm")["main"](*map(tvm.runtime.from_dlpack, (x, w, b, output)))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
