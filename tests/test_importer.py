"""What is rewritten before TVM's importer, and the dtypes that it gives: models with what it refuses or gets wrong."""

import functools
import json

import pytest
import torch
from transformers import ResNetConfig
from transformers.integrations import moe

import benchmark
from conftest import H200, make_case
from harness.check import output_arrays, relative_error
from tvm_items.executable import compile_module
from tvm_items.exported_graph import compute_constants_once
from tvm_items.importer import export_for_tvm, import_to_relax

pytestmark = pytest.mark.usefixtures("tvm")


def test_what_is_rewritten_before_the_import():
    """What TVM's importer refuses or gets wrong.

    Logarithms of integers, booleans plus integers, a number less integers, index -1, any().
    """

    class Awkward(torch.nn.Module):
        main_input_name = "pixel_values"

        def forward(self, pixel_values):
            positive = pixel_values > 0
            guarded = torch.where(pixel_values.isinf().any(), 0, pixel_values[:, -1, None])
            return torch.log(positive.long() + 1) + (positive + positive.int()) / 3 + (1.0 - positive.long()) + guarded

    inputs = {"pixel_values": torch.randn(2, 3)}
    run = benchmark.tvm_default(Awkward(), inputs, make_case(ResNetConfig()))
    for overflow in (False, True):
        if overflow:
            inputs["pixel_values"][0, 1] = torch.inf
        assert relative_error(output_arrays(run()), [Awkward()(**inputs).numpy()]) < 1e-6


def test_windows_larger_than_the_image():
    """As EfficientNet's, which are as large as there are channels: a kernel would pad the image to 400 GB."""

    class Pooled(torch.nn.Module):
        def forward(self, pixel_values):
            pool = functools.partial(torch.nn.functional.avg_pool2d, ceil_mode=True)
            return pool(pixel_values, 100_000), pool(pixel_values, (6, 3), (2, 3)), pool(pixel_values, 3)

    inputs = {"pixel_values": torch.randn(1, 10, 5, 6)}
    run = benchmark.tvm_default(Pooled(), inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(Pooled()(**inputs))) < 1e-6


def test_what_is_written_into_an_input():
    """As TVP does: times ones changes nothing, all else is refused."""

    class Writing(torch.nn.Module):
        def __init__(self, kept):
            super().__init__()
            self.kept = kept

        def forward(self, pixel_values):
            pixel_values *= torch.full((3,), self.kept)
            return pixel_values + 1

    inputs = {"pixel_values": torch.randn(2, 3)}
    exported = export_for_tvm(Writing(1.0), inputs)
    assert not exported.graph_signature.user_inputs_to_mutate
    assert torch.equal(exported.module()(**inputs), inputs["pixel_values"] + 1)
    with pytest.raises(NotImplementedError, match="what is written into pixel_values"):
        export_for_tvm(Writing(0.5), inputs)


def test_an_if_on_values_is_exported():
    """As in BART, which clamps what overflows in fp16."""

    class Clamped(torch.nn.Module):
        def forward(self, pixel_values):
            if not torch.isfinite(pixel_values).all():
                pixel_values = pixel_values.clamp(-9, 9)
            return pixel_values * 2

    inputs = {"pixel_values": torch.randn(2, 3)}
    run = benchmark.tvm_default(Clamped(), inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), [2 * inputs["pixel_values"].numpy()]) < 1e-6


def test_indices_in_tensors_count_from_the_end():
    """As in Falcon, whose keys are the last but one of each group of heads; both as constants and as computed."""

    class Picking(torch.nn.Module):
        def forward(self, pixel_values):
            computed = (pixel_values[0] > 0).long() - 1  # 0 and -1
            written = pixel_values.clone()
            written[:, torch.tensor([-3])] = 5.0
            return pixel_values[:, [-2, 0]], pixel_values[:, computed], written

    inputs = {"pixel_values": torch.randn(2, 3)}
    run = benchmark.tvm_default(Picking(), inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(Picking()(**inputs))) == 0


