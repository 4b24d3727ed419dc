"""What the scripts' command lines share: --version, errors of one line, and the kinds of numbers that options take."""

import argparse
import math
import sys

from harness.errors import print_error
from harness.version import harness_version

MOST_DIGITS = 9  # of a batch size, say: tables take no more, and no machine has the memory


class ShowVersion(argparse.Action):
    """Prints this harness's version, for which it asks git only then, and exits."""

    def __call__(self, parser, *_):
        print(f"{parser.prog} {harness_version()}")
        parser.exit()


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit code 2; options have no abbreviations.

    It knows --version.
    """

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument(
            "--version", action=ShowVersion, nargs=0, default=argparse.SUPPRESS, help="show the version and exit"
        )

    def error(self, message):
        print_error(message, self.prog)
        sys.exit(2)


def at_least_one(text):
    value = int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least 1 and at most {MOST_DIGITS} digits, not {text!r:.80}"
        )
    return value


def at_least_one_or_all(text):
    return text if text == "all" else at_least_one(text)


def positive(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r:.80}")
    return value
