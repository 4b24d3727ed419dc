"""The history: rows that were published once and have been measured again since, in a compressed CSV."""

import gzip
import io
import os

from harness.reports.comparison import drop_superseded, find_latest, read_csv
from harness.rows import COLUMNS, csv_line, open_locked


def move_superseded(results, history):
    """Moves the rows that tables no longer show from the CSV `results` to the compressed CSV `history`.

    Afterwards each row of both is in one of them, once; rows of the history are in the order of their time. Both files
    are replaced as wholes, the history first: whenever this is stopped, every row is in one of them at least, and the
    next call finds those that are in both. Processes that append rows wait for the lock meanwhile.
    """
    with open_locked(results):
        rows = read_csv(results)
        shown = drop_superseded(find_latest([{**row, "place": place} for place, row in enumerate(rows)]))
        places = {row["place"] for row in shown}
        kept = [row for place, row in enumerate(rows) if place in places]
        superseded = [row for place, row in enumerate(rows) if place not in places]
        before = read_csv(history) if history.exists() else []
        # A dict, for its order: what was in both after a stop, or is shown again, is there once.
        lines = dict.fromkeys(as_line(row) for row in sorted([*before, *superseded], key=timestamp))
        for row in kept:
            lines.pop(as_line(row), None)
        if lines:
            replace(history, compress("".join([csv_line(COLUMNS), *lines]).encode()))
        replace(results, "".join([csv_line(COLUMNS), *map(as_line, kept)]).encode())


def as_line(row):
    return csv_line(row[name] for name in COLUMNS)


def timestamp(row):
    return row["timestamp_utc"]


def compress(data):
    """Returns the bytes as gzip: the same for the same bytes, whenever and under whatever name they are written."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write(data)
    return buffer.getvalue()


def replace(path, data):
    """Replaces the file's content by way of a new file beside it; a file that has that content stays as it is."""
    if path.exists() and path.read_bytes() == data:
        return
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # before another file is replaced
    finally:
        os.close(directory)
