"""One case, as a user meets it: the command line, the terminal and the CSV."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import transformers

import benchmark
import plot
from conftest import ROOT, TINY_RESNET, read_csv
from harness import models
from harness.models import find_model
from harness.rows import COLUMNS
from harness.version import harness_version

# Items that go wrong in every way a compiler can, added by a script that uses benchmark.py as it is.
BROKEN_ITEMS = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import benchmark

def off(model, inputs, case):
    return lambda: model(**inputs).logits * 1.01

def far_off(model, inputs, case):
    return lambda: model(**inputs).logits * 1.05

def not_a_number(model, inputs, case):
    return lambda: model(**inputs).logits * float("nan")

def other_shape(model, inputs, case):
    return lambda: model(**inputs).logits[:, :5]

def wrong_when_replayed(model, inputs, case):
    calls = iter(range(10**9))
    return lambda: model(**inputs).logits * (1 if next(calls) == 0 else 1.01)

def crash(model, inputs, case):
    os.kill(os.getpid(), signal.SIGSEGV)

def out_of_memory(model, inputs, case):
    os.kill(os.getpid(), signal.SIGKILL)

def hang(model, inputs, case):
    time.sleep(1000)

def unsupported(model, inputs, case):
    raise NotImplementedError("no operator\\nfor this")

for function in (off, far_off, not_a_number, other_shape, wrong_when_replayed, crash, out_of_memory, hang, unsupported):
    benchmark.TEST_ITEMS[function.__name__] = benchmark.TestItem(function)

if __name__ == "__main__":
    sys.exit(benchmark.main())
"""


@pytest.fixture
def broken_items(tmp_path):
    script = tmp_path / "broken_items.py"
    script.write_text(BROKEN_ITEMS)
    return script


def test_default_items(command, write_model, tmp_path):
    results = tmp_path / "rows.csv"
    # One thread: two that wait for each other take half a second for a run on a busy machine, and 20 are then too many.
    threads = {"OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"}
    done = command("benchmark.py", "--model", write_model(), "--batch-size", 2, "--results", results, **threads)
    assert done.returncode == 0, done.stderr
    assert results.read_text().splitlines()[0] == ",".join(COLUMNS)
    rows = read_csv(results)
    assert [row["test_item"] for row in rows] == ["torch", "torch_compile", "tvm"]
    for row in rows:
        assert row["status"] == "ok" and row["error"] == ""
        assert float(row["rel_error"]) <= 1e-4
        assert row["weights"] == "random" and row["input_shape"] == "pixel_values=2x3x32x32"
        minimum, median, p90, p99 = (float(row[f"infer_time_{name}_ms"]) for name in ("min", "median", "p90", "p99"))
        assert 0 < minimum <= median <= p90 <= p99
        assert int(row["iterations"]) >= benchmark.MIN_ITERATIONS
        assert float(row["throughput_samples_per_s"]) == pytest.approx(2e3 / float(row["infer_time_mean_ms"]), rel=1e-4)
        assert float(row["peak_memory_mib"]) > 1
        assert all(row[f"{package}_version"] for package in ("torch", "tvm", "transformers"))
    assert rows[0]["compile_time_s"] == "" and all(float(row["compile_time_s"]) > 0.1 for row in rows[1:])
    for row in rows:
        assert row["host_time_ms"] == "" and row["cpu_threads"] == "1"  # on the CPU the host is what is timed
        assert row["model_class"] == "ResNetForImageClassification" and len(row["config_hash"]) == 8
    for row in rows[1:]:  # a second start, with the caches and files that the first one left
        assert 0 < float(row["warm_start_time_s"]) < float(row["compile_time_s"])
    assert rows[0]["warm_start_time_s"] == ""
    assert "times faster than" in done.stdout and done.stdout.count("rel_error") == 3
    assert "verdict: use " in done.stdout and "not tried: torch_compile_reduce_overhead" in done.stdout
    assert "tvm_tune is left out" in done.stdout and "--batch-size 2 --precision fp32 --tune-minutes 10" in done.stdout
    assert "random weights" in done.stderr and len(done.stderr.splitlines()) == 1


