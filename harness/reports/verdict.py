"""The verdict: which item to use for a case, what it costs to get there, and when that has paid for itself.

All of it is computed from rows, so that the terminal, the tables and the pictures say the same. Times are medians: an
outlier is the machine's, not the item's.
"""

import math
import typing

from harness.rows import ITEM_ORDER, item_order, number

EAGER = "torch"


class Contender(typing.NamedTuple):
    """One row that is ok, as far as the verdict looks at it; milliseconds are of an inference, seconds of a start."""

    item: str
    median_ms: float
    low_ms: float  # the spread: one standard deviation to both sides, but not beyond the minimum and the 90th
    high_ms: float  # percentile; all of that where something disturbed the row
    cold_s: float  # from the loaded model to the first output, caches empty; 0 for eager
    warm_s: float  # the same with the caches of an earlier run; that of cold caches where it was not measured
    search_s: float  # what the search behind its schedules took, 0 where there is none

    def total_s(self, calls, caches):
        """Returns the seconds that a start and `calls` inferences take. caches: "cold" or "warm"."""
        return (self.warm_s if caches == "warm" else self.cold_s) + calls * self.median_ms / 1e3


def contenders(rows):
    """Returns a Contender for each row that is ok, the fastest first. rows: dicts of the CSV's columns."""
    found = []
    for row in rows:
        if row["status"] != "ok":
            continue
        median, std = number(row, "infer_time_median_ms"), number(row, "infer_time_std_ms")
        low, high = number(row, "infer_time_min_ms"), number(row, "infer_time_p90_ms")
        if not row.get("warnings"):
            low, high = max(low, median - std), min(high, median + std)
        cold_s = number(row, "compile_time_s") or 0.0
        warm_s = number(row, "warm_start_time_s")
        found.append(
            Contender(
                row["test_item"],
                median,
                low,
                high,
                cold_s,
                cold_s if warm_s is None else warm_s,
                number(row, "tune_time_s") or 0.0,
            )
        )
    return sorted(found, key=lambda contender: (contender.median_ms, item_order(contender.item)))


def level_with(fastest, others):
    """Returns those of `others` whose spread overlaps with that of `fastest`: the rows do not say who is faster."""
    return [other for other in others if other.low_ms <= fastest.high_ms and fastest.low_ms <= other.high_ms]


def choose(found):
    """Returns the Contender to use and those that are level with it: of level ones, the one that starts soonest.

    Unless something that is not level with the fastest is faster than that one: a wide spread is no recommendation.
    """
    fastest, *others = found
    level = [fastest, *level_with(fastest, others)]
    next_ms = min((contender.median_ms for contender in others if contender not in level), default=math.inf)
    chosen = min((c for c in level if c.median_ms <= next_ms), key=lambda contender: contender.cold_s)
    return chosen, [contender for contender in level if contender is not chosen]


def speedup(slower, faster):
    """Returns how many times faster one row is than another, and the spread of that: a ratio of two medians.

    The rows' errors are independent, so that relative standard deviations add up by their squares.
    """
    medians = [number(row, "infer_time_median_ms") for row in (slower, faster)]
    ratio = medians[0] / medians[1]
    spreads = [number(row, "infer_time_std_ms") / median for row, median in zip((slower, faster), medians)]
    return ratio, ratio * math.hypot(*spreads)


def break_even_calls(faster, slower, caches="cold", with_search=False):
    """Returns after how many inferences `faster` has caught up what it started later; inf where it never does."""
    gained_ms = slower.median_ms - faster.median_ms
    later_s = faster.total_s(0, caches) - slower.total_s(0, caches)
    if with_search:
        later_s += faster.search_s - slower.search_s
    if later_s <= 0:
        return 0
    return math.ceil(later_s * 1e3 / gained_ms) if gained_ms > 0 else math.inf


def cheapest(found, calls, caches):
    """Returns the Contender that needs the least time for one start and `calls` inferences."""
    return min(found, key=lambda contender: contender.total_s(calls, caches))


def describe_verdict(rows, expected_calls=None):
    """Returns the verdict's lines on the rows of one case; of a single row that is ok there is nothing to say.

    expected_calls: also says who wins by one start and so many inferences.
    """
    found = contenders(rows)
    if len(found) < 2:
        return []
    chosen, level = choose(found)
    by_item = {contender.item: contender for contender in found}
    behind = [contender for contender in found if contender is not chosen and contender not in level]
    compared = {contender.item: contender for contender in [*behind[:1], by_item.get(EAGER)] if contender in behind}
    lines = [f"verdict: use {chosen.item} ({chosen.median_ms:.3f} ms)"]
    if level:
        names = " and ".join(f"{contender.item} ({contender.median_ms:.3f} ms)" for contender in level)
        lines[0] += f"; level with {names}, the difference is within the spread, and it starts soonest"
    if compared:
        ratios = [f"{c.median_ms / chosen.median_ms:.2f} times faster than {c.item}" for c in compared.values()]
        lines[0] += "; " + ", ".join(ratios)
    if chosen.item != EAGER:
        lines.append(f"  costs {describe_cost(chosen)}")
    for other in compared.values():
        lines.append(f"  pays off against {other.item} {describe_break_even(chosen, other)}")
    for caches in ("cold", "warm") if expected_calls else ():
        best = cheapest(found, expected_calls, caches)
        total = f"{best.total_s(expected_calls, caches):.1f} s"
        lines.append(f"  for {expected_calls:,} inferences, caches {caches}: {best.item}, {total} with its start")
    lines += describe_rest(rows)
    return lines


def describe_cost(contender):
    """Returns what it takes to get to a compiled model, in words."""
    text = f"{contender.cold_s:.1f} s to compile"
    if contender.warm_s < contender.cold_s:
        text += f", {contender.warm_s:.1f} s to start again"
    if contender.search_s:
        text += f"; {contender.search_s:.0f} s of search went into its schedules before"
    return text


def describe_break_even(chosen, other):
    """Returns after how many inferences, and seconds, the chosen one has paid for itself against another one."""

    def after(with_search):
        calls = break_even_calls(chosen, other, with_search=with_search)
        if calls == 0:
            return "from the first inference"
        seconds = chosen.total_s(calls, "cold") + (chosen.search_s if with_search else 0)
        return f"after {calls:,} inferences, {seconds:.0f} s"

    return after(False) + (f"; {after(True)} if the search is counted" if chosen.search_s else "")


def describe_rest(rows):
    """Returns a line on the items that gave no time, and one on those that were not tried."""
    failed = [f"{row['test_item']} ({row['status']})" for row in rows if row["status"] != "ok"]
    tried = {row["test_item"] for row in rows}
    missing = [item for item in ITEM_ORDER if item not in tried]
    return [f"  no result: {', '.join(failed)}"] * bool(failed) + [f"  not tried: {', '.join(missing)}"] * bool(missing)
