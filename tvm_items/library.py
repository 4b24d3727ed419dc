"""The library of schedules: for each device, the best schedule known of every kernel that was ever tuned there.

Two files in a device's directory, of a line of JSON each: kernels.jsonl has a line a kernel, keyed by its task's hash,
whichever model it comes from; cases.jsonl a line a case, what its tuning has taken. Both are sorted, so that git can
merge them line by line; of two lines for a kernel the faster one counts.
"""

import json
import os
import re
import typing

from harness.errors import warn
from harness.rows import lock
from tvm_items.records import Kernel, TunedCase, TuningFileError, damaged, parse, read_bounded

KERNELS, CASES, LOCK = "kernels.jsonl", "cases.jsonl", "library.lock"
MAX_LIBRARY_BYTES = 2**26  # a hundred thousand kernels


class Library(typing.NamedTuple):
    """What is known. Every value is a dict of the fields of a Kernel or a TunedCase."""

    kernels: dict  # {task's key: the best Kernel of this device and this version of TVM}
    others: list  # Kernels of other devices, of other versions, and those that `kernels` does not have for being slower
    cases: dict  # {name: TunedCase of this device and this version of TVM}


def device_directory(directory, device):
    """Returns where a directory of libraries has the one of a device, by its name."""
    return directory / re.sub(r"[^\w.=-]+", "_", device).strip("_")


def read_library(directories, device, tvm_version, with_others=True):
    """Returns the Library of the device, whose files may lie in each of the directories, beside those of others.

    with_others: whether to read those too.

    What an earlier directory has of a kernel or a case goes before what a later one has: the first is the user's own,
    in which stands what was measured here. Raises TuningFileError where the device's own files cannot be used; those of
    other devices are left out then, with a warning.
    """
    library = Library({}, [], {})
    for directory in directories:
        own = device_directory(directory, device)
        for kernel in sorted(read_lines(own / KERNELS, Kernel), key=lambda kernel: kernel["seconds"]):
            is_own = (kernel["device"], kernel["tvm"]) == (device, tvm_version)
            if not is_own or library.kernels.setdefault(kernel["task"], kernel) is not kernel:
                library.others.append(kernel)
        for case in sorted(read_lines(own / CASES, TunedCase), key=lambda case: -case["tune_trials"]):
            if (case["device"], case["tvm"]) == (device, tvm_version):
                library.cases.setdefault(case["case"], case)
        for file in sorted(directory.glob(f"*/{KERNELS}")) if with_others else ():
            if file.parent != own:
                try:
                    library.others.extend(read_lines(file, Kernel))
                except TuningFileError as error:
                    warn(str(error))
    return library


def read_lines(file, line_class):
    """Returns the lines of a library's file as dicts, [] where there is none. Raises TuningFileError."""
    try:
        return [parse(line, line_class) for line in read_bounded(file, MAX_LIBRARY_BYTES).splitlines()]
    except ValueError:
        raise damaged(file) from None


def add_to_library(directory, kernels, case, measured):
    """Adds what a run has found to the library in a device's directory; several processes may do so at once.

    kernels: Kernels. case: a TunedCase, which takes the place of an earlier one. measured: {schedule_key()} of all that
    the run has measured itself, as in merge_kernels(). Each file is replaced as a whole: a writer that is killed leaves
    the old one. Raises TuningFileError where the files are damaged or cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / LOCK).open("a") as file:
            lock(file, directory)
            kernels = merge_kernels(read_lines(directory / KERNELS, Kernel), kernels, measured)
            replace(directory / KERNELS, kernels)
            cases = {case_key(line): line for line in [*read_lines(directory / CASES, TunedCase), case]}
            replace(directory / CASES, [cases[key] for key in sorted(cases)])
    except OSError as error:
        raise TuningFileError(f"{directory} cannot be written: {error.strerror}") from None


def merge_kernels(old, new, measured=frozenset()):
    """Returns the sorted Kernels of two lists, one for each task, device and version of TVM: the fastest.

    measured: {schedule_key()} of what has been measured since `old` was, which counts no more: what there is to say of
    it stands in `new`.
    """
    best = {}
    kept = [kernel for kernel in old if schedule_key(kernel) not in measured]
    for kernel in sorted([*kept, *new], key=lambda kernel: (kernel["seconds"], json.dumps(kernel))):
        best.setdefault(kernel_key(kernel), kernel)
    return [best[key] for key in sorted(best)]


def kernel_key(kernel):
    return kernel["task"], kernel["device"], kernel["tvm"]


def case_key(case):
    return case["case"], case["device"], case["tvm"]


def schedule_key(kernel):
    """Returns what tells a Kernel's schedule from all others, of any device, as a text."""
    return json.dumps([*kernel_key(kernel), kernel["space"], kernel["decisions"]])


def replace(file, lines):
    """Writes a file of JSON lines beside its place, then puts it there."""
    unfinished = file.with_suffix(".new")
    with unfinished.open("w", encoding="utf-8") as opened:
        opened.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        opened.flush()
        os.fsync(opened.fileno())
    unfinished.replace(file)
