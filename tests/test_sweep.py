"""The sweep: benchmark_all.sh goes on past failures and ends with tables and pictures."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import QUICK, ROOT, read_csv

ENVIRONMENT = {"PYTHON": sys.executable}


def test_sweep_goes_on_past_failures(command, write_model, tmp_path):
    small, missing, results = write_model(), tmp_path / "missing", tmp_path / "rows.csv"
    readme = (ROOT / "README.md").read_bytes()
    done = command(
        "benchmark_all.sh",
        *QUICK,
        MODELS=f"{missing} {small}",
        BATCH_SIZES="1 3",
        RESULTS=results,
        **ENVIRONMENT,
    )
    assert done.returncode == 1
    assert [(row["model_name"], row["batch_size"]) for row in read_csv(results)] == [
        (str(small), "1"),
        (str(small), "3"),
    ]
    assert "4 cases by 2 processes" in done.stdout and "1 with rows that are not ok" in done.stdout
    assert done.stdout.count(f"exit code 2: benchmark.py --model {missing} --batch-size 1 3") == 1
    assert " ± " in done.stdout  # the table is printed
    assert [path.name for path in tmp_path.glob("*.png")] == [
        f"{str(small).strip('/').replace('/', '_')}_infer_time.png"
    ]
    assert (ROOT / "README.md").read_bytes() == readme


@pytest.mark.slow
def test_sweep_of_ok_rows_ends_with_zero(command, write_model, tmp_path):
    done = command(
        "benchmark_all.sh",
        *QUICK,
        MODELS=write_model(),
        BATCH_SIZES="2",
        PRECISIONS="fp32 bf16",
        RESULTS="rows.csv",
        **ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert "2 cases" in done.stdout and "0 with rows" in done.stdout
    assert [row["precision"] for row in read_csv(tmp_path / "rows.csv")] == ["fp32", "bf16"]
    assert "threads, bf16" in done.stdout and "threads, fp32" in done.stdout  # a table each


def test_sweep_refuses_arguments_of_its_own(command):
    done = command("benchmark_all.sh", "--precision", "fp16")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--precision" in done.stderr


def one_line(done):
    """Returns the only line of a script that refuses to run, on stderr."""
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout and line.startswith("benchmark_all.sh: error: ")
    return line


def test_lists_are_separated_by_any_white_space(command):
    lists = {"MODELS": "a\nb\n", "BATCH_SIZES": "\t1\n\n8", "PRECISIONS": " fp32\tfp16 ", **ENVIRONMENT}
    done = command("benchmark_all.sh", "--list", **lists)
    cases = [(line[3], line[5], line[7]) for line in map(shlex.split, done.stdout.splitlines())]
    assert cases == [(model, size, precision) for model in "ab" for size in "18" for precision in ("fp32", "fp16")]
    refused = command("benchmark_all.sh", "--list", GPUS="0\n1", JOBS="3", **ENVIRONMENT)
    assert "GPUS names 2" in one_line(refused)


@pytest.mark.parametrize("name", ["MODELS", "BATCH_SIZES", "PRECISIONS", "GPUS", "HOSTS"])
def test_an_empty_list_is_refused(command, name):
    assert name in one_line(command("benchmark_all.sh", **{name: " \n\t"}, **ENVIRONMENT))


@pytest.mark.parametrize(
    "option, variable",
    [
        ("--model", "MODELS"),
        ("--batch-size=8", "BATCH_SIZES"),
        ("--batch", "BATCH_SIZES"),
        ("--precision", "PRECISIONS"),
        ("--results", "RESULTS"),
        ("--res=x", "RESULTS"),
        ("--skip=ok", "RETRY"),
        ("--concurrent-cases", "JOBS"),
    ],
)
def test_options_that_the_sweep_sets_itself_are_refused(command, option, variable):
    line = one_line(command("benchmark_all.sh", "--", "--verbose", option, "8", **ENVIRONMENT))
    assert option in line and variable in line


@pytest.mark.parametrize("variable, value", [("PYTHON", "no-such-python"), ("PATH", None)])
def test_a_missing_program_is_refused_before_anything_runs(command, tmp_path, variable, value):
    if variable == "PATH":  # of all that the script needs but setpriv
        value = tmp_path / "bin"
        value.mkdir()
        for name in ("bash", "dirname", "realpath", "mkdir", "sed"):
            (value / name).symlink_to(shutil.which(name))
    done = command("benchmark_all.sh", **{**ENVIRONMENT, "RESULTS": tmp_path / "rows.csv", variable: value})
    assert ("no-such-python" if variable == "PYTHON" else "setpriv") in one_line(done)
    assert not (tmp_path / "rows.csv").exists()


def test_help_is_the_comment_at_the_top(command):
    done = command("benchmark_all.sh", "--help")
    assert done.returncode == 0 and not done.stderr
    assert all(name in done.stdout for name in ("MODELS", "BATCH_SIZES", "RETRY=failed", "HOSTS", "Exit code"))
    assert "#" not in done.stdout and "set -u" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("redirected", ["| head -1; exit ${PIPESTATUS[0]}", ">&-"])
def test_a_sweep_goes_on_where_nobody_reads_it(write_model, tmp_path, redirected):
    variables = {"MODELS": str(write_model()), "BATCH_SIZES": "1 2", "RESULTS": str(tmp_path / "rows.csv")}
    line = shlex.join(["bash", str(ROOT / "benchmark_all.sh"), *QUICK])
    environment = {**os.environ, **ENVIRONMENT, **variables}
    done = subprocess.run(["bash", "-c", f"{line} {redirected}"], env=environment, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and b"rror" not in done.stderr, done.stderr
    assert [row["batch_size"] for row in read_csv(tmp_path / "rows.csv")] == ["1", "2"]
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_phases_and_context_lengths_are_swept(command):
    variables = {"MODELS": "a/b", "BATCH_SIZES": "1 4", "PHASES": "forward decode", "CONTEXT_LENS": "64 128"}
    lines = command("benchmark_all.sh", "--list", **variables, **ENVIRONMENT).stdout.splitlines()
    assert len(lines) == 6 and sum("--phase" in line for line in lines) == 4
    assert sum("--batch-size 4 --precision fp32 --phase decode --context-len 128 " in line for line in lines) == 1
    done = command("benchmark_all.sh", "--list", **variables | {"PHASES": "prefill"}, **ENVIRONMENT)
    assert done.returncode == 2 and "PHASES takes forward and decode" in done.stderr
