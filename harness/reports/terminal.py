"""What the terminal says of rows, in the manner of hyperfine: a line a row, then who is how many times faster."""

import math

from harness.rows import ITEM_ORDER


def describe_row(row):
    """Returns the terminal's lines on one row."""
    name = f"{row['test_item']:<{max(map(len, ITEM_ORDER))}}"
    if row["status"] == "failed":
        return f"{name}  FAILED: {row['error']}"
    text = (
        f"{name}  {row['infer_time_mean_ms']:8.3f} ms ± {row['infer_time_std_ms']:.3f} ms"
        f"  [{row['infer_time_min_ms']:.3f} ms … {row['infer_time_max_ms']:.3f} ms]  {row['iterations']} runs"
    )
    if row["compile_time_s"] is not None:
        text += f"  compiled in {row['compile_time_s']:.1f} s"
    if row.get("tune_trials") is not None:
        text += f"  tuned in {row['tune_time_s']:.0f} s ({row['tune_trials']} trials)"
    text += f"  rel_error {row['rel_error']:.1e}"
    if row["status"] == "wrong":
        text += f"  WRONG: {row['error']}"
    if row["warnings"]:
        text += f"\n{'':<{len(name)}}  warning: {row['warnings']}"
    return text


def describe_comparison(rows):
    """Returns how many times faster the fastest row is than each other one that is ok.

    The spread is that of a ratio of two means with independent errors.
    """
    fastest, *others = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["infer_time_mean_ms"])
    lines = [f"{fastest['test_item']} ran"]
    for row in others:
        ratio = row["infer_time_mean_ms"] / fastest["infer_time_mean_ms"]
        spread = ratio * math.hypot(*(r["infer_time_std_ms"] / r["infer_time_mean_ms"] for r in (row, fastest)))
        lines.append(f"  {ratio:.2f} ± {spread:.2f} times faster than {row['test_item']}")
    return "\n".join(lines)
