"""Standard output and error, on which no run depends: what they cannot take is escaped, or lost."""

import io
import os
import sys


class LossyFile(io.FileIO):
    """A file descriptor to which writing goes on when it fails, because a pipe's reader has gone, say.

    on_loss: called with the first OSError other than a broken pipe, which is how `| head` says that it has enough.
    """

    def __init__(self, descriptor, on_loss):
        super().__init__(descriptor, "w", closefd=False)
        self.on_loss, self.has_failed = on_loss, False

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            first, self.has_failed = not self.has_failed, True
            if first and not isinstance(error, BrokenPipeError):
                self.on_loss(error)
            return len(data)


def protect_standard_streams(on_loss):
    """Makes standard output and error take any text, at any time; each line is written as it ends.

    A character that the encoding lacks, and a byte of a path that is not UTF-8, are written as Python escapes them.
    What is closed becomes /dev/null: its number would else go to the next file that is opened, and what is printed
    into that file. on_loss: what LossyFile calls for standard output. Streams that a test has put in their place stay.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            raw = LossyFile(descriptor, on_loss if name == "stdout" else lambda error: None)
            encoding = stream.encoding if stream else "utf-8"
            text = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, text)
