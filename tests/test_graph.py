"""What is rewritten in the exported graph before it is tuned."""

import pytest
import torch

from tvm_items.graph import simplify
from tvm_items.importer import export_for_tvm

aten = torch.ops.aten


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
        x = self.linear(x.permute(0, 2, 3, 1).contiguous())
        return torch.nn.functional.gelu(x * torch.sigmoid(x)) * 2  # reads a view of the product twice


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
    product = next(i for i, call in enumerate(calls) if "addmm" in call)
    assert [call.split(".")[1] for call in calls[product + 1 :]] == ["sigmoid", "mul", "gelu", "mul", "reshape"]


class Levit(torch.nn.Module):
    """Linear layers on the permuted points of an image, each with a BatchNorm, as LeViT's; the last is read twice."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=bias) for bias in (False, True, True))
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(8) for _ in range(3))

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        for layer, norm in zip(self.layers, self.norms):
            before = layer(x)
            x = norm(before.flatten(0, 1)).reshape_as(x)
        return x, before


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_norms_fold_into_linear_layers(batch_size):
    torch.manual_seed(0)
    model, x = Levit().eval(), torch.randn(batch_size, 8, 3, 4)
    for norm in model.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_()
        norm.bias.normal_()
    exported = export_for_tvm(model, {"x": x})
    simplify(exported)
    torch.testing.assert_close(exported.module()(x=x), model(x), rtol=1e-4, atol=1e-5)
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert calls.count(aten._native_batch_norm_legit_no_training.default) == 1
    assert calls.count(aten.addmm.default) == 3 and aten.bmm.default not in calls


class Audio(torch.nn.Module):
    """A residual that begins with a convolution along time, as Whisper's, and a bias with more axes, as BART's."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = torch.nn.Conv1d(4, 8, 3, padding=1), torch.nn.LayerNorm(8)
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("bias", torch.randn(1, 8))

    def forward(self, x):
        x = torch.nn.functional.gelu(self.convolution(x)).permute(0, 2, 1)
        return x + self.linear(self.norm(x)) + self.bias


@torch.no_grad()
def test_residuals_and_biases_come_behind_products():
    torch.manual_seed(0)
    model, x = Audio().eval(), torch.randn(1, 4, 10)
    exported = export_for_tvm(model, {"x": x})
    simplify(exported)
    torch.testing.assert_close(exported.module()(x=x), model(x))
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    behind = calls[calls.index(aten.addmm.default) + 1 :]
    assert behind == [aten.add.Tensor, aten.add.Tensor, aten.reshape.default]


class Powers(torch.nn.Module):
    def forward(self, x):
        return x.pow(3) + x**2 + x.abs().pow(1.5)


@torch.no_grad()
def test_squares_and_cubes_are_products():
    x = torch.randn(5)
    exported = export_for_tvm(Powers(), {"x": x})
    simplify(exported)
    assert torch.equal(exported.module()(x=x), Powers()(x))
    calls = [str(node.target).split(".")[1] for node in exported.graph.nodes if node.op == "call_function"]
    assert calls.count("pow") == 1 and calls.count("mul") == 3


class Projections(torch.nn.Module):
    """Queries, keys and values of the same input, keys without a bias; a product with an activation; another input."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys = torch.nn.Linear(8, 12), torch.nn.Linear(8, 6, bias=False)
        self.values, self.gate = torch.nn.Linear(8, 6), torch.nn.Linear(8, 5)
        self.tied = torch.nn.Linear(8, 8)

    def forward(self, x):
        parts = [layer(x).view(2, 4, -1, 2).transpose(1, 2) for layer in (self.queries, self.keys, self.values)]
        rest = self.gate(x).relu(), self.tied(x), self.tied(x.mul(2)), self.keys.weight.sum()
        return *parts, *rest


def simplify_and_compare(model, x):
    """Returns the simplified program of a model; it computes of x what the model does."""
    expected = model(x)
    exported = export_for_tvm(model, {"x": x})
    simplify(exported)
    torch.testing.assert_close(exported.module()(x=x), expected)
    return exported


@torch.no_grad()
def test_products_of_the_same_input_become_one():
    torch.manual_seed(0)
    exported = simplify_and_compare(Projections().eval(), torch.randn(2, 4, 8))
    products = [node for node in exported.graph.nodes if node.target == torch.ops.aten.addmm.default]
    # Queries, keys, values and one reading of the tied layer; another input; a gate has its relu().
    assert sorted(node.meta["val"].shape[1] for node in products) == [5, 8, 32]


@torch.no_grad()
def test_a_product_without_bias_joins_those_with_one():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 6, bias=False), torch.nn.Linear(8, 4), torch.nn.Linear(8, 2)])

    class Model(torch.nn.Module):
        def forward(self, x):
            return [layer(x).transpose(0, 1) for layer in layers]

    model = Model()
    model.layers = layers
    exported = simplify_and_compare(model, torch.randn(3, 8))
    assert sum("mm" in str(node.target) for node in exported.graph.nodes) == 1


class SharedBias(torch.nn.Module):
    """As torch's attention has them: the biases of three projections in one tensor, here put together before."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, size) for size in (6, 4, 2))

    def forward(self, x):
        bias = torch.cat([layer.bias for layer in self.layers])
        parts = [*bias.split([6, 4, 2]), bias[1:6]]
        products = [torch.nn.functional.linear(x, layer.weight, part) for layer, part in zip(self.layers, parts)]
        return [product.transpose(0, 1) for product in products] + [parts[3].relu()]


@torch.no_grad()
def test_parts_of_a_concatenation_are_taken_from_before_it():
    torch.manual_seed(0)
    exported = simplify_and_compare(SharedBias(), torch.randn(3, 8))
    assert sum("mm" in str(node.target) for node in exported.graph.nodes) == 1


class TwoProducts(torch.nn.Module):
    """The sum of a Linear layer's product, of two dimensions, and of a batched one, of three."""

    def __init__(self):
        super().__init__()
        self.linear, self.weight = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.randn(1, 8, 8))

    def forward(self, x):
        return (self.linear(x) + torch.bmm(x, self.weight)).relu()


@torch.no_grad()
@pytest.mark.timeout(60)
def test_operators_on_two_products_are_moved_in_front_of_one_of_them():
    model, x = TwoProducts(), torch.randn(1, 6, 8)
    exported = export_for_tvm(model, {"x": x})
    simplify(exported)
    torch.testing.assert_close(exported.module()(x=x), model(x))
    calls = [str(node.target).split(".")[1] for node in exported.graph.nodes if node.op == "call_function"]
    assert calls[-3:] == ["add", "relu", "reshape"]
