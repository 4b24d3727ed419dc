"""Pictures of rows: one a model and phase, a panel for each setting, a line a case, a point an item."""

import textwrap
from collections import Counter

import matplotlib
import matplotlib.pyplot as plt

from harness.names import file_stem
from harness.reports.comparison import across
from harness.reports.points import FONT_SIZE, draw_legend, draw_point, look, set_up_axes
from harness.reports.tables import DISTURBED_MARK, short_name
from harness.rows import item_order, number

WIDTH, INCHES_PER_LINE = 6.5, 0.25  # inches; a README's column makes of it 8.3, a phone 3.9
PRECISION_GAP = 0.5  # lines between the cases of one precision and those of the next
NOTE_BELOW = 0.75  # lines, of what is written below a case's points
LEAST_RANGE = 5  # from the lowest to the highest time, so that two labels of the axis are in sight
LONGEST_STEM = 200  # bytes; file systems take 255


def save_pictures(comparisons, directory):
    """Saves a picture for each model and phase of the comparisons in the directory; returns the paths."""
    paths = []
    for phase, ending in (("forward", "infer_time"), ("decode", "decode_time")):
        of_phase = across("precision", (c for c in comparisons if c.setting["phase"] == phase))
        names = sorted({row["model_name"] for comparison in of_phase for row in comparison.rows})
        for name, file_name in zip(names, file_names(names, ending)):
            paths.append(directory / file_name)
            draw_model(find_panels(of_phase, name), phase, paths[-1])
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
def draw_model(panels, phase, path):
    """Saves one model's picture. panels: as find_panels() returns them."""
    positions = [place_lines(cases) for _, cases in panels]
    heights = [places[-1] + 3 for places in positions]  # in lines: the title and the labels above and below
    figure, axes = plt.subplots(
        len(panels),
        figsize=(WIDTH, INCHES_PER_LINE * sum(heights) + 1.4),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    rows = [row for _, cases in panels for case in cases for row in case.rows]
    several = len({label for (label, *_), _ in panels}) > 1
    figure.suptitle(wrapped([rows[0]["model_name"] if several else panels[0][0][0]]), fontsize=FONT_SIZE + 2)
    axes[0, 0].set_xlim(time_range(rows))
    for axis, places, (title, cases) in zip(axes[:, 0], positions, panels):
        set_up_axes(axis, "", [f"{case.precision}, batch {case.batch_size}" for case in cases], places)
        axis.tick_params(axis="x", labelbottom=True)
        for y, case in zip(places, cases):
            draw_case(axis, y, case)
        axis.set_title(wrapped(title if several else title[1:]), fontsize=FONT_SIZE)
    axes[-1, 0].set_xlabel(f"one {'step' if phase == 'decode' else 'inference'}, ms (log scale)", fontsize=FONT_SIZE)
    title = "point: median, whisker: minimum to 90th percentile, bold: the lowest median"
    fastest = [find_fastest(case) for _, cases in panels for case in cases]
    if any(row["warnings"] for row in fastest if row):
        title += f"\n{DISTURBED_MARK} disturbed by outliers or a drift"
    items = sorted({row["test_item"] for row in rows}, key=item_order)
    draw_legend(figure, items, rows, title=title, title_fontsize=FONT_SIZE)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def wrapped(lines):
    """Returns the lines of a title that are not empty, none wider than the picture."""
    return "\n".join(textwrap.fill(line, int(11 * WIDTH), max_lines=4, placeholder=" …") for line in lines if line)


def place_lines(cases):
    """Returns the y of each case's line, in lines, and of one more, with room for what draw_case() writes below."""
    places = [0.0]
    for case, following in zip(cases, [*cases[1:], cases[-1]]):
        has_note = 0 < len(ok(case)) < len(case.rows)
        gap = NOTE_BELOW * has_note + PRECISION_GAP * (case.precision != following.precision)
        places.append(places[-1] + 1 + gap)
    return places


def ok(case):
    """Returns the rows of a case that have a time."""
    return [row for row in case.rows if row["status"] == "ok"]


def find_fastest(case):
    """Returns the row with the lowest median, None where none is ok."""
    return min(ok(case), key=median_ms, default=None)


def median_ms(row):
    return number(row, "infer_time_median_ms")


def ends(row):
    """Returns the least and the most milliseconds of a row's point and whisker."""
    median, lowest, p90 = (number(row, f"infer_time_{name}_ms") for name in ("median", "min", "p90"))
    return min(lowest, median), max(median, p90)


def time_range(rows):
    """Returns the milliseconds at the left and the right of the axis, with room for a figure beside the first point."""
    reached = [ms for row in rows if row["status"] == "ok" for ms in ends(row)] or [1.0]
    low, high = min(reached), max(reached)
    widened = max(1, LEAST_RANGE * low / high) ** 0.5
    low, high = low / widened, high * widened
    return low / (high / low) ** 0.15, high * (high / low) ** 0.04


def draw_case(axis, y, case):
    """Draws a case's line: its points, the lowest median in figures, and at its end which items gave no time."""
    if fastest := find_fastest(case):
        both = [ends(row) for row in ok(case)]
        left = min(low for low, _ in both)
        axis.plot([left, max(high for _, high in both)], [y, y], color="#dddddd", linewidth=1, zorder=0)
        text = f"{median_ms(fastest):#.3g}".rstrip(".") + DISTURBED_MARK * bool(fastest["warnings"])
        font = {"fontsize": FONT_SIZE, "fontweight": "bold", "ha": "right", "va": "center_baseline"}
        axis.annotate(text, (left, y), xytext=(-7, 0), textcoords="offset points", **font)
    for row in sorted(ok(case), key=median_ms, reverse=True):  # the fastest lies on top
        axis.plot(ends(row), [y, y], color=look(row["test_item"])["color"], linewidth=1.2, zorder=2)
        draw_point(axis, median_ms(row), y, row)
    no_time = "; ".join(
        f"{status}: {', '.join(short_name(row['test_item']) for row in case.rows if row['status'] == status)}"
        for status in sorted({row["status"] for row in case.rows} - {"ok"})
    )
    font = {"fontsize": FONT_SIZE, "color": "#666666", "ha": "right", "va": "center_baseline"}
    axis.text(0.995, y + NOTE_BELOW * bool(fastest), no_time, transform=axis.get_yaxis_transform(), **font)
