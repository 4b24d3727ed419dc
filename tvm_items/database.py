"""The files of a tuned case: its database and its journal.

PATH.journal has a line of JSON for every trial, written as it is measured: what an interrupted run goes on from.
PATH.json.gz, the database, has the best record of each task: all that a tuned model is compiled from.
"""

import contextlib
import dataclasses
import fcntl
import gzip
import json
import os
import zlib

from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError

from harness.errors import warn

MAX_DATABASE_BYTES = 2**26  # expanded; a network of a hundred different kernels has some 20 KB
MAX_JOURNAL_BYTES = 2**28  # a million trials


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


# What search.py and spaces.py take: the number of a design space, and a decision for each sampling instruction.
Decisions = list[int | list[int] | None]


@strict
@dataclasses.dataclass(kw_only=True)
class Record:
    """The best schedule of a task, which is better than TVM's default one."""

    task: str
    name: str
    space: int = validated_field(not_negative)
    decisions: Decisions = validated_field(decisions_in_range)
    seconds: float = validated_field(not_negative)
    default_seconds: float = validated_field(not_negative)


@strict
@dataclasses.dataclass(kw_only=True)
class Database:
    """What the database of a case holds."""

    origin: str  # names the device and TVM's version; records are good for both together
    tune_time_s: float = validated_field(not_negative)
    tune_trials: int = validated_field(not_negative)
    asked_trials: int = validated_field(not_negative)
    records: list[dict]


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


RECORD = tuple(field.name for field in dataclasses.fields(Record))


def parse(content, checked_class):
    """Returns the JSON object in some bytes as a dict, if it has the fields of a class; raises ValueError if not."""
    fields = json.loads(content)
    try:
        checked_class(**fields)
    except (StrictDataclassError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return fields


class DatabaseError(Exception):
    """A tuning database that cannot be used, in one line."""


def database_path(path):
    return path.with_name(path.name + ".json.gz")


def journal_path(path):
    return path.with_name(path.name + ".journal")


def read_database(path, origin):
    """Returns the database of a case as a dict of Database's fields, or None where there is none.

    origin: what the database must be of. Raises DatabaseError for a database that cannot be read, that is damaged, or
    that is of another origin.
    """
    file = database_path(path)
    try:
        with gzip.open(file) as opened:
            content = opened.read(MAX_DATABASE_BYTES + 1)
        if len(content) > MAX_DATABASE_BYTES:
            raise DatabaseError(f"{file} is larger than {MAX_DATABASE_BYTES / 2**20:g} MiB; delete it to tune anew")
        database = parse(content, Database)
        for record in database["records"]:
            Record(**record)
    except FileNotFoundError:
        return None
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, TypeError, RecursionError, StrictDataclassError):
        raise DatabaseError(f"{file} is damaged; delete it to tune anew") from None
    except OSError as error:
        raise DatabaseError(f"{file} cannot be read: {error.strerror}") from None
    check_origin(file, database["origin"], origin)
    return database


def write_database(path, database):
    """Puts the database in its place as a whole, in the same bytes for the same content."""
    file = database_path(path)
    unfinished = file.with_suffix(".new")
    unfinished.write_bytes(gzip.compress(json.dumps(database, separators=(",", ":")).encode(), mtime=0))
    unfinished.replace(file)


def read_siblings(paths, origin):
    """Returns {task's name: list of best (space, decisions)} from the databases of the model's other input shapes.

    paths: where the case's own database may be; its siblings lie beside it. A task has the same name at every batch
    size. What cannot be read is left out: it is not of this case.
    """
    model, _, precision = paths[0].name.rsplit(".", 2)
    files = [file for path in paths for file in sorted(path.parent.glob(f"{model}.*.{precision}.json.gz"))]
    siblings = {}
    for file in files:
        other = file.with_name(file.name.removesuffix(".json.gz"))
        if other in paths or other.name.rsplit(".", 2)[0] != model:
            continue
        with contextlib.suppress(DatabaseError):
            for record in read_database(other, origin)["records"]:
                siblings.setdefault(record["name"], []).append((record["space"], record["decisions"]))
    return siblings


def read_journal(path, origin):
    """Returns the lines of a case's journal as dicts; a last one that was never finished is left out.

    Raises DatabaseError for a journal that is damaged, or of another origin.
    """
    file = journal_path(path)
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_JOURNAL_BYTES + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DatabaseError(f"{file} cannot be read: {error.strerror}") from None
    first, *lines = content[: content.rfind(b"\n") + 1].splitlines() or [None]
    if first is None:
        return []
    try:
        if len(content) > MAX_JOURNAL_BYTES:
            raise ValueError("it is too large")
        found = parse(first, JournalHeader)["origin"]
        trials = [parse(line, JournalLine) for line in lines]
        if any("space" in trial and not {"decisions", "seconds"} <= trial.keys() for trial in trials):
            raise ValueError("a trial has space, decisions and seconds")
    except (ValueError, RecursionError):
        raise DatabaseError(f"{file} is damaged; delete it to tune anew") from None
    check_origin(file, found, origin)
    return trials


class Journal:
    """Appends trials, each on the disk before the next; one process at a time.

    `trials` is what earlier runs left. Raises DatabaseError where that is damaged or not of `origin`, or where another
    process writes.
    """

    def __init__(self, path, origin):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = journal_path(path).open("a+b")
        except OSError as error:
            raise DatabaseError(f"{journal_path(path)} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatabaseError(f"{journal_path(path)} is being written: another process tunes this case") from None
        except OSError as error:
            warn(f"{journal_path(path)} cannot be locked ({error.strerror}): let no other process tune this case")
        self.trials = read_journal(path, origin)
        self.file.seek(0)
        whole, end, _ = self.file.read().rpartition(b"\n")
        self.file.truncate(len(whole + end))
        if not whole:
            self.append({"origin": origin})

    def append(self, line):
        # What is not UTF-8 in a compiler's message would make the journal one that cannot be read.
        self.file.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def check_origin(file, found, expected):
    """Raises DatabaseError unless the file is of the expected origin."""
    if found != expected:
        raise DatabaseError(f"{file} is of {found}, and this is {expected}; move it away to tune anew")
