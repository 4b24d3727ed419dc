"""What is rewritten in the exported graph before it is tuned."""

import torch

from tvm_items.graph import simplify
from tvm_items.importer import export_for_tvm


class Parts(torch.nn.Module):
    """BatchNorm after a convolution, with and without bias, and elsewhere; an activation after a Linear layer."""

    def __init__(self):
        super().__init__()
        self.plain = torch.nn.Conv2d(3, 8, 3, bias=False)
        self.biased = torch.nn.Conv2d(8, 8, 3, groups=2)
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(8) for _ in range(3))
        self.linear = torch.nn.Linear(8, 16)

    def forward(self, x):
        x = self.norms[1](self.biased(self.norms[0](self.plain(x)).relu()))
        x = self.norms[2](x.relu())
        return torch.nn.functional.gelu(self.linear(x.permute(0, 2, 3, 1).contiguous())) * 2


@torch.no_grad()
def test_simplifying_the_graph_changes_no_result():
    torch.manual_seed(0)
    model, x = Parts().eval(), torch.randn(2, 3, 8, 8)
    for norm in model.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_()
        norm.bias.normal_()
    expected = model(x)
    exported = export_for_tvm(model, {"x": x})
    simplify(exported)
    torch.testing.assert_close(exported.module()(x=x), expected, rtol=1e-4, atol=1e-5)
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("batch_norm" in call for call in calls) == 1
    product, activation = (next(i for i, c in enumerate(calls) if name in c) for name in ("addmm", "gelu"))
    assert activation == product + 1
