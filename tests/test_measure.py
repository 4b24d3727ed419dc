"""Kernels that cheat, leave their buffers or race: measuring a candidate finds them out."""

import itertools
import types

import pytest
import torch

from tvm_items import measure as measuring
from tvm_items.measure import ALIGNMENT, argument_sets, measure, run_reference

SIZE = 1000  # no multiple of an alignment
ARGUMENTS = (("float32", (SIZE,)), ("float32", (SIZE,)))  # of y = 2 x


class Kernel:
    """A library whose `main` is a Python function of the tensors x and y, with the timing that TVM's modules have."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, name):
        return lambda *buffers: self.function(*map(torch.from_dlpack, buffers))

    def time_evaluator(self, name, device, number, repeat):
        def evaluate(*buffers):
            for _ in range(min(number, 20) * repeat):
                self[name](*buffers)
            return type("Result", (), {"results": (1e-3,) * repeat})

        return evaluate


def right(x, y):
    torch.mul(x, 2, out=y)


def does_nothing(x, y):
    pass


def leaves_the_last_element(x, y):
    y[:-1] = 2 * x[:-1]


def overwrites_its_input(x, y):
    right(x, y)
    x[0] = 0


def accumulates(x, y):
    y += 2 * x


def skips_after_the_first_call():
    calls = itertools.count()
    return lambda x, y: None if next(calls) else right(x, y)


def is_right_for_ten_calls():
    calls = itertools.count()
    return lambda x, y: right(x, y) if next(calls) < 10 else None


def keeps_its_first_result():
    kept = []

    def run(x, y):
        if not kept:
            kept.append(2 * x)
        y.copy_(kept[0])

    return run


def skips_work_for_the_same_address():
    kept = {}

    def run(x, y):
        y.copy_(kept.setdefault(x.data_ptr(), 2 * x))

    return run


def races():
    """A sum whose order is left to chance is a little different in each run."""
    calls = itertools.count()
    return lambda x, y: torch.mul(x, 2 + 1e-6 * (next(calls) % 2), out=y)


@pytest.fixture
def measure_kernel(tvm, monkeypatch):
    """Gives a function that measures a Python function as a candidate, faster than the best so far or not."""
    monkeypatch.setattr(tvm.runtime, "load_module", Kernel)
    run_reference.cache_clear()
    yield lambda kernel, best_s=1.0: measure(ARGUMENTS, kernel, right, "cpu", 1e-4, best_s)
    run_reference.cache_clear()


@pytest.mark.parametrize(
    "kernel, says",
    [
        (does_nothing, "not finite"),
        (leaves_the_last_element, "not finite"),
        (accumulates, "not finite"),
        (overwrites_its_input, "input was overwritten"),
        (skips_after_the_first_call(), "not finite"),
        (is_right_for_ten_calls(), "not finite"),
        (keeps_its_first_result(), "rel_error"),
        (skips_work_for_the_same_address(), "rel_error"),
        (races(), "not the same in every run"),
    ],
)
def test_a_kernel_that_cheats_is_wrong(measure_kernel, kernel, says):
    measurement = measure_kernel(kernel)
    assert measurement.seconds is None and says in measurement.error


def test_a_right_kernel_is_measured(measure_kernel):
    for best_s in (None, 1.0, 1e-3, 1e-9):
        assert measure_kernel(right, best_s).seconds == 1e-3 and measure_kernel(right, best_s).error is None


def test_what_is_slower_than_the_best_is_run_no_more_often(measure_kernel):
    calls = []

    def count(x, y):
        calls.append(1)
        right(x, y)

    measure_kernel(count, best_s=1e-4)
    assert len(calls) == 1 + measuring.REPEATS  # the one that is checked, and those that show that it is slow


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "int8"])
def test_buffers_lie_between_guards(dtype):
    arguments = ((dtype, (3, 5)), ("float32", ()), (dtype, (7,)))
    buffers = measuring.Buffers(arguments, "cpu")
    assert [(tensor.shape, tensor.is_contiguous()) for tensor in buffers.tensors] == [
        (shape, True) for _, shape in arguments
    ]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in buffers.tensors)  # what TVM's vector instructions ask for
    covered = torch.zeros_like(buffers.memory)
    for guard in buffers.guards:
        assert guard.stop - guard.start >= measuring.GUARD_BYTES
        covered[guard] += 1
    assert covered.sum() + sum(span.numel() for span in buffers.bytes) == buffers.memory.numel() and covered.max() == 1
    assert not dtype.startswith(("float", "bfloat")) or buffers.tensors[0].isnan().all()
    around = [buffers.memory[guard.stop - 512 : guard.stop] for guard in buffers.guards]
    assert len({bytes(guard.numpy()) for guard in around}) == len(around)
    for name in ("float32", "float16", "bfloat16"):
        assert all(guard.view(getattr(torch, name)).isnan().all() for guard in around)


@pytest.mark.parametrize(
    "first, last, expression, says",
    [
        (0, 1000, "x[i] * T.float32(2)", None),
        (0, 1001, "x[i] * T.float32(2)", "out of bounds"),
        (-2000, 1000, "x[i] * T.float32(2)", "out of bounds"),
        # As good as right, were there ordinary numbers behind x.
        (0, 1000, "x[i] * T.float32(2) + x[i + 1] * T.float32(1e-30)", "not finite"),
    ],
)
def test_a_compiled_kernel_that_leaves_its_buffers_is_wrong(tvm, tmp_path, first, last, expression, says):
    def compile_kernel(path, first, last, expression):
        function = tvm.script.from_source(f"""
