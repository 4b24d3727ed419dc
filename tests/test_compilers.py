"""A machine without a C++ compiler or Python's headers: the row names the remedy; and how long errors are cut."""

import pytest

from conftest import read_csv
from harness.errors import one_line

# What gcc says on a machine that has no python3-dev, for whatever is compiled with Python's include directory.
WITHOUT_HEADERS = """#!/bin/sh
case "$*" in
*-I*/include/python3*)
    echo "main.cpp:1:10: fatal error: Python.h: No such file or directory" >&2
    echo "    1 | #include <Python.h>" >&2
    echo "compilation terminated." >&2
    exit 1;;
esac
exec /usr/bin/env g++ "$@"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler, says",
    [
        ("#!/bin/sh\nexit 1\n", "No working C++ compiler found"),
        (WITHOUT_HEADERS, "Python.h: No such file or directory"),
    ],
)
def test_a_row_names_what_torch_compile_lacks(command, write_model, tmp_path, compiler, says):
    path = tmp_path / "compiler"
    path.write_text(compiler)
    path.chmod(0o755)
    arguments = ["--model", write_model(), "--weights", "random", "--test-items", "torch_compile"]
    done = command("benchmark.py", *arguments, "--results", "rows.csv", CXX=path)
    (row,) = read_csv(tmp_path / "rows.csv")
    assert done.returncode == 1 and row["status"] == "failed"
    assert says in row["error"] and "apt install g++ python3-dev" in row["error"] and len(row["error"]) <= 300


def test_a_path_without_compilers(command, write_model, tmp_path):
    arguments = ["--model", write_model(), "--weights", "random", "--test-items", "torch_compile"]
    done = command("benchmark.py", *arguments, "--results", "rows.csv", PATH=tmp_path)
    (row,) = read_csv(tmp_path / "rows.csv")
    assert done.returncode == 1 and "apt install g++ python3-dev" in row["error"]


@pytest.mark.slow
def test_tvm_needs_a_compiler_for_its_second_start_alone(command, write_model, tmp_path):
    arguments = ["--model", write_model(), "--weights", "random", "--test-items", "tvm", "--iterations", 3]
    done = command("benchmark.py", *arguments, "--results", "rows.csv", PATH=tmp_path)
    (row,) = read_csv(tmp_path / "rows.csv")
    assert done.returncode == 0 and row["status"] == "ok" and row["warm_start_time_s"] == ""
    assert "no second start: a C++ compiler and Python's headers are needed (apt install g++" in done.stdout


@pytest.mark.parametrize(
    "message",
    [
        "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl.",
        # Triton's: what gcc says goes to the log
        "Command '['/usr/bin/gcc', '/tmp/tmpx/cuda_utils.c', '-O3', '-shared']' returned non-zero exit status 1.",
    ],
)
def test_what_triton_says_without_a_compiler(message):
    line = one_line(RuntimeError(message))
    assert "apt install g++ python3-dev" in line and message in line


def test_long_errors_are_cut_in_the_middle():
    error = ValueError("what it is about\n" + "-I/a/directory " * 100 + "\n  and the reason")
    line = one_line(error)
    assert len(line) == 300 and line.startswith("ValueError: what it is about -I/a") and line.endswith("and the reason")
    assert " … " in line and one_line(ValueError("short")) == "ValueError: short"
    assert one_line(ValueError("x" * 288)) == "ValueError: " + "x" * 288


def test_the_hint_that_ends_every_error_of_inductor_is_left_out():
    error = RuntimeError(
        'no such operator\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace; set TORCH_LOGS="+d"'
    )
    assert one_line(error) == "RuntimeError: no such operator"


def test_files_of_packages_are_named_from_the_package_on():
    error = RuntimeError('in /a/b-1/lib/python3.12/site-packages/x/y.py:3, File "/usr/lib/dist-packages/z.py", line 4')
    assert one_line(error) == 'RuntimeError: in x/y.py:3, File "z.py", line 4'
