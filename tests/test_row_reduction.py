"""The template for reductions along rows: its kernels, run on the CPU, are right for odd shapes and what is around."""

import json
import random

import pytest
import torch

from conftest import H200
from cuda_emulator import emulate, generate
from products import random_fitting
from tvm_items.importer import export_for_tvm
from tvm_items.kernels import compile_candidate
from tvm_items.lowering import tir_pipeline
from tvm_items.measure import build
from tvm_items.relax_module import tuned_module
from tvm_items.target import load_target
from tvm_items.tasks import extract_tasks
from tvm_items.templates.find import find_templates
from tvm_items.templates.row_reduction import PARAMETERS, RowReductionTemplate


class Rows(torch.nn.Module):
    """Row reductions as models have them, each a task of its own: norms, a softmax, a mean, one with two inputs."""

    def __init__(self, columns):
        super().__init__()
        self.weight, self.norm = torch.nn.Parameter(torch.rand(columns)), torch.nn.LayerNorm(columns)
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.norm.bias)

    def rms_norm(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)

    def forward(self, x, y):
        images = y.reshape(y.shape[0], -1, 5, y.shape[-1] // 5)
        return self.norm(x + y), self.rms_norm(y).relu(), torch.softmax(x, -1), images.mean((-1, -2)), (x * y).amax(-1)


@torch.no_grad()
def row_tasks(dtype, columns, rows=(2, 7)):
    """Returns the Tasks of Rows."""
    torch.manual_seed(0)
    model = Rows(columns).eval().to(dtype)
    inputs = {name: torch.randn(*rows, columns).to(dtype) for name in "xy"}
    target = load_target(H200)
    return extract_tasks(tuned_module(export_for_tvm(model, inputs), target)[0], target)


def find_template(tvm, task):
    (template,) = find_templates(tvm.ir.load_json(task.module_json), load_target(H200))
    assert isinstance(template, RowReductionTemplate)
    return template


def make_arguments(task):
    """Returns tensors for a task: normal noise, and for the output what is no number."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [getattr(torch, dtype) for dtype, _ in task.arguments]
    tensors = [torch.randn(shape, generator=generator).to(d) for d, (_, shape) in zip(dtypes, task.arguments)]
    tensors[-1].fill_(torch.nan)
    return tensors


def run_plain(tvm, task, arguments, path):
    """Returns the output of a task as TVM computes it on the CPU, without a schedule.

    As PyTorch does in fp32 where TVM would add up in fp16.
    """
    if task.name.startswith(("mean", "softmax")):
        x = arguments[0].float()
        return x.mean((-1, -2)) if task.name.startswith("mean") else torch.softmax(x, -1)
    build(task.module_json, json.dumps({"kind": "llvm", "num-cores": 2}), None, path)
    arguments = [argument.clone() for argument in arguments]
    tvm.runtime.load_module(path)["main"](*map(tvm.runtime.from_dlpack, arguments))
    return arguments[-1].float()


@pytest.mark.parametrize(
    "dtype, columns, parameters",
    [
        (torch.float16, 40, (4, 32, 4)),  # the last vectors of a row are not all inside, nor are the last rows
        (torch.float32, 40, (64, 128, 1)),  # two warps a row
        pytest.param(torch.float16, 200, (8, 64, 8), marks=pytest.mark.slow),
        pytest.param(torch.float32, 520, (32, 32, 4), marks=pytest.mark.slow),
        pytest.param(torch.float16, 1040, (128, 512, 2), marks=pytest.mark.slow),
    ],
)
def test_reductions_along_rows(tvm, tmp_path, dtype, columns, parameters):
    tasks = row_tasks(dtype, columns)
    assert len(tasks) == 5
    target, checked = load_target(H200), 0
    for task in tasks:
        template, arguments = find_template(tvm, task), make_arguments(task)
        decisions = [values.index(value) for values, value in zip(PARAMETERS, parameters, strict=True)]
        if not template.fits(decisions):
            continue
        checked += 1
        expected = run_plain(tvm, task, arguments, str(tmp_path / f"{task.key}.so"))
        for values in emulate(template.realize(decisions), target, arguments, tir_pipeline()):
            error = (values[-1].float() - expected).norm() / expected.norm()
            assert error < (1e-6 if dtype == torch.float32 else 1e-3), task.name
            assert all(map(torch.equal, values[:-1], arguments[:-1]))
    assert checked >= 3


class Clamped(Rows):
    """As T5's activations, to a limit that depends on whether any is infinite."""

    def forward(self, x):
        limit = torch.where(torch.isinf(x).any(), 1.0, 2.0)
        return self.rms_norm(x.clamp(-limit, limit))


@torch.no_grad()
def test_scalars_beside_a_reduction(tvm, tmp_path):
    torch.manual_seed(0)
    exported, target = export_for_tvm(Clamped(40).eval().half(), {"x": torch.randn(7, 40).half()}), load_target(H200)
    (task,) = (task for task in extract_tasks(tuned_module(exported, target)[0], target) if "rsqrt" in task.name)
    assert any(not shape for _, shape in task.arguments)
    template, arguments = find_template(tvm, task), make_arguments(task)
    expected = run_plain(tvm, task, arguments, str(tmp_path / "task.so"))
    decisions = random_fitting(template, random.Random(0))
    for values in emulate(template.realize(decisions), target, arguments, tir_pipeline()):
        assert (values[-1].float() - expected).norm() / expected.norm() < 1e-3


class NormalizedHeads(Rows):
    """As Qwen3's queries and keys, which are normalized head by head."""

    def __init__(self, columns):
        super().__init__(columns)
        self.query, self.key = torch.nn.Linear(64, 2 * columns, bias=False), torch.nn.Linear(64, 3 * columns)

    def forward(self, x):
        return [self.rms_norm(layer(x).unflatten(-1, (-1, len(self.weight)))) for layer in (self.query, self.key)]


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@torch.no_grad()
def test_heads_are_normalized_where_one_product_has_put_them(tvm, tmp_path, dtype):
    torch.manual_seed(0)
    model, target = NormalizedHeads(32).eval().to(dtype), load_target(H200)
    module, _ = tuned_module(export_for_tvm(model, {"x": torch.randn(7, 64).to(dtype)}), target)
    product, *norms = sorted(extract_tasks(module, target), key=lambda task: "rsqrt" in task.name)
    assert [task.launches for task in (product, *norms)] == [1, 1, 1] and product.arguments[-1][1] == (7, 160)
    for task in norms:
        assert task.name.startswith("fused_strided_slice")
        template, arguments = find_template(tvm, task), make_arguments(task)
        expected = run_plain(tvm, task, arguments, str(tmp_path / f"{task.key}.so"))
        decisions = [values.index(value) for values, value in zip(PARAMETERS, (4, 32, 4), strict=True)]
        for values in emulate(template.realize(decisions), target, arguments, tir_pipeline()):
            error = (values[-1].float() - expected).norm() / expected.norm()
            assert error < (1e-6 if dtype == torch.float32 else 1e-3)
        source, *_ = generate(template.realize(decisions), target, tir_pipeline())
        assert f"*({'float' if dtype == torch.float32 else 'half'}4*)(argument0" in source


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_row_is_read_once_in_vectors_and_kernels_compile_for_hopper(tvm, dtype):
    target = load_target(H200)
    for task in row_tasks(dtype, 1280):
        template = find_template(tvm, task)
        source, *_ = generate(template.realize(random_fitting(template, random.Random(0))), target, tir_pipeline())
        with target:
            assert bytes(compile_candidate(source)).startswith(b"\x7fELF")
        if "layer_norm" in task.name:  # 64 threads with 3 vectors of 8 columns each
            source, *_ = generate(template.realize([4, 2, 3]), target, tir_pipeline())
            assert source.count("*(uint4*)(argument0") == source.count("*(uint4*)(argument1") == 3


class Others(torch.nn.Module):
    """What is no reduction of rows, but for one sum: over the first axis, too short, and nothing reduced."""

    def forward(self, x):
        return x.sum(0), (x.sum(-1) + x[:, 0]).flip(0), torch.softmax(x[:, :8], -1), x * 2


def test_rows_that_read_one_another_are_left_alone(tvm):
    """A softmax whose second half reads what is of the row before it."""
    from tvm import te, topi

    x = te.placeholder((8, 32), name="x")
    softmax = topi.nn.softmax(x)
    shifted = te.compute((8, 32), lambda i, j: softmax[i, j] * x[(i + 7) % 8, j])
    module = tvm.IRModule({"main": te.create_prim_func([x, shifted])})
    assert not find_templates(module, load_target(H200))
    plain = tvm.IRModule({"main": te.create_prim_func([x, topi.multiply(softmax, x)])})
    assert len(find_templates(plain, load_target(H200))) == 1


@torch.no_grad()
def test_what_reduces_no_rows_is_left_alone(tvm):
    target = load_target(H200)
    module, _ = tuned_module(export_for_tvm(Others().eval(), {"x": torch.randn(32, 32)}), target)
    found = {
        task.name: bool(find_templates(tvm.ir.load_json(task.module_json), target))
        for task in extract_tasks(module, target)
    }
    assert len(found) == 6 and [name for name, templates in found.items() if templates] == ["sum1"], found
