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
    """Raises ValueError unless each decision is None, a choice from -2 on, or a list of a tile's factors from 1 on.

    That is what search.py and spaces.py take for each sampling instruction. SampleComputeLocation chooses a loop, -1
    for the root of the task, or -2 for inlining. As the field's type it would take three times as long to check.
    """
    for decision in value:
        least, numbers = (1, decision) if isinstance(decision, list) else (-2, [decision])
        for number in numbers if decision is not None else ():
            if type(number) is not int or not least <= number < 2**63:
                raise ValueError(f"{number!r} is no decision")


def arguments_in_form(value):
    """Raises ValueError unless each argument is a dtype and a shape, as describe_argument() has them."""
    for argument in value:
        if not isinstance(argument, str) or not ARGUMENT.fullmatch(argument):
            raise ValueError("an argument is a dtype and a shape")


@strict
@dataclasses.dataclass(kw_only=True)
class Kernel:
    """A line of a library: the best schedule known for a task, and what measured it."""

    task: str  # a Task's key
    name: str
    arguments: list = validated_field(arguments_in_form)
    space: int | None = validated_field(not_negative)  # None: TVM's default schedule, which no candidate has beaten
    decisions: list = validated_field(decisions_in_range)
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
    untried: int = validated_field(not_negative, default=0)  # of the others, those that its kin may have schedules for


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
    decisions: list = validated_field(decisions_in_range, default_factory=list)
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
