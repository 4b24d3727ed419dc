"""What is timed of TVM's: buffers that are shared, not copied."""

import pytest
import torch
from transformers import ResNetConfig

import benchmark
from conftest import TINY_RESNET, make_case
from harness.check import output_arrays, relative_error
from harness.inputs import make_inputs
from harness.weights import load_model

pytestmark = pytest.mark.usefixtures("tvm")


def test_weights_and_inputs_are_bound_once_and_inputs_are_shared():
    """A change of the input tensor in place is seen by the next call: nothing was copied, nothing is passed again."""
    config = ResNetConfig(**{k: v for k, v in TINY_RESNET.items() if k != "model_type"})
    case = make_case(config)
    model, inputs = load_model(case), make_inputs(case)
    run = benchmark.tvm_default(model, inputs, case)
    for _ in range(2):
        expected = output_arrays(model(**inputs))
        assert relative_error(output_arrays(run()), expected) < 1e-5
        inputs["pixel_values"].mul_(-0.5).add_(0.1)


def test_a_kept_model_gives_the_same_without_being_compiled(tmp_path):
    """As a deployment would: compiled once, loaded in another process; here with other inputs, so nothing is a copy."""
    from tvm_items.executable import load_saved

    case = make_case(ResNetConfig(**{k: v for k, v in TINY_RESNET.items() if k != "model_type"}))
    model, inputs = load_model(case), make_inputs(case)
    run = benchmark.tvm_default(model, inputs, case)
    run.save(tmp_path)
    inputs = {name: torch.randn_like(tensor) for name, tensor in inputs.items()}
    loaded = load_saved(inputs, case, tmp_path)
    assert relative_error(output_arrays(loaded()), output_arrays(model(**inputs))) < 1e-5


def test_tvm_has_as_many_threads_as_pytorch():
    import tvm

    assert tvm.runtime.num_threads() == torch.get_num_threads()
