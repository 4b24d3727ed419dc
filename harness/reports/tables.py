"""Markdown tables of rows: the times of every item, the verdict on every case, and what was made of many models."""

import math

from tabulate import tabulate

from harness.reports import verdict
from harness.rows import number, waits_for_host

# What the names of test items are cut to where space is short; the others are short.
SHORT_NAMES = {
    "torch_compile": "torch.compile",
    "torch_compile_reduce_overhead": "reduce-overhead",
    "torch_compile_max_autotune": "max-autotune",
}
HOST_MARK, DISTURBED_MARK = "ʰ", "ᵈ"
LEGENDS = {
    HOST_MARK: "waits for the host: says more about the host than about the compiler",
    DISTURBED_MARK: "disturbed by outliers or a drift: see the column `warnings`",
}
CAPTION = """\
Times: milliseconds for one inference, median ± standard deviation; the fastest item of a case is bold, and so is what
is level with it. Verdicts: what to use, and after how many inferences it pays off against the runner-up and against
eager, counted from a start with cold caches.
"""
# What is said under a table's heading: (name, column, whether an empty one is worth a word).
MEASURED_WITH = [
    ("torch", "torch_version", True),
    ("TVM", "tvm_version", True),
    ("transformers", "transformers_version", True),
    ("driver", "driver_version", False),  # a CPU has none
    ("weights", "weights", True),
    ("CPU threads", "cpu_threads", True),
    ("harness", "harness_version", True),
    ("cases at once:", "concurrent_cases", False),
]


def short_name(item):
    return SHORT_NAMES.get(item, item)


def plus_minus(value, spread):
    """Returns "value ± spread": the spread with one significant digit, the value with no digit that it blurs."""
    decimals = allowed_decimals(value, spread)
    return f"{rounded(value, decimals)} ± {rounded(spread, decimals)}"


def allowed_decimals(value, spread, most_decimals=3):
    """Returns how many decimals of the value its spread allows, negative for tens and hundreds.

    The value keeps its first digit, however wide the spread is.
    """
    if spread == 0:
        return most_decimals
    first_digits = [math.floor(math.log10(float(f"{x:.0e}"))) for x in (value, spread)]
    return min(most_decimals, -min(first_digits))


def rounded(value, decimals):
    return f"{round(value, decimals):,.{max(decimals, 0)}f}"


def marks(row):
    """Returns the marks on a row's time."""
    return HOST_MARK * waits_for_host(row) + DISTURBED_MARK * bool(row["warnings"])


def median_text(row):
    """Returns the median of a row that is ok and its standard deviation, in milliseconds."""
    return plus_minus(number(row, "infer_time_median_ms"), number(row, "infer_time_std_ms"))


def table(lines, right=()):
    """Returns a markdown table of dicts with the same keys. right: the columns that are aligned to the right."""
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line.values()] for line in lines]
    align = ["right" if name in right else "left" for name in lines[0]]
    return tabulate(cells, list(lines[0]), tablefmt="pipe", disable_numparse=True, colalign=align)


def heading(comparison):
    """Returns what a table is headed by: device and precision, and in a line of its own what else was the same."""
    return f"### {comparison.title}\n\n{measured_with(comparison)}"


def measured_with(comparison):
    """Returns a line that says which versions, weights and threads a comparison's rows were measured with."""
    told = []
    for name, column, always in MEASURED_WITH:
        values = sorted({row[column] for row in comparison.rows if row[column]})
        if values or always:
            told.append(f"{name} {', '.join(values) or 'not recorded'}")
    return "; ".join(told)


def legend(text):
    """Returns a line that explains the marks that occur in the text."""
    return "; ".join(f"{mark} {meaning}" for mark, meaning in LEGENDS.items() if mark in text)


def reasons(comparison):
    """Returns a line for each row that is not ok."""
    several = "precision" not in comparison.setting  # in one table
    return "\n".join(
        f"- {case.label}, {f'{case.precision}, ' * several}batch size {case.batch_size}, {row['test_item']}: "
        f"{row['status']}{reason(row['error'])}"
        for case in comparison.cases
        for row in case.rows
        if row["status"] != "ok"
    )


def reason(error):
    """Returns an error in one line, as markdown shows it letter by letter; "" where there is none."""
    return f", `{' '.join(error.split()).replace('`', chr(39))}`" if error.strip() else ""


def paragraphs(*parts):
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def times_of(case):
    """Returns {item: its median ± standard deviation with marks, or why there is none}, the winners in bold."""
    winners = case.winners()
    texts = {}
    for row in case.rows:
        text = median_text(row) + marks(row) if row["status"] == "ok" else row["status"]
        texts[row["test_item"]] = f"**{text}**" if row["test_item"] in winners else text
    return texts


def compact_table(comparison):
    """Returns a line a case with the time of every item: median ± standard deviation, the winners in bold."""
    lines = []
    for case in comparison.cases:
        line = {"model": case.label, "batch size": case.batch_size, **dict.fromkeys(comparison.items, "")}
        lines.append(line | times_of(case))
    text = table(lines, right={"batch size", *comparison.items})
    return paragraphs(text, legend(text), reasons(comparison))


def bandwidth_table(comparison):
    """Returns a line a case with the tokens a second of every item and its share of the memory's copy rate.

    Nothing of forward passes.
    """
    if not comparison.decodes:
        return ""
    lines = []
    for case in comparison.cases:
        line = {"model": case.label, "batch size": case.batch_size, **dict.fromkeys(comparison.items, "")}
        for row in case.rows:
            rate, share = number(row, "tokens_per_s"), number(row, "bandwidth_share")
            if row["status"] == "ok" and rate is not None and share is not None:
                line[row["test_item"]] = f"{rate:,.0f} tokens/s ({share:.0%})"
        lines.append(line)
    text = table(lines, right={"batch size", *comparison.items})
    return paragraphs(text, "In brackets: weights and cache, moved once, against the rate at which the device copies")


