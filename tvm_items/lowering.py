"""Lowering scheduled kernels: those that are written in s_tir and those in TIRx, in one build.

TVM 0.27 has a pipeline for each of the two and takes one for all functions. MetaSchedule's and dlight's schedules are
s_tir, whose pipeline puts barriers and copies where it finds that they are needed. Templates are TIRx and say
themselves where they are.
"""

import contextlib
import unittest.mock

PIPELINE = "s_tir_or_tirx"


@contextlib.contextmanager
def rules_that_decline():
    """Makes TVM's default schedules go on with the next rule while it lasts, where one raises an error.

    A rule says by None that it has no schedule for a kernel. In TVM 0.27 that of matrix-vector products stops at an
    assertion instead (upstream: apache/tvm#20047), and that of reductions at a layer norm that is padded.
    """
    from tvm.s_tir.dlight.base import transform

    def apply_rules(function, target, rules, tunable):
        for rule in rules:
            with contextlib.suppress(Exception):
                space = rule.apply(function, target, tunable)
                if space is not None:
                    return space if isinstance(space, list) else [space]
        return None

    with unittest.mock.patch.object(transform, "_apply_rules", apply_rules):
        yield


def tir_pipeline():
    """Returns the name, for tvm.tirx.build and tvm.compile, of a pipeline that lowers each function by its own one."""
    from tvm.s_tir.pipeline import default_s_tir_pipeline
    from tvm.tirx.compilation_pipeline import PIPELINE_MAP, register_tir_pipeline, tirx_pipeline

    if PIPELINE not in PIPELINE_MAP:
        register_tir_pipeline(PIPELINE, lambda: combine(default_s_tir_pipeline(), tirx_pipeline()))
    return PIPELINE


def combine(s_tir, tirx):
    """Returns the pipeline that lowers functions by the one or the other of two: (pass, passes of host, of device)."""
    import tvm

    (lower_s_tir, *finalize), (lower_tirx, *_) = s_tir, tirx

    @tvm.transform.module_pass(opt_level=0, name="LowerEachKind")
    def lower(module, _):
        kinds = {True: {}, False: {}}
        for name, function in module.functions.items():
            kinds[is_s_tir(function)][name] = function
        lowered = {}
        for kind, lower_kind in ((True, lower_s_tir), (False, lower_tirx)):
            if kinds[kind]:
                lowered |= dict(lower_kind(tvm.IRModule(kinds[kind], attrs=module.attrs)).functions.items())
        return tvm.IRModule(lowered, attrs=module.attrs)

    return lower, *finalize


def is_s_tir(function):
    return bool(function.attrs and function.attrs.get("s_tir", False))
