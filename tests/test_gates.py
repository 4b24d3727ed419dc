"""Gated MLPs: one product of pairs of columns, one task with the gate, and the numbers of eager PyTorch."""

import json
import random

import pytest
import torch
from test_attention import called_functions, run_unscheduled
from torch.nn import functional

from conftest import H200
from cuda_emulator import emulate, generate
from harness.check import output_arrays, relative_error
from products import make_gate, random_fitting
from tvm_items.graph import simplify
from tvm_items.importer import export_for_tvm
from tvm_items.kernels import compile_candidate
from tvm_items.lowering import tir_pipeline
from tvm_items.relax_module import tuned_module
from tvm_items.target import load_target
from tvm_items.tasks import extract_tasks
from tvm_items.templates.find import find_templates

WIDTH, TERMS = 40, 32


class Gated(torch.nn.Module):
    """An MLP whose products become one in some way."""

    def __init__(self, meet, bias=False):
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(TERMS, WIDTH, bias=bias) for _ in range(2))
        self.both, self.down = torch.nn.Linear(TERMS, 2 * WIDTH, bias=bias), torch.nn.Linear(WIDTH, TERMS)
        self.meet = meet

    def forward(self, x):
        x = torch.nn.functional.layer_norm(x, (TERMS,))
        return self.down(self.meet(self, x))


def as_llama(mlp, x):
    return functional.silu(mlp.gate(x)) * mlp.up(x)


def as_modernbert(mlp, x):
    gated, up = mlp.both(x).chunk(2, dim=-1)
    return functional.gelu(gated) * up


def as_phi3(mlp, x):
    both = mlp.both(x)
    return both[..., WIDTH:] * functional.silu(both[..., :WIDTH])


def as_glu(mlp, x):
    return functional.glu(mlp.both(x))


def without_a_gate(mlp, x):
    return mlp.up(x).relu()


def read_by_another(mlp, x):
    up = mlp.up(x)
    return functional.silu(mlp.gate(x)) * up + up.mean(-1, keepdim=True)


def of_other_inputs(mlp, x):
    return functional.silu(mlp.gate(x)) * mlp.up(x + 1)


