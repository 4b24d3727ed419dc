"""The published schedules under NVIDIA's compute-sanitizer: no kernel leaves its buffers, no threads of a block race.

    pytest -m gpu -s tests/test_sanitizer.py

compute-sanitizer comes with the CUDA toolkit. A large model takes minutes: `-k "1x3 and memcheck"` picks some.
"""

import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

SANITIZER = shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
DATABASES = sorted((ROOT / "results" / "tuning").glob("*/*.json.gz"))


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not SANITIZER, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("database", DATABASES, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_published_schedules_are_clean(database, tool):
    done = subprocess.run(
        [
            SANITIZER,
            "--tool",
            tool,
            "--error-exitcode",
            "99",
            sys.executable,
            ROOT / "tests" / "run_tuned.py",
            database,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    found = [line for line in done.stdout.splitlines() if line.startswith(("=========", database.name))]
    print(f"\n{tool}: " + "\n".join(found[-20:]))
    assert done.returncode == 0, done.stdout[-4000:]
    assert any("SUMMARY: 0 " in line for line in found)  # the tool has run, and says so
