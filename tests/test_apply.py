"""A model scheduled by a library: records that are templates, beside what keeps TVM's default schedule."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig

from conftest import H200, TINY_BERT, make_case
from harness.case import arithmetic
from harness.weights import load_on_device
from products import random_fitting
from tvm_items.apply import KernelsGone, compile_with_library
from tvm_items.executable import compile_module, passes_after_scheduling
from tvm_items.importer import export_for_tvm
from tvm_items.measure import build_options
from tvm_items.relax_module import tuned_module
from tvm_items.spaces import cached_design_spaces
from tvm_items.tasks import extract_tasks

CONFIG = BertConfig(**{name: value for name, value in TINY_BERT.items() if name != "model_type"})


def make_record(task, rng):
    """Returns a record of the last of a task's templates with decisions that fit, None where it has no template."""
    spaces = cached_design_spaces(task.module_json, H200)
    if not spaces.templates:
        return None
    number, template = list(spaces.templates.items())[-1]
    return {"task": task.key, "name": task.name, "space": number, "decisions": random_fitting(template, rng)}


@pytest.mark.parametrize(
    "precision, instruction, numbers",
    [
        ("fp16", "wgmma", {101, 105, 107, 110}),
        pytest.param("tf32", "wgmma", {100, 101, 105, 107, 111}, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_a_model_of_templates_compiles_for_hopper(tvm, monkeypatch, precision, instruction, numbers):
    case, target = make_case(CONFIG, precision=precision), tvm.target.Target(H200)
    with arithmetic(precision) as dtype:
        exported = export_for_tvm(*load_on_device(case, dtype), whole_attention=True)
        module, _ = tuned_module(exported, target, allow_tf32=precision == "tf32")
    rng = random.Random(0)
    tasks = extract_tasks(module, target)
    records = [record for task in tasks if (record := make_record(task, rng))]
    assert {record["space"] for record in records} == numbers
    kernels = {task.key: {"task": task.key, "name": task.name, "space": None, "decisions": None} for task in tasks}
    kernels |= {record["task"]: record for record in records}
    options = {"relax.backend.use_cuda_graph": True, **build_options(target)}

    def compile_scheduled(scheduled):
        executable = compile_module(scheduled, target, passes_after_scheduling(target), options)
        return SimpleNamespace(source=executable.mod.imports[0].imports[0].inspect_source("cuda"))

    done = compile_with_library(module, target, kernels, len(tasks) + 1, compile_scheduled)  # all there are
    assert instruction in done.source and done.schedule_columns == {"schedule_warning": ""}

    # A record that fits no more costs itself only, and so does one whose kernel the device's compiler refuses.
    first, second, *rest = records
    kernels[second["task"]] = second | {"decisions": [99]}
    del kernels[first["task"]]
    broken, compiled = rest[0], []

    def build_alone(task_json, target_json, candidate, path):
        if candidate == (broken["space"], broken["decisions"]):
            raise RuntimeError("ptxas")

    def compile_without_broken(scheduled):
        compiled.append(sum("tirx.is_scheduled" in (f.attrs or {}) for f in scheduled.functions.values()))
        if len(compiled) == 1:
            raise RuntimeError("a kernel")
        return SimpleNamespace()

    monkeypatch.setattr("tvm_items.apply.build", build_alone)
    with pytest.raises(KernelsGone, match=f"1 of the kernels have no schedule; {len(tasks)} had one"):
        compile_with_library(module, target, kernels, len(tasks), compile_without_broken)
    done = compile_with_library(module, target, kernels, len(tasks) - 1, compile_without_broken)
    warning = done.schedule_columns["schedule_warning"]
    assert f"the schedule of {second['name']} is left out: ValueError" in warning
    assert "those of 1 more kernels" in warning and len(compiled) == 2
