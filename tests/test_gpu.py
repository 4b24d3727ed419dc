"""Behaviour that only a GPU can show; tests/test_evidence.py has the measurements."""

import json

import pytest
import torch

import benchmark
from conftest import TINY_BERT, TINY_RESNET, make_case, read_csv
from harness.case import arithmetic
from harness.check import output_arrays, relative_error
from harness.models import find_model
from harness.weights import load_on_device
from tvm_items.imports import import_tvm
from tvm_items.measure import build, measure
from tvm_items.target import find_target

pytestmark = pytest.mark.gpu
CUDA = "cuda:0"


def test_default_items(command, write_model, tmp_path):
    done = command("benchmark.py", "--model", write_model(), "--weights", "random", "--results", "rows.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_csv(tmp_path / "rows.csv")
    assert [row["test_item"] for row in rows] == ["torch", "torch_compile", "torch_compile_reduce_overhead", "tvm"]
    for row in rows[1:]:
        assert 0 < float(row["warm_start_time_s"]) < float(row["compile_time_s"])
    for row in rows:
        assert float(row["host_time_ms"]) > 0
        assert row["device_name"] == torch.cuda.get_device_name(0) and row["cuda_version"] == torch.version.cuda
        assert row["driver_version"] and float(row["rel_error"]) <= 1e-4


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_tuned_schedules_are_measured_checked_and_used(command, write_model, tmp_path, precision):
    arguments = ["--model", write_model(), "--weights", "random", "--precision", precision, "--results", "rows.csv"]
    tune = ["--test-items", "tvm", "tvm_tune", "--tuning-dir", "tuning", "--tune-trials", 16]
    done = command("benchmark.py", *arguments, *tune)
    assert done.returncode == 0, done.stdout + done.stderr
    row = read_csv(tmp_path / "rows.csv")[1]
    (journal,) = (tmp_path / "tuning").glob("*/*.journal")
    _, *lines = map(json.loads, journal.read_text().splitlines())
    measured = [line for line in lines if line.get("seconds")]
    assert len(measured) > 0.5 * int(row["tune_trials"]), [line["error"] for line in lines if "error" in line][:5]
    print(f"\n{precision}: {row['tune_trials']} trials in {row['tune_time_s']} s, {len(measured)} of them valid")


@pytest.mark.parametrize("config", [TINY_RESNET, TINY_BERT], ids=["resnet", "bert"])
def test_every_item_reads_the_inputs_that_change_in_place(command, write_model, tmp_path, config):
    """In fp16, where convolutional models have channels-last copies, and with CUDA graphs; else the rows are wrong."""
    items = ["torch", "torch_compile", "torch_compile_reduce_overhead", "tvm"]
    arguments = ["--model", write_model(config), "--weights", "random", "--precision", "fp16", "--test-items", *items]
    done = command("benchmark.py", *arguments, "--results", "rows.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["reference"] for row in read_csv(tmp_path / "rows.csv")} == {"fp32 on the device"}


def test_a_reference_that_does_not_fit_is_computed_on_the_host(command, write_model, tmp_path):
    """Another process leaves less memory than the weights need in fp32, and more than in fp16."""
    model = write_model(TINY_BERT | {"vocab_size": 2**20, "hidden_size": 1024})  # 4 GiB in fp32
    free, _ = torch.cuda.mem_get_info(CUDA)
    held = torch.empty(free - 7 * 2**29, dtype=torch.uint8, device=CUDA)
    arguments = ["--model", model, "--weights", "random", "--precision", "fp16", "--test-items", "torch"]
    done = command("benchmark.py", *arguments, "--results", "rows.csv", timeout=550)
    assert held.numel() and done.returncode == 0, done.stdout + done.stderr
    (row,) = read_csv(tmp_path / "rows.csv")
    assert row["reference"] == "fp32 on the host"


def test_out_of_memory_is_a_failed_row(command, write_model, tmp_path):
    # The first activation alone is 256 GiB: 64 images of 4096 channels and 512 x 512 pixels.
    model = write_model({**TINY_RESNET, "embedding_size": 4096, "image_size": 1024})
    done = command(
        "benchmark.py",
        "--model",
        model,
        "--weights",
        "random",
        "--batch-size",
        64,
        "--test-items",
        "torch",
        "--results",
        "rows.csv",
    )
    assert done.returncode == 1
    (row,) = read_csv(tmp_path / "rows.csv")
    assert row["status"] == "failed" and "memory" in row["error"]


def test_tvm_shares_the_inputs_and_replays_a_graph(write_model):
    """A change of the input in place is seen by the next replay, so neither was it copied nor is a result cached."""
    import_tvm("fp32")
    config, _ = find_model(str(write_model()), "random")
    case = make_case(config, device=CUDA)
    with arithmetic("fp32") as dtype, torch.no_grad():
        model, inputs = load_on_device(case, dtype)
        expected = []
        for factor in (1, -0.5):
            expected.append(output_arrays(model(pixel_values=inputs["pixel_values"] * factor)))
        run = benchmark.tvm_default(model, inputs, case)
        for factor, reference in zip((1, -0.5), expected):
            inputs["pixel_values"].mul_(factor)
            for _ in range(3):
                assert relative_error(output_arrays(run()), reference) < 1e-5


def test_a_small_kernel_is_timed_without_its_launch(tvm, tmp_path):
    """One at a time, kernels of 2 µs and of 4 µs are launched at the same rate: the tuner could not tell them apart."""
    from tvm import te

    x = te.placeholder((1000,), name="x")
    module = tvm.IRModule({"main": te.create_prim_func([x, te.compute((1000,), lambda i: x[i] * 2, name="y")])})
    library = build(tvm.ir.save_json(module), find_target(CUDA), None, str(tmp_path / "double.so"))
    run, tensors = tvm.runtime.load_module(library), [torch.zeros(1000, device=CUDA) for _ in range(2)]
    launched = run.time_evaluator("main", tvm.runtime.device(CUDA), number=1000)(*map(tvm.runtime.from_dlpack, tensors))
    in_graph = measure((("float32", (1000,)),) * 2, library, library, CUDA, 1e-4, None)
    print(f"\n{1e6 * launched.median:.2f} µs launched one by one, {1e6 * in_graph.seconds:.2f} µs in a graph")
    assert 0.3e-6 < in_graph.seconds < launched.median
