"""How test items look in pictures: a point with the item's colour and shape, the legend, and the axis of times."""

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness.reports.tables import short_name
from harness.rows import ITEM_ORDER, waits_for_host

# Okabe and Ito's palette, which colour-blind readers can tell apart (jfly.uni-koeln.de/color).
COLORS = dict(zip(ITEM_ORDER, ["#000000", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#D55E00"], strict=True))
# A shape for each item, so that the colours need not be told apart.
MARKERS = dict(zip(ITEM_ORDER, "sv^<oD", strict=True))
OTHER_COLOR, OTHER_MARKER = "#CC79A7", "P"  # of an item that has none of its own yet
POINT = {"linestyle": "", "markersize": 6, "markeredgewidth": 1.2}
FONT_SIZE = 9  # points


def look(item):
    """Returns an item's colour and shape as matplotlib's arguments."""
    return {"color": COLORS.get(item, OTHER_COLOR), "marker": MARKERS.get(item, OTHER_MARKER)}


def draw_point(axis, x, y, row):
    """Draws a row's point: hollow where the row says more about the host than about the compiler."""
    face = {"markerfacecolor": "white"} if waits_for_host(row) else {}
    axis.plot(x, y, **look(row["test_item"]), **face, **POINT, zorder=3)


def draw_legend(figure, items, rows, **settings):
    """Draws under the axes which point is which item, and what a hollow one says. rows: all that are drawn."""
    handles = [Line2D([], [], **look(item), **POINT, label=short_name(item)) for item in items]
    if any(waits_for_host(row) for row in rows if row["status"] == "ok"):
        hollow = {"marker": "o", "color": "#888888", "markerfacecolor": "white"}
        handles.append(Line2D([], [], **hollow, **POINT, label="hollow: waits for the host"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=FONT_SIZE, **settings)


def set_up_axes(axis, unit, labels, places):
    """Makes x a logarithmic axis, labelled in a unit above and below, and y one of lines, from above.

    places: the y of each line, and that of one more.
    """
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_ticks_position("both")
    axis.tick_params(axis="x", labeltop=True, labelsize=FONT_SIZE)
    axis.grid(axis="x", which="major", color="#eeeeee", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_yticks(places[:-1], labels, fontsize=FONT_SIZE)
    axis.set_ylim(places[-1] - 0.4, places[0] - 0.6)
    axis.tick_params(axis="y", length=0)
    axis.spines[["left", "right"]].set_visible(False)