@T.prim_func
def main(x: T.Buffer(({SIZE},), "float32"), y: T.Buffer(({SIZE},), "float32")):
    T.func_attr({{"global_symbol": "main"}})
    for i in range({first}, {last}):
        y[i] = {expression}
""")
        tvm.build(tvm.IRModule({"main": function}), target="llvm").export_library(str(path))
        return str(path)

    reference = compile_kernel(tmp_path / "reference.so", 0, SIZE, "x[i] * T.float32(2)")
    candidate = compile_kernel(tmp_path / "candidate.so", first, last, expression)
    measurement = measure(ARGUMENTS, candidate, reference, "cpu", 1e-4, 1.0)
    if says:
        assert measurement.seconds is None and says in measurement.error
    else:
        assert measurement.seconds > 0 and measurement.error is None


def test_what_is_measured_with_a_mask_sees_something(tvm, tmp_path):
    from tvm import te

    mask, x = te.placeholder((64,), name="mask", dtype="bool"), te.placeholder((64,), name="x")
    y = te.compute((64,), lambda i: te.if_then_else(mask[i], x[i], 0.0), name="y")
    path = tmp_path / "masked.so"
    tvm.build(te.create_prim_func([mask, x, y]), target="llvm").export_library(path)
    arguments = (("bool", (64,)), ("float32", (64,)), ("float32", (64,)))
    mask, _, y = run_reference(arguments, str(path), "cpu", 0).values
    assert mask.any() and not mask.all() and torch.equal(y != 0, mask)


# ---- What is not in the cache ----------------------------------------------------------------------------------------


def test_what_a_task_is_given_is_in_the_cache_only_if_all_of_the_models_fits(monkeypatch):
    cache = types.SimpleNamespace(L2_cache_size=50 * 2**20)  # an H200's
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cache)
    product = ("float16", (1, 768)), ("float16", (768, 3072)), ("float16", (3072,)), ("float16", (1, 3072))
    assert measuring.count_copies(product, (1, 2), 200 * 2**20, "cuda:0") == 23  # of 4.5 MiB
    assert measuring.count_copies(product, (1, 2), 49 * 2**20, "cuda:0") == 1
    assert measuring.count_copies(product, (2,), 200 * 2**20, "cuda:0") == 1  # 256 of them would not fill it
    assert measuring.count_copies(product, (), 200 * 2**20, "cuda:0") == 1
    head = [("float16", (2**16, 2**12))]  # more than twice the cache
    assert measuring.count_copies(head, (0,), 2**30, "cuda:0") == 1


def test_each_set_of_arguments_has_copies_of_what_is_given(tvm):
    x, weight, y = torch.randn(3), torch.randn(2, 3, dtype=torch.float16), torch.zeros(2)
    sets = [[torch.from_dlpack(each) for each in each_set] for each_set in argument_sets([x, weight, y], (1,), 3)]
    places = [[tensor.data_ptr() for tensor in each_set] for each_set in sets]
    assert [place[::2] for place in places] == [[x.data_ptr(), y.data_ptr()]] * 3
    assert len({place[1] for place in places}) == 3 and all(torch.equal(each[1], weight) for each in sets)
    assert len({place[1] % ALIGNMENT for place in places}) == 1