def test_each_broken_item_costs_itself_only(command, broken_items, write_model, tmp_path):
    results = tmp_path / "rows.csv"
    items = "crash off hang not_a_number other_shape wrong_when_replayed out_of_memory unsupported torch".split()
    done = command(
        broken_items,
        "--model",
        write_model(),
        "--weights",
        "random",
        "--test-items",
        *items,
        "--timeout",
        30,  # more than any of the others takes on a busy machine
        "--iterations",
        3,
        "--results",
        results,
    )
    assert done.returncode == 1
    rows = {row["test_item"]: row for row in read_csv(results)}
    assert list(rows) == items
    assert {name: row["status"] for name, row in rows.items()} == {
        "crash": "failed",
        "off": "wrong",
        "hang": "failed",
        "not_a_number": "wrong",
        "other_shape": "wrong",
        "wrong_when_replayed": "wrong",
        "out_of_memory": "failed",
        "unsupported": "failed",
        "torch": "ok",
    }
    assert float(rows["off"]["rel_error"]) == pytest.approx(0.01, rel=1e-3)
    assert float(rows["not_a_number"]["rel_error"]) == math.inf
    assert "SIGSEGV" in rows["crash"]["error"] and "SIGKILL" in rows["out_of_memory"]["error"]
    assert "30 s" in rows["hang"]["error"] and "compiling" not in rows["hang"]["infer_time_mean_ms"]
    assert rows["unsupported"]["error"] == "NotImplementedError: no operator for this"
    assert "Traceback" not in done.stderr


def test_several_cases_of_which_items_fail(command, broken_items, write_model, tmp_path):
    results = tmp_path / "rows.csv"
    models = [write_model(name="one"), write_model(name="other")]
    arguments = ["--model", *models, "--batch-size", 1, 2, "--precision", "fp32", "bf16", "--weights", "random"]
    items = ["--test-items", "crash", "torch", "off", "--iterations", 3, "--results", results]
    done = command(broken_items, *arguments, *items)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    rows = read_csv(results)
    cases = [(str(model), size, precision) for model in models for size in "12" for precision in ("fp32", "bf16")]
    assert [(row["model_name"], row["batch_size"], row["precision"]) for row in rows[::3]] == cases
    for crashed, torch_row, off in zip(rows[::3], rows[1::3], rows[2::3]):
        assert crashed["status"] == "failed" and "SIGSEGV" in crashed["error"] and torch_row["status"] == "ok"
        assert off["status"] == ("wrong" if off["precision"] == "fp32" else "ok")  # by 1 %
    assert len({row["harness_version"] for row in rows}) == 1


def test_one_bad_model_among_several_runs_nothing(command, write_model, tmp_path):
    arguments = ["--model", write_model(), tmp_path / "missing", "--weights", "random", "--test-items", "torch"]
    done = command("benchmark.py", *arguments, "--results", tmp_path / "rows.csv")
    assert done.returncode == 2 and done.stdout == "" and "missing is not a directory" in done.stderr
    assert not (tmp_path / "rows.csv").exists()


