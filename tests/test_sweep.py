"""The sweep and what is made of its rows: benchmark_all.sh, the table and the pictures."""

import csv
import os
import shutil
import sys

import pytest

from conftest import QUICK, ROOT, read_csv
from harness.rows import COLUMNS

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
    assert "4 cases" in done.stdout and "2 with rows that are not ok" in done.stdout
    assert done.stdout.count(f"exit code 2: benchmark.py --model {missing} --batch-size") == 2
    assert "| /" in done.stdout.replace("  ", "") or "/ |" in done.stdout  # the table is printed
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


def row(item, batch_size, mean, **fields):
    ok = mean is not None
    return {
        "model_name": "some/model",
        "test_item": item,
        "batch_size": batch_size,
        "status": "ok" if ok else "failed",
        "infer_time_mean_ms": mean if ok else "",
        "infer_time_min_ms": mean * 0.9 if ok else "",
        "infer_time_p90_ms": mean * 1.1 if ok else "",
        "compile_time_s": "" if item == "torch" or not ok else 7.25,
        "error": "" if ok else "RuntimeError: a | b",
        "precision": "fp32",
        "device_name": "GPU A",
        "weights": "random",
        "input_shape": f"pixel_values={batch_size}x3x224x224",
        "torch_version": "2",
        "tvm_version": "0.27",
        "timestamp_utc": "2026-01-01T00:00:00+00:00",
        **fields,
    }


@pytest.fixture
def project(tmp_path):
    """-> a copy of the project's scripts and READMEs, with a function that writes its results/benchmark.csv."""
    copy = tmp_path / "project"
    (copy / "docs").mkdir(parents=True)
    (copy / "results").mkdir()
    shutil.copytree(ROOT / "harness", copy / "harness")
    for name in ("plot.py", "README.md", "docs/README.zh-CN.md", "docs/coverage.md"):
        shutil.copy(ROOT / name, copy / name)

    def write(rows, name="results/benchmark.csv"):
        with (copy / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    return copy, write


def table_rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_plot_writes_the_tables_and_the_pictures(command, project):
    copy, write = project
    write(
        [
            row("torch", 1, 99.0),
            row("tvm", 1, 50.0),
            row("torch", 1, 3.2, timestamp_utc="2026-01-02T00:00:00+00:00"),  # run again: this one counts
            row("tvm", 4, 0.6, precision="fp16"),
            row("torch", 1, 9.0, device_name="GPU B"),
        ]
    )
    done = command(copy / "plot.py")
    assert done.returncode == 0, done.stderr
    assert (copy / "docs" / "some_model_infer_time.png").read_bytes().startswith(b"\x89PNG")
    for readme in (copy / "README.md", copy / "docs" / "README.zh-CN.md"):
        text = readme.read_text()
        written = text[text.index("<!-- results") : text.index("<!-- end of results")]
        assert done.stdout.strip() in written
    assert [line for line in done.stdout.splitlines() if line.startswith("#")] == [
        "### GPU A, fp16",
        "### GPU A, fp32",
        "### GPU B, fp32",
    ]
    header, _, *_ = table_rows(done.stdout)
    assert header == ["model_name", "test_item", "batch_size", "compile_time_s", "infer_time_mean_ms"]
    cells = table_rows(done.stdout)
    assert ["some/model", "torch", "1", "/", "3.200"] in cells and ["some/model", "tvm", "1", "7.2", "50.000"] in cells
    assert not any("99.000" in line for line in cells)


def test_plot_shows_what_is_not_ok_and_draws_no_time_for_it(command, project):
    copy, write = project
    write([row("torch", 1, 3.2), row("tvm", 1, None), row("torch_compile", 1, 1.0, status="wrong", error="off")])
    done = command(copy / "plot.py")
    cells = table_rows(done.stdout)
    assert cells[0][-1] == "status"
    assert ["some/model", "torch_compile", "1", "", "", "wrong: off"] in cells
    assert "failed: RuntimeError: a \\| b" in done.stdout
    write([row("tvm", 1, None)])
    assert command(copy / "plot.py").returncode == 0  # a picture without a single bar


def test_plot_tables_the_coverage(command, project):
    copy, write = project
    write([row("torch", 1, 3.0)])
    rows = [row("torch", 1, 3.0), row("torch_compile", 1, 1.5), row("tvm", 1, 12.0)]
    rows += [row(item, 1, mean, model_name="other/model") for item, mean in [("torch", 2.0), ("tvm", None)]]
    write(rows, "results/coverage.csv")
    assert command(copy / "plot.py").returncode == 0
    page = (copy / "docs" / "coverage.md").read_text()
    assert ["some/model", "random", "3.000 ms", "2.00x faster", "4.00x slower"] in table_rows(page)
    assert ["other/model", "random", "2.000 ms", "", "failed"] in table_rows(page)
    assert "- other/model, tvm, failed: RuntimeError: a | b" in page
    for name in ("README.md", "docs/README.zh-CN.md", "docs/coverage.md"):
        assert ["GPU A", "fp32", "2 of 2", "1 of 1", "1 of 2"] in table_rows((copy / name).read_text())


def test_plot_keeps_input_sizes_apart_and_takes_several_files(command, project):
    copy, write = project
    write([row("torch", 1, 1.0)], "a.csv")
    write([row("torch", 1, 5.0, input_shape="pixel_values=1x3x384x384")], "b.csv")
    before = (copy / "README.md").read_bytes()
    done = command(copy / "plot.py", copy / "a.csv", copy / "b.csv")
    names = {line[0] for line in table_rows(done.stdout)[2:]}
    assert names == {"some/model (pixel_values=3x224x224)", "some/model (pixel_values=3x384x384)"}
    assert (copy / "some_model_infer_time.png").exists()
    assert (copy / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "cannot be read"),
        ("", "cannot be read"),
        ("a,b\n1,2\n", "no column"),
        (",".join(COLUMNS) + "\n", "no rows yet"),
    ],
)
def test_plot_refuses_what_is_no_result(command, content, says, tmp_path):
    if content is not None:
        (tmp_path / "rows.csv").write_text(content)
    done = command("plot.py", "rows.csv")
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ([] if content is None else ["rows.csv"])
