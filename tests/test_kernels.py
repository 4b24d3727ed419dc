"""CUDA code generation without a GPU: from a module, or from CUDA C++, to machine code for Hopper."""

import json
import re

import pytest
from transformers import ResNetConfig

from conftest import H200, TINY_RESNET, make_case
from harness.case import PRECISIONS
from harness.weights import load_on_device
from tvm_items.importer import export_for_tvm, import_to_relax
from tvm_items.kernels import compile_candidate, compile_kernels, find_arch, without_type_traits
from tvm_items.tasks import default_schedule


@pytest.mark.parametrize(
    "precision, c_type",
    [
        pytest.param("fp32", "float", marks=pytest.mark.slow),
        ("fp16", "half"),
        pytest.param("bf16", "nv_bfloat16", marks=pytest.mark.slow),
    ],
)
def test_cuda_kernels_for_hopper_without_a_gpu(tvm, precision, c_type):
    """The item's own path up to the cubin: export, import, TVM's default pipeline for sm_90, NVRTC, link."""
    config = ResNetConfig(**{k: v for k, v in TINY_RESNET.items() if k != "model_type"})
    dtype = PRECISIONS[precision].dtype
    model, inputs = load_on_device(make_case(config), dtype)
    module, _ = import_to_relax(export_for_tvm(model, inputs))
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
        cubins = [bytes(compiled(source)) for compiled in (compile_kernels, compile_candidate)]
    for cubin in cubins:
        assert cubin.startswith(b"\x7fELF")
        assert all(kernel.encode() in cubin for kernel in kernels)
    header = "cuda/std/type_traits"
    assert header in source and header not in without_type_traits(source)
    using = source + "static_assert(std::is_signed<int>::value);"
    assert without_type_traits(using) == using


@pytest.mark.parametrize("version", ["9.0", "9.0.a"])
def test_the_architecture_is_one_that_nvrtc_knows(tvm, monkeypatch, version):
    """TVM's name for it has a letter or not; what wgmma is in needs it."""
    from tvm.support import nvcc

    monkeypatch.setattr(nvcc, "get_target_compute_version", lambda target: version)
    assert find_arch("mma.sync.aligned.m16n8k16") == "sm_90"
    assert find_arch("wgmma.mma_async.sync.aligned.m64n64k16") == "sm_90a"


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
    module = default_schedule(tvm.IRModule({"main": te.create_prim_func([x, clamped])}), target)
    source = tvm.build(module, target=target).imports[0].inspect_source("cuda")
    assert "inff" in source
    with target:
        assert bytes(compile_candidate(source)).startswith(b"\x7fELF")


def test_what_does_not_compile_is_named_first(tvm):
    """Before the warnings of NVIDIA's headers, of which the one line of a row has room for the first only."""
    from tvm.support import nvcc

    kernel = '#include <cuda_fp16.h>\n#include <cuda_fp8.h>\nextern "C" __global__ void kernel(float* x) { *x = y; }'
    with pytest.raises(RuntimeError, match=r'failed:\s+\S+: error: identifier "y" is undefined'):
        nvcc.compile_cuda(kernel, target_format="cubin", arch="sm_90")


def test_an_error_of_the_linker_says_what_is_wrong(tvm):
    """As of wav2vec 2.0's positions before shorten_convolutions(), for which the library's own error has a number."""
    kernel = 'extern "C" __global__ void %s(float* x) { __shared__ float s[%d]; s[threadIdx.x] = *x; *x = s[0]; }\n'
    with tvm.target.Target(json.loads(H200)), pytest.raises(RuntimeError, match="'large' uses too much shared data"):
        compile_kernels(kernel % ("small", 8) + kernel % ("large", 2**14))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_chosen_behind_a_product(tvm, dtype):
    """As in Aria's experts: TVM gives the condition of a vectorised `where` the type of its result."""
    from tvm import te, tirx, topi

    shapes = {"x": (64, 64), "w": (64, 64), "y": (64, 64)}
    x, w, y = (te.placeholder(shape, dtype, name) for name, shape in shapes.items())
    mask, sums = te.placeholder((64,), "int32", "mask"), topi.nn.matmul(x, w, out_dtype="float32")
    chosen = te.compute((64, 64), lambda i, j: tirx.Select(mask[i] > 0, sums[i, j].astype(dtype), y[i, j]))
    function = te.create_prim_func([x, w, y, mask, chosen]).with_attr("global_symbol", "main")
    target = tvm.target.Target(json.loads(H200))
    with target:
        module = tvm.tirx.build(default_schedule(tvm.IRModule({"main": function}), target), target=target)
        source = module.imports[0].inspect_source("cuda")
        assert "2 v_" in source and "make_ushort2((0 < " in source
        assert bytes(compile_candidate(source)).startswith(b"\x7fELF")
