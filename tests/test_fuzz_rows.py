"""The CSV and the command lines, fed with what nobody would write; see test_fuzz.py, whose rules hold here."""

import contextlib
import io
import os
import subprocess
import sys
import warnings

import pytest
from hypothesis import strategies as st
from test_fuzz import CASES, fuzz, refusals, scratch
from test_fuzz import report as report

import benchmark
import plot
from conftest import ROOT
from harness import models
from harness.errors import UserError
from harness.reports.comparison import compare, drop_superseded, read_rows
from harness.reports.pictures import save_pictures
from harness.reports.tables import compact_table, long_table, verdict_table
from harness.rows import COLUMNS, append_row, check_results_file, csv_line, find_statuses
from made_up_rows import row

# ---- CSV ------------------------------------------------------------------------------------------------------------

ROWS = [
    row("torch", 1, 3.0),
    row("tvm", 1, 2.0, host_time_ms=1.9),
    row("torch", 4, None),
    row("tvm", 4, 1.0, model_name="other", weights="random, 4 of 24 layers"),
]
cells = st.one_of(
    st.sampled_from(["", " ", "0", "-1", "1e999", "nan", "1e-320", "12,5", "1_0", "x" * 300, '"', "\r", "\n", "\0"]),
    st.sampled_from(["٣", "=1+1", "é☃\udcff", "1" * 5000, "ok", "wrong", "failed", "a|b", "$x_{", "`", "2x3", "x=1x"]),
    st.text(max_size=9),
    st.floats().map(str),
)
changes = st.lists(st.tuples(st.integers(0, len(ROWS) - 1), st.sampled_from(COLUMNS), cells), max_size=4)


def csv_of(changes, ends):
    """Returns the bytes of a CSV of the rows with some cells changed."""
    changed = [dict(fields) for fields in ROWS]
    for number, name, cell in changes:
        changed[number][name] = cell
    lines = [csv_line(COLUMNS), *(csv_line(fields.get(name) for name in COLUMNS) for fields in changed)]
    return "".join(lines).replace("\n", ends).encode()


contents = st.one_of(
    st.builds(csv_of, changes, st.sampled_from(["\n", "\n", "\n", "\r\n", "\n\n", "\r"])),
    # A part is lost, or something stands where nothing should.
    st.builds(
        lambda content, at, length, text: content[: at % len(content)] + text + content[at % len(content) + length :],
        st.builds(csv_of, changes, st.just("\n")),
        st.integers(0, 10_000),
        st.sampled_from([0, 1, 30, 10_000]),
        st.sampled_from([b"", b'"', b"\n", b",", b"\0", b"\xff", b"\r", b"x" * 140_000]) | st.binary(max_size=9),
    ),
    st.binary(max_size=50),
)


@pytest.mark.timeout(0 if CASES else 600)
@fuzz(contents, 500)
def test_reports_of_a_csv(content):
    with scratch() as directory, refusals(UserError, "CSV for tables"):
        (directory / "rows.csv").write_bytes(content)
        rows = read_rows([directory / "rows.csv"])
        for comparison in compare(drop_superseded(rows)):
            for table in (compact_table, verdict_table, long_table):
                assert isinstance(table(comparison), str)


@pytest.mark.timeout(0 if CASES else 600)
@fuzz(changes, 30)
def test_pictures_of_a_csv(changes):
    with scratch() as directory, refusals(UserError, "CSV for pictures"):
        (directory / "rows.csv").write_bytes(csv_of(changes, "\n"))
        comparisons = compare(read_rows([directory / "rows.csv"]))
        with warnings.catch_warnings(action="ignore"):  # a font lacks a character
            names = {path.name for path in save_pictures(comparisons, directory)}
        assert names == {path.name for path in directory.glob("*.png")}


@pytest.mark.timeout(0 if CASES else 600)
@fuzz(st.tuples(contents, st.sampled_from(["rows.csv", "rows.csv", "x" * 256, "x\0", "\udcff.csv", "a/b.csv"])), 500)
def test_appending_to_a_csv(case):
    content, name = case
    new = {column: f"a {column}" for column in COLUMNS}
    with scratch() as directory, refusals((UserError, OSError), "CSV to append to"):
        path = directory / name
        with contextlib.suppress(OSError, ValueError):
            path.write_bytes(content)
        check_results_file(path)
        find_statuses(path, new)
        before = path.read_bytes() if path.exists() else b""
        append_row(path, new)
        after = path.read_bytes()
        kept = before[: before.rfind(b"\n") + 1]  # all but a half written line
        assert after.startswith(kept) and after.endswith(b"\n")
        assert find_statuses(path, new) == {"a test_item": "a status"}
        append_row(path, new, unless=("a status",))
        assert path.read_bytes() == after


# ---- Command lines --------------------------------------------------------------------------------------------------

