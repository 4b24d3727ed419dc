import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.case import Case  # noqa: E402
from harness.models import find_model_class  # noqa: E402

# A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that: tests that send it would
# wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)

QUICK = "-- --weights random --test-items torch --iterations 3".split()  # what a sweep hands on to benchmark.py
# TVM's target, as find_target() gives it there.
H200 = """{"kind": "cuda", "arch": "sm_90", "max_num_threads": 1024, "max_threads_per_block": 1024,
           "max_shared_memory_per_block": 49152, "thread_warp_size": 32}"""
TURING = H200.replace("sm_90", "sm_75")  # which no template runs on
TINY_RESNET = {
    "model_type": "resnet",
    "architectures": ["ResNetForImageClassification"],
    "embedding_size": 16,
    "hidden_sizes": [32, 64],
    "depths": [1, 1],
    "num_labels": 10,
    "image_size": 32,
}

TINY_BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 1000,
    "pad_token_id": 0,
}

# Files of few and long tests: first, so that at the end of a run no worker is left with one of them alone.
LONG = "test_benchmark test_tuning test_models test_resume test_decode test_sweep test_loop".split()


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files that have the most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if not torch.cuda.device_count():  # asks NVML: a process that has asked CUDA cannot fork one that uses it
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def write_model(tmp_path):
    """Gives a function that writes a model directory with a config.json and returns its path."""

    def write(config=TINY_RESNET, name="model"):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return write


@pytest.fixture
def command(tmp_path):
    """Gives a function that runs one of the project's scripts as a user does and returns the CompletedProcess."""

    def run(script, *arguments, timeout=300, **variables):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **{k: str(v) for k, v in variables.items()}}
        interpreter = "bash" if str(script).endswith(".sh") else sys.executable
        return subprocess.run(
            [interpreter, str(ROOT / script), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            cwd=tmp_path,
        )

    return run


@pytest.fixture(scope="session")
def tvm():
    """TVM, with what it needs at every precision; imported when a test asks for it."""
    from tvm_items.imports import import_tvm_for_tuning

    import_tvm_for_tuning("fp16")
    import tvm

    return tvm


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def process_list():
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()


def make_case(config, weights_dir=None, **fields):
    return Case(
        **{
            "model_name": "test",
            "model_class": find_model_class("test", config),
            "config": config,
            "weights": "pretrained" if weights_dir else "random",
            "weights_dir": weights_dir and str(weights_dir),
            "batch_size": 1,
            "seq_len": 128,
            "image_size": None,
            "precision": "fp32",
            "device": "cpu",
            "device_name": "a CPU",
            "tuning_dirs": (ROOT / "results" / "tuning",),
            "iterations": None,
            **fields,
        }
    )
