"""Prints what takes the longest of an inference by tuned TVM, by the published schedules' times, without a GPU.

    python tests/slowest.py fp16 16 microsoft/resnet-50 facebook/convnext-tiny-224

Of each built-in model, at a precision and a batch size, the tasks that take half of the time. A task has a schedule of
a template where its number is at least 100 (tvm_items/templates), of MetaSchedule's rules where it is less.
"""

import sys

from launches import find_tasks
from tabulate import tabulate

from conftest import ROOT
from tvm_items.imports import import_tvm
from tvm_items.library import read_library
from tvm_items.tasks import bytes_of
from tvm_items.tuning import tvm_version

DEVICE = "NVIDIA H200"
HEADERS = ["task", "shapes", "launches", "µs each", "share", "TFLOP/s", "TB/s", "space"]


def slowest(tasks, kernels):
    """Returns ([(Task, its kernel in a library)] that take half of an inference, its seconds, how many have none)."""
    known = [(task, kernels[task.key]) for task in tasks if task.key in kernels]
    known.sort(key=lambda each: -each[0].launches * each[1]["seconds"])
    times = [task.launches * kernel["seconds"] for task, kernel in known]
    count = next(n for n in range(len(times) + 1) if 2 * sum(times[:n]) >= sum(times))
    return known[:count], sum(times), len(tasks) - len(known)


def describe(task, kernel, total_s):
    """Returns the cells of a line of the table."""
    seconds, moved_bytes = kernel["seconds"], sum(bytes_of(*argument) for argument in task.arguments)
    return [
        task.name,
        ", ".join("×".join(map(str, shape)) for _, shape in task.arguments),
        task.launches,
        f"{1e6 * seconds:.1f}",
        f"{task.launches * seconds / total_s:.0%}",
        f"{task.flops / seconds / 1e12:.3g}",
        f"{moved_bytes / seconds / 1e12:.2g}",
        kernel["space"],
    ]


def main(precision, batch_size, *names):
    import_tvm(precision)
    kernels = read_library([ROOT / "results" / "tuning"], DEVICE, tvm_version(), with_others=False).kernels
    for name in names:
        found, total_s, unknown = slowest(find_tasks(name, precision, int(batch_size)), kernels)
        case = f"{name}, {precision}, batch size {batch_size}"
        print(f"\n{case}: {1e6 * total_s:.0f} µs; {unknown} tasks have no schedule\n")
        cells = [describe(task, kernel, total_s) for task, kernel in found]
        print(tabulate(cells, HEADERS, tablefmt="pipe", disable_numparse=True), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
