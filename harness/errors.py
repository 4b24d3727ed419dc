"""What a user is told when something is wrong: one line, never a traceback."""

import sys


class UserError(Exception):
    """A mistake of the user's, or a model that cannot be had: one line on stderr and exit code 2."""


def one_line(error, limit=300):
    """Returns the class and the message of an exception in one line of at most `limit` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def warn(message):
    """Prints one line of warning on stderr."""
    print(f"benchmark.py: warning: {message}", file=sys.stderr)


def print_error(error):
    """Prints a UserError as the one line on stderr that stands beside exit code 2."""
    print(f"benchmark.py: error: {error}", file=sys.stderr)
