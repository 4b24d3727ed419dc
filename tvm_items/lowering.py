"""Lowering scheduled kernels: those that are written in s_tir and those in TIRx, in one build.

TVM 0.27 has a pipeline for each of the two and takes one for all functions. MetaSchedule's and dlight's schedules are
s_tir, whose pipeline puts barriers and copies where it finds that they are needed. Templates are TIRx and say
themselves where they are.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import os
import unittest.mock

from tvm_items.target import MAX_BLOCK_SHARED_BYTES

PIPELINE = "s_tir_or_tirx"


@contextlib.contextmanager
def rules_that_decline():
    """Makes TVM's default schedules go on with the next rule while it lasts, where one's schedule is not usable.

    A rule says by None that it has no schedule for a kernel. In TVM 0.27 that of matrix-vector products stops at an
    assertion instead (upstream: apache/tvm#20047), that of reductions at a layer norm that is padded. Others return
    what is of no use: for a convolution in groups a reduction that cannot be lowered, for one that is padded all sums
    in the shared memory of a block, more than there is.
    """
    from tvm.s_tir.dlight.base import transform

    def apply_rules(function, target, rules, tunable):
        for rule in rules:
            with contextlib.suppress(Exception):
                space = rule.apply(function, target, tunable)
                schedules = space if isinstance(space, list) else [space]
                if space is not None and all(shared_bytes(each) <= MAX_BLOCK_SHARED_BYTES for each in schedules):
                    return schedules
        return None

    with unittest.mock.patch.object(transform, "_apply_rules", apply_rules):
        yield


def shared_bytes(schedule):
    """Returns the bytes of static shared memory that the kernel of a tvm.s_tir.Schedule declares.

    Raises TVM's error where the schedule cannot be lowered.
    """
    import tvm
    from tvm.s_tir import transform
    from tvm.s_tir.analysis import calculate_allocated_bytes

    # A schedule says how large all of a buffer is; these find out how much of it a block of threads has at a time.
    passes = """
    LowerCrossThreadReduction LowerInitBlock PlanAndUpdateBufferAllocationLocation ConvertBlocksToOpaque
    CompactBufferAllocation LowerOpaqueBlock
    """
    lower = tvm.transform.Sequential([getattr(transform, each)() for each in passes.split()])
    return sum(sizes.get("shared", 0) for sizes in calculate_allocated_bytes(lower(schedule.mod)["main"]).values())


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

    (lower_s_tir, finalize_host, finalize_device), (lower_tirx, *_) = s_tir, tirx

    def lower(module):
        (function,) = module.functions.values()
        return (lower_s_tir if is_s_tir(function) else lower_tirx)(module)

    @tvm.transform.module_pass(opt_level=0, name="LowerEach")
    def lower_each(module, _):
        return on_every_core(lower, module)

    return lower_each, finalize_host, lambda: functools.partial(on_every_core, finalize_device())


def on_every_core(transform, module):
    """Returns the module of what transform(), from an IRModule to one, makes of each function of a module.

    TVM's passes take one function after the other, on one core: most of the time that templates' kernels take to
    compile. Functions do not call one another here, and passes let go of Python's lock: threads do the same at once.
    """
    import tvm

    if len(module.functions) == 1:
        return transform(module)
    context, target = tvm.transform.PassContext.current(), tvm.target.Target.current(allow_none=True)

    def transform_one(item):
        name, function = item
        with context, target or contextlib.nullcontext():  # each thread has its own
            transformed = transform(tvm.IRModule({name: function}, attrs=module.attrs))
        # The only function of a module is marked as where a program starts.
        return [(name, each.without_attr("tirx.is_entry_func")) for name, each in transformed.functions.items()]

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        transformed = list(pool.map(transform_one, module.functions.items()))
    return tvm.IRModule(dict(itertools.chain(*transformed)), attrs=module.attrs)


def is_s_tir(function):
    return bool(function.attrs and function.attrs.get("s_tir", False))
