"""Row reductions, and what is elementwise around them: one task that computes the same."""

import re
from types import SimpleNamespace

import pytest
import torch

from conftest import H200, TURING
from harness.check import output_arrays, relative_error
from tvm_items.executable import compile_and_bind, passes_after_scheduling
from tvm_items.importer import export_for_tvm
from tvm_items.relax_module import tuned_module
from tvm_items.search import search
from tvm_items.spaces import DesignSpaces
from tvm_items.tasks import extract_tasks


class Norms(torch.nn.Module):
    """Norms as language models write them: in fp32 whatever the dtype; one scaled behind it, one with two users."""

    def __init__(self):
        super().__init__()
        self.weight, self.linear = torch.nn.Parameter(torch.rand(32)), torch.nn.Linear(32, 32, bias=False)
        self.norm = torch.nn.LayerNorm(32)

    def rms_norm(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)

    def forward(self, x):
        x = x + self.linear(self.rms_norm(x))
        y = self.norm(x)
        return self.rms_norm(x).relu(), y.exp(), y.tanh(), x.mean((0, 1))  # the last does not reduce rows


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_is_one_launch_with_what_is_around_it(tvm, dtype):
    torch.manual_seed(0)
    model, inputs = Norms().eval().to(dtype), {"x": torch.randn(2, 16, 32).to(dtype)}
    exported = export_for_tvm(model, inputs)
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    module, weights = tuned_module(exported, target)
    names = re.findall(r"call_tir\((\w+),", re.sub(r"\d+", "", module["main"].script()))
    norms = [name for name in names if "rsqrt" in name]
    assert len(norms) == 2 and all(re.search("multiply.*_mean", name) for name in norms)
    assert any("relu" in name for name in norms)
    assert "layer_norm" in names  # two read it: they stay two
    assert sum("matmul" in name for name in names) == 1 and len(names) == 7
    case, pipeline = SimpleNamespace(device="cpu"), passes_after_scheduling(target)
    run = compile_and_bind(module, weights, exported, inputs, target, case, pipeline, {})
    expected = output_arrays(model.float()(inputs["x"].float()))
    assert relative_error(output_arrays(run()), expected) < (1e-6 if dtype == torch.float32 else 1e-3)


@torch.no_grad()
def test_a_layer_norm_in_bf16_is_one_launch(tvm):
    exported = export_for_tvm(torch.nn.LayerNorm(32).eval().bfloat16(), {"input": torch.randn(2, 16, 32).bfloat16()})
    module, _ = tuned_module(exported, tvm.target.Target({"kind": "llvm", "num-cores": 2}))
    assert len(re.findall(r"call_tir\((\w+),", module["main"].script())) == 1  # casts to fp32 and back are in it


class Positions(torch.nn.Module):
    """A cumulative sum, as RoBERTa counts positions: on the CPU a function of TVM's without a root block."""

    def forward(self, x):
        return torch.cumsum(x, 1) * 2


def test_a_function_without_a_root_block_is_left_alone(tvm):
    exported = export_for_tvm(Positions(), {"x": torch.ones(1, 8, dtype=torch.int64)})
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    assert len(extract_tasks(tuned_module(exported, target)[0], target)) == 2


@torch.no_grad()
def test_a_norm_with_what_is_around_it_can_be_one_kernel(tvm):
    """By MetaSchedule's rules; where there is a template it always is."""
    exported = export_for_tvm(Norms().eval().half(), {"x": torch.randn(2, 16, 32).half()})
    target = tvm.target.Target(H200)
    tasks = [task for task in extract_tasks(tuned_module(exported, target)[0], target) if "rsqrt" in task.name]
    assert tasks
    for task in tasks:
        spaces = DesignSpaces(task.module_json, TURING)
        found = search(task.module_json, TURING, [], [], 16, 1)
        scripts = [spaces.realize(space, decisions)[0].script() for space, decisions, _ in found]
        assert 1 in {script.count('thread="blockIdx.x"') for script in scripts}
