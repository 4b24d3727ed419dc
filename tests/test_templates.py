"""Which templates a model's tasks have."""

import json

import pytest
import torch

from conftest import H200
from tvm_items.importer import export_for_tvm
from tvm_items.relax_module import tuned_module
from tvm_items.tasks import extract_tasks
from tvm_items.templates.find import find_templates


@pytest.mark.parametrize(
    "dtype, allow_tf32, first, second",
    [
        (torch.float16, False, ["MmaTemplate", "WgmmaTemplate"], ["MmaTemplate", "WgmmaTemplate"]),
        (torch.bfloat16, False, ["MmaTemplate", "WgmmaTemplate"], ["MmaTemplate", "WgmmaTemplate"]),
        (torch.float32, True, ["MmaTemplate"], ["MmaTemplate", "WgmmaTemplate"]),  # the input is not rounded
        (torch.float32, False, ["FmaTemplate"], ["FmaTemplate"]),  # IEEE fp32
    ],
)
@torch.no_grad()
def test_a_linear_layer_has_templates_by_its_precision(tvm, dtype, allow_tf32, first, second):
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 32)).to(dtype).eval()
    target = tvm.target.Target(json.loads(H200))
    module, _ = tuned_module(export_for_tvm(model, {"input": torch.randn(24, 64).to(dtype)}), target, allow_tf32)
    tasks = extract_tasks(module, target)
    assert len(tasks) == 2  # each product with all that follows it
    found = [find_templates(tvm.ir.load_json(task.module_json), target) for task in tasks]
    names = [[type(template).__name__ for template in templates] for templates in found]
    assert sorted(names) == sorted([first, second])
    cpu = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    assert find_templates(tvm.ir.load_json(tasks[0].module_json), cpu) == []
