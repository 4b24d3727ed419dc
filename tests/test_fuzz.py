"""The ways in, fed with what nobody would write: a refusal in one line is all that may come out.

The cases are the same at every run, some hundreds of each kind. `FUZZ=10000 pytest tests/test_fuzz.py` tries so many of
each, other ones every time.
"""

import collections
import contextlib
import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import TINY_RESNET, make_case
from harness.checkpoints import check_model, find_safetensors
from harness.errors import UserError
from harness.inputs import describe_shapes
from harness.models import find_model, find_model_class
from tvm_items import library
from tvm_items.journal import Journal, journal_path, read_journal
from tvm_items.kin import find_starts
from tvm_items.records import TuningFileError
from tvm_items.tasks import Task

CASES = int(os.environ.get("FUZZ", 0))
tried, accepted = collections.Counter(), collections.Counter()

# ---- What is fed ----------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIGS = [
    TINY_RESNET,
    {"model_type": "bert", "vocab_size": 99, "architectures": ["BertForMaskedLM"], **SMALL},
    {"model_type": "vit", "image_size": 32, "patch_size": 8, "num_labels": 3, **SMALL},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99, "eos_token_id": [1, 2]},
    {"model_type": "clip", "text_config": {"vocab_size": 99, **SMALL}, "vision_config": {"image_size": 32, **SMALL}},
    {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 99},
    {"model_type": "detr", "backbone_config": {"model_type": "resnet", "depths": [1, 1]}, "num_queries": 5},
    {"model_type": "wav2vec2", "conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3], **SMALL},
]
KERNEL = {"task": "a", "name": "fused_matmul1_add", "arguments": ["float32[2,4]", "float32[]"], "space": 1}
KERNEL |= {"decisions": [[2, 4], 3], "seconds": 1e-6, "default_seconds": 2e-6, "arch": "sm_90", "case": "x.x=1.fp32"}
KERNEL |= {"device": "here", "tvm": "1"}
TUNED = {"case": "x.x=1.fp32", "device": "here", "tvm": "1", "tune_time_s": 1.5, "tune_trials": 9, "asked_trials": 8}
TUNED |= {"kernels": 5}
JOURNAL = [
    {"origin": "here"},
    {"task": "a", "elapsed_s": 1.5, "default_seconds": 1e-6, "estimated_ms": 0.5},
    {"task": "a", "elapsed_s": 2.5, "space": 1, "decisions": [[2, 4], 3], "seconds": None, "trials": 1, "error": "x"},
]
INDEX = {"metadata": {"total_size": 5}, "weight_map": {"a.weight": "x.safetensors", "b.weight": "y.safetensors"}}

HOSTILE = [
    -1,
    0,
    1.5,
    2**31,
    2**63,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "1",
    "\0",
    "../x.bin",
    "owner/repo",
    "é" * 300,
]
HOSTILE += [None, True, [], {}, [[]], {"": {}}, ["pipeline"], "\ud800", "x.safetensors", "/x.safetensors"]
KEYS = ["architectures", "auto_map", "backbone", "attn_implementation", "quantization_config", "num_labels", "id2label"]
KEYS += ["torch_dtype", "pruned_heads", "rope_parameters", "layer_types", "vocab_size", "image_size", "model_type", "x"]
values = st.one_of(
    st.sampled_from(HOSTILE).map(copy.deepcopy),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        max_leaves=8,
    ),
)


