"""The switches that belong to a precision."""

import pytest
import torch

from harness.case import arithmetic


@pytest.mark.parametrize("precision, tf32", [("fp32", False), ("tf32", True), ("fp16", False), ("bf16", False)])
def test_precision_switches_are_set_and_restored(precision, tf32):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    assert before != [tf32, tf32]  # else the assertions below would show nothing
    with pytest.raises(ZeroDivisionError), arithmetic(precision) as dtype:
        assert [backend.allow_tf32 for backend in backends] == [tf32, tf32]
        assert dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        raise ZeroDivisionError
    assert [backend.allow_tf32 for backend in backends] == before
