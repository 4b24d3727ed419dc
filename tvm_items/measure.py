"""Building one candidate of a task, and measuring it: a candidate counts only if its outputs are right."""

import functools
import math
import statistics
import typing

import torch

from harness.errors import one_line
from tvm_items.spaces import cached_design_spaces
from tvm_items.target import load_target
from tvm_items.tasks import default_schedule

REPEATS, MIN_REPEAT_S = 3, 3e-3  # a measurement is the median of so many repeats, each at least so long
MAX_SLOWDOWN_TO_REPEAT = 4  # a candidate that is so many times slower than the best of its task is measured once


class WrongOutput(Exception):
    """A candidate computes something else than TVM's default schedule does."""


class Measurement(typing.NamedTuple):
    """What measuring gave: a time, or one line that says which output is wrong."""

    seconds: float | None
    error: str | None = None


def build_options(target):
    """Returns TVM's options for building a tuned task, alone and in its model.

    Without storage rewriting on CUDA: TVM 0.27 lets a buffer of fp16 share the memory of one of fp32, and then refuses
    what MetaSchedule makes for tensor cores ("tvm_access_ptr element type must match the source buffer").
    """
    return {"tirx.disable_assert": True, "tirx.disable_storage_rewrite": target.kind.name == "cuda"}


def build(module_json, target_json, candidate, path):
    """Compiles a candidate of a task, (space, decisions), into the shared library `path`; returns the path.

    None: TVM's default schedule. Raises ValueError for a candidate that the target forbids, and TVM's own errors.
    """
    import tvm

    target = load_target(target_json)
    if candidate is None:
        scheduled = default_schedule(tvm.ir.load_json(module_json), target)
    else:
        scheduled = schedule_candidate(module_json, target_json, *candidate)
    with target, tvm.transform.PassContext(opt_level=3, config=build_options(target)):
        tvm.build(scheduled, target=target).export_library(path)
    return path


def schedule_candidate(module_json, target_json, space, decisions):
    """Returns a task's IRModule as the candidate schedules it. Raises ValueError where the target forbids that."""
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    realized = cached_design_spaces(module_json, target_json).realize(space, decisions)
    if realized is None:
        raise ValueError("the target forbids this candidate")
    schedule, _ = realized
    return RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(schedule.mod)


def measure(arguments, library, reference_library, device, tolerance, best_s):
    """Runs a built candidate and returns its Measurement.

    arguments: the Task's. library, reference_library: paths of the candidate and of TVM's default schedule, whose
    outputs must agree within `tolerance`. device: "cpu" or "cuda:N". best_s: the task's best so far in seconds or None.
    """
    import tvm

    module, tvm_device = tvm.runtime.load_module(library), tvm.runtime.device(device)
    inputs, expected = run_reference(arguments, reference_library, device)
    buffers = [tensor.clone() for tensor in inputs]
    shared = [tvm.runtime.from_dlpack(tensor) for tensor in buffers]
    module["main"](*shared)
    tvm_device.sync()
    try:
        for output, reference in zip(buffers, expected):
            check_buffer(output, reference, tolerance)
    except WrongOutput as error:
        return Measurement(None, one_line(error))

    def seconds(calls, repeats):
        return module.time_evaluator("main", tvm_device, number=calls, repeat=repeats)(*shared).results

    (once_s,) = seconds(1, 1)
    if best_s and once_s > MAX_SLOWDOWN_TO_REPEAT * best_s:
        return Measurement(once_s)
    return Measurement(statistics.median(seconds(max(1, math.ceil(MIN_REPEAT_S / once_s)), REPEATS)))


@functools.lru_cache(maxsize=4)
def run_reference(arguments, library, device):
    """Returns (input buffers, the same buffers after TVM's default schedule ran on them), lists of tensors on `device`.

    arguments: the Task's (dtype, shape) pairs. Floating-point buffers start as seeded standard normal noise, integers
    as zeros.
    """
    import tvm

    generator = torch.Generator(device).manual_seed(0)
    inputs = []
    for dtype_name, shape in arguments:
        dtype = getattr(torch, dtype_name)
        if dtype.is_floating_point:
            inputs.append(torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype))
        else:
            inputs.append(torch.zeros(shape, device=device, dtype=dtype))
    outputs = [tensor.clone() for tensor in inputs]
    tvm.runtime.load_module(library)["main"](*(tvm.runtime.from_dlpack(tensor) for tensor in outputs))
    tvm.runtime.device(device).sync()
    return inputs, outputs


def check_buffer(output, reference, tolerance):
    """Raises WrongOutput unless ||output - reference|| <= tolerance ||reference||, both finite at the same places.

    Integers must be equal.
    """
    if not reference.is_floating_point():
        if not torch.equal(output, reference):
            raise WrongOutput("integers are off")
        return
    output, reference = output.double(), reference.double()
    if not torch.equal(output.isfinite(), reference.isfinite()):
        raise WrongOutput("not finite where it should be")
    output, reference = (torch.where(tensor.isfinite(), tensor, 0) for tensor in (output, reference))
    error, norm = (output - reference).norm().item(), reference.norm().item()
    if error > tolerance * norm:
        raise WrongOutput(f"rel_error {error / norm if norm else math.inf:.1e}")