def test_the_checkout_stays_clean(command, write_model, tmp_path):
    """A first run and a sweep of a newcomer's write to files that git ignores."""
    checkout = tmp_path / "checkout"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(None, files.stdout.splitlines()):
        if (ROOT / name).exists():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    git = ["git", "-C", checkout, "-c", "user.name=x", "-c", "user.email=x@y"]
    for arguments in (["init"], ["add", "."], ["commit", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    quick = ["--weights", "random", "--test-items", "torch", "--iterations", 3]
    done = command(checkout / "benchmark.py", "--model", write_model(), *quick)
    assert done.returncode == 0, done.stderr
    done = command(
        checkout / "benchmark_all.sh", "--", *quick, MODELS=tmp_path / "model", BATCH_SIZES="1 2", PYTHON=sys.executable
    )
    assert done.returncode == 0, done.stderr
    assert len(read_csv(checkout / "results" / "local" / "benchmark.csv")) == 2  # the first row was there already
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    assert status.stdout == ""


@pytest.mark.parametrize("parse, script", [(benchmark.parse_args, "benchmark.py"), (plot.parse_arguments, "plot.py")])
def test_both_scripts_say_which_version_they_are(capsys, parse, script):
    with pytest.raises(SystemExit, match="0"):
        parse(["--version"])
    assert capsys.readouterr() == (f"{script} {harness_version()}\n", "")


def test_half_precision_has_a_tolerance_of_its_own(command, broken_items, write_model, tmp_path):
    results = tmp_path / "rows.csv"
    arguments = ["--model", write_model(), "--weights", "random", "--precision", "fp16", "--iterations", 7]
    command(broken_items, *arguments, "--test-items", "torch", "off", "far_off", "--results", results)
    torch_row, off_row, far_off_row = read_csv(results)
    assert torch_row["status"] == off_row["status"] == "ok"  # off by 1 %: within fp16's 2 %
    assert far_off_row["status"] == "wrong" and float(far_off_row["rel_error"]) == pytest.approx(0.05, rel=0.1)
    assert 1e-5 < float(torch_row["rel_error"]) < float(off_row["rel_error"])
    assert torch_row["precision"] == "fp16" and torch_row["iterations"] == "7"


def test_ctrl_c_keeps_the_rows_that_ended(broken_items, write_model, tmp_path):
    results, scratch = tmp_path / "rows.csv", tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [
            sys.executable,
            broken_items,
            "--model",
            write_model(),
            "--weights",
            "random",
            "--test-items",
            "torch",
            "hang",
            "--results",
            results,
        ],
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not results.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # the item that hangs has its turn now
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert [row["status"] for row in read_csv(results)] == ["ok"]
    assert "Traceback" not in errors
    assert list(scratch.iterdir()) == []
    assert subprocess.run(["pgrep", "-f", str(broken_items)], capture_output=True).stdout == b""


def test_missing_tvm_is_a_failed_row_that_names_the_remedy(command, write_model, tmp_path):
    (tmp_path / "shadow" / "tvm").mkdir(parents=True)
    (tmp_path / "shadow" / "tvm" / "__init__.py").write_text("raise ImportError('libtvm.so: cannot open')")
    results = tmp_path / "rows.csv"
    done = command(
        "benchmark.py",
        "--model",
        write_model(),
        "--test-items",
        "tvm",
        "torch",
        "--iterations",
        3,
        "--results",
        results,
        PYTHONPATH=tmp_path / "shadow",
    )
    assert done.returncode == 1
    tvm_row, torch_row = read_csv(results)
    assert tvm_row["status"] == "failed" and torch_row["status"] == "ok"
    assert "pip install -r requirements.txt" in tvm_row["error"] and "libtvm.so" in tvm_row["error"]


def test_a_dead_reference_fails_every_item_and_says_why(command, write_model, tmp_path):
    # One layer of scale zero makes the output all zero: nothing can be checked against that.
    import torch

    directory = write_model({**TINY_RESNET, "num_labels": 1})
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig.from_pretrained(directory))
    torch.nn.init.zeros_(model.classifier[1].weight)
    torch.nn.init.zeros_(model.classifier[1].bias)
    model.save_pretrained(directory)
    results = tmp_path / "rows.csv"
    done = command(
        "benchmark.py", "--model", directory, "--test-items", "torch", "--iterations", 3, "--results", results
    )
    assert done.returncode == 1
    assert [(row["status"], row["error"]) for row in read_csv(results)] == [
        ("failed", "ValueError: the reference is all zero")
    ]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--batch-size", "0"], "at least 1"),
        (["--batch-size", "-1"], "at least 1"),
        (["--batch-size", "four"], "at least 1"),
        (["--iterations", "0"], "at least 1"),
        (["--image-size", "1.5"], "at least 1"),
        (["--timeout", "nan"], "positive number"),
        (["--device", "cuda:9"], "cuda:9"),
        (["--device", "tpu"], "auto, cuda, cuda:N or cpu"),
        (["--test-items", "onnx"], "torch_compile"),
        (["--precision", "fp8"], "bf16"),
        (["--weights", "none"], "pretrained"),
        (["--no-such-option"], "--no-such-option"),
        (["--results", "."], "is a directory"),
        (["--results", "missing/rows.csv"], "no directory missing"),
        (["--results", "foreign.csv"], "another header"),
        (["--model", "./nowhere"], "not a directory"),
        (["--model", "a/b/c"], "neither a hub id"),
        (["--model", "empty"], "no config.json"),
        (["--model", "nobody/knows-it"], "built in"),
        (["--model", "microsoft/resnet-50", "--weights", "pretrained"], "cannot be reached"),
    ],
)
def test_bad_input(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "foreign.csv").write_text("a,b,c\n1,2,3\n")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    if "--results" not in arguments:
        arguments = [*arguments, "--results", "rows.csv"]
    if "--model" not in arguments:
        arguments = [*arguments, "--model", "microsoft/resnet-50", "--weights", "random"]
    assert_refused(arguments, says, capsys)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "foreign.csv").read_text() == "a,b,c\n1,2,3\n"


