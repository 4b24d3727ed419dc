"""What is particular to TVM: CUDA code generation without a GPU, and buffers that are shared, not copied."""

import json
import re

import pytest
import torch
from conftest import H200, TINY_RESNET
from test_model import make_case

import benchmark
import tuning


@pytest.fixture(scope="module")
def tvm():
    benchmark.import_tvm("fp16")
    import tvm

    return tvm


@pytest.mark.parametrize("precision, c_type", [("fp32", "float"), ("fp16", "half"), ("bf16", "nv_bfloat16")])
def test_cuda_kernels_for_hopper_without_a_gpu(tvm, precision, c_type):
    """The item's own path up to the cubin: export, import, TVM's default pipeline for sm_90, NVRTC, link."""
    config = benchmark.CONFIG_MAPPING["resnet"](**{k: v for k, v in TINY_RESNET.items() if k != "model_type"})
    dtype = benchmark.PRECISIONS[precision][0]
    model, inputs = benchmark.load_on_device(make_case(config), dtype)
    module, _ = benchmark.import_to_relax(benchmark.export_for_tvm(model, inputs))
    target = tvm.target.Target(json.loads(H200))
    with tvm.transform.PassContext(opt_level=3, config={"relax.backend.use_cuda_graph": True}):
        executable = tvm.compile(module, target)
    assert "cuda_graph" in executable.as_text()
    source = executable.mod.imports[0].imports[0].inspect_source("cuda")
    kernels = set(re.findall(r"(\w+_kernel)\(", source))
    others = {"half*", "nv_bfloat16*"} - {f"{c_type}*"}
    assert len(kernels) > 5 and f"{c_type}* __restrict__" in source
    assert not any(f" {other} __restrict__" in source for other in others)
    with target:
        cubins = [bytes(compiled(source)) for compiled in (benchmark.compile_kernels, benchmark.compile_candidate)]
    for cubin in cubins:
        assert cubin.startswith(b"\x7fELF")
        assert all(kernel.encode() in cubin for kernel in kernels)
    header = "cuda/std/type_traits"
    assert header in source and header not in benchmark.without_type_traits(source)
    using = source + "static_assert(std::is_signed<int>::value);"
    assert benchmark.without_type_traits(using) == using


def test_kernels_compute_as_fp32_does(tvm):
    """Not with the approximations of --use_fast_math, by which a negative number's square is NaN."""
    from tvm.support import nvcc

    kernel = 'extern "C" __global__ void kernel(float* x) { *x = powf(*x, 2.0f) + tanhf(*x) / *x + sqrtf(*x); }'
    ptx = bytes(nvcc.compile_cuda(kernel, target_format="ptx", arch="sm_90")).decode()
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx
    assert not re.search(r"(tanh|lg2|div|sqrt)\.approx", ptx)


def test_infinity_in_bf16_compiles(tvm):
    """It is what a clamp with one end has at the other end."""
    from tvm import te

    target = tvm.target.Target(json.loads(H200))
    x = te.placeholder((64,), name="x", dtype="bfloat16")
    clamped = te.compute((64,), lambda i: te.min(x[i], tvm.tirx.const(float("inf"), "bfloat16")), name="clamped")
    module = tuning.default_schedule(tvm.IRModule({"main": te.create_prim_func([x, clamped])}), target)
    source = tvm.build(module, target=target).imports[0].inspect_source("cuda")
    assert "inff" in source
    with target:
        assert bytes(benchmark.compile_candidate(source)).startswith(b"\x7fELF")


def test_what_does_not_compile_is_named_first(tvm):
    """Before the warnings of NVIDIA's headers, of which the one line of a row has room for the first only."""
    from tvm.support import nvcc

    kernel = '#include <cuda_fp16.h>\n#include <cuda_fp8.h>\nextern "C" __global__ void kernel(float* x) { *x = y; }'
    with pytest.raises(RuntimeError, match=r'failed:\s+\S+: error: identifier "y" is undefined'):
        nvcc.compile_cuda(kernel, target_format="cubin", arch="sm_90")


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


def test_what_is_rewritten_before_the_import(tvm):
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
    run = benchmark.tvm_default(Awkward(), inputs, make_case(benchmark.CONFIG_MAPPING["resnet"]()))
    for overflow in (False, True):
        if overflow:
            inputs["pixel_values"][0, 1] = torch.inf
        assert benchmark.relative_error(benchmark.output_arrays(run()), [Awkward()(**inputs).numpy()]) < 1e-6


def test_an_if_on_values_is_exported(tvm):
    """As in BART, which clamps what overflows in fp16."""

    class Clamped(torch.nn.Module):
        def forward(self, pixel_values):
            if not torch.isfinite(pixel_values).all():
                pixel_values = pixel_values.clamp(-9, 9)
            return pixel_values * 2

    inputs = {"pixel_values": torch.randn(2, 3)}
    run = benchmark.tvm_default(Clamped(), inputs, make_case(benchmark.CONFIG_MAPPING["resnet"]()))
    assert benchmark.relative_error(benchmark.output_arrays(run()), [2 * inputs["pixel_values"].numpy()]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_operators_keep_their_dtype(tvm, dtype):
    """A bias behind a convolution and a matrix product, a gate on what BatchNorm gives, other norms, in one dtype."""

    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
            self.gate, self.linear = torch.nn.Conv2d(8, 8, 1), torch.nn.Linear(32, 4)
            self.group_norm, self.layer_norm = torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm(32)

        def forward(self, pixel_values):
            features = self.norm(self.convolution(pixel_values))
            features = self.group_norm(features * self.gate(features).sigmoid())
            features = self.layer_norm(features.flatten(1))
            return self.linear(features / features.norm(dim=-1, keepdim=True))

    model = Gated().eval().to(dtype)
    inputs = {"pixel_values": torch.randn(2, 3, 4, 4).to(dtype)}
    with torch.no_grad():
        run = benchmark.tvm_default(model, inputs, make_case(benchmark.CONFIG_MAPPING["resnet"]()))
        (output,) = run()
        assert output.dtype == str(dtype).removeprefix("torch.")
        error = benchmark.relative_error(benchmark.output_arrays(output), [model(**inputs).float().numpy()])
    assert error < {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
