"""What is particular to TVM: CUDA code generation without a GPU, and buffers that are shared, not copied."""

import re

import pytest
import torch
from conftest import TINY_RESNET
from test_model import make_case

import benchmark


@pytest.fixture(scope="module")
def tvm():
    benchmark.import_tvm("fp32")
    import tvm

    return tvm


def test_cuda_kernels_for_hopper_without_a_gpu(tvm):
    """The item's own path up to the cubin: export, import, TVM's default pipeline for sm_90, NVRTC, link."""
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    config = benchmark.CONFIG_MAPPING["resnet"](**{k: v for k, v in TINY_RESNET.items() if k != "model_type"})
    case = make_case(config)
    exported = torch.export.export(benchmark.load_model(case), (), benchmark.make_inputs(case))
    module, _ = relax.frontend.detach_params(from_exported_program(exported, keep_params_as_input=True))
    target = tvm.target.Target(
        {
            "kind": "cuda",
            "arch": "sm_90",
            "max_num_threads": 1024,
            "max_shared_memory_per_block": 49152,
            "thread_warp_size": 32,
        }
    )
    with tvm.transform.PassContext(opt_level=3, config={"relax.backend.use_cuda_graph": True}):
        executable = tvm.compile(module, target)
    assert "cuda_graph" in executable.as_text()
    source = executable.mod.imports[0].imports[0].inspect_source("cuda")
    kernels = set(re.findall(r"(\w+_kernel)\(", source))
    assert len(kernels) > 5
    with target:
        cubin = bytes(benchmark.compile_kernels(source))
    assert cubin.startswith(b"\x7fELF")
    assert all(kernel.encode() in cubin for kernel in kernels)


def test_weights_and_inputs_are_bound_once_and_inputs_are_shared(tvm):
    """A change of the input tensor in place is seen by the next call: nothing was copied, nothing is passed again."""
    config = benchmark.CONFIG_MAPPING["resnet"](**{k: v for k, v in TINY_RESNET.items() if k != "model_type"})
    case = make_case(config)
    model, inputs = benchmark.load_model(case), benchmark.make_inputs(case)
    run = benchmark.tvm_default(model, inputs, case)
    for _ in range(2):
        expected = benchmark.output_arrays(model(**inputs))
        assert benchmark.relative_error(benchmark.output_arrays(run()), expected) < 1e-5
        inputs["pixel_values"].mul_(-0.5).add_(0.1)
