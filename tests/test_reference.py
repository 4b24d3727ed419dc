"""The reference: items that cheat are found out by it, and where it is computed when memory is short."""

import pytest
import torch

from conftest import ROOT, TINY_BERT, TINY_RESNET, make_case, read_csv
from harness import reference
from harness.cases import find_models
from harness.check import output_arrays, relative_error
from harness.inputs import change_inputs, make_inputs
from harness.processes import WorkerError
from harness.reference import Reference, References, compute_reference
from harness.weights import load_model

# Items that do not compute what they are timed for, added by a script that uses benchmark.py as it is.
CHEATS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import benchmark

def returns_a_stale_buffer(model, inputs, case):
    buffer = model(**inputs).logits.clone()
    return lambda: buffer

def keeps_its_first_result(model, inputs, case):
    kept = []
    def run():
        if not kept:
            kept.append(model(**inputs).logits)
        return kept[0].clone()
    return run

def skips_work_for_the_same_address(model, inputs, case):
    kept = {{}}
    def run():
        address = tuple(tensor.data_ptr() for tensor in inputs.values())
        if address not in kept:
            kept[address] = model(**inputs).logits
        return kept[address]
    return run

def is_right_for_two_calls(model, inputs, case):
    calls = iter(range(10**9))
    return lambda: model(**inputs).logits * (1 if next(calls) < 2 else 0.99)

def stops_computing_after_some_calls(model, inputs, case):
    outputs = []
    def run():
        if len(outputs) < 4:
            outputs.append(model(**inputs).logits)
        return outputs[-1]
    return run

def copies_its_inputs(model, inputs, case):
    inputs = {{name: tensor.clone() for name, tensor in inputs.items()}}
    return lambda: model(**inputs)

for function in list(globals().values()):
    if getattr(function, "__module__", None) == "__main__":
        benchmark.TEST_ITEMS[function.__name__] = benchmark.TestItem(function)

if __name__ == "__main__":
    sys.exit(benchmark.main())
