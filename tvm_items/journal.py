"""A case's journal: a line of JSON for every trial, written as it is measured: what an interrupted run goes on from."""

import fcntl
import json
import os

from harness.errors import warn
from tvm_items.records import JournalHeader, JournalLine, TuningFileError, damaged, parse, read_bounded

MAX_JOURNAL_BYTES = 2**28  # a million trials


def journal_path(path):
    return path.with_name(path.name + ".journal")


def read_journal(path, origin):
    """Returns the lines of a case's journal as dicts; a last one that was never finished is left out.

    path: of the case, without the end of a file's name. origin: the device and TVM's version, which the journal must be
    of. Raises TuningFileError for a journal that is damaged, or of another origin.
    """
    file = journal_path(path)
    content = read_bounded(file, MAX_JOURNAL_BYTES)
    first, *lines = content[: content.rfind(b"\n") + 1].splitlines() or [None]
    if first is None:
        return []
    try:
        found = parse(first, JournalHeader)["origin"]
        trials = [parse(line, JournalLine) for line in lines]
        if any("space" in trial and not {"decisions", "seconds"} <= trial.keys() for trial in trials):
            raise ValueError("a trial has space, decisions and seconds")
    except ValueError:
        raise damaged(file) from None
    if found != origin:
        raise TuningFileError(f"{file} is of {found}, and this is {origin}; move it away to tune anew")
    return trials


class Journal:
    """Appends trials, each on the disk before the next; one process at a time.

    `trials` is what earlier runs left. Raises TuningFileError where that is damaged or not of `origin`, or where
    another process writes.
    """

    def __init__(self, path, origin):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = journal_path(path).open("a+b")
        except OSError as error:
            raise TuningFileError(f"{journal_path(path)} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TuningFileError(f"{journal_path(path)} is being written: another process tunes this case") from None
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
