"""Kernels of every kind in one Relax module: TVM's default schedule, WMMA by MetaSchedule, and templates."""

import itertools
import json
import re

import pytest

from conftest import H200
from tvm_items.executable import compile_module, passes_after_scheduling
from tvm_items.kernels import compile_kernels
from tvm_items.lowering import on_every_core
from tvm_items.measure import build_options
from tvm_items.spaces import DesignSpaces
from tvm_items.tasks import default_schedule
from tvm_items.templates.find import find_templates


def test_kernels_of_every_kind_compile_together(tvm):
    from tvm import relax, te, topi

    target = tvm.target.Target(json.loads(H200))
    x, w = (te.placeholder(shape, name=name, dtype="float16") for name, shape in (("x", (256, 256)), ("w", (256, 512))))
    product = topi.cast(topi.nn.matmul(x, w, out_dtype="float32"), "float16")
    module = tvm.IRModule({"main": te.create_prim_func([x, w, product])})
    templates = find_templates(module, target)
    relu = tvm.IRModule({"main": te.create_prim_func([x, topi.nn.relu(x)])})
    scheduled = {
        "wmma": wmma_schedule(tvm, module),
        **{type(template).__name__: realize_any(template)["main"] for template in templates},
    }
    builder = relax.BlockBuilder()
    x, w = (relax.Var(tensor.name, relax.TensorType(list(tensor.shape), "float16")) for tensor in (x, w))
    with builder.function("main", [x, w]):
        with builder.dataflow():
            positive = call(builder, "plain", default_schedule(relu, target)["main"], [x], x.ty)
            of_product = relax.TensorType([256, 512], "float16")
            results = [call(builder, name, function, [positive, w], of_product) for name, function in scheduled.items()]
            results = [builder.emit_output(result) for result in results]
        builder.emit_func_output(relax.Tuple(results))
    options = {"relax.backend.use_cuda_graph": True, **build_options(target)}
    executable = compile_module(builder.get(), target, passes_after_scheduling(target), options)
    source = executable.mod.imports[0].imports[0].inspect_source("cuda")
    kernels = set(re.findall(r'extern "C" __global__ .*? (\w+_kernel\w*)\(', source))
    assert {name.removesuffix("_kernel") for name in kernels} >= {"plain", *scheduled}
    assert "wmma::mma_sync" in source and "mma.sync.aligned.m16n8k16" in source
    with target:
        cubin = bytes(compile_kernels(source))
    assert cubin.startswith(b"\x7fELF") and all(kernel.encode() in cubin for kernel in kernels)


def test_functions_are_lowered_on_every_core_as_in_one_go(tvm):
    from tvm import te, topi
    from tvm.s_tir.pipeline import default_s_tir_pipeline

    target, (lower, *_) = tvm.target.Target(json.loads(H200)), default_s_tir_pipeline()
    functions = {}
    for name, size in (("small", 32), ("large", 4096)):
        x = te.placeholder((size,), name="x", dtype="float16")
        relu = tvm.IRModule({"main": te.create_prim_func([x, topi.nn.relu(x)])})
        functions[name] = default_schedule(relu, target)["main"].with_attr("global_symbol", name)
    module = tvm.tirx.transform.BindTarget(target.with_host("llvm"))(tvm.IRModule(functions))
    seen = []

    def lower_one(part):
        seen.append((len(part.functions), dict(tvm.transform.PassContext.current().config)))
        return lower(part)

    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        lowered = on_every_core(lower_one, module)
        at_once = lower(module)
    written = [{name.name_hint: str(each[name]) for name in each.functions} for each in (lowered, at_once)]
    assert written[0] == written[1] and len(written[0]) == 4  # of each, what the host runs and the kernel
    assert seen == 2 * [(1, {"tirx.disable_assert": True})]
    with pytest.raises(ZeroDivisionError):
        on_every_core(lambda part: 1 / 0, module)


def test_a_default_schedule_that_raises_an_error_declines(tvm):
    """A convolution of one channel, which the rule for matrix-vector products takes for its own."""
    from tvm import te, topi

    image, kernel = (te.placeholder(shape, name=name) for name, shape in (("x", (1, 1, 6, 8)), ("w", (1, 1, 1, 3))))
    module = tvm.IRModule({"main": te.create_prim_func([image, kernel, topi.nn.conv2d(image, kernel, 1, 0, 1)])})
    target = tvm.target.Target(json.loads(H200))
    assert "threadIdx.x" in default_schedule(module, target).script()


@pytest.mark.parametrize("which", ["padded", "in groups"])
def test_a_default_schedule_that_is_of_no_use_declines(tvm, which):
    """As in D-FINE, whose image is padded behind its second convolution, and in Zaya's attention."""
    from tvm import te, topi

    def convolution(function, image, kernel, *options):
        tensors = [te.placeholder(shape, "float16", name) for name, shape in (("x", image), ("w", kernel))]
        return *tensors, topi.cast(function(*tensors, *options, "float32"), "float16")

    if which == "padded":  # one block's sums are larger than its shared memory
        *operands, result = convolution(topi.nn.conv2d, (1, 64, 56, 56), (64, 64, 3, 3), 1, 1, 1, "NCHW", "OIHW")
        result = topi.nn.pad(topi.nn.relu(result), [0, 0, 0, 0], [0, 0, 1, 1])
    else:  # its reduction across threads cannot be lowered
        *operands, result = convolution(topi.nn.group_conv1d_ncw, (1, 160, 33), (160, 16, 2), 1, 0, 1, 10)
    function = te.create_prim_func([*operands, result]).with_attr("global_symbol", "main")
    target = tvm.target.Target(json.loads(H200))
    with target:
        built = tvm.tirx.build(default_schedule(tvm.IRModule({"main": function}), target), target=target)
        assert bytes(compile_kernels(built.imports[0].inspect_source("cuda"))).startswith(b"\x7fELF")


def call(builder, name, function, arguments, type_of_result):
    """Emits a call of a PrimFunc in a Relax function and returns its result."""
    from tvm import relax

    called = builder.add_func(function.with_attr("global_symbol", name), name)
    return builder.emit(relax.call_tir(called, arguments, type_of_result))


def wmma_schedule(tvm, module):
    """Returns the product's function as MetaSchedule's first design space for tensor cores schedules it."""
    spaces = DesignSpaces(tvm.ir.save_json(module), H200)
    # 2 x 2 warps of 2 x 2 tiles, as in test_tensor_cores.py.
    tiles = [[4, 1, 2, 2, 1], [8, 1, 2, 2, 1], [spaces[0].choices[2].extent // 4, 2, 2]]
    return spaces.realize(0, [*tiles, 0, 2, 2] + [0] * (len(spaces[0].choices) - 6))[0]["main"]


def realize_any(template):
    """Returns the module of the first decisions that fit."""
    all_decisions = map(list, itertools.product(*map(range, template.choices)))
    return template.realize(next(filter(template.fits, all_decisions)))
