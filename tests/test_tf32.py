"""TF32: what is rounded before products read it, to what, and that their kernels know it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import H200, TURING
from products import rounded_to_tf32
from tvm_items.executable import compile_and_bind, passes_after_scheduling
from tvm_items.importer import export_for_tvm, import_to_relax
from tvm_items.relax_module import prepare, tuned_module
from tvm_items.target import load_target
from tvm_items.templates.product_task import ROUNDED
from tvm_items.tf32 import round_to_tf32


class Residual(torch.nn.Module):
    """Three convolutions with a residual, which the first one reads, too; a norm before a Linear, and a tied one."""

    def __init__(self):
        super().__init__()
        self.convolutions = torch.nn.ModuleList(torch.nn.Conv2d(16, 16, size, padding="same") for size in (1, 3, 1))
        self.norm, self.linear, self.embedding = (
            torch.nn.LayerNorm(16),
            torch.nn.Linear(16, 20),
            torch.nn.Embedding(24, 16),
        )

    def forward(self, x, ids):
        first, second, third = self.convolutions
        y = third(second(first(x).relu()).relu()) + x
        tied = torch.nn.functional.linear(y.mean((2, 3)), self.embedding.weight)
        return y, self.linear(self.norm(y.flatten(2).mT)), self.embedding(ids), tied


@torch.no_grad()
def test_weights_and_what_only_products_read_are_rounded_once(tvm):
    torch.manual_seed(0)
    model, target = Residual().eval(), tvm.target.Target({"kind": "llvm", "num-cores": 2})
    inputs = {"x": torch.randn(2, 16, 9, 9), "ids": torch.tensor([[3, 1]])}
    exported = export_for_tvm(model, inputs)
    module, weights = import_to_relax(exported)
    module = prepare(module, target, allow_tf32=True)
    rounded = {}
    for name, function in module.functions_items():
        if isinstance(function, tvm.tirx.PrimFunc) and any(kind in name.name_hint for kind in ("conv2d", "matmul")):
            rounded[name.name_hint] = sorted(map(int, function.attrs.get(ROUNDED, ())))
    # Sorted by name: conv2d1, conv2d2, conv2d; of Linear layers the tied one, in which only the weight is rounded.
    assert [rounded[name] for name in sorted(rounded) if "conv" in name] == [[0, 1], [0, 1], [1]]
    assert sorted(rounded[name] for name in rounded if "matmul" in name) == [[0, 1], [1]]
    pipeline = passes_after_scheduling(target)
    run = compile_and_bind(module, weights, exported, inputs, target, SimpleNamespace(device="cpu"), pipeline, {})
    y, of_norm, embedded, tied = (torch.from_dlpack(output) for output in run())
    for part in (*model.convolutions, model.linear):
        part.weight.copy_(rounded_to_tf32(part.weight))
    first, second, third = model.convolutions
    convolved = rounded_to_tf32(second(rounded_to_tf32(first(inputs["x"]).relu())).relu())
    close = {"rtol": 1e-3, "atol": 1e-4}  # what is on the edge may round to the other side
    torch.testing.assert_close(y, third(convolved) + inputs["x"], **close)
    torch.testing.assert_close(of_norm, model.linear(rounded_to_tf32(model.norm(y.flatten(2).mT))), **close)
    assert torch.equal(embedded, model.embedding(inputs["ids"]))  # which is no product
    weight = rounded_to_tf32(model.embedding.weight)
    torch.testing.assert_close(tied, torch.nn.functional.linear(y.mean((2, 3)), weight))


@pytest.mark.parametrize("size, stride, padding", [(7, 2, 3), (4, 4, 0)])  # with a fourth channel; a patch's lines
@torch.no_grad()
def test_images_are_rounded_where_they_become_channels_last(tvm, size, stride, padding):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, size, stride, padding), torch.nn.ReLU()).eval()
    exported = export_for_tvm(model, {"input": torch.randn(1, 3, 32, 32)})
    module, _ = tuned_module(exported, load_target(H200), allow_tf32=True)
    rounded = {
        name.name_hint: list(f.attrs.get(ROUNDED, ())) for name, f in module.functions_items() if "conv" in str(name)
    }
    assert list(map(list, rounded.values())) == [[0, 1]]
    assert any("round_operand" in name.name_hint and "transpose" in name.name_hint for name in module.functions)


@pytest.mark.parametrize("target, rounds", [(H200, True), (TURING, False)])
def test_only_where_there_are_tensor_cores_for_it(tvm, target, rounds):
    exported = export_for_tvm(torch.nn.Linear(64, 64).eval(), {"input": torch.randn(32, 64)})
    module, _ = tuned_module(exported, load_target(target), allow_tf32=True)
    assert (ROUNDED in module.script()) == rounds


def test_rounding_is_to_nearest_and_keeps_what_is_no_number(tvm):
    from tvm import te

    x = te.placeholder((12,), "float32", "x")
    round_all = tvm.compile(tvm.IRModule({"main": te.create_prim_func([x, round_to_tf32(x)])}), target="llvm")
    ties = np.array([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23], "float32")
    others = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3e38, 1e-40, -1.5], "float32")
    result = tvm.runtime.tensor(np.empty(12, "float32"))
    round_all["main"](tvm.runtime.tensor(np.concatenate([ties, others])), result)
    nearest = [1 + 2**-10, 1 + 2**-9, -1 - 2**-10, 1]
    kept = result.numpy()[4:]
    assert result.numpy()[:4].tolist() == nearest
    assert np.isnan(kept[4]) and kept[[2, 3]].tolist() == [np.inf, -np.inf] and kept[7] == -1.5
    assert not kept[:2].any() and abs(kept[5] / 3e38 - 1) < 2**-11 and abs(kept[6]) < 2e-40
