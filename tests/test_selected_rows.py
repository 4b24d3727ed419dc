"""Models that compute rows a mask selects, and that loop over the places of one: with other rows each time."""

import pytest
import torch
from transformers import ResNetConfig

import benchmark
from conftest import make_case
from harness.check import output_arrays, relative_error
from tvm_items.importer import export_for_tvm

pytestmark = pytest.mark.usefixtures("tvm")


def check(model, inputs):
    """Compiles a model and compares it on several inputs, of which the first selects some rows and the last none."""
    with torch.no_grad():
        run = benchmark.tvm_default(model, inputs, make_case(ResNetConfig()))
        for _ in range(3):
            assert relative_error(output_arrays(run()), output_arrays(model(**inputs))) < 1e-6
            inputs["pixel_values"].copy_(inputs["pixel_values"].flip(0).abs())
            inputs["pixel_values"].neg_()


def test_rows_that_a_mask_selects():
    """As in Higgs Audio, whose tokens of sound and of text take different ways, and in OneFormer's masks."""

    class Selecting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = torch.nn.LayerNorm(5), torch.nn.Linear(5, 5)

        def forward(self, pixel_values):
            mask = pixel_values[..., 0] > 0
            changed = pixel_values.masked_scatter(mask.unsqueeze(-1), self.norm(pixel_values[mask]))
            changed[~mask] = changed[~mask] + self.linear(changed[~mask]).softmax(-1)[:, :1]
            row, column = torch.where(pixel_values.sum(-1) > 0)
            changed[row, column] = 7.0
            reversed_places = pixel_values.flip(0, 1).masked_scatter(mask.flip(0, 1)[..., None], pixel_values[mask] * 2)
            return changed, reversed_places

    torch.manual_seed(0)
    check(Selecting(), {"pixel_values": torch.randn(2, 3, 5)})


class Experts(torch.nn.Module):
    """A loop over the experts that were hit, as in DBRX and Switch Transformers. leak: what else it does."""

    def __init__(self, leak=None):
        super().__init__()
        self.gates = torch.nn.ModuleDict({f"gate_{expert}": torch.nn.Linear(5, 5) for expert in range(3)})
        self.weight, self.leak = torch.nn.Parameter(torch.randn(3, 5, 5)), leak

    def forward(self, pixel_values):
        result, last = torch.zeros_like(pixel_values), None
        weights, chosen = pixel_values[:, :3].topk(2)
        chosen_by = torch.nn.functional.one_hot(chosen, 3).permute(2, 1, 0) * (weights.T > 0)
        hit = torch.greater(chosen_by.sum((-1, -2)), 0).nonzero()
        for expert in hit:
            rank, row = torch.where(chosen_by[expert[0]])
            gate = self.gates[f"gate_{expert[0]}"].to(pixel_values.dtype)
            rows = torch.nn.functional.silu(gate(pixel_values[None, row])[0]) * (
                pixel_values[row] @ self.weight[expert[0]]
            )
            result.index_add_(0, row, rows * weights[row, rank, None])
            if self.leak == "another result":
                last = self.weight[expert[0]].sum()
            elif self.leak == "other writes":
                result[0] = 1.0
            elif self.leak == "an early stop":
                break
        result = result + pixel_values  # that of no expert
        return result if last is None else result + last


def test_experts_that_were_hit():
    torch.manual_seed(0)
    check(Experts(), {"pixel_values": torch.randn(6, 5)})


class Parts(torch.nn.Module):
    """Products of parts whose sizes depend on the input, as in JetMoE. order: of the parts when they are joined."""

    def __init__(self, order=1):
        super().__init__()
        self.weight, self.order = torch.nn.Parameter(torch.randn(3, 5, 5)), order

    def forward(self, pixel_values):
        sizes = torch.nn.functional.one_hot(pixel_values[:, :3].argmax(-1), 3).sum(0).tolist()
        parts = pixel_values.split(sizes, dim=0)
        return torch.cat([part @ weight for part, weight in zip(parts, self.weight)][:: self.order], dim=0)


def test_parts_of_sizes_that_depend_on_the_input():
    torch.manual_seed(0)
    check(Parts(), {"pixel_values": torch.randn(6, 5)})
    with pytest.raises(NotImplementedError, match="how many places a mask names"):
        export_for_tvm(Parts(order=-1), {"pixel_values": torch.randn(6, 5)})


@pytest.mark.parametrize("leak", ["another result", "other writes", "an early stop"])
def test_a_loop_that_does_more_is_refused(leak):
    with pytest.raises(NotImplementedError, match="a loop over the places of a mask"):
        export_for_tvm(Experts(leak), {"pixel_values": torch.randn(6, 5)})


def test_rows_that_depend_on_each_other_are_refused():
    class Mixing(torch.nn.Module):
        def forward(self, pixel_values):
            return pixel_values[pixel_values[:, 0] > 0].softmax(0).sum(0)

    with pytest.raises(NotImplementedError, match="how many places a mask names"):
        export_for_tvm(Mixing(), {"pixel_values": torch.randn(6, 5)})
