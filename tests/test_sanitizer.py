"""Published schedules and templates under NVIDIA's compute-sanitizer: kernels stay in their buffers, no threads race.

    pytest -m gpu -s tests/test_sanitizer.py

compute-sanitizer comes with the CUDA toolkit. racecheck takes minutes: `-k "published and fp16 and memcheck"` picks
one run.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

SANITIZER = shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
TOOLS = ["memcheck", "racecheck"]
TUNED = sorted(  # (directory of a device, precision)
    {
        (file.parent, json.loads(line)["case"].rpartition(".")[2])
        for file in (ROOT / "results" / "tuning").glob("*/cases.jsonl")
        for line in file.read_text().splitlines()
    }
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not SANITIZER, reason="no compute-sanitizer"),
]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
}


def run(script, *arguments, under=()):
    """Returns the finished run of a script of tests/, under another command."""
    command = [*under, sys.executable, ROOT / "tests" / script, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def run_clean(tool, script, *arguments):
    """Runs a script under one of compute-sanitizer's tools; asserts that it passes and nothing is found."""
    done = run(script, *arguments, under=[SANITIZER, "--tool", tool, "--error-exitcode", "99"])
    found = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    print(f"\n{tool}: " + "\n".join([*found, *done.stdout.splitlines()][-20:]))
    assert done.returncode == 0, done.stdout[-4000:]
    assert any("SUMMARY: 0 " in line for line in found)  # the tool has run, and says so


def build(directory, script, *arguments):
    """Returns the directory, where a script has built kernels: without the tool, which would take its time there."""
    done = run(script, *arguments, directory)
    assert done.returncode == 0, done.stdout[-4000:]
    return directory


@pytest.fixture(scope="module", params=TUNED, ids=[f"{path.name}-{precision}" for path, precision in TUNED])
def built_library(request, tmp_path_factory):
    """Gives a directory with the kernels of a published library, each by its best schedule."""
    return build(tmp_path_factory.mktemp("library"), "build_published.py", *request.param)


@pytest.mark.parametrize("tool", TOOLS)
def test_published_schedules_are_clean(built_library, tool):
    run_clean(tool, "run_built.py", built_library)


@pytest.fixture(scope="module", params=["fp16", "bf16", "tf32", "fp32"])
def built_templates(request, tmp_path_factory):
    """Gives a directory with a random candidate of each template for each task of small models."""
    return build(tmp_path_factory.mktemp(request.param), "run_templates.py", request.param, "1")


@pytest.mark.parametrize("tool", TOOLS)
def test_templates_are_clean(built_templates, tool):
    run_clean(tool, "run_built.py", built_templates)
