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
    "dtype, allow_tf32, expected",
    [
        (torch.float16, False, ["MmaTemplate", "WgmmaTemplate"]),
        (torch.bfloat16, False, ["MmaTemplate", "WgmmaTemplate"]),
        (torch.float32, True, ["MmaTemplate"]),
        (torch.float32, False, ["FmaTemplate"]),  # IEEE fp32
    ],
)
@torch.no_grad()
def test_a_linear_layer_has_templates_by_its_precision(tvm, dtype, allow_tf32, expected):
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 32)).to(dtype).eval()
    target = tvm.target.Target(json.loads(H200))
    module, _ = tuned_module(export_for_tvm(model, {"input": torch.randn(24, 64).to(dtype)}), target, allow_tf32)
    tasks = extract_tasks(module, target)
    assert len(tasks) == 2  # each product with all that follows it
    for task in tasks:
        templates = find_templates(tvm.ir.load_json(task.module_json), target)
        assert [type(template).__name__ for template in templates] == expected
    cpu = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    assert find_templates(tvm.ir.load_json(tasks[0].module_json), cpu) == []