NUMBERS = ["0", "-1", "1", "1.5", "1e3", "nan", "inf", "9" * 5000, "٣", "", " ", "1 2", "0x10", "1\n2", "\0"]
PATHS = [
    "",
    ".",
    "/",
    "\0",
    "x" * 300,
    "x/" * 3000,
    "a\nb/c",
    "\udcff/x",
    "/proc/rows.csv",
    "/dev/null",
    "~",
    "a.csv/b",
]
NAMES = ["a/b/c", "nobody/knows-it", "a" * 97, "../x", "-", "é", "a\nb", "microsoft/resnet-50", "owner/na me", ".x"]
OPTIONS = (
    "--model --batch-size --test-items --device --precision --weights --task --seq-len --image-size --iterations "
    "--timeout --tune-trials --tune-minutes --tuning-dir --results --expected-calls --skip --concurrent-cases "
    "--verbose --help --publish --long --batch --res -h -x -- @file --model= --results=x"
).split()
words = st.one_of(
    st.sampled_from(OPTIONS),
    st.sampled_from(
        [*NUMBERS, *PATHS, *NAMES, "torch", "tvm", "all", "fp16", "random", "pretrained", "cpu", "cuda:99"]
    ),
    st.text(max_size=9),
)


class Refused(Exception):
    """Stands for exit code 2; the message is the beginning of the line on stderr."""


class NothingIsForked(Exception):
    """Stands for all that would come after the checks of what the user gave."""


def run_main(main, arguments):
    """Runs a script's main() as far as its checks. Raises Refused for exit code 2: one line, after any warnings."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        except NothingIsForked:
            code = 0
    assert code in (0, 2)
    if code == 2:
        *others, error = err.getvalue().splitlines()
        assert ": error: " in error and not out.getvalue()
        assert all(line.startswith("benchmark.py: warning: ") for line in others)
        raise Refused(error[:100])


@pytest.fixture
def checks_only(monkeypatch, tmp_path_factory):
    """Lets benchmark.main() come as far as its first process and plot.main() as far as its first picture, offline."""

    def stop(*_, **__):
        raise NothingIsForked

    directory = tmp_path_factory.mktemp("empty")
    monkeypatch.chdir(directory)
    monkeypatch.setattr(benchmark, "Launchers", stop)
    monkeypatch.setattr(plot, "save_pictures", lambda *_: [])
    monkeypatch.setattr(plot, "publish", lambda: None)
    monkeypatch.setattr(models.hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(directory))
    yield
    assert os.listdir(directory) == []


@pytest.mark.timeout(0 if CASES else 600)
@fuzz(st.lists(words, max_size=6), 500)
def test_arguments_of_benchmark(checks_only, arguments):
    with refusals(Refused, "arguments of benchmark.py"):
        run_main(benchmark.main, arguments)


@pytest.mark.timeout(0 if CASES else 600)
@fuzz(st.tuples(st.sampled_from([*PATHS, *NAMES]), st.sampled_from([*PATHS, "rows.csv"])), 150)
def test_models_and_results_of_benchmark(checks_only, case):
    model, results = case
    arguments = ["--model", model, "--results", results, "--weights", "random"]
    with refusals(Refused, "arguments of benchmark.py"):
        run_main(benchmark.main, arguments)


@pytest.mark.timeout(0 if CASES else 600)
@fuzz(st.lists(words, max_size=4), 300)
def test_arguments_of_plot(checks_only, arguments):
    with refusals(Refused, "arguments of plot.py"):
        run_main(plot.main, arguments)


@pytest.mark.timeout(0 if CASES else 600)
@fuzz(
    st.tuples(
        st.dictionaries(
            st.sampled_from("MODELS BATCH_SIZES PRECISIONS RESULTS GPUS JOBS HOSTS RETRY FORCE".split()),
            words.filter(lambda word: "\0" not in word),
            max_size=3,
        ),
        st.lists(words.filter(lambda word: "\0" not in word), max_size=2),
    ),
    60,
)
def test_variables_and_options_of_the_sweep(case):
    variables, options = case
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
    for name, value in variables.items():
        environment[name] = value.encode(errors="surrogateescape" if "\udcff" in value else "replace")
    options = [option.encode(errors="replace") for option in options]
    with scratch() as directory, refusals(Refused, "variables of the sweep"):
        done = subprocess.run(
            ["bash", ROOT / "benchmark_all.sh", "--list", "--", *options],
            env=environment,
            cwd=directory,
            capture_output=True,
        )
        assert done.returncode in (0, 2) and not os.listdir(directory)
        if done.returncode == 2:
            assert not done.stdout and done.stderr.startswith(b"benchmark_all.sh: error: "), done.stderr
            raise Refused("one line")
        assert not done.stderr and f"{ROOT}/benchmark.py --model ".encode() in done.stdout
