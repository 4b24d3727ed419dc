"""Models that compute with complex numbers: rotary positions as in Llama 4, Fourier transforms as in FNet."""

import pytest
import torch
from transformers import ResNetConfig

import benchmark
from conftest import make_case
from harness.check import output_arrays, relative_error
from tvm_items.importer import export_for_tvm, import_to_relax

pytestmark = pytest.mark.usefixtures("tvm")


def test_complex_numbers_become_real_ones():
    class Complex(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.turns = torch.polar(torch.ones(3, 2), torch.randn(3, 2))

        def forward(self, pixel_values):
            turned = torch.view_as_complex(pixel_values.reshape(2, 3, 2, 2)) * self.turns * 0.5
            turned = torch.cat(
                [turned, turned.conj() * torch.polar(pixel_values[..., :2].abs(), pixel_values[..., 2:])]
            )
            spectrum = torch.fft.fftn(pixel_values, dim=(1, 2)).real
            half = torch.fft.rfft(pixel_values, norm="ortho") + 1
            shorter = torch.fft.irfft(half, 3, dim=1)
            return torch.view_as_real(turned), spectrum, half.abs(), shorter, torch.fft.irfft(half, 4)

    torch.manual_seed(0)
    model, inputs = Complex(), {"pixel_values": torch.randn(2, 3, 4)}
    run = benchmark.tvm_default(model, inputs, make_case(ResNetConfig()))
    assert relative_error(output_arrays(run()), output_arrays(model(**inputs))) < 1e-6


def test_an_unknown_operator_on_complex_numbers_is_refused():
    class Unknown(torch.nn.Module):
        def forward(self, pixel_values):
            return torch.fft.fft(pixel_values).sqrt().real

    exported = export_for_tvm(Unknown(), {"pixel_values": torch.randn(2, 4)})
    with pytest.raises(NotImplementedError, match=r"complex numbers in aten\.sqrt"):
        import_to_relax(exported)
