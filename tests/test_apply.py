"""A model scheduled by its database: records that are templates, beside what keeps TVM's default schedule."""

import random

import pytest
import torch
from transformers import BertConfig

from conftest import H200, TINY_BERT, make_case
from harness.case import arithmetic
from harness.weights import load_on_device
from products import random_fitting
from tvm_items.apply import apply_database
from tvm_items.database import RECORD, DatabaseError
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
    return dict(zip(RECORD, (task.key, task.name, number, random_fitting(template, rng), 1e-6, 2e-6)))


@pytest.mark.parametrize(
    "precision, instruction, numbers", [("fp16", "wgmma", {101, 110}), ("tf32", "m16n8k8", {100, 111})]
)
@torch.no_grad()
def test_a_model_of_templates_compiles_for_hopper(tvm, precision, instruction, numbers):
    case, target = make_case(CONFIG, precision=precision), tvm.target.Target(H200)
    with arithmetic(precision) as dtype:
        exported = export_for_tvm(*load_on_device(case, dtype), whole_attention=True)
        module, _ = tuned_module(exported, target, allow_tf32=precision == "tf32")
    rng = random.Random(0)
    records = [record for task in extract_tasks(module, target) if (record := make_record(task, rng))]
    assert {record["space"] for record in records} == numbers
    scheduled = apply_database(module, target, {"records": records})
    options = {"relax.backend.use_cuda_graph": True, **build_options(target)}
    executable = compile_module(scheduled, target, passes_after_scheduling(target), options)
    assert instruction in executable.mod.imports[0].imports[0].inspect_source("cuda")
    unfit = [records[0] | {"task": "0x0"}, records[1] | {"decisions": [99]}, *records[2:]]
    with pytest.raises(DatabaseError, match=f"2 of {len(records)} records fit no kernel"):
        apply_database(module, target, {"records": unfit})