def verdict_table(comparison):
    """Returns a line a case: what to use, how much faster it is, what it costs and when that has paid for itself.

    Nothing where no case has two items to choose from.
    """
    lines = [verdict_line(case) for case in comparison.cases if case.winners()]
    if not lines:
        return ""
    optional = ["second start, s", "search, s"]
    unused = [name for name in optional if not any(line[name] for line in lines)]
    lines = [{name: cell for name, cell in line.items() if name not in unused} for line in lines]
    return paragraphs(table(lines, right=set(lines[0]) - {"model", "use", "runner-up"}))


def verdict_line(case):
    """Returns the cells of a case in the verdict table."""
    found = verdict.contenders(case.rows)
    rows = {row["test_item"]: row for row in case.rows}
    chosen, level = verdict.choose(found)
    behind = [contender for contender in found if contender is not chosen and contender not in level]
    runner_up = behind[0] if behind else None
    eager = next((contender for contender in behind if contender.item == verdict.EAGER), None)
    row = rows[chosen.item]

    def times_faster(other):
        if other is None:
            return ""
        ratio, spread = verdict.speedup(rows[other.item], row)
        return plus_minus(ratio, spread) if spread < ratio else "unclear"

    level_names = " and ".join(contender.item for contender in level)
    warm_s = number(row, "warm_start_time_s")
    return {
        "model": case.label,
        "batch size": case.batch_size,
        "use": f"{chosen.item} (level with {level_names})" if level else chosen.item,
        "median, ms": rounded(chosen.median_ms, 3),
        "compile, s": "/" if chosen.item == verdict.EAGER else f"{chosen.cold_s:,.1f}",
        "second start, s": "" if warm_s is None else f"{warm_s:,.1f}",
        "search, s": f"{chosen.search_s:,.0f}" if chosen.search_s else "",
        "runner-up": runner_up.item if runner_up else "",
        "times faster": times_faster(runner_up),
        "pays off after": break_even_text(chosen, runner_up),
        "eager: times faster": times_faster(eager),
        "eager: pays off after": break_even_text(chosen, eager),
    }


def break_even_text(chosen, other):
    """Returns after how many inferences the chosen item has paid for itself, and the same with its search counted."""
    if other is None:
        return ""

    def after(with_search):
        calls = verdict.break_even_calls(chosen, other, with_search=with_search)
        return "at once" if calls == 0 else "never" if calls == math.inf else f"{calls:,}"

    return after(False) + (f" ({after(True)} with search)" if chosen.search_s else "")


def long_table(comparison):
    """Returns a line a row, with the five columns of the founding README; what is not ok says so."""
    has_search = any(number(row, "tune_time_s") is not None for row in comparison.rows)
    all_ok = all(row["status"] == "ok" for row in comparison.rows)
    lines = []
    for case in comparison.cases:
        for row in case.rows:
            ok, compile_s, search_s = row["status"] == "ok", number(row, "compile_time_s"), number(row, "tune_time_s")
            line = {
                "model_name": case.label,
                "test_item": row["test_item"],
                "batch_size": case.batch_size,
                "compile_time_s": "" if not ok else "/" if compile_s is None else f"{compile_s:.1f}",
                "infer_time_mean_ms": f"{number(row, 'infer_time_mean_ms'):.3f}" if ok else "",
            }
            if has_search:
                line["tune_time_s"] = "" if search_s is None else f"{search_s:.0f}"
            if not all_ok:
                line["status"] = "ok" if ok else f"{row['status']}: {row['error']}"
            lines.append(line)
    return paragraphs(table(lines, right=set(lines[0]) - {"model_name", "test_item", "status"}))


def is_level(row, other):
    """Returns whether the spreads of two rows that are ok overlap, by the verdict's rule."""
    one, two = (verdict.contenders([r])[0] for r in (row, other))
    return bool(verdict.level_with(one, [two]))


def totals_table(comparisons):
    """Returns, for each setting and item, in how many cases it came out right, beat eager and was the fastest."""
    lines = []
    for comparison in comparisons:
        for item in comparison.items:
            with_item = [case for case in comparison.cases if any(r["test_item"] == item for r in case.rows)]
            faster = fastest = level = ok = 0
            for case in with_item:
                good = {row["test_item"]: row for row in case.rows if row["status"] == "ok"}
                row, eager, winners = good.get(item), good.get(verdict.EAGER), case.winners()
                ok += row is not None
                if row and eager and row is not eager and not is_level(row, eager):
                    faster += verdict.speedup(eager, row)[0] > 1
                fastest += winners == {item}
                level += item in winners and len(winners) > 1
            lines.append(
                {
                    "device_name": comparison.setting["device_name"],
                    "precision": comparison.title.partition(", ")[2],
                    "harness": versions_of(comparison),
                    "test_item": item,
                    "ok": f"{ok} of {len(with_item)}",
                    "faster than eager": "/" if item == verdict.EAGER else faster,
                    "fastest": fastest,
                    "level with the fastest": level,
                }
            )
    return paragraphs(table(lines, right={"ok", "faster than eager", "fastest", "level with the fastest"}))


def versions_of(comparison):
    """Returns the version of this harness that measured a Comparison's rows, or how many versions did."""
    versions = {row["harness_version"] or "not recorded" for row in comparison.rows}
    return versions.pop() if len(versions) == 1 else f"{len(versions)} versions"
