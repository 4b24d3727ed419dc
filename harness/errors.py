"""What a user is told when something is wrong: one line, never a traceback."""

import contextlib
import re
import sys


class UserError(Exception):
    """A mistake of the user's, or a model that cannot be had: one line on stderr and exit code 2."""


def without_breaks(text):
    """Returns a text as one line: every run of white space, which line breaks belong to, is one space."""
    return " ".join(str(text).split())


# How inductor, Triton and the compilers say that a compiler or Python's headers are missing.
NO_COMPILER = re.compile(
    r"InvalidCxxCompiler|Failed to find C compiler|Python\.h: No such file|Command '\['[^']*(cc|clang)'.*non-zero exit"
)
COMPILER_REMEDY = "a C++ compiler and Python's headers are needed (apt install g++ python3-dev): "
INSTALLED_IN = re.compile(r"[^\s\"']*/(?:site|dist)-packages/")  # of no use to other machines, and long
TORCH_HINT = re.compile(r" ?Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace.*")  # at the end of every message


def one_line(error, limit=300):
    """Returns the class and the message of an exception in one line of at most `limit` characters.

    What is too long is cut in the middle: a compiler's command line may stand there, and the reason at the end. Files
    of installed packages are named from the package on. Where a compiler is missing, the line begins with the remedy.
    """
    text = TORCH_HINT.sub("", INSTALLED_IN.sub("", without_breaks(f"{type(error).__name__}: {error}")))
    remedy = COMPILER_REMEDY if NO_COMPILER.search(text) else ""
    limit -= len(remedy)
    if len(text) > limit:
        end = 2 * limit // 3
        text = f"{text[: limit - end - 3]} … {text[-end:]}"
    return remedy + text


def warn(message):
    """Prints one line of warning on stderr."""
    print(f"benchmark.py: warning: {without_breaks(message)}", file=sys.stderr)


def print_error(error, program="benchmark.py"):
    """Prints an error, a UserError or a text, as one line on stderr."""
    print(f"{program}: error: {without_breaks(error)}", file=sys.stderr)


@contextlib.contextmanager
def report_errors_as(columns, name):
    """Puts an error that ends the block into a column of that name, in one line."""
    try:
        yield
    except Exception as error:
        columns[name] = one_line(error)
