"""Models whose sizes depend on values: on those that never change, as grids of patches, and on others."""

import pytest
import torch
from transformers import ResNetConfig, masking_utils

import benchmark
from conftest import make_case
from harness.check import output_arrays, relative_error
from tvm_items.importer import export_for_tvm

pytestmark = pytest.mark.usefixtures("tvm")


class Patches(torch.nn.Module):
    """Reads each image's patches by themselves, as vision towers do that take images of any shape."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        self.stride = torch.nn.Buffer(torch.tensor(2))

    def forward(self, pixel_values, grid_thw):
        parts = pixel_values.split(grid_thw.prod(-1).tolist())
        rows = torch.repeat_interleave(grid_thw[:, 1], grid_thw[:, 0])
        mask = torch.ones(pixel_values.shape[0], dtype=torch.bool)
        places = torch.zeros(pixel_values.shape[0], dtype=torch.long)
        places[mask] = torch.arange(pixel_values.shape[0])[mask]
        means = torch.stack([part.mean(0) for part in parts])
        padded = torch.nn.functional.pad(pixel_values, (0, int(self.stride)))
        counts = torch.tensor([part.shape[0] + grid_thw[0, 1] for part in parts])
        return means * rows[:, None], pixel_values.cumsum(0)[places[mask]], padded * counts[0]


def test_sizes_that_depend_on_a_grid():
    inputs = {"pixel_values": torch.randn(10, 3), "grid_thw": torch.tensor([[1, 2, 2], [1, 2, 3]])}
    run = benchmark.tvm_default(Patches(), inputs, make_case(ResNetConfig()))
    for _ in range(2):
        expected = [output.numpy() for output in Patches()(**inputs)]
        assert relative_error(output_arrays(run()), expected) < 1e-6
        inputs["pixel_values"].normal_()


def test_known_values_in_bf16():
    """As in TAPAS: NumPy, which hands them to TVM, has no such dtype."""

    class Known(torch.nn.Module):
        def forward(self, pixel_values):
            mask = torch.ones(2, dtype=torch.bool)
            return pixel_values[mask] * torch.full((2, 3), 0.5, dtype=pixel_values.dtype)[mask]

    inputs = {"pixel_values": torch.randn(2, 3).bfloat16()}
    run = benchmark.tvm_default(Known(), inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(Known()(**inputs))) == 0


def test_a_mask_of_ones_is_left_out_where_a_trace_cannot_use_it():
    class Masked(torch.nn.Module):
        def forward(self, pixel_values, attention_mask):
            if masking_utils.is_tracing(attention_mask) or not attention_mask.all():
                raise ValueError("a mask of another shape")
            return pixel_values * 2

    inputs = {"pixel_values": torch.randn(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    run = benchmark.tvm_default(Masked(), inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), [2 * inputs["pixel_values"].numpy()]) < 1e-6
    inputs["attention_mask"][0, 1] = 0
    with pytest.raises(ValueError, match="a mask of another shape"):
        export_for_tvm(Masked(), inputs)


def test_rows_between_places_that_the_inputs_name():
    """As in Aria's experts. draft_export() would write to the rows that the sample names, without an error."""

    class Writing(torch.nn.Module):
        def forward(self, pixel_values, ends):
            written = pixel_values.clone()
            written[ends[0] : ends[1]] = pixel_values[ends[0] : ends[1]] * 3
            written[ends[1] :] = 0.5
            return written

    inputs = {"pixel_values": torch.randn(9, 3), "ends": torch.tensor([2, 5])}
    run = benchmark.tvm_default(Writing(), inputs, make_case(ResNetConfig()))
    for ends in ([2, 5], [0, 9], [6, 4], [-3, -1]):
        inputs["ends"].copy_(torch.tensor(ends))
        assert relative_error(output_arrays(run()), output_arrays(Writing()(**inputs))) < 1e-6


def test_sizes_that_depend_on_other_values_are_refused():
    class Cutting(torch.nn.Module):
        def forward(self, pixel_values, ends):
            return pixel_values[ends[0] : ends[1]] * 2

    with pytest.raises(NotImplementedError, match="as many outputs as a mask has places"):
        export_for_tvm(Cutting(), {"pixel_values": torch.randn(9, 3), "ends": torch.tensor([2, 5])})
