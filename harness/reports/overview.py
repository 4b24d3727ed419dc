"""One picture of many models: each a line, with the time of every item against the best mode of torch.compile."""

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness.reports.pictures import COLORS, OTHER_COLOR
from harness.rows import ITEM_ORDER, number, waits_for_host

# A shape for each item, so that the colours need not be told apart.
MARKERS = dict(zip(ITEM_ORDER, "sv^<oD", strict=True))
OTHER_MARKER = "P"
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
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_ticks_position("both")
    axis.tick_params(axis="x", labeltop=True, labelsize=9)
    axis.grid(axis="x", which="major", color="#eeeeee", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_yticks(range(len(lines)), names_of([case for case, _ in lines]), fontsize=9)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.spines[["left", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    figure.suptitle(
        f"{comparison.title}: the time of one inference\nagainst the best torch.compile mode's (left is faster)",
        fontsize=10,
    )
    draw_legend(figure, comparison.items, [row for case, _ in lines for row in case.rows])
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def draw_point(axis, ratio, y, row):
    """Draws an item's ratio in its line: hollow where the row says more about the host than about the compiler."""
    color = COLORS.get(row["test_item"], OTHER_COLOR)
    face = "white" if waits_for_host(row) else color
    marker = MARKERS.get(row["test_item"], OTHER_MARKER)
    axis.plot(ratio, y, marker, markersize=6, color=color, markerfacecolor=face, markeredgewidth=1.2, zorder=2)


def draw_legend(figure, items, rows):
    """Draws under the lines which shape is which item, and what a hollow one says."""
    handles = [
        Line2D([], [], linestyle="", marker=MARKERS.get(i, OTHER_MARKER), color=COLORS.get(i, OTHER_COLOR), label=i)
        for i in items
    ]
    if any(waits_for_host(row) for row in rows if row["status"] == "ok"):
        hollow = {"marker": "o", "color": "#888888", "markerfacecolor": "white", "markeredgewidth": 1.2}
        handles.append(Line2D([], [], linestyle="", **hollow, label="hollow: waits for the host"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def names_of(cases):
    """Returns the cases' names: the model's without its owner, and the batch size where not all have the same."""
    names = [case.rows[0]["model_name"].rpartition("/")[2] for case in cases]
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 2] + " …" for name in names]
    if len({case.batch_size for case in cases}) > 1:
        names = [f"{name}, {case.batch_size}" for name, case in zip(names, cases)]
    return names
