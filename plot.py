#!/usr/bin/env python3
"""Turn benchmark.py's rows into the markdown table and one picture per model.

    python plot.py               results/benchmark.csv -> the tables in the READMEs, docs/<model>_infer_time.png,
                                 results/coverage.csv -> docs/coverage.md and its totals in the READMEs
    python plot.py A.csv B.csv   the rows of all of them -> the table on stdout, the pictures beside A.csv

The second form leaves the READMEs alone: what is published comes from results/ only.
Of several rows of one case and item the latest counts. Exit code: 0, or 2 on bad input.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from harness.errors import UserError
from harness.rows import COLUMNS, ITEM_ORDER, item_order

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "benchmark.csv"
COVERAGE = ROOT / "results" / "coverage.csv"
READMES = [ROOT / "README.md", ROOT / "docs" / "README.zh-CN.md"]
COVERAGE_PAGE = ROOT / "docs" / "coverage.md"

# Okabe and Ito's palette, which colour-blind readers can tell apart (jfly.uni-koeln.de/color).
COLORS = dict(zip(ITEM_ORDER, ["#000000", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#D55E00"], strict=True))
OTHER_COLOR = "#CC79A7"  # an item that has no colour of its own yet
TABLE_COLUMNS = ["model_name", "test_item", "batch_size", "compile_time_s", "infer_time_mean_ms"]


def read_rows(paths):
    """-> the latest row of each case and item, as a table in the order model, batch size, item."""
    frames = []
    for path in paths:
        try:
            frame = pd.read_csv(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        if missing := set(COLUMNS) - set(frame.columns):
            raise UserError(f"{path} is not a CSV of benchmark.py: it has no column {min(missing)}")
        frames.append(frame)
    rows = pd.concat(frames, ignore_index=True)
    text = [name for name in rows.columns if not name.endswith(("_s", "_ms"))]
    rows[text] = rows[text].astype(object).where(rows[text].notna(), "")  # an empty cell of text is no number
    if rows.empty:
        raise UserError(f"{', '.join(map(str, paths))}: no rows yet; run benchmark.py or benchmark_all.sh first")
    # A model that was run with inputs of several sizes is several models here: their times cannot share a panel.
    sample_shape = rows["input_shape"].str.replace(r"=\d+x", "=", regex=True)
    several = sample_shape.groupby(rows["model_name"]).transform("nunique") > 1
    rows["label"] = rows["model_name"].where(~several, rows["model_name"] + " (" + sample_shape + ")")
    rows["order"] = rows["test_item"].map(item_order)
    case = ["device_name", "precision", "label", "batch_size", "test_item"]
    rows = rows.sort_values("timestamp_utc", kind="stable").drop_duplicates(case, keep="last")
    return rows.sort_values(["label", "batch_size", "order"], kind="stable")


def markdown(rows):
    """-> one table for each device and precision, in the founding README's form; what is not ok says so."""
    parts = []
    for (device_name, precision), group in rows.groupby(["device_name", "precision"], sort=True):
        ok = group["status"] == "ok"
        table = pd.DataFrame(
            {
                "model_name": group["label"],
                "test_item": group["test_item"],
                "batch_size": group["batch_size"],
                "compile_time_s": group["compile_time_s"].map("{:.1f}".format).where(ok, ""),
                "infer_time_mean_ms": group["infer_time_mean_ms"].map("{:.3f}".format).where(ok, ""),
            }
        )
        table.loc[ok & group["compile_time_s"].isna(), "compile_time_s"] = "/"
        if not ok.all():
            reason = group["status"] + ": " + group["error"].str.replace("|", "\\|", regex=False)
            table["status"] = group["status"].where(ok, reason)
        versions = "; ".join(
            f"{name} {', '.join(sorted(map(str, group[column].unique())))}"
            for name, column in [
                ("torch", "torch_version"),
                ("TVM", "tvm_version"),
                ("transformers", "transformers_version"),
                ("driver", "driver_version"),
                ("weights", "weights"),
                ("cases at once:", "concurrent_cases"),
            ]
            if group[column].astype(bool).any()
        )
        align = ["left", "left", "right", "right", "right", "left"][: table.shape[1]]
        parts.append(
            f"### {device_name}, {precision}\n\n"
            f"{table.to_markdown(index=False, disable_numparse=True, colalign=align)}\n\n{versions}\n"
        )
    return "\n".join(parts)


def coverage_totals(rows):
    """-> a table of how many models each item got right, for each device and precision."""
    counts = rows.assign(ok=rows["status"] == "ok").groupby(["device_name", "precision", "test_item"], sort=False)["ok"]
    texts = counts.agg(lambda ok: f"{ok.sum()} of {len(ok)}").rename("models ok").reset_index()
    table = texts.pivot(index=["device_name", "precision"], columns="test_item", values="models ok").fillna("")
    return (
        table[sorted(table.columns, key=item_order)].reset_index().to_markdown(index=False, disable_numparse=True)
        + "\n"
    )


