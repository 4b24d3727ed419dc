"""What the tuner keeps on the disk: files of JSON lines, and which values each kind of line may hold."""

import dataclasses
import json
import re

from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError

ARGUMENT = re.compile(r"\w{1,20}\[(\d{1,18}(,\d{1,18}){0,15})?\]", re.ASCII)  # dtype and shape: float16[1,128,768]


class TuningFileError(Exception):
    """A file of the tuner's that cannot be used, in one line."""


def not_negative(value):
    """Raises ValueError for a number below 0 or beyond what 64 bits hold, infinity and NaN included; None passes."""
    if value is not None and not 0 <= value < 2**63:
        raise ValueError(f"{value} is out of range")


def decisions_in_range(value):
    """Raises ValueError for a factor of a tile below 1, or a choice below -2.

    SampleComputeLocation chooses a loop, -1 for the root of the task, or -2 for inlining.
    """
    for decision in value:
        if isinstance(decision, list):
            for factor in decision:
                not_negative(factor - 1)
        elif decision is not None:
            not_negative(decision + 2)


def arguments_in_form(value):
    """Raises ValueError for what is not an argument's dtype and shape: describe_argument()."""
    for argument in value:
        if not ARGUMENT.fullmatch(argument):
            raise ValueError("an argument is a dtype and a shape")


# What search.py and spaces.py take: the number of a design space, and a decision for each sampling instruction.
Decisions = list[int | list[int] | None]


@strict
@dataclasses.dataclass(kw_only=True)
class Kernel:
    """A line of a library: the best schedule known for a task, and what measured it."""

    task: str  # a Task's key
    name: str
    arguments: list[str] = validated_field(arguments_in_form)
    space: int | None = validated_field(not_negative)  # None: TVM's default schedule, which no candidate has beaten
    decisions: Decisions = validated_field(decisions_in_range)
    seconds: float = validated_field(not_negative)
    default_seconds: float = validated_field(not_negative)
    device: str
    arch: str  # the architecture that the target names, such as sm_90
    tvm: str  # version
    case: str  # whose tuning found it: model, input shapes and precision, as in the names of journals


@strict
@dataclasses.dataclass(kw_only=True)
class TunedCase:
    """A line of a library: what the tuning of a case has taken, in all runs."""

    case: str
    device: str
    tvm: str
    tune_time_s: float = validated_field(not_negative)
    tune_trials: int = validated_field(not_negative)
    asked_trials: int = validated_field(not_negative)  # for each task, that a search has come to; 0: none has
    kernels: int = validated_field(not_negative)  # of its tasks, that the library had then


@strict
@dataclasses.dataclass(kw_only=True)
class JournalHeader:
    """The first line of a journal."""

    origin: str


@strict
@dataclasses.dataclass(kw_only=True)
class JournalLine:
    """A trial, the time of a task's default schedule, or what went wrong."""

    task: str
    elapsed_s: float = validated_field(not_negative, default=0.0)
    trials: int = validated_field(not_negative, default=0)  # up to this one, of all tasks
    space: int = validated_field(not_negative, default=0)
    decisions: Decisions = validated_field(decisions_in_range, default_factory=list)
    seconds: float | None = validated_field(not_negative, default=None)  # None where it failed
    default_seconds: float | None = validated_field(not_negative, default=None)
    estimated_ms: float = validated_field(not_negative, default=0.0)
    error: str = ""


def parse(content, checked_class):
    """Returns the JSON object in some bytes as a dict, if it has the fields of a class; raises ValueError if not."""
    try:
        fields = json.loads(content)
        checked_class(**fields)
    except (StrictDataclassError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return fields


def read_bounded(file, max_bytes):
    """Returns the bytes of a file, b"" where there is none.

    Raises TuningFileError where it cannot be read or is too large.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(max_bytes + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise TuningFileError(f"{file} cannot be read: {error.strerror}") from None
    if len(content) > max_bytes:
        raise TuningFileError(f"{file} is larger than {max_bytes / 2**20:g} MiB; move it away to tune anew")
    return content


def damaged(file):
    return TuningFileError(f"{file} is damaged; move it away to tune anew")


def describe_argument(dtype, shape):
    """Returns a task's argument in a few characters: describe_argument("float16", (1, 128)) is float16[1,128]."""
    return f"{dtype}[{','.join(map(str, shape))}]"


def parse_argument(text):
    """Returns (dtype, list of sizes) of what describe_argument() has made."""
    dtype, _, sizes = text.removesuffix("]").partition("[")
    return dtype, [int(size) for size in sizes.split(",") if size]
