"""What the terminal says of rows, in the manner of hyperfine: a line a row, who is faster, the verdict, the seconds."""

import os
import time
from pathlib import Path

from harness.reports.verdict import describe_verdict, speedup
from harness.rows import ITEM_ORDER, waits_for_host


def describe_title(case, columns):
    """Returns the line that stands above a case's rows. columns: those that all of them share."""
    return (
        f"{case.model_name}, {describe_phase(columns)}batch size {case.batch_size}, {case.precision}, "
        f"{columns['weights']} weights, "
        f"{case.device_name}, {case.model_class.__name__}: {columns['input_shape']}"
    )


def describe_phase(columns):
    """Returns what the title says of a case that decodes; nothing of a forward pass."""
    return f"decode, context length {columns['context_len']}, " if columns["phase"] == "decode" else ""


def describe_row(row):
    """Returns the terminal's lines on one row: the median of its runs, their spread and range, and what it cost."""
    name = f"{row['test_item']:<{max(map(len, ITEM_ORDER))}}"
    if row["status"] == "failed":
        return f"{name}  FAILED: {row['error']}"
    text = (
        f"{name}  {row['infer_time_median_ms']:8.3f} ms ± {row['infer_time_std_ms']:.3f} ms"
        f"  [{row['infer_time_min_ms']:.3f} ms … {row['infer_time_max_ms']:.3f} ms]  {row['iterations']} runs"
    )
    if row["compile_time_s"] is not None:
        text += f"  compiled in {row['compile_time_s']:.1f} s"
    if row.get("warm_start_time_s") is not None:
        text += f" (again in {row['warm_start_time_s']:.1f} s)"
    if row.get("tune_trials") is not None:
        text += f"  tuned in {row['tune_time_s']:.0f} s ({row['tune_trials']} trials)"
    if row.get("tokens_per_s") is not None:
        text += f"  {row['tokens_per_s']:.0f} tokens/s, {row['bandwidth_share']:.0%} of the memory's copy rate"
    text += f"  rel_error {row['rel_error']:.1e}"
    if row["status"] == "wrong":
        text += f"  WRONG: {row['error']}"
    notes = []
    if waits_for_host(row):
        notes.append(f"waits for the host, which takes {row['host_time_ms']:.3f} ms to hand over one inference")
    if row.get("warm_start_error"):
        notes.append(f"no second start: {row['warm_start_error']}")
    if row.get("schedule_warning"):
        notes.append(f"warning: {row['schedule_warning']}")
    if row["warnings"]:
        notes.append(f"warning: {row['warnings']}")
    return "\n".join([text, *(f"{'':<{len(name)}}  {note}" for note in notes)])


def describe_end(rows, elapsed_s, args):
    """Returns what follows a case's rows: who was faster, which item to use, and where the time went.

    args: the command line's expected_calls, results and verbose.
    """
    lines = [describe_comparison(rows)] if sum(row["status"] == "ok" for row in rows) > 1 else []
    lines += describe_verdict(rows, args.expected_calls)
    unsaved = ", ".join(row["test_item"] for row in rows if "not_saved" in row)
    where = f"rows in {args.results}" + (f", but for {unsaved}" if unsaved else "")
    lines.append(f"{describe_seconds(rows, elapsed_s)}; {where}")
    if any(row["status"] == "failed" for row in rows) and not args.verbose:
        lines.append("--verbose shows the whole traceback of what failed")
    return "\n".join(lines)


def describe_seconds(rows, elapsed_s):
    """Returns where a case's seconds went: its rows' search, compiling, starting again and timing, and all else."""
    columns = {
        "searching": "search_s",
        "compiling": "compile_time_s",
        "starting again": "warm_start_time_s",
        "timing": "timing_s",
    }
    parts = {name: sum(row.get(column) or 0 for row in rows) for name, column in columns.items()}
    if not parts["searching"]:
        del parts["searching"]
    parts["for all else"] = elapsed_s - sum(parts.values())
    return f"{elapsed_s:.1f} s: " + ", ".join(f"{seconds:.1f} s {name}" for name, seconds in parts.items())


def describe_comparison(rows):
    """Returns how many times faster the fastest row is than each other one that is ok, by their medians."""
    by_median = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["infer_time_median_ms"])
    fastest, *others = by_median
    lines = [f"{fastest['test_item']} ran"]
    for row in others:
        ratio, spread = speedup(row, fastest)
        lines.append(
            f"  {ratio:.2f} ± {spread:.2f} times faster than {row['test_item']}"
            if spread < ratio
            else f"  unclear how many times faster than {row['test_item']}: the spread is as large as the ratio"
        )
    return "\n".join(lines)


def process_age_s():
    """Returns the seconds since this process was started, its imports included.

    man 5 proc: field 22 of stat is the start in clock ticks after boot.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