def places(value, path=()):
    """Yields the path of every place in a JSON value, the outermost first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


@st.composite
def damaged(draw, originals):
    """Draws one of the values with one to three of its places replaced, removed or added to."""
    value = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([path for path in places(value) if path] or [(None,)]))
        if last is None:
            return draw(values)
        holder = value
        for key in path:
            holder = holder[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "remove":
            del holder[last]
        elif change == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS) | st.text(max_size=9))] = draw(values)
        else:
            holder[last] = draw(values)
    return value


def written(originals):
    """Returns a strategy for the bytes of a file that should hold one of the JSON values."""
    whole = damaged(originals).map(lambda value: json.dumps(value).encode())
    cut = st.tuples(st.sampled_from(originals), st.integers(0, 400)).map(lambda t: json.dumps(t[0]).encode()[: t[1]])
    deep = st.sampled_from([b"[", b'{"a":', b"9", b"\xef\xbb\xbf{}"]).map(lambda part: 50_000 * part)
    return st.one_of(whole, whole, whole, cut, deep, st.binary(max_size=50))


def fuzz(strategy, cases):
    """Returns a decorator that runs a test with so many values of the strategy."""

    def decorate(test):
        options = {"max_examples": CASES or cases, "derandomize": not CASES, "database": None, "deadline": None}
        return settings(**options, suppress_health_check=list(HealthCheck))(given(strategy)(test))

    return decorate


@contextlib.contextmanager
def refusals(error_class, kind):
    """Lets an error of this class pass where its message is one line that can be printed; counts the case."""
    tried[kind] += 1
    try:
        yield
        accepted[kind] += 1
    except error_class as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        str(error).encode(errors="backslashreplace")


@pytest.fixture(scope="module", autouse=True)
def report(request):
    yield
    kinds = ", ".join(f"{number} of {kind} ({accepted[kind]} accepted)" for kind, number in sorted(tried.items()))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nfuzz: {sum(tried.values())} cases: {kinds}")


@contextlib.contextmanager
def scratch():
    directory = Path(tempfile.mkdtemp())
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


# ---- The ways in ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(0 if CASES else 600)
@fuzz(written(CONFIGS), 500)
def test_config_json(content):
    with scratch() as directory, refusals(UserError, "config.json"):
        (directory / "config.json").write_bytes(content)
        config, _ = find_model(str(directory), "random")
        model_class = find_model_class("test", config)
        assert issubclass(model_class, torch.nn.Module)
        describe_shapes(make_case(config, model_class=model_class))


@pytest.mark.timeout(0 if CASES else 600)
@fuzz(damaged(CONFIGS), 60)
def test_models_of_config_json(fields):
    with scratch() as directory, refusals(UserError, "models"):
        (directory / "config.json").write_text(json.dumps(fields))
        config, _ = find_model(str(directory), "random")
        assert check_model("test", find_model_class("test", config), config, None) == "random"


@pytest.mark.timeout(0 if CASES else 600)
@fuzz(written([INDEX]), 500)
def test_index(content):
    with scratch() as directory, refusals(UserError, "index"):
        for name in ("x.safetensors", "y.safetensors"):
            safetensors.torch.save_file({"a": torch.zeros(1)}, directory / name)
        (directory / "model.safetensors.index.json").write_bytes(content)
        files = find_safetensors(directory)
        assert files and {file.name for file in files} <= {"x.safetensors", "y.safetensors"}


@pytest.mark.timeout(0 if CASES else 600)
@fuzz(st.tuples(written([KERNEL]), written([TUNED])), 500)
def test_library(lines):
    with scratch() as directory, refusals(TuningFileError, "library"):
        (directory / "here").mkdir()
        for name, line, whole in zip((library.KERNELS, library.CASES), lines, (KERNEL, TUNED)):
            (directory / "here" / name).write_bytes(json.dumps(whole).encode() + b"\n" + line + b"\n")
        found = library.read_library([directory], "here", "1")
        for kernel in (*found.kernels.values(), *found.others):
            assert kernel.keys() == KERNEL.keys() and kernel["seconds"] >= 0
        tasks = [Task(key, "matmul", 1, "", (("float32", (4,)), ("float32", ()))) for key in "ab"]
        for start in find_starts(tasks, found, "sm_90", searches=True).values():
            assert all(space >= 0 for space, _ in start.known + start.kin)


@pytest.mark.timeout(0 if CASES else 600)
@fuzz(st.lists(written(JOURNAL), max_size=4), 500)
def test_journal(lines):
    with scratch() as directory, refusals(TuningFileError, "journal"):
        journal_path(directory / "case").write_bytes(b'{"origin": "here"}\n' + b"".join(line + b"\n" for line in lines))
        for line in read_journal(directory / "case", "here"):
            assert isinstance(line["task"], str) and line.get("space", 0) >= 0
        Journal(directory / "case", "here").append({"task": "a"})
        assert read_journal(directory / "case", "here")[-1] == {"task": "a"}