def of_other_columns(mlp, x):
    both = mlp.both(x)
    return functional.silu(both[..., : WIDTH // 2]).repeat(1, 1, 2) * both[..., WIDTH:]


def with_another_tensor(mlp, x):
    return functional.silu(mlp.gate(x)) * x.mean() * mlp.up(x)


def simplified(model, x):
    exported = export_for_tvm(model.eval(), {"x": x})
    simplify(exported, with_gates=True)
    return exported


def columns_of_products(exported):
    return [
        node.meta["val"].shape[1]
        for node in exported.graph.nodes
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    ]


@pytest.mark.parametrize(
    "meet, bias", [(as_llama, False), (as_llama, True), (as_modernbert, True), (as_phi3, False), (as_glu, True)]
)
@torch.no_grad()
def test_a_gate_and_what_it_multiplies_are_one_product(meet, bias):
    torch.manual_seed(0)
    model, x = Gated(meet, bias), torch.randn(2, 5, TERMS)
    expected, exported = model(x), simplified(model, x)
    assert columns_of_products(exported) == [2 * WIDTH, TERMS]
    torch.testing.assert_close(exported.module()(x=x), expected)


@pytest.mark.parametrize(
    "meet, columns",
    [
        (without_a_gate, [WIDTH]),
        (read_by_another, [WIDTH, WIDTH]),
        (of_other_inputs, [WIDTH, WIDTH]),
        (of_other_columns, [2 * WIDTH]),
        (with_another_tensor, [WIDTH, WIDTH]),
    ],
)
@torch.no_grad()
def test_what_stays_as_it_is(meet, columns):
    torch.manual_seed(0)
    model, x = Gated(meet), torch.randn(2, 5, TERMS)
    expected, exported = model(x), simplified(model, x)
    assert columns_of_products(exported) == [*columns, TERMS]
    slices = exported.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor)
    assert all(node.args[0].meta["val"].shape[-1] != 2 for node in slices)
    torch.testing.assert_close(exported.module()(x=x), expected)


@torch.no_grad()
def test_one_function_has_product_and_gate(tvm):
    torch.manual_seed(0)
    model, x = Gated(as_modernbert, bias=True).eval(), torch.randn(2, 5, TERMS)
    exported = export_for_tvm(model, {"x": x})
    module, weights = tuned_module(exported, load_target(H200))
    assert [("matmul" in name, "gelu" in name) for name in called_functions(module)] == [
        (False, False),  # the norm
        (True, True),
        (True, False),
    ]
    values = run_unscheduled(exported, module, weights, tvm.target.Target({"kind": "llvm", "num-cores": 2}), x)
    assert relative_error(values, output_arrays(model(x))) < 1e-5


@pytest.mark.parametrize("rows, numbers", [(5, {100, 102}), (1, {107})])
@torch.no_grad()
def test_the_gate_is_part_of_the_product_s_task(tvm, rows, numbers):
    torch.manual_seed(0)
    model, x = Gated(as_llama, bias=True).eval().half(), torch.randn(1, rows, TERMS).half()
    expected = as_llama(model, x)
    target = tvm.target.Target(json.loads(H200))
    module, _ = tuned_module(export_for_tvm(model, {"x": x}), target)
    tasks = [task for task in extract_tasks(module, target) if "matmul" in task.name]
    assert len(tasks) == 2
    (task,) = [task for task in tasks if "sigmoid" in task.name]
    templates = find_templates(tvm.ir.load_json(task.module_json), target)
    assert {template.number for template in templates} == numbers
    weight = torch.stack([model.gate.weight, model.up.weight], 1).flatten(0, 1)
    bias = torch.stack([model.gate.bias, model.up.bias], 1).flatten()
    given = [x[0], weight if rows == 1 else weight.T.contiguous(), bias, torch.full((rows, WIDTH), torch.nan).half()]
    assert [tuple(tensor.shape) for tensor in given] == [shape for _, shape in task.arguments]
    for template in templates:
        realized = template.realize(random_fitting(template, random.Random(0)))
        for values in emulate(realized, target, given, tir_pipeline()):
            assert relative_error([values[-1].float().numpy()], [expected[0].float().numpy()]) < 1e-3


@pytest.mark.parametrize(
    "shape, dtype, transposed, activation, rounded",
    [
        ((1, 70, 80, 104), "float16", False, "silu", False),  # neither rows, columns nor terms are multiples of a tile
        pytest.param((2, 37, 66, 64), "bfloat16", True, "gelu", False, marks=pytest.mark.slow),
        ((1, 40, 72, 96), "float32", False, "silu", False),
        ((1, 40, 72, 96), "float32", True, "silu", True),
        ((1, 1, 72, 200), "float16", False, "silu", False),
        pytest.param((1, 3, 66, 264), "bfloat16", True, "gelu by tanh", False, marks=pytest.mark.slow),
    ],
)
def test_every_template_has_pairs(tvm, shape, dtype, transposed, activation, rounded):
    module, arguments, expected = make_gate(shape, dtype, transposed, activation, rounded)
    target, rng = tvm.target.Target(json.loads(H200)), random.Random(0)
    templates = find_templates(module, target)
    assert templates
    tolerance = 1e-4 if rounded else {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-6}[dtype]
    for template in templates:
        for values in emulate(template.realize(random_fitting(template, rng)), target, arguments, tir_pipeline()):
            error = (values[-1].float() - expected.float()).norm() / expected.float().norm()
            assert error < tolerance and all(map(torch.equal, values[:-1], arguments[:-1]))


def test_pairs_are_written_in_vectors_for_hopper(tvm):
    target, rng = tvm.target.Target(json.loads(H200)), random.Random(0)
    *_, template = find_templates(make_gate((1, 128, 16384, 2048), "float16")[0], target)
    decisions = random_fitting(template, rng)
    while not template.make_config(*template.read(decisions)).staged:
        decisions = random_fitting(template, rng)
    source, *_ = generate(template.realize(decisions), target, tir_pipeline())
    assert "wgmma" in source and "*(uint4*)(argument3" in source
    with target:
        assert bytes(compile_candidate(source)).startswith(b"\x7fELF")
