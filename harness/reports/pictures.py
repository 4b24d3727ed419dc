"""Pictures of rows: one a model and phase, a panel for each setting, grouped bars by batch size."""

import textwrap
from collections import Counter

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from harness.names import file_stem
from harness.reports.tables import DISTURBED_MARK
from harness.rows import ITEM_ORDER, item_order, number, waits_for_host

# Okabe and Ito's palette, which colour-blind readers can tell apart (jfly.uni-koeln.de/color).
COLORS = dict(zip(ITEM_ORDER, ["#000000", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#D55E00"], strict=True))
OTHER_COLOR = "#CC79A7"  # an item that has no colour of its own yet
HATCH = {"hatch": "////", "edgecolor": "white", "linewidth": 0}  # of bars that wait for the host

INCHES_PER_BAR = 0.62
NARROWEST, WIDEST = 5.0, 8.3  # inches; at 100 pixels an inch a README's column is 8.3 wide
LONGEST_STEM = 200  # bytes; file systems take 255
UPRIGHT_LABEL = 0.36  # inches; in a narrower place a bar's number is turned by 90 degrees


def save_pictures(comparisons, directory):
    """Saves a picture for each model and phase of the comparisons in the directory; returns the paths."""
    paths = []
    for phase, ending in (("forward", "infer_time"), ("decode", "decode_time")):
        of_phase = [comparison for comparison in comparisons if comparison.setting["phase"] == phase]
        names = sorted({row["model_name"] for comparison in of_phase for row in comparison.rows})
        for name, file_name in zip(names, file_names(names, ending)):
            paths.append(directory / file_name)
            draw_model(find_panels(of_phase, name), paths[-1])
    return paths


def file_names(model_names, ending="infer_time"):
    """Returns a file name with that ending for each model name, of which no two are the same."""
    plain = [name.strip("/").replace("/", "_") for name in model_names]
    shared = Counter(plain)
    usable = [
        shared[stem] == 1 and len(stem.encode()) <= LONGEST_STEM and stem.isprintable() for stem in plain
    ]  # what is not printable may be a NUL byte, which no path takes
    stems = [stem if good else file_stem(name) for name, stem, good in zip(model_names, plain, usable)]
    return [f"{stem}_{ending}.png" for stem in stems]


def find_panels(comparisons, model_name):
    """Returns (the title's lines, cases) for each setting and label that the model has."""
    of_model = {}
    for comparison in comparisons:
        cases = [case for case in comparison.cases if case.rows[0]["model_name"] == model_name]
        if cases:
            of_model[comparison.title, tuple(comparison.setting.items())] = cases
    panels = []
    for (title, setting), cases in of_model.items():
        alike = [other for other_title, other in of_model if other_title == title]
        differing = [(name, value) for name, value in setting if not all((name, value) in other for other in alike)]
        what_differs = ", ".join(f"{name} {value or 'not recorded'}" for name, value in differing)
        for label in sorted({case.label for case in cases}):
            panels.append(([label, title, what_differs], [case for case in cases if case.label == label]))
    return panels


@matplotlib.rc_context({"text.parse_math": False})  # a name may have a dollar sign
def draw_model(panels, path):
    """Saves one model's picture. panels: as find_panels() returns them."""
    rows = [row for _, cases in panels for case in cases for row in case.rows]
    items = sorted({row["test_item"] for row in rows}, key=item_order)
    places = len(items) * max(len(cases) for _, cases in panels)
    width = min(max(NARROWEST, INCHES_PER_BAR * places + 0.8), WIDEST)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(width, 3.3 * len(panels) + 0.9), squeeze=False, layout="constrained"
    )
    upright = (width - 0.8) / places >= UPRIGHT_LABEL
    for axis, (title, cases) in zip(axes[:, 0], panels):
        draw_panel(axis, cases, items, upright)
        lines = [textwrap.fill(line, int(7 * width), max_lines=4, placeholder=" …") for line in title if line]
        axis.set_title("\n".join(lines), fontsize=10)
    draw_legend(figure, items, rows, columns=3 if width > 7 else 2)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def draw_panel(axis, cases, items, upright):
    """Draws the bars of one setting: medians on a logarithmic axis, on which 0.6 ms stays legible beside 50 ms."""
    ok = [row for case in cases for row in case.rows if row["status"] == "ok"]
    low = min((number(row, "infer_time_min_ms") for row in ok), default=1)
    high = max((number(row, name) for row in ok for name in ("infer_time_median_ms", "infer_time_p90_ms")), default=1)
    bottom = low / 2.5
    axis.set_yscale("log")
    axis.set_ylim(bottom, high * (2 if upright else 4))
    bar_width = 0.84 / len(items)
    for x, case in enumerate(cases):
        winners = case.winners()
        for row in case.rows:
            at = x + (items.index(row["test_item"]) - (len(items) - 1) / 2) * bar_width
            if row["status"] == "ok":
                draw_bar(axis, at, bar_width * 0.92, row, upright, bold=row["test_item"] in winners)
            else:
                axis.text(
                    at, bottom * 1.1, row["status"], rotation=90, ha="center", va="bottom", color="#666666", fontsize=9
                )
    axis.set_xlim(-0.5, len(cases) - 0.5)
    axis.set_xticks(range(len(cases)), [str(case.batch_size) for case in cases])
    axis.set_xlabel("batch size")
    axis.set_ylabel("inference time, ms (log scale)")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", which="major", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def draw_bar(axis, at, width, row, upright, bold):
    """Draws a row that is ok: a bar up to the median, a whisker from the minimum to the 90th percentile, the number."""
    median, lowest, p90 = (number(row, f"infer_time_{name}_ms") for name in ("median", "min", "p90"))
    axis.bar(
        at,
        median,
        width,
        color=COLORS.get(row["test_item"], OTHER_COLOR),
        yerr=[[max(0, median - lowest)], [max(0, p90 - median)]],
        error_kw={"ecolor": "#888888", "capsize": 2, "elinewidth": 1},
        **(HATCH if waits_for_host(row) else {}),
    )
    axis.annotate(
        f"{median:#.3g}".rstrip(".") + DISTURBED_MARK * bool(row["warnings"]),
        (at, max(median, p90)),
        xytext=(0, 2 if upright else 4),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation=0 if upright else 90,
        fontsize=8,
        fontweight="bold" if bold else "normal",
    )


def draw_legend(figure, items, rows, columns):
    """Draws under the panels which colour is which item, and what else the bars say."""
    handles = [Patch(color=COLORS.get(item, OTHER_COLOR), label=item) for item in items]
    ok = [row for row in rows if row["status"] == "ok"]
    if any(waits_for_host(row) for row in ok):
        handles.append(Patch(facecolor="#888888", label="hatched: waits for the host", **HATCH))
    title = "bar: median, whisker: minimum to 90th percentile, bold: the fastest or level with it"
    if any(row["warnings"] for row in ok):
        title += f"\n{DISTURBED_MARK} disturbed by outliers or a drift"
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=9,
        title=title,
        title_fontsize=8,
    )