def assert_refused(arguments, says, capsys):
    try:
        code = benchmark.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("benchmark.py: error: ") and says in err, err


def test_results_that_cannot_be_written(capsys):
    # Not even root, who may write to any read-only file, can make a file there.
    assert_refused(["--weights", "random", "--results", "/proc/rows.csv"], "not writable", capsys)


def test_cuda_where_there_is_none(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.torch.cuda, "device_count", lambda: 0)
    arguments = ["--weights", "random", "--device", "cuda", "--results", tmp_path / "rows.csv"]
    assert_refused(arguments, "--device cpu", capsys)


@pytest.mark.parametrize(
    "config, says",
    [
        ({"hidden_size": 8}, "model_type"),
        ({"model_type": "from-next-year"}, "a newer one may"),
        ({"model_type": "theirs", "auto_map": {"AutoModel": "modeling.Theirs"}}, "never run"),
        ({"model_type": "time_series_transformer", "prediction_length": 4}, "past_time_features"),  # of no time at all
        ({"model_type": "siglip_text_model"}, "no model class"),
        ({"model_type": "bark"}, "no forward()"),
        ({"model_type": "pi0"}, "takes action_embeds"),
        ({"model_type": "voxtral_realtime_text"}, "no model class"),  # transformers' table names one that is not there
        ({**TINY_RESNET, "layer_type": "none"}, "layer_type"),
    ],
)
def test_config_that_cannot_be_run(config, says, write_model, capsys, tmp_path):
    directory = write_model(config)
    assert_refused(["--model", directory, "--weights", "random", "--results", tmp_path / "rows.csv"], says, capsys)
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize(
    "model_type, task, says",
    [
        ("resnet", "no-such-task", "text-classification"),  # the line lists the names
        ("resnet", "text-classification", "--task text-classification"),
    ],
)
def test_task_that_cannot_be_run(model_type, task, says, write_model, capsys, tmp_path):
    arguments = ["--model", write_model(), "--task", task, "--weights", "random", "--results", tmp_path / "rows.csv"]
    assert_refused(arguments, says, capsys)


@pytest.mark.parametrize("model_type, library", [("dinat", "natten"), ("higgs_audio_v2_tokenizer", "torchaudio")])
def test_family_whose_library_is_missing(model_type, library, write_model, capsys, tmp_path):
    arguments = ["--model", write_model({"model_type": model_type}), "--weights", "random"]
    assert_refused([*arguments, "--results", tmp_path / "rows.csv"], library, capsys)


def test_pickled_weights_are_never_opened(write_model, capsys, tmp_path):
    directory = write_model()
    (directory / "pytorch_model.bin").write_bytes(b"whatever it is")
    assert_refused(["--model", directory, "--results", tmp_path / "rows.csv"], "pickled", capsys)
    config, weights = find_model(str(directory), "random")
    assert weights is None and config.model_type == "resnet"


def test_damaged_checkpoint(write_model, capsys, tmp_path):
    directory = write_model()
    (directory / "model.safetensors").write_bytes(b"not safetensors")
    assert_refused(["--model", directory, "--results", tmp_path / "rows.csv"], "cannot be loaded", capsys)