def coverage(rows):
    """-> for each device and precision a table of what every item made of every model, against eager PyTorch."""
    parts = []
    for (device_name, precision), group in rows.groupby(["device_name", "precision"], sort=True):
        items = sorted(group["test_item"].unique(), key=item_order)
        lines, reasons = [], []
        for label, model in group.groupby("label"):
            model = model.set_index("test_item")
            line = {"model": label, "weights": model["weights"].iloc[0]}
            eager = model.loc["torch", "infer_time_mean_ms"] if model["status"].get("torch") == "ok" else np.nan
            for item in items:
                status = model["status"].get(item, "")
                if status == "ok" and item == "torch":
                    status = f"{eager:.3f} ms"
                elif status == "ok":
                    status = times_faster(eager / model.loc[item, "infer_time_mean_ms"])
                elif status:
                    reasons.append(f"- {label}, {item}, {status}: {model.loc[item, 'error']}")
                line[item] = status
            lines.append(line)
        table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
        parts.append("\n".join([f"### {device_name}, {precision}\n", table, "", *reasons, ""]))
    return "\n".join(parts)


def times_faster(ratio):
    if np.isnan(ratio):
        return "ok"
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def write_part(path, name, text):
    """Replace what stands in the file between the two lines that name this part."""
    begin, end = f"<!-- {name}: plot.py writes this part -->", f"<!-- end of {name} -->"
    old = path.read_text(encoding="utf-8")
    before, found_begin, rest = old.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise UserError(f"{path} lacks the lines {begin!r} and {end!r} that the table goes between")
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", encoding="utf-8")


def draw(rows, path):
    """Save one model's picture: a panel for each device, precision and input size, grouped bars by batch size.

    Bars are means on a logarithmic axis (a 0.6 ms bar stays legible beside a 50 ms one), whiskers reach from the
    minimum to the 90th percentile. Rows that are not ok are named where their bar would stand.
    """
    panels = list(rows.groupby(["device_name", "precision", "label"], sort=True))
    items = sorted(rows["test_item"].unique(), key=item_order)
    width = max(5.0, 0.62 * len(items) * rows["batch_size"].nunique() + 0.8)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(width, 4.2 * len(panels) + 0.6), squeeze=False, layout="constrained"
    )
    for axis, ((device_name, precision, label), group) in zip(axes[:, 0], panels):
        batch_sizes = sorted(group["batch_size"].unique())
        ok = group[group["status"] == "ok"]
        low, high = 1, 1
        if len(ok):
            low, high = ok["infer_time_min_ms"].min(), ok[["infer_time_mean_ms", "infer_time_p90_ms"]].max(axis=None)
        axis.set_yscale("log")
        axis.set_ylim(low / 2.5, high * 2)
        bar_width = 0.84 / len(items)
        for i, item in enumerate(items):
            for x, batch_size in enumerate(batch_sizes):
                at = x + (i - (len(items) - 1) / 2) * bar_width
                row = group[(group["test_item"] == item) & (group["batch_size"] == batch_size)]
                if row.empty:
                    continue
                row = row.iloc[0]
                if row["status"] != "ok":
                    axis.text(at, low / 2.2, row["status"], rotation=90, ha="center", va="bottom", color="#666666")
                    continue
                mean = row["infer_time_mean_ms"]
                whisker = [[max(0, mean - row["infer_time_min_ms"])], [max(0, row["infer_time_p90_ms"] - mean)]]
                axis.bar(
                    at,
                    mean,
                    bar_width * 0.92,
                    color=COLORS.get(item, OTHER_COLOR),
                    yerr=whisker,
                    error_kw={"ecolor": "#888888", "capsize": 2, "elinewidth": 1},
                )
                top = max(mean, row["infer_time_p90_ms"])
                axis.annotate(
                    f"{mean:#.3g}",
                    (at, top),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=8,
                )
        axis.set_xticks(np.arange(len(batch_sizes)), [str(size) for size in batch_sizes])
        axis.set_xlabel("batch size")
        axis.set_ylabel("inference time, ms (log scale)")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{label}\n{device_name}, {precision}", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS.get(item, OTHER_COLOR)) for item in items]
    figure.legend(
        handles,
        items,
        loc="outside lower center",
        ncols=min(3, len(items)),
        frameon=False,
        fontsize=9,
        title="bar: mean, whisker: minimum to 90th percentile",
        title_fontsize=8,
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def main(arguments):
    if options := [argument for argument in arguments if argument.startswith("-")]:
        if options[0] in ("-h", "--help"):
            print(__doc__)
            return
        raise UserError(f"unknown option {options[0]}; plot.py takes CSV files only")
    rows = read_rows([Path(argument) for argument in arguments] or [RESULTS])
    text = markdown(rows)
    print(text)
    for readme in [] if arguments else READMES:
        write_part(readme, "results", text)
    if not arguments and COVERAGE.exists():
        covered = read_rows([COVERAGE])
        write_part(COVERAGE_PAGE, "coverage", coverage(covered))
        for page in [COVERAGE_PAGE, *READMES]:
            write_part(page, "totals", coverage_totals(covered))
    for model_name, group in rows.groupby("model_name"):
        directory = Path(arguments[0]).parent if arguments else ROOT / "docs"
        draw(group, directory / f"{model_name.strip('/').replace('/', '_')}_infer_time.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"plot.py: error: {error}", file=sys.stderr)
        sys.exit(2)
