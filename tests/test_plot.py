"""plot.py as a user meets it: tables, verdicts and pictures of made-up rows, and what is no CSV of ours."""

import os
import shutil

import pytest

import plot
from conftest import ROOT
from harness.rows import COLUMNS, PUBLISHED_COVERAGE, PUBLISHED_DECODE, PUBLISHED_RESULTS
from made_up_rows import row, write_csv

PAGES = ("README.md", "docs/coverage.md", "docs/decode.md", "docs/results.md")
LONG_HEADER = ["model_name", "test_item", "batch_size", "compile_time_s", "infer_time_mean_ms"]
GRAPHS = "torch_compile_reduce_overhead"


@pytest.fixture
def project(tmp_path):
    """Returns a copy of the project's scripts and pages, and a function that writes a CSV in it."""
    copy = tmp_path / "project"
    (copy / "docs").mkdir(parents=True)
    (copy / "results" / "local").mkdir(parents=True)
    shutil.copytree(ROOT / "harness", copy / "harness")
    for name in ("plot.py", *PAGES):
        shutil.copy(ROOT / name, copy / name)

    def write(rows, name="results/benchmark.csv"):
        return write_csv(copy / name, rows)

    return copy, write


@pytest.fixture
def show(command, tmp_path):
    """Returns a function that runs plot.py on made-up rows and returns what it prints."""

    def run(rows, *options):
        done = command("plot.py", *options, write_csv(tmp_path / "rows.csv", rows))
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout

    return run


