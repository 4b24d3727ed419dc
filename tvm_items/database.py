"""The files of a tuned case: its database and its journal.

PATH.journal has a line of JSON for every trial, written as it is measured: what an interrupted run goes on from.
PATH.json.gz, the database, has the best record of each task: all that a tuned model is compiled from.
"""

import contextlib
import fcntl
import gzip
import json
import os
import zlib

FIELDS = {"origin", "tune_time_s", "tune_trials", "asked_trials", "records"}
RECORD = ("task", "name", "space", "decisions", "seconds", "default_seconds")


class DatabaseError(Exception):
    """A tuning database that cannot be used, in one line."""


def database_path(path):
    return path.with_name(path.name + ".json.gz")


def journal_path(path):
    return path.with_name(path.name + ".journal")


def read_database(path, origin):
    """Returns the database of a case as a dict of FIELDS, or None where there is none.

    origin: names the device and TVM's version; records are good for both together. Raises DatabaseError for a database
    that is damaged, or of another origin.
    """
    file = database_path(path)
    try:
        database = json.loads(gzip.decompress(file.read_bytes()))
        is_complete = all(record.keys() == set(RECORD) for record in database["records"])
        is_complete = is_complete and database.keys() == FIELDS
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError):
        is_complete = False
    if not is_complete:
        raise DatabaseError(f"{file} is damaged; delete it to tune anew")
    check_origin(file, database["origin"], origin)
    return database


def write_database(path, database):
    """Puts the database in its place as a whole, in the same bytes for the same content."""
    file = database_path(path)
    unfinished = file.with_suffix(".new")
    unfinished.write_bytes(gzip.compress(json.dumps(database, separators=(",", ":")).encode(), mtime=0))
    unfinished.replace(file)


def read_siblings(path, origin):
    """Returns {task's name: list of best (space, decisions)} from the databases of the model's other input shapes.

    A task has the same name at every batch size. What cannot be read is left out: it is not of this case.
    """
    model, _, precision = path.name.rsplit(".", 2)
    siblings = {}
    for file in sorted(path.parent.glob(f"{model}.*.{precision}.json.gz")):
        other = path.with_name(file.name.removesuffix(".json.gz"))
        if other == path or other.name.rsplit(".", 2)[0] != model:
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
        lines = file.read_text().splitlines(keepends=True)
        first, *trials = [json.loads(line) for line in lines if line.endswith("\n")] or [{"origin": origin}]
        found = first["origin"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise DatabaseError(f"{file} is damaged; delete it to tune anew") from None
    check_origin(file, found, origin)
    return trials


class Journal:
    """Appends trials, each on the disk before the next; one process at a time.

    `trials` is what earlier runs left. Raises DatabaseError where that is damaged or not of `origin`, or where another
    process writes.
    """

    def __init__(self, path, origin):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = journal_path(path).open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatabaseError(f"{journal_path(path)} is being written: another process tunes this case") from None
        self.trials = read_journal(path, origin)
        self.file.seek(0)
        whole, end, _ = self.file.read().rpartition(b"\n")
        self.file.truncate(len(whole + end))
        if not whole:
            self.append({"origin": origin})

    def append(self, line):
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def check_origin(file, found, expected):
    """Raises DatabaseError unless the file is of the expected origin."""
    if found != expected:
        raise DatabaseError(f"{file} is of {found}, and this is {expected}; move it away to tune anew")
