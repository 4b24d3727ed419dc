"""Standard output that is gone, closed, full or of a small alphabet, and results that vanish: no run ends by it."""

import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, read_csv

VANISHING_RESULTS = f"""
import shutil, sys
sys.path.insert(0, {str(ROOT)!r})
import benchmark

def vanish(model, inputs, case):
    shutil.rmtree("rows")
    return lambda: model(**inputs)

benchmark.TEST_ITEMS["vanish"] = benchmark.TestItem(vanish)
if __name__ == "__main__":
    sys.exit(benchmark.main())
"""


@pytest.fixture
def strange_model(write_model, tmp_path):
    """Returns the path, in bytes, of a model directory whose name is not UTF-8."""
    path = os.fsencode(tmp_path) + b"/m\xff\xe9"
    shutil.move(write_model(), path)
    return path


def start(script, *arguments, redirected="", **options):
    """Returns the CompletedProcess of a script with a shell's redirections."""
    line = [sys.executable, ROOT / script, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **options.pop("variables", {})}
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirected}', "bash", *line], capture_output=True, env=environment, **options
    )


def quick(model):
    return ["--model", model, "--weights", "random", "--test-items", "torch", "--iterations", "3"]


@pytest.mark.parametrize(
    "redirected, variables, errors",
    [
        # A reader that goes before the first line.
        pytest.param("2>&1 | true; exit ${PIPESTATUS[0]}", {}, 0, marks=pytest.mark.slow),
        pytest.param(">&- 2>&- <&-", {}, 0, marks=pytest.mark.slow),
        (">/dev/full", {}, 1),
        pytest.param("", {"PYTHONIOENCODING": "latin-1"}, 0, marks=pytest.mark.slow),
        pytest.param(
            "", {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}, 0, marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_printed_costs_no_row(strange_model, tmp_path, redirected, variables, errors):
    arguments = [*quick(strange_model), "--results", "rows.csv", "--skip", "ok"]
    done = start("benchmark.py", *arguments, redirected=redirected, variables=variables, cwd=tmp_path)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == errors, done.stderr
    (row,) = read_csv(tmp_path / "rows.csv")
    assert row["status"] == "ok" and row["model_name"].endswith("/m\\udcff\\udce9")
    if "PYTHONIOENCODING" in variables:
        assert b"/m\\udcff\\udce9, batch size 1" in done.stdout and b" ms " in done.stdout
        again = start("benchmark.py", *arguments, variables=variables, cwd=tmp_path)
        assert again.returncode == 0 and b"already in rows.csv: torch (ok)" in again.stdout
        assert len(read_csv(tmp_path / "rows.csv")) == 1


@pytest.mark.slow
def test_a_results_directory_that_vanishes_costs_no_later_item(command, write_model, tmp_path):
    script = tmp_path / "vanishing_results.py"
    script.write_text(VANISHING_RESULTS)
    (tmp_path / "rows").mkdir()
    arguments = [*quick(write_model()), "--results", "rows/rows.csv"]
    done = command(script, *arguments, "--test-items", "vanish", "torch")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines() if " 3 runs" in line] == ["vanish", "torch"]
    assert "rows in rows/rows.csv, but for vanish, torch" in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 2 and all("is not written: FileNotFoundError" in line for line in errors), errors


@pytest.mark.parametrize(
    "redirected, code",
    [
        ("| true; exit ${PIPESTATUS[0]}", 0),
        pytest.param(">&-", 0, marks=pytest.mark.slow),
        (">/dev/full", 2),
    ],
)
def test_pictures_are_drawn_where_nobody_reads_the_tables(tmp_path, redirected, code):
    shutil.copy(ROOT / "results" / "benchmark.csv", tmp_path / "rows.csv")
    variables = {"PYTHONIOENCODING": "latin-1"}
    done = start("plot.py", "rows.csv", redirected=redirected, variables=variables, cwd=tmp_path)
    assert done.returncode == code and len(done.stderr.splitlines()) == bool(code), done.stderr
    assert len(list(tmp_path.glob("*.png"))) == (0 if code else 2)