"""
NAMES = """returns_a_stale_buffer keeps_its_first_result skips_work_for_the_same_address is_right_for_two_calls
stops_computing_after_some_calls copies_its_inputs torch""".split()


@pytest.mark.parametrize(
    "config, precision", [(TINY_RESNET, "fp32"), pytest.param(TINY_BERT, "bf16", marks=pytest.mark.slow)]
)
def test_items_that_cheat_are_wrong(command, write_model, tmp_path, config, precision):
    (tmp_path / "cheats.py").write_text(CHEATS)
    arguments = ["--model", write_model(config), "--weights", "random", "--precision", precision]
    done = command(
        tmp_path / "cheats.py", *arguments, "--test-items", *NAMES, "--iterations", 5, "--results", "rows.csv"
    )
    assert done.returncode == 1, done.stderr
    rows = {row["test_item"]: row for row in read_csv(tmp_path / "rows.csv")}
    right = {"torch"} if precision == "fp32" else {"torch", "is_right_for_two_calls"}  # 1 % is within bf16's tolerance
    assert {name for name, row in rows.items() if row["status"] == "ok"} == right
    assert {row["status"] for name, row in rows.items() if name not in right} == {"wrong"}
    assert all(row["reference"] == "fp32 on the device" for row in rows.values())
    for name in set(NAMES) - right - {"is_right_for_two_calls"}:
        assert "changed in place" in rows[name]["error"]


@pytest.mark.parametrize("config", [TINY_RESNET, TINY_BERT])
def test_inputs_change_in_place(write_model, config):
    (model,) = find_models([str(write_model(config))], "random", None)
    case = make_case(model.config)
    inputs = make_inputs(case)
    before, addresses = (
        {name: tensor.clone() for name, tensor in inputs.items()},
        [t.data_ptr() for t in inputs.values()],
    )
    change_inputs(inputs, case)
    assert [tensor.data_ptr() for tensor in inputs.values()] == addresses
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]) == (name == "attention_mask")
    with torch.no_grad():
        changed = output_arrays(load_model(case)(**inputs))
    found = compute_reference(case, "fp32", "device")
    assert relative_error(changed, found.changed_outputs) < 1e-6 < relative_error(changed, found.outputs)


def test_an_old_result_is_found_out_within_the_tolerance():
    before, after = [torch.ones(100).numpy()], [1.03 * torch.ones(100).numpy()]  # as near as EfficientNet's
    checked = Reference("fp32 on the device", before, after).check
    assert checked(5e-2, before, before, after)["status"] == "ok"
    assert checked(5e-2, before, before, before)["status"] == "wrong"
    assert Reference("", before, before).check(5e-2, before, before, before)["status"] == "ok"  # depends on no input


def in_this_process(failures):
    """Returns a References whose computations, one after another, end with the given errors (None: with a result)."""
    failures = iter(failures)

    def call(function, *arguments):
        if isinstance(failure := next(failures), WorkerError):
            raise failure
        with pytest.MonkeyPatch.context() as patch:
            if failure:
                patch.setattr(reference, "load_on_device", lambda *_: (_ for _ in ()).throw(failure))
            try:
                return function(*arguments)
            except Exception as error:
                raise WorkerError(str(error)) from None

    return References(call)


SHORT = torch.OutOfMemoryError("CUDA out of memory")
DEAD = WorkerError("the process died of SIGKILL, exit code -9 (out of memory?)")


@pytest.mark.parametrize(
    "precision, failures, found",
    [
        ("fp32", [None], "fp32 on the device"),
        ("fp16", [SHORT, None], "fp32 on the host"),
        ("bf16", [SHORT, DEAD, None], "bf16 on the device"),
        ("bf16", [SHORT, DEAD, SHORT], "the device's memory is too small"),
        ("fp32", [SHORT, DEAD], "SIGKILL"),
        ("tf32", [SHORT, DEAD], "SIGKILL"),
        ("bf16", [RuntimeError("no such kernel")], "no such kernel"),  # and nothing else is tried
        ("bf16", [DEAD], "SIGKILL"),
        ("bf16", [SHORT, DEAD, RuntimeError("no such kernel")], "no such kernel"),
    ],
)
def test_where_the_reference_is_computed(write_model, precision, failures, found):
    (model,) = find_models([str(write_model())], "random", None)
    result = in_this_process(failures).find(make_case(model.config, precision=precision))
    if found.endswith(("device", "host")):
        assert result.origin == found
    else:
        assert isinstance(result, WorkerError) and found in str(result) and "no reference" in str(result)


def test_precisions_share_a_reference_in_fp32_alone(write_model):
    (model,) = find_models([str(write_model())], "random", None)
    cases = [make_case(model.config, precision=precision) for precision in ("fp32", "fp16", "bf16")]
    shared = in_this_process([None])
    assert len({id(shared.find(case)) for case in cases}) == 1
    own = in_this_process([SHORT, DEAD, None, None])
    assert isinstance(own.find(cases[0]), WorkerError)
    assert [own.find(case).origin for case in cases[1:]] == ["fp16 on the device", "bf16 on the device"]


def test_the_row_says_where_the_reference_was_computed(command, write_model, tmp_path):
    """The first reference does not fit a made-up device, and the process of the second one is killed."""
    script = tmp_path / "short_of_memory.py"
    script.write_text(f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import torch
import benchmark
from harness import reference

def load_on_device(case, dtype, load=reference.load_on_device, first=Path("first")):
    if dtype == torch.float32 and not first.exists():
        first.touch()
        raise torch.OutOfMemoryError("CUDA out of memory")
    if dtype == torch.float32:
        os.kill(os.getpid(), signal.SIGKILL)
    return load(case, dtype)

reference.load_on_device = load_on_device
sys.exit(benchmark.main())
""")
    arguments = ["--model", write_model(), "--weights", "random", "--precision", "bf16", "--test-items", "torch"]
    done = command(script, *arguments, "--iterations", 3, "--results", "rows.csv")
    (row,) = read_csv(tmp_path / "rows.csv")
    assert done.returncode == 0 and row["status"] == "ok" and row["reference"] == "bf16 on the device"
    assert "the reference is bf16 on the device" in done.stdout