def table_rows(text):
    """Returns the cells of all tables in the text, row by row."""
    return [
        [cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def headings(text):
    return [line for line in text.splitlines() if line.startswith("### ")]


def part(path, name):
    text = path.read_text()
    return text[text.index(f"<!-- {name}:") : text.index(f"<!-- end of {name}")]


def snapshot(directory):
    return {
        path: path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "local" not in path.parts
    }


def test_the_times_of_a_case_stand_in_one_line(show):
    shown = show(
        [
            row("torch", 1, 99.0),
            row("tvm", 1, 50.0),
            row("torch", 1, 3.2, timestamp_utc="2026-01-02T00:00:00+00:00"),  # run again: this one counts
            row("my_item", 1, 8.0),
            row("tvm", 4, 0.6, precision="fp16"),
            row("torch", 1, 9.0, device_name="GPU B"),
        ]
    )
    assert headings(shown) == ["### GPU A, fp16", "### GPU A, fp32", "### GPU B, fp32"]
    cells = table_rows(shown)
    assert ["model", "batch size", "torch", "tvm", "my_item"] in cells
    assert ["some/model", "1", "**3.20 ± 0.03**", "50.0 ± 0.5", "8.00 ± 0.08"] in cells
    assert ["some/model", "4", "0.600 ± 0.006"] in cells  # alone: no winner
    assert "99" not in shown
    assert "ʰ" not in shown and "ᵈ" not in shown


def test_the_long_table_has_the_founding_columns(show):
    rows = [row("torch", 1, 3.0), row("tvm", 1, 50.0)]
    cells = table_rows(show(rows, "--long"))
    assert cells[0] == LONG_HEADER
    assert cells[2:] == [["some/model", "torch", "1", "/", "3.030"], ["some/model", "tvm", "1", "7.2", "50.500"]]
    rows += [row("tvm_tune", 1, 2.0, tune_time_s=330.2), row("torch_compile", 1, None)]
    cells = table_rows(show(rows, "--long"))
    assert cells[0] == [*LONG_HEADER, "tune_time_s", "status"]
    assert ["some/model", "tvm_tune", "1", "7.2", "2.020", "330", "ok"] in cells
    assert ["some/model", "torch_compile", "1", "", "", "", "failed: RuntimeError: a ¦ b"] in cells


@pytest.mark.parametrize(
    "other",
    [
        {"precision": "fp16"},
        {"device_name": "GPU B"},
        {"weights": "pretrained"},
        {"cpu_threads": 2},
        {"torch_version": "3"},
        {"tvm_version": "1"},
        {"transformers_version": "6"},
        {"harness_version": "abc"},
    ],
)
def test_rows_of_different_settings_never_share_a_table(show, other):
    shown = show([row("torch", 1, 3.0), row("tvm", 1, 2.0, **other)])
    assert len(headings(shown)) == 2
    assert "use" not in [cell for line in table_rows(shown) for cell in line]  # no verdict on either


def test_a_heading_says_what_it_was_measured_with(show):
    shown = show([row("torch", 1, 3.0, driver_version="580", concurrent_cases=2, cpu_threads=16)])
    assert (
        "torch 2; TVM 0.27; transformers not recorded; driver 580; weights random; CPU threads 16; "
        "harness not recorded; cases at once: 2\n"
    ) in shown


def test_what_is_not_ok_says_so(show):
    shown = show([row("torch", 1, 3.2), row("tvm", 1, None), row("torch_compile", 1, 1.0, status="wrong", error="off")])
    assert ["some/model", "1", "3.20 ± 0.03", "wrong", "failed"] in table_rows(shown)
    assert "- some/model, batch size 1, torch_compile: wrong, `off`" in shown
    assert "- some/model, batch size 1, tvm: failed, `RuntimeError: a | b`" in shown
    show([row("tvm", 1, None)])  # a picture without a single point


def test_marks_are_explained_where_they_occur(show, tmp_path):
    rows = [
        row("torch", 1, 3.0, host_time_ms=2.8),
        row("tvm", 1, 2.0, host_time_ms=0.1, warnings="2.0% of the runs are outliers"),
    ]
    shown = show(rows)
    assert ["some/model", "1", "3.00 ± 0.03ʰ", "**2.00 ± 0.02ᵈ**"] in table_rows(shown)
    assert len([line for line in shown.splitlines() if line.startswith("ʰ waits for the host")]) == 1
    assert "; ᵈ disturbed" in shown
    assert (tmp_path / "some_model_infer_time.png").exists()


def test_the_verdict_names_item_price_and_break_even(show):
    cells = table_rows(
        show(
            [
                row("torch", 1, 4.0),
                row(GRAPHS, 1, 0.5, compile_time_s=10.0, warm_start_time_s=4.0),
                row("tvm_tune", 1, 0.3, compile_time_s=13.0, warm_start_time_s=1.0, tune_time_s=330.0),
                row("torch", 4, 4.0),
                row("torch_compile", 4, 3.99, compile_time_s=10.0),
            ]
        )
    )
    header = next(line for line in cells if "use" in line)
    first, tie = (dict(zip(header, line)) for line in cells[cells.index(header) + 2 :])
    assert first["use"] == "tvm_tune" and first["runner-up"] == GRAPHS and first["median, ms"] == "0.300"
    assert first["times faster"] == "1.67 ± 0.02" and first["eager: times faster"] == "13.3 ± 0.2"
    assert (first["compile, s"], first["second start, s"], first["search, s"]) == ("13.0", "1.0", "330")
    # (13 - 10) s / 0.2 ms and 13 s / 3.7 ms; with the search 333 s / 0.2 ms and 343 s / 3.7 ms.
    assert first["pays off after"] == "15,000 (1,665,000 with search)"
    assert first["eager: pays off after"] == "3,514 (92,703 with search)"
    assert tie["use"] == "torch (level with torch_compile)" and tie["compile, s"] == "/"
    assert tie["runner-up"] == tie["eager: times faster"] == tie["eager: pays off after"] == ""


def test_columns_that_no_case_fills_are_left_out_of_the_verdict(show):
    header = next(line for line in table_rows(show([row("torch", 1, 3.0), row("tvm", 1, 2.0)])) if "use" in line)
    assert "second start, s" not in header and "search, s" not in header and "compile, s" in header


def test_a_ratio_that_its_spread_swallows_is_no_number(show):
    cells = table_rows(show([row("torch", 1, 4.0, infer_time_std_ms=1.9), row("tvm", 1, 2.0, infer_time_std_ms=0.05)]))
    assert "2 ± 1" in cells[-1]
    cells = table_rows(show([row("torch", 1, 9.0, infer_time_std_ms=9.5, warnings="x"), row("tvm", 1, 2.0)]))
    assert "unclear" in cells[-1]


def test_own_rows_come_before_published_ones_and_nothing_published_changes(command, project):
    copy, write = project
    write([row("torch", 1, 3.0), row("tvm", 1, 2.0)])
    before = snapshot(copy)
    done = command(copy / "plot.py")
    assert done.returncode == 0 and "**2.00 ± 0.02**" in done.stdout and "published" in done.stderr
    write([], "results/local/benchmark.csv")
    assert "**2.00 ± 0.02**" in command(copy / "plot.py").stdout
    write([row("torch", 1, 7.0), row("tvm", 1, 8.0)], "results/local/benchmark.csv")
    done = command(copy / "plot.py")
    assert done.returncode == 0 and "**7.00 ± 0.07**" in done.stdout and not done.stderr
    assert snapshot(copy) == before
    assert sorted(path.name for path in (copy / "results" / "local").iterdir()) == [
        "benchmark.csv",
        "some_model_infer_time.png",
    ]


def test_publishing_fills_the_pages_and_the_pictures(command, project):
    copy, write = project
    measured = [row("torch", 1, 3.0), row("tvm", 1, 2.0)]
    write(measured)
    rows = [row("torch", 1, 3.0), row("torch_compile", 1, 1.5, warnings="x"), row("tvm", 1, 12.0)]
    rows += [row(item, 1, median, model_name="other/model") for item, median in [("torch", 2.0), ("tvm", None)]]
    rows += [row(item, 8, median) for item, median in [("torch", 2.0), ("tvm", 2.001)]]
    write(rows, "results/coverage.csv")
    step = {"phase": "decode", "context_len": "1024"}
    steps = [row(item, 1, 4.0, **step, tokens_per_s=250, bandwidth_share=0.4) for item in ("torch", "tvm")]
    write(steps, "results/decode.csv")
    write([row("torch", 1, 99.0)], "results/local/benchmark.csv")
    done = command(copy / "plot.py", "--publish")
    assert done.returncode == 0 and not done.stdout + done.stderr
    decoded = table_rows(part(copy / "docs" / "decode.md", "decode"))
    assert ["some/model", "1", *["250 tokens/s (40%)"] * 2] in decoded
    answer = table_rows(part(copy / "README.md", "answer"))
    assert ["model", "fp32", "1", "3.00 ± 0.03", "**2.00 ± 0.02**", "1.50x"] in answer
    assert "the fastest item is tvm in 1" in part(copy / "README.md", "short")
    tables = table_rows(part(copy / "docs" / "results.md", "tables"))
    assert ["some/model", "1", "3.00 ± 0.03", "**2.00 ± 0.02**"] in tables
    assert ["some/model", "tvm", "1", "7.2", "2.020"] in tables
    assert any("pays off" in cell for line in tables for cell in line)
    assert (copy / "docs" / "some_model_infer_time.png").read_bytes().startswith(b"\x89PNG")
    assert (copy / "docs" / "coverage.png").read_bytes().startswith(b"\x89PNG")
    covered = part(copy / "docs" / "coverage.md", "coverage")
    assert ["other/model", "fp32", "1", "2.00 ± 0.02", "", "failed", ""] in table_rows(covered)
    assert ["some/model", "fp32", "1", "3.00 ± 0.03", "**1.50 ± 0.01ᵈ**", "12.0 ± 0.1", "2.00x"] in table_rows(covered)
    assert ["some/model", "fp32", "8", "**2.00 ± 0.02**", "", "**2.00 ± 0.02**", "level"] in table_rows(covered)
    assert "- other/model, fp32, batch size 1, tvm: failed, `RuntimeError: a | b`" in covered
    for name in ("README.md", "docs/coverage.md"):
        totals = table_rows(part(copy / name, "totals"))
        assert ["GPU A", "fp32", "not recorded", "torch", "3 of 3", "/", "0", "1"] in totals
        assert ["GPU A", "fp32", "not recorded", "torch_compile", "1 of 1", "1", "1", "0"] in totals
        assert ["GPU A", "fp32", "not recorded", "tvm", "2 of 3", "0", "0", "1"] in totals
    before = snapshot(copy)
    older = {"harness_version": "0", "timestamp_utc": "2025-01-01T00:00:00+00:00"}
    superseded = [row("torch", 1, 5.0, **older), row("tvm", 1, 4.0, **older)]
    write([*superseded, *measured])
    assert command(copy / "plot.py", "--publish").returncode == 0
    after, history = snapshot(copy), copy / "results" / "history.csv.gz"
    assert after == before | {history: after[history]}  # what was measured again leaves the CSV, and no page shows it
    assert "4.040" in command(copy / "plot.py", "--long", history).stdout
    assert snapshot(copy) == after  # a published CSV: no picture beside it


def test_the_published_pages_say_what_the_published_rows_say():
    """Every figure in their generated parts: what is stale here wants `python plot.py --publish`."""
    published = (PUBLISHED_RESULTS, PUBLISHED_COVERAGE, PUBLISHED_DECODE)
    pages = plot.make_pages(*map(plot.read_published, published))
    assert {ROOT / name for name in PAGES} == set(pages)
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, page


def test_the_chinese_page_has_no_generated_part():
    """It links to the tables and shows the same pictures, so that nothing in it ages when rows are published."""
    text = (ROOT / "docs" / "README.zh-CN.md").read_text(encoding="utf-8")
    assert "plot.py writes this part" not in text and " ± " not in text.replace("中位数 ± 标准差", "")
    for target in ("../README.md", "results.md", *(name.name for name in (ROOT / "docs").glob("*_infer_time.png"))):
        assert f"]({target})" in text, target


def test_publishing_changes_no_page_where_one_lacks_its_place(command, project):
    copy, write = project
    write([row("torch", 1, 3.0)])
    for name in ("coverage", "decode"):
        write([row("torch", 1, 3.0)], f"results/{name}.csv")
    (copy / "docs" / "coverage.md").write_text("nothing\n")
    before = snapshot(copy)
    done = command(copy / "plot.py", "--publish")
    assert done.returncode == 2 and "lacks the lines" in done.stderr and len(done.stderr.splitlines()) == 1
    assert snapshot(copy) == before


def test_several_files_give_one_table_and_pictures_beside_the_first(command, tmp_path):
    (tmp_path / "second").mkdir()
    a = write_csv(tmp_path / "a.csv", [row("torch", 1, 5.0)])
    b = write_csv(tmp_path / "second" / "b.csv", [row("tvm", 1, 6.0), row("tvm", 1, 7.0, model_name="some_model")])
    done = command("plot.py", a, b)
    assert ["some/model", "1", "**5.00 ± 0.05**", "6.00 ± 0.06"] in table_rows(done.stdout)
    # Both names would make the same file name.
    assert len(list(tmp_path.glob("*.png"))) == 2 and not list((tmp_path / "second").glob("*.png"))


def test_strange_names_make_tables_and_pictures(show, tmp_path):
    shown = show(
        [
            row("torch", 1, 3.0, model_name="m" * 300),
            row("a$b_{item}", 2, 3.0, model_name="a|b $x_{ \n c"),
            row("torch", 2, 12345.6, model_name="slow"),
        ]
    )
    assert ["a¦b $x_{ c", "2", "", "3.00 ± 0.03"] in table_rows(shown)
    assert ["slow", "2", "12,300 ± 100", ""] in table_rows(shown)
    assert len(list(tmp_path.glob("*.png"))) == 3


HEADER = ",".join(COLUMNS)


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "cannot be read"),
        ("", "no column"),
        ("a,b\n1,2\n", "no column"),
        (HEADER.rpartition(",")[0] + "\n", f"no column {COLUMNS[-1]}"),
        (HEADER + "\n", "no rows yet"),
        (HEADER + "\nsome/mod", "no rows yet"),  # half written when the power went
        (HEADER + "\nsome/model\n" + "," * (len(COLUMNS) - 1) + "\n", "cells than the header"),
        (HEADER + "\n" + "," * len(COLUMNS) + "\n", "cells than the header"),
        (HEADER + "\n" + "," * (len(COLUMNS) - 1) + "\n", "model_name is empty"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_what_is_no_csv_of_ours_is_refused_in_one_line(command, content, says, tmp_path):
    if content is not None:
        (tmp_path / "rows.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(command("plot.py", "rows.csv"), says)
    assert os.listdir(tmp_path) == ([] if content is None else ["rows.csv"])


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"infer_time_median_ms": "12,5"}, "infer_time_median_ms is '12,5', not a number"),
        ({"host_time_ms": "fast"}, "host_time_ms is 'fast', not a number"),
        ({"infer_time_p90_ms": "inf"}, "no time can be"),
        ({"infer_time_min_ms": ""}, "infer_time_min_ms is '' in a row that is ok"),
        ({"infer_time_std_ms": "nan"}, "infer_time_std_ms is empty"),
        ({"infer_time_median_ms": "0"}, "infer_time_median_ms is '0' in a row that is ok"),
        ({"batch_size": ""}, "batch_size is empty"),
        ({"batch_size": "1.5"}, "batch_size is '1.5'"),
        ({"status": "good"}, "status is 'good'"),
    ],
)
def test_a_cell_that_makes_no_sense_is_named_in_one_line(command, tmp_path, fields, says):
    write_csv(tmp_path / "rows.csv", [row("torch", 1, 3.0), {**row("tvm", 1, 3.0), **fields}])
    refused(command("plot.py", "rows.csv"), "rows.csv, line 3: " + says if "no time" not in says else says)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "arguments, says",
    [(["--publish", "a.csv"], "--publish"), (["--publish", "--long"], "--publish"), (["--nonsense"], "--nonsense")],
)
def test_arguments_that_do_not_fit_are_refused(command, arguments, says):
    refused(command("plot.py", *arguments), says)


def test_help(command):
    done = command("plot.py", "--help")
    assert done.returncode == 0 and "--publish" in done.stdout and "results/local" in done.stdout


def refused(done, says):
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_a_picture_that_cannot_be_written_is_one_line(command, tmp_path):
    path = write_csv(tmp_path / "rows.csv", [row("torch", 1, 3.0)])
    (tmp_path / "some_model_infer_time.png").mkdir()
    done = command("plot.py", path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "3.00 ± 0.03" in done.stdout
