"""The sweep: benchmark_all.sh goes on past failures and ends with tables and pictures."""

import sys

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