def test_axes_count_from_the_end():
    class Turning(torch.nn.Module):
        def forward(self, pixel_values):
            cube = torch.stack([pixel_values, pixel_values.flip(-1)], -1).permute(0, -1, -2)  # (2, 2, 3)
            joined = torch.cat([cube, cube.cumsum(-2)], -1).unsqueeze(-2)  # (2, 2, 1, 6)
            return joined.squeeze((-2,)).sum((-1,)), joined.softmax(-1).select(-1, -2), joined.roll(2, -1)

    inputs = {"pixel_values": torch.randn(2, 3)}
    exported = export_for_tvm(Turning(), inputs)
    import_to_relax(exported)
    for node in exported.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default):
        assert min(node.args[1]) >= 0
    run = benchmark.tvm_default(Turning(), inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(Turning()(**inputs))) < 1e-6


def test_operators_that_the_importer_lacks():
    """Extremes, sums by place, sorting in any order and stably, counting down, windows."""

    class Lacking(torch.nn.Module):
        def forward(self, pixel_values):
            places = torch.tensor([[0, 2, 0, 1]])
            summed = torch.zeros(1, 3).scatter_add(1, places, pixel_values[:1])
            largest = torch.topk(pixel_values, 3, sorted=False).values.sort(stable=True, descending=True).values
            countdown = torch.arange(3, -1, -1) * pixel_values
            windows = pixel_values.unfold(0, 2, 1) * 2
            nearest, place = pixel_values.min(-1)
            place = place.clamp(min=1) + place.clamp(max=2) + place.int().clamp(min=1)
            summed = summed + (nearest * place).sum()
            return summed, largest, countdown, windows, pixel_values.amin((0, 1)), pixel_values.amax(-1, True)

    inputs = {"pixel_values": torch.randn(3, 4)}
    run = benchmark.tvm_default(Lacking(), inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(Lacking()(**inputs))) < 1e-6


def test_memory_read_in_another_order_and_numbers_that_tvm_cannot_make():
    """Windows that overlap as in Longformer, infinite numbers as in Llama 4, a quantile as in Gemma 3n, no element."""

    class Awkward(torch.nn.Module):
        def forward(self, pixel_values):
            swapped = pixel_values.transpose(0, 1)  # strides 1 and 4
            windows = swapped.as_strided((2, 4, 2), (4, 1, 4), 0) * 2
            hidden = torch.where(pixel_values > 0, pixel_values, torch.full_like(pixel_values, -torch.inf)).exp()
            quantile = torch.special.erfinv(2 * torch.tensor(0.95) - 1)
            nothing = pixel_values[:0].reshape(2, 0, 4)
            grown = torch.cat([pixel_values.expand(2, 3, 4), nothing], dim=1)
            return windows, hidden, pixel_values * quantile, grown

    inputs = {"pixel_values": torch.randn(3, 4)}
    run = benchmark.tvm_default(Awkward(), inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(Awkward()(**inputs))) < 1e-6


def test_what_is_rolled_is_slices_that_change_places():
    """As Swin's windows are shifted: a choice of rows by number would be launches of its own."""

    class Rolling(torch.nn.Module):
        def forward(self, pixel_values):
            there = torch.roll(pixel_values, (-2, 1), (1, 2))
            return there, torch.roll(there * 2, (2, -1), (1, 2)), torch.roll(pixel_values, 9, -1), pixel_values.roll(7)

    inputs = {"pixel_values": torch.randn(2, 3, 4)}
    graph = export_for_tvm(Rolling(), inputs).graph
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default)
    run = benchmark.tvm_default(Rolling(), inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(Rolling()(**inputs))) == 0


def test_indices_along_several_axes_belong_together():
    """As in ConvBERT's windows; with an axis before, behind and between."""

    class Picking(torch.nn.Module):
        def forward(self, pixel_values):
            i, j = torch.tensor([0, 2, 1]), torch.tensor([3, 0, 2])
            return pixel_values[:, i, j], pixel_values[i, j], pixel_values[i, :, j], pixel_values[:, i[:, None], j]

    inputs = {"pixel_values": torch.randn(3, 4, 5)}
    run = benchmark.tvm_default(Picking(), inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(Picking()(**inputs))) == 0


