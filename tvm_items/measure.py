"""Building one candidate of a task, and measuring it: a candidate counts only if its outputs are right."""

import functools
import math
import statistics
import typing

import torch

from harness.errors import one_line
from tvm_items.executable import export_library
from tvm_items.lowering import tir_pipeline
from tvm_items.spaces import cached_design_spaces
from tvm_items.target import load_target
from tvm_items.tasks import bytes_of, default_schedule

REPEATS, MIN_REPEAT_S = 3, 2e-3  # a measurement is the median of so many repeats, each at least so long
POISON = 0xFF  # every byte of a candidate's outputs before it runs: NaN in all floating-point formats, -1 in integers
# Around a candidate's buffers stand NaNs too, in fp16, bf16 and fp32. They are another one around each buffer: a kernel
# that goes too far copies them from one to the next, and most arithmetic leaves their bits alone.
GUARDS = range(-63, 0)  # the bits, as int16
GUARD_BYTES = 2**18  # between two buffers: more than a tile, and next to nothing to fill and compare
ALIGNMENT = 512  # of a buffer in bytes, as PyTorch's allocator for CUDA has it
MAX_COPIES = 256  # of less, so many fit into the L2 cache: it is there while a candidate is timed
MAX_SLOWDOWN_TO_REPEAT = 4  # a candidate that is so many times slower than the best of its task is measured no further


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
        export_library(tvm.tirx.build(scheduled, target=target, pipeline=tir_pipeline()), path)
    return path


def schedule_candidate(module_json, target_json, space, decisions):
    """Returns a task's IRModule as the candidate schedules it. Raises ValueError where the target forbids that."""
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    realized = cached_design_spaces(module_json, target_json).realize(space, decisions)
    if realized is None:
        raise ValueError("the target forbids this candidate")
    return RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(realized[0])


def measure(arguments, library, reference_library, device, tolerance, best_s, given=(), model_bytes=0):
    """Runs a built candidate and returns its Measurement.

    arguments, given: the Task's. library, reference_library: paths of the candidate and of TVM's default schedule,
    whose outputs must agree within `tolerance`. device: "cpu" or "cuda:N". best_s: the task's best so far in seconds,
    None for what is measured first, TVM's default schedule. model_bytes: of what is given to all tasks of the model.
    Where that does not fit into the L2 cache of a GPU, it comes from memory in each inference: the candidate is timed
    with copies of its own share in turns. What else it reads was written just before, by other kernels.

    The candidate is checked before it is timed. One that is faster than the best so far is checked again: a further run
    must give the same bits as the last timed one, and it must be right for other inputs.
    """
    import tvm

    module, tvm_device = tvm.runtime.load_module(library), tvm.runtime.device(device)
    buffers = Buffers(arguments, device)
    shared = [tvm.runtime.from_dlpack(tensor) for tensor in buffers.tensors]

    def run_and_check(seed):
        example = run_reference(arguments, reference_library, device, seed)
        buffers.fill(example)
        module["main"](*shared)
        tvm_device.sync()
        buffers.check(example, tolerance)

    def seconds(calls, repeats):
        if calls > 1 and device != "cpu":
            copies = count_copies(arguments, given, model_bytes, device)
            sets = argument_sets(buffers.tensors, given, copies) if copies > 1 else [shared]
            return time_in_graph(module["main"], sets, device, calls, repeats)
        return module.time_evaluator("main", tvm_device, number=calls, repeat=repeats)(*shared).results

    try:
        run_and_check(seed=0)
        # The quickest of a few: a first call waits for threads that sleep, on a busy CPU for milliseconds.
        median_s = min(seconds(1, REPEATS))
        if not best_s or median_s <= MAX_SLOWDOWN_TO_REPEAT * best_s:
            median_s = statistics.median(seconds(max(1, math.ceil(MIN_REPEAT_S / median_s)), REPEATS))
        if best_s and median_s < best_s:
            after_timing = buffers.memory.clone()
            run_and_check(seed=0)
            if not torch.equal(buffers.memory, after_timing):  # no schedule adds up in an order that is left to chance
                raise WrongOutput("not the same in every run")
            run_and_check(seed=1)
    except WrongOutput as error:
        return Measurement(None, one_line(error))
    return Measurement(median_s)


def count_copies(arguments, given, model_bytes, device):
    """Returns how many copies of what a task is given are twice as much as the device's L2 cache holds.

    1 where it holds what all tasks of the model are given, or where that takes too many. The rest is as in measure().
    """
    own_bytes = sum(bytes_of(*arguments[number]) for number in given)
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    if model_bytes <= cache_bytes or MAX_COPIES * own_bytes < 2 * cache_bytes:
        return 1
    return math.ceil(2 * cache_bytes / own_bytes)


