"""The verdict on made-up rows: the winner, ties, what it costs, and when it has paid for itself."""

import math

import pytest

from harness.reports import terminal, verdict


def row(item, median, std=0.001, compile_s=None, **fields):
    return {
        "test_item": item,
        "status": "ok",
        "infer_time_median_ms": median,
        "infer_time_std_ms": std,
        "infer_time_min_ms": 0.9 * median,
        "infer_time_p90_ms": 1.2 * median,
        "compile_time_s": compile_s,
        "warnings": "",
        **fields,
    }


EAGER = row("torch", 4.0, std=0.5)
COMPILED = row("torch_compile", 3.0, std=0.3, compile_s=12.0, warm_start_time_s=3.0)
GRAPHS = row("torch_compile_reduce_overhead", 0.5, compile_s=10.0, warm_start_time_s=4.0)
TUNED = row("tvm_tune", 0.3, compile_s=13.0, warm_start_time_s=1.0, tune_time_s=330.0)


def text(*rows, **options):
    return "\n".join(verdict.describe_verdict(list(rows), **options))


def test_the_fastest_row_is_named_with_its_price():
    said = text(EAGER, COMPILED, GRAPHS, TUNED)
    assert said.startswith(
        "verdict: use tvm_tune (0.300 ms); 1.67 times faster than torch_compile_reduce_overhead, 13.33"
    )
    assert "costs 13.0 s to compile, 1.0 s to start again; 330 s of search went into its schedules before" in said
    # (13 - 10) s / 0.2 ms and 13 s / 3.7 ms; with the search 333 s / 0.2 ms and 343 s / 3.7 ms.
    assert "against torch_compile_reduce_overhead after 15,000 inferences, 18 s; after 1,665,000 inferences" in said
    assert "against torch after 3,514 inferences, 14 s; after 92,703 inferences, 371 s if the search is counted" in said
    assert "not tried: torch_compile_max_autotune, tvm" in said and "no result" not in said


def test_what_gave_no_time_cannot_win():
    failed = {"test_item": "tvm", "status": "failed"}
    said = text(EAGER, GRAPHS, failed, TUNED | {"status": "wrong"})
    assert said.startswith("verdict: use torch_compile_reduce_overhead (0.500 ms); 8.00 times faster than torch")
    assert "no result: tvm (failed), tvm_tune (wrong)" in said
    assert text(EAGER, failed) == ""


@pytest.mark.parametrize(
    "other, level",
    [
        (row("tvm_tune", 0.501, compile_s=5.0), True),
        (row("tvm_tune", 0.49, compile_s=5.0), False),
        (row("tvm_tune", 0.49, compile_s=5.0, warnings="2.0% of the runs are outliers"), True),
        (
            row("tvm_tune", 0.3, compile_s=5.0, warnings="2.0% of the runs are outliers"),
            False,
        ),  # 0.36 at the 90th percentile
    ],
)
def test_a_tie_is_where_spreads_meet_and_a_disturbed_row_has_a_wide_one(other, level):
    chosen, tied = verdict.choose(verdict.contenders([GRAPHS, other]))
    assert [contender.item for contender in tied] == ["torch_compile_reduce_overhead"] * level
    assert chosen.item == "tvm_tune"  # of two that are level it starts sooner
    assert ("level with torch_compile_reduce_overhead (0.500 ms)" in text(GRAPHS, other)) == level


def test_eager_may_win():
    said = text(EAGER, row("torch_compile", 5.0, std=0.1, compile_s=12.0))
    assert said.startswith("verdict: use torch (4.000 ms); 1.25 times faster than torch_compile")
    assert "costs" not in said and "pays off against torch_compile from the first inference" in said


def test_break_even():
    eager, graphs, tuned = (verdict.contenders([r])[0] for r in (EAGER, GRAPHS, TUNED))
    assert verdict.break_even_calls(graphs, eager) == math.ceil(10e3 / 3.5)
    assert verdict.break_even_calls(tuned, graphs, "warm") == 0  # it starts sooner, too
    assert verdict.break_even_calls(tuned, graphs, "warm", with_search=True) == math.ceil((330 - 3) * 1e3 / 0.2)
    assert verdict.break_even_calls(eager, graphs) == 0
    assert verdict.break_even_calls(graphs, graphs._replace(cold_s=0)) == math.inf


@pytest.mark.parametrize(
    "calls, cold, warm",
    [
        (100, "torch, 0.4 s", "torch, 0.4 s"),
        (3000, "torch_compile_reduce_overhead, 11.5 s", "tvm_tune, 1.9 s"),
        (1_000_000, "tvm_tune, 313.0 s", "tvm_tune, 301.0 s"),
    ],
)
def test_expected_calls_choose_by_start_and_inferences(calls, cold, warm):
    said = text(EAGER, COMPILED, GRAPHS, TUNED, expected_calls=calls)
    assert f"for {calls:,} inferences, caches cold: {cold} with its start" in said
    assert f"for {calls:,} inferences, caches warm: {warm} with its start" in said


def test_a_wide_spread_is_no_recommendation():
    fastest, between = row("torch", 1.0, std=0.05), row("tvm", 1.2, std=0.01, compile_s=9.0)
    disturbed = row("torch_compile", 1.25, compile_s=0.0, warnings="x", infer_time_min_ms=0.9)
    chosen, level = verdict.choose(verdict.contenders([fastest | {"compile_time_s": 1.0}, between, disturbed]))
    assert chosen.item == "torch" and [contender.item for contender in level] == ["torch_compile"]


def test_a_ratio_within_its_spread_is_no_number():
    lines = terminal.describe_comparison([row("tvm", 1.0), row("torch", 1.2, std=1.5), row("torch_compile", 2.0)])
    assert "  unclear how many times faster than torch: the spread is as large as the ratio" in lines.splitlines()
    assert "  2.00 ± 0.00 times faster than torch_compile" in lines.splitlines()
