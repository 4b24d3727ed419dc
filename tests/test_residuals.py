"""What a residual passes through is part of the product that adds it, with the numbers of eager PyTorch."""

import json
import random

import pytest
import torch
from test_attention import called_functions, run_unscheduled
from torch.nn import functional

from conftest import H200
from cuda_emulator import emulate
from harness.check import output_arrays, relative_error
from products import random_fitting
from tvm_items.importer import export_for_tvm
from tvm_items.lowering import tir_pipeline
from tvm_items.relax_module import tuned_module
from tvm_items.target import load_target
from tvm_items.tasks import extract_tasks
from tvm_items.templates.find import find_templates

ROWS, WIDTH = 24, 64


class Clamped(torch.nn.Module):
    """A layer whose residual is clamped, as T5's is in fp16; other layers may read that too."""

    def __init__(self, then):
        super().__init__()
        self.linears, self.then = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)), then

    def forward(self, x):
        limit = torch.where(torch.isinf(x).any(), 0.5, 1.0)
        return self.then(self, torch.clamp(x, min=-limit, max=limit))


def norm(x):
    return functional.layer_norm(x, (WIDTH,))


def added(layer, x):
    return x + layer.linears[0](norm(x))


def added_twice(layer, x):
    return torch.stack([x + linear(norm(x)) for linear in layer.linears])


def multiplied(layer, x):
    return x + layer.linears[0](x)


def returned(layer, x):
    return x + layer.linears[0](norm(x)), x


def prepare(then, dtype):
    torch.manual_seed(0)
    model, x = Clamped(then).eval().to(dtype), torch.randn(1, ROWS, WIDTH).to(dtype)
    exported = export_for_tvm(model, {"x": x})
    return model, x, exported, *tuned_module(exported, load_target(H200))


@pytest.mark.parametrize(
    "then, is_joined", [(added, True), (added_twice, True), (multiplied, False), (returned, False)]
)
@torch.no_grad()
def test_the_clamp_is_part_of_the_product(tvm, then, is_joined):
    model, x, exported, module, weights = prepare(then, torch.float32)
    products = [name for name in called_functions(module) if "matmul" in name]
    assert products and all(("minimum" in name) == is_joined for name in products)
    clamps = [name for name in called_functions(module) if "minimum" in name and "matmul" not in name]
    if is_joined:
        assert len(clamps) == 1 and "norm" in clamps[0]
    values = run_unscheduled(exported, module, weights, tvm.target.Target({"kind": "llvm", "num-cores": 2}), x)
    assert relative_error(values, output_arrays(model(x))) < 1e-5


@torch.no_grad()
def test_templates_clamp_the_residual(tvm):
    *_, module, _ = prepare(added, torch.float16)
    target = tvm.target.Target(json.loads(H200))
    (task,) = [task for task in extract_tasks(module, target) if "matmul" in task.name]
    assert task.name.startswith("fused_matmul")  # as those that have no clamp: they are kin
    generator = torch.Generator().manual_seed(0)
    x, weight, residual = (torch.randn(size, WIDTH, generator=generator).half() for size in (ROWS, WIDTH, ROWS))
    is_infinite, limits = torch.ones(1, dtype=torch.int32), (torch.tensor(0.5), torch.tensor(1.0))
    given = [x, weight, is_infinite, *limits, residual[None], torch.full((ROWS, WIDTH), torch.nan).half()]
    assert [tuple(tensor.shape) for tensor in given] == [shape for _, shape in task.arguments]
    expected = residual.clamp(-0.5, 0.5) + (x.float() @ weight.float()).half()
    templates = find_templates(tvm.ir.load_json(task.module_json), target)
    assert {template.number for template in templates} == {100, 101}
    for template in templates:
        realized = template.realize(random_fitting(template, random.Random(0)))
        for values in emulate(realized, target, given, tir_pipeline()):
            assert relative_error([values[-1].float().numpy()], [expected.float().numpy()]) < 1e-3
