"""Measures what programmatic dependent launch would bring: tuned models with and without it, on Hopper or later.

    python tests/dependent_launch.py fp16 google-bert/bert-base-uncased:1 microsoft/resnet-50:16

By it a kernel's blocks start while the last ones of the kernel before still run, and wait there for its end (CUDA C++
Programming Guide, "Programmatic Dependent Launch and Synchronization"). With "early", a kernel lets the next one's
blocks start as soon as all its own have. The schedules are the library's; the outputs must have the same bits.
"""

import functools
import sys

import torch

import benchmark
import timers
from conftest import make_case
from harness.architectures import builtin_config
from harness.case import arithmetic
from harness.check import output_arrays
from harness.weights import load_on_device
from tvm_items import lowering

LAUNCH_PARAMS, DEPENDENT = "tirx.kernel_launch_params", "tirx.use_programtic_dependent_launch"  # TVM spells it so
RUNS_BEFORE_COMPARING = 100


def pipeline(actions):
    """Returns the product's pipeline; where there are actions, kernels begin with them and are launched as dependents.

    actions: of PTX's griddepcontrol.
    """
    import tvm
    from tvm.s_tir.pipeline import default_s_tir_pipeline
    from tvm.script import tirx as T
    from tvm.tirx.compilation_pipeline import tirx_pipeline

    lower, *finalize = lowering.combine(default_s_tir_pipeline(), tirx_pipeline())

    @tvm.transform.module_pass(opt_level=0, name="LaunchAsDependents")
    def launch_as_dependents(module, _):
        module = lower(module)
        for name, function in module.functions_items():
            if actions and function.attrs and LAUNCH_PARAMS in function.attrs:
                begin = [tvm.tirx.Evaluate(getattr(T.ptx.griddepcontrol, action)()) for action in actions]
                # Without __restrict__: for that the compiler reads inputs through a cache that is not kept coherent
                # with the kernel before, which still writes when this one begins.
                function = function.without_attr("tirx.noalias")
                function = function.with_body(tvm.tirx.SeqStmt([*begin, function.body]))
                module[name] = function.with_attr(LAUNCH_PARAMS, [DEPENDENT, *function.attrs[LAUNCH_PARAMS]])
        return module

    return launch_as_dependents, *finalize


@torch.no_grad()
def measure(name, batch_size, precision):
    """Returns {variant: (median ms, first outputs as arrays)} of a built-in model."""
    from tvm.tirx.compilation_pipeline import PIPELINE_MAP

    where = {"device": timers.CUDA, "device_name": torch.cuda.get_device_name(0)}
    case = make_case(builtin_config(name), model_name=name, batch_size=batch_size, precision=precision, **where)
    found = {}
    with arithmetic(precision) as dtype:
        model, inputs = load_on_device(case, dtype)
        variants = {"as it is": (), "dependent": ("wait",), "early": ("launch_dependents", "wait")}
        for variant, actions in variants.items():
            PIPELINE_MAP[lowering.PIPELINE] = functools.partial(pipeline, actions)
            run = benchmark.TEST_ITEMS["tvm_tune"].build(model, inputs, case)
            for _ in range(RUNS_BEFORE_COMPARING):
                outputs = run()
            torch.cuda.synchronize()
            found[variant] = timers.median_ms(run), output_arrays(outputs)
    return found


def main(precision, *cases):
    benchmark.import_compiler("tvm_tune", [precision])
    for case in cases:
        name, _, batch_size = case.partition(":")
        found = measure(name, int(batch_size), precision)
        _, expected = found["as it is"]
        for variant, (median_ms, outputs) in found.items():
            same = all((one == other).all() for one, other in zip(outputs, expected, strict=True))
            print(
                f"{name}, batch {batch_size}, {precision}, {variant}: {median_ms:.4f} ms, same bits: {same}", flush=True
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