def test_what_is_written_by_indices():
    """A row, a column and what a mask names, with one value or several; means and extremes of the same place."""

    class Writing(torch.nn.Module):
        def forward(self, pixel_values):
            rows, columns, masked = pixel_values.clone(), pixel_values.clone(), pixel_values.clone()
            rows[torch.tensor([2, 0])] = pixel_values[:2] * 2
            columns[:, torch.tensor([1, 3])] = 7.0
            masked[pixel_values > 0] = 9.0
            places = torch.tensor([[0, 2, 0, 2], [1, 1, 1, 1], [0, 1, 2, 3]])
            means = pixel_values.scatter_reduce(1, places, pixel_values * 3, "mean", include_self=False)
            largest = pixel_values.scatter_reduce(1, places, pixel_values * 3, "amax", include_self=True)
            scattered = pixel_values.masked_scatter(pixel_values[:, :1] > 0, pixel_values.flip(0) * 5)
            in_order = pixel_values.clone()
            in_order[torch.tensor([True, False, True])] = pixel_values[1:] * 2
            return rows, columns, masked, means, largest, scattered, in_order

    inputs = {"pixel_values": torch.randn(3, 4)}
    run = benchmark.tvm_default(Writing(), inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(Writing()(**inputs))) < 1e-6


def test_divisions_of_integers_by_a_number():
    class Dividing(torch.nn.Module):
        def forward(self, pixel_values):
            numbers = (pixel_values * 10).long()
            down, towards_zero = numbers // 3, torch.div(numbers, 3, rounding_mode="trunc")
            return pixel_values + down, pixel_values + towards_zero

    inputs = {"pixel_values": torch.randn(4, 5)}
    run = benchmark.tvm_default(Dividing(), inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(Dividing()(**inputs))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_mixture_of_experts(dtype):
    """The library's own products of groups of rows, one of which is empty, as its mixtures of experts use them."""

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, pixel_values):
            experts = torch.tensor([3, 0, 0, 1, 3])
            counts = torch.histc(experts.float(), bins=4, min=0, max=3)
            return moe._grouped_mm(pixel_values, self.weight, torch.cumsum(counts, 0, dtype=torch.int32))

    model = Experts().to(dtype)
    inputs = {"pixel_values": torch.randn(5, 8).to(dtype)}
    with torch.no_grad():
        run = benchmark.tvm_default(model, inputs, make_case(ResNetConfig()))
        expected = output_arrays(model(**inputs))
    assert relative_error(output_arrays(run()), expected) < {torch.float32: 1e-6, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_operators_keep_their_dtype(dtype):
    """A bias behind a convolution and a matrix product, a gate on what BatchNorm gives, other norms, in one dtype."""

    torch.manual_seed(1)  # the tolerance is that of a sum's last bits

    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
            self.gate, self.linear = torch.nn.Conv2d(8, 8, 1), torch.nn.Linear(32, 4)
            self.group_norm, self.layer_norm = torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm(32)

        def forward(self, pixel_values):
            features = self.norm(self.convolution(pixel_values))
            features = self.group_norm(features * self.gate(features).sigmoid())
            middle = torch.zeros(2, 2, 2, 2, dtype=features.dtype)
            features = features.asinh() * torch.nn.functional.grid_sample(features, middle, align_corners=False)
            features = self.layer_norm(features.flatten(1))
            return self.linear(features / features.norm(dim=-1, keepdim=True))

    model = Gated().eval().to(dtype)
    inputs = {"pixel_values": torch.randn(2, 3, 4, 4).to(dtype)}
    with torch.no_grad():
        run = benchmark.tvm_default(model, inputs, make_case(ResNetConfig()))
        (output,) = run()
        assert output.dtype == str(dtype).removeprefix("torch.")
        error = relative_error(output_arrays(output), [model(**inputs).float().numpy()])
    assert error < {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


@torch.no_grad()
def test_statistics_of_batch_norms_need_no_cast(tvm):
    """TVM would compile a program for each, in half precision: they are constants."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4))
    model[1].running_mean.normal_(), model[2].running_var.uniform_(0.5, 2)
    model, inputs = model.eval().half(), {"input": torch.randn(1, 3, 5, 5).half()}
    module, _ = import_to_relax(export_for_tvm(model, inputs))
    lines = module["main"].script(show_meta=False).splitlines()
    assert sum("GenericConst" in line and "batch_norm" in line for line in lines) == 2
    assert not any("GenericConst" in line and "astype" in line for line in lines)


@torch.no_grad()
def test_averages_over_a_grid_compile_for_hopper_in_bf16():
    """As UperNet's, of 3 by 3; TVM's own are of bf16 and of its bits at once."""
    import tvm

    pool = torch.nn.AdaptiveAvgPool2d(3)
    module, _ = import_to_relax(export_for_tvm(pool, {"input": torch.randn(1, 4, 8, 8).bfloat16()}))
    executable = compile_module(module, tvm.target.Target(json.loads(H200)), "default", {"tirx.disable_assert": True})
    (host,) = executable.mod.imports
    assert ["__global__" in kernels.inspect_source("cuda") for kernels in host.imports] == [True]


def test_what_detectors_and_caches_are_made_of():
    """Reading between pixels, products of booleans, the largest so far, empty parts, masks of rows, sizes as output."""

    class Awkward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Linear(4, 4, bias=False)

        def forward(self, pixel_values):
            places = pixel_values[:, 0, :, :2].unsqueeze(1).tanh() * 1.2
            read = torch.nn.functional.grid_sample(pixel_values, places, align_corners=False)
            grown = torch.cat([torch.tensor([]), self.scale(pixel_values)], dim=2)
            row = torch.arange(4.0)
            grown[pixel_values[..., 0] > 0] = row
            downwards = torch.arange(3, -1, -1.0, dtype=torch.long)
            both = (pixel_values > 0) * (pixel_values < 1)
            return (
                read,
                grown + both[:, :, :1],
                pixel_values.cummax(-1).values + pixel_values.cummin(1).values + downwards,
                5,
            )

    torch.manual_seed(0)
    model, inputs = Awkward(), {"pixel_values": torch.randn(2, 3, 5, 4)}
    with torch.no_grad():
        run = benchmark.tvm_default(model, inputs, make_case(ResNetConfig()))
        expected = [output.numpy() for output in model(**inputs)[:3]]
    assert relative_error(output_arrays(run()), expected) < 1e-6


def test_a_convolution_that_is_cut_at_its_ends():
    """As wav2vec 2.0's positions and Mamba's causal convolution: what is cut off is not computed, nor cut from it."""

    class Cut(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.even = torch.nn.Conv1d(8, 16, 4, padding=2, groups=2)
            self.causal = torch.nn.Conv1d(8, 8, 3, padding=4, dilation=2, groups=8)
            self.strided = torch.nn.Conv2d(1, 3, 3, stride=2, padding=3)

        def forward(self, pixel_values):
            images = self.strided(pixel_values[:, None])
            return self.even(pixel_values)[:, :, :-1], self.causal(pixel_values)[..., :9], images[:, :, 1:-1, 1:]

    model, inputs = Cut().requires_grad_(False), {"pixel_values": torch.randn(2, 8, 9)}
    exported = export_for_tvm(model, inputs)
    module, _ = import_to_relax(exported)
    assert "strided_slice" not in module.script()
    run = benchmark.tvm_default(model, inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(model(**inputs))) < 1e-6


def test_a_convolution_that_is_cut_further_or_read_elsewhere_is_left_alone():
    class Kept(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (torch.nn.Conv1d(8, 8, 4, padding=1) for _ in range(3))

        def forward(self, pixel_values):
            of_two, further, channels = (layer(pixel_values) for layer in (self.first, self.second, self.third))
            return of_two[:, :, :-1], of_two.sum(), further[:, :, :-2], channels[:, 1:]

    model, inputs = Kept().requires_grad_(False), {"pixel_values": torch.randn(2, 8, 9)}
    exported = export_for_tvm(model, inputs)
    module, _ = import_to_relax(exported)
    assert module.script().count("strided_slice") == 3
    run = benchmark.tvm_default(model, inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(model(**inputs))) < 1e-6


def test_what_layers_compute_alike_from_constants_is_computed_once():
    """As positions of BEiT's layers: TVM would compile a function for each."""

    class Positions(torch.nn.Module):
        def forward(self, pixel_values):
            for _ in range(3):
                places = torch.arange(4) * 2
                pixel_values = pixel_values[:, places % 4] + (torch.arange(4) * 2 + 1)
            return pixel_values

    model, inputs = Positions(), {"pixel_values": torch.randn(2, 9)}
    exported = export_for_tvm(model, inputs)
    before = sum(node.target == torch.ops.aten.arange.start_step for node in exported.graph.nodes)
    compute_constants_once(exported)
    after = [node.target for node in exported.graph.nodes]
    assert before == 6 and after.count(torch.ops.aten.arange.start_step) == 1
    assert after.count(torch.ops.aten.mul.Tensor) == 1 and after.count(torch.ops.aten.index.Tensor) == 3
    run = benchmark.tvm_default(model, inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(model(**inputs))) < 1e-6
