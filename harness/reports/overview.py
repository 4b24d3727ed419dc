"""One picture of many models: each a line, with the time of every item against the best mode of torch.compile."""

import matplotlib
import matplotlib.pyplot as plt

from harness.reports.points import draw_legend, draw_point, set_up_axes
from harness.rows import number

BASE, RIVAL = "torch_compile", "tvm"  # what the names of the items on both sides begin with
WIDTH, INCHES_PER_LINE = 6.0, 0.24  # inches: on a phone it is as wide as the screen
LONGEST_NAME = 34  # characters


def ratios(case):
    """Returns {item: median / that of the best torch.compile mode} of the rows that are ok; {} without such a mode."""
    medians = {row["test_item"]: number(row, "infer_time_median_ms") for row in case.rows if row["status"] == "ok"}
    base = min((median for item, median in medians.items() if item.startswith(BASE)), default=None)
    return {item: median / base for item, median in medians.items()} if base else {}


def lines_of(comparison):
    """Returns (case, ratios) for each case that has a torch.compile mode, those first in which TVM does best.

    Cases without a time of TVM come last.
    """
    lines = [(case, found) for case in comparison.cases if (found := ratios(case))]

    def best_of_tvm(line):
        return min((ratio for item, ratio in line[1].items() if item.startswith(RIVAL)), default=float("inf"))

    return sorted(lines, key=best_of_tvm)


@matplotlib.rc_context({"text.parse_math": False})  # a name may have a dollar sign
def save_overview(comparison, path):
    """Saves the picture of a Comparison's cases."""
    lines = lines_of(comparison)
    figure, axis = plt.subplots(figsize=(WIDTH, INCHES_PER_LINE * len(lines) + 1.9), layout="constrained")
    axis.axvline(1, color="#888888", linewidth=1, zorder=1)
    for y, (case, found) in enumerate(lines):
        rows = {row["test_item"]: row for row in case.rows}
        axis.plot([min(found.values()), max(found.values())], [y, y], color="#dddddd", linewidth=1, zorder=0)
        for item, ratio in found.items():
            draw_point(axis, ratio, y, rows[item])
    set_up_axes(axis, "x", names_of([case for case, _ in lines]), range(len(lines) + 1))
    figure.suptitle(
        f"{comparison.title}: the time of one inference\nagainst the best torch.compile mode's (left is faster)",
        fontsize=10,
    )
    draw_legend(figure, comparison.items, [row for case, _ in lines for row in case.rows])
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def names_of(cases):
    """Returns the cases' names: the model's without its owner, and the batch size where not all have the same."""
    names = [case.rows[0]["model_name"].rpartition("/")[2] for case in cases]
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 2] + " …" for name in names]
    if len({case.batch_size for case in cases}) > 1:
        names = [f"{name}, {case.batch_size}" for name, case in zip(names, cases)]
    return names