def argument_sets(tensors, given, copies):
    """Returns so many lists of a kernel's arguments as TVM tensors, each with copies of its own of what is given."""
    import tvm

    sets = [list(tensors) for _ in range(copies)]
    for number in given:
        tensor = tensors[number]
        size = tensor.numel() * tensor.itemsize
        line = -(-size // ALIGNMENT) * ALIGNMENT
        copied = torch.empty((copies, line), dtype=torch.uint8, device=tensor.device)
        copied[:, :size] = tensor.view(-1).view(torch.uint8)
        for arguments, copy in zip(sets, copied):
            arguments[number] = copy[:size].view(tensor.dtype).view(tensor.shape)
    return [[tvm.runtime.from_dlpack(tensor) for tensor in arguments] for arguments in sets]


def time_in_graph(run, sets, device, calls, repeats):
    """Returns the seconds of one run() on a CUDA device, `repeats` times the mean of `calls` in a CUDA graph.

    So it runs in the model, too. Launched one by one, all kernels of less than about 5 µs take as long as their launch.
    sets: lists of its arguments, which it gets in turns.
    """
    import tvm_ffi

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    timers = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    with tvm_ffi.use_torch_stream(torch.cuda.stream(stream)):
        graph.capture_begin()
        for call in range(calls):
            run(*sets[call % len(sets)])
        graph.capture_end()
        graph.replay()
        for start, end in timers:
            start.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 / calls for start, end in timers]


class Example(typing.NamedTuple):
    """What a task's buffers hold after a right run."""

    values: list[torch.Tensor]
    outputs: list[bool]  # whether the task writes the buffer; the others are as they were before the run


@functools.lru_cache(maxsize=8)
def run_reference(arguments, library, device, seed):
    """Returns the Example of a task that TVM's default schedule gives for seeded inputs.

    arguments: the Task's (dtype, shape) pairs. Floating-point buffers start as standard normal noise, masks at random,
    integers as zeros, which are valid wherever they are used as indices.
    """
    import tvm

    generator = torch.Generator(device).manual_seed(seed)
    before = []
    for dtype_name, shape in arguments:
        dtype = getattr(torch, dtype_name)
        if dtype.is_floating_point:
            before.append(torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype))
        elif dtype == torch.bool:  # of an attention that sees nothing every result would be zero
            before.append(torch.rand(shape, generator=generator, device=device) < 0.5)
        else:
            before.append(torch.zeros(shape, device=device, dtype=dtype))
    values = [tensor.clone() for tensor in before]
    tvm.runtime.load_module(library)["main"](*(tvm.runtime.from_dlpack(tensor) for tensor in values))
    tvm.runtime.device(device).sync()
    return Example(values, [not torch.equal(old, new) for old, new in zip(before, values)])


class Buffers:
    """A task's arguments as tensors in one piece of memory, with guards before, between and behind them."""

    def __init__(self, arguments, device):
        end, self.guards, spans = 0, [], []
        sizes = [bytes_of(*argument) for argument in arguments]
        for size in (*sizes, 0):  # an empty one at the end
            start = -(-(end + GUARD_BYTES) // ALIGNMENT) * ALIGNMENT
            self.guards.append(slice(end, start))
            end = start + size
            spans.append(slice(start, end))
        self.memory = torch.full((self.guards[-1].stop,), POISON, dtype=torch.uint8, device=device)
        for number, guard in enumerate(self.guards):
            self.memory[guard.start // 2 * 2 : guard.stop].view(torch.int16).fill_(GUARDS[number % len(GUARDS)])
        self.intact_guards = self.read_guards()
        self.bytes = [self.memory[span] for span in spans[:-1]]
        self.tensors = [
            span.view(getattr(torch, dtype_name)).view(shape)
            for span, (dtype_name, shape) in zip(self.bytes, arguments)
        ]

    def fill(self, example):
        """Puts an Example's inputs into the buffers, and POISON where its outputs will be."""
        for tensor, span, value, is_output in zip(self.tensors, self.bytes, *example, strict=True):
            if is_output:
                span.fill_(POISON)
            else:
                tensor.copy_(value)

    def check(self, example, tolerance):
        """Raises WrongOutput unless the buffers hold what an Example says and nothing was written around them."""
        for tensor, value, is_output in zip(self.tensors, *example, strict=True):
            if is_output:
                check_buffer(tensor, value, tolerance)
            elif not torch.equal(tensor, value):
                raise WrongOutput("an input was overwritten")
        if not torch.equal(self.read_guards(), self.intact_guards):
            raise WrongOutput("written out of bounds")

    def read_guards(self):
        """Returns the bytes of all guards."""
        return torch.cat([self.memory[guard] for guard in self.guards])


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
