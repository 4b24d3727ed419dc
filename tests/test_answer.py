"""The answer: one table over all precisions, and what it adds up to in words."""

import pytest

from harness.case import PRECISIONS
from harness.reports.answer import answer_in_short, answer_tables, short_models
from harness.reports.comparison import across, compare, read_rows
from harness.reports.pictures import find_panels, place_lines
from harness.rows import PRECISION_ORDER
from made_up_rows import row, write_csv

GRAPHS, AUTOTUNE = "torch_compile_reduce_overhead", "torch_compile_max_autotune"


@pytest.fixture
def merged(tmp_path):
    """Gives a function that writes rows and returns them read, with a Comparison for all precisions of a setting."""

    def merge(rows):
        return across("precision", compare(read_rows([write_csv(tmp_path / "rows.csv", rows)])))

    return merge


def sweep(**fields):
    """Returns the rows of two cases in each precision, which tvm wins by 1.5 but for one that is level."""
    medians = {"torch": 3.0, GRAPHS: 1.5, "tvm": 1.0}
    rows = [
        row(item, batch_size, median, precision=precision, **fields)
        for precision in ("bf16", "tf32", "fp16", "fp32")
        for batch_size in (16, 4)
        for item, median in medians.items()
    ]
    rows[1].update(row(GRAPHS, 16, 1.001, precision="bf16", **fields))
    return rows


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_precisions_have_their_place_in_tables():
    assert list(PRECISIONS) == list(PRECISION_ORDER)


def test_one_setting_is_one_table_sorted_by_model_precision_and_batch_size(merged):
    text = answer_tables(merged([*sweep(), row("torch", 1, 2.0, model_name="another/model-2", precision="bf16")]))
    assert text.startswith("GPU A; torch 2; TVM 0.27; ") and "###" not in text
    header, _, *lines = cells(text)
    assert header == ["model", "precision", "batch size", "torch", "reduce-overhead", "tvm", "lead"]
    assert [line[:3] for line in lines] == [
        ["model-2", "bf16", "1"],
        *(["model", precision, size] for precision in PRECISION_ORDER for size in ("4", "16")),
    ]
    assert lines[0][3:] == ["2.00 ± 0.02", "", "", ""]  # alone: no winner
    assert lines[1][3:] == ["3.00 ± 0.03", "1.50 ± 0.01", "**1.00 ± 0.01**", "1.50x"]
    assert lines[-1][3:] == ["3.00 ± 0.03", "**1.00 ± 0.01**", "**1.00 ± 0.01**", "level"]


def test_other_settings_have_tables_of_their_own(merged):
    text = answer_tables(merged([*sweep(), *sweep(harness_version="1.0.0+a"), *sweep(device_name="GPU B")]))
    assert [line for line in text.splitlines() if line.startswith("### ")] == ["### GPU A", "### GPU A", "### GPU B"]
    assert text.count("harness not recorded\n") == 2 and text.count("harness 1.0.0+a\n") == 1


def test_what_is_not_ok_stays_visible_with_its_reason(merged):
    rows = [row("torch", 1, 3.0), row("tvm", 1, None), row(AUTOTUNE, 1, 1.0, status="wrong", error="off")]
    text = answer_tables(merged([*rows, row("torch", 1, 3.0, precision="fp16", host_time_ms=2.9, warnings="x")]))
    assert ["model", "fp32", "1", "3.00 ± 0.03", "wrong", "failed", ""] in cells(text)
    assert ["model", "fp16", "1", "3.00 ± 0.03ʰᵈ", "", "", ""] in cells(text)
    assert f"- some/model, fp32, batch size 1, {AUTOTUNE}: wrong, `off`" in text
    assert "ʰ waits for the host" in text and "ᵈ disturbed" in text


def test_a_lead_has_no_more_digits_than_its_spread_allows(merged):
    rows = [row("torch", 1, 4.0, infer_time_std_ms=0.9), row("tvm", 1, 1.0)]
    assert cells(answer_tables(merged(rows)))[-1][-1] == "4.0x"
    rows[0]["infer_time_std_ms"] = 4.5
    assert cells(answer_tables(merged([{**rows[0], "warnings": "x"}, rows[1]])))[-1][-1] == "unclear"


def test_models_lose_their_organisation_where_no_other_has_that_name(merged):
    names = ["a/one", "b/one", "b/two (with/slash)", "three", "/models/four"]
    (comparison,) = merged([row("torch", 1, 1.0, model_name=name, weights="random, 4 of 8 layers") for name in names])
    assert list(short_models(comparison.cases).values()) == [
        "four (4 of 8 layers)",
        "a/one (4 of 8 layers)",
        "b/one (4 of 8 layers)",
        "slash) (4 of 8 layers)",
        "three (4 of 8 layers)",
    ]


def test_the_sentence_counts_what_the_table_shows(merged):
    rows = [*sweep(), *sweep(harness_version="1.0.0+a", model_name="other/model")]
    assert answer_in_short(merged(rows)) == (
        "GPU A, 16 cases: the fastest item is tvm in 14 (fp32 4 of 4, tf32 4 of 4, fp16 4 of 4, bf16 2 of 4) with a "
        "lead of 1.50x; reduce-overhead and tvm are level in 2 (bf16 2 of 4).\n"
    )
    rows = [row("torch", 1, 3.0), row("tvm", 1, 2.0), row("tvm_tune", 1, 1.0), row("torch", 4, 3.0)]
    rows += [row("torch", 1, 1.0, precision="fp16"), row("tvm", 1, 4.0, precision="fp16"), row("tvm_tune", 4, None)]
    rows += [row("torch", 1, 1.0, device_name="GPU B")]
    assert answer_in_short(merged(rows)) == (
        "GPU A, 3 cases: the fastest item is tvm_tune in 1 (fp32 1 of 2) with a lead of 2.00x and torch in 1 "
        "(fp16 1 of 1) with a lead of 4.00x; there is nothing to compare in 1 (fp32 1 of 2). "
        "Not run: tvm_tune in fp16.\n\n"
        "GPU B, 1 case: there is nothing to compare in 1 (fp32 1 of 1).\n"
    )


def test_a_picture_has_a_panel_a_setting_and_a_line_a_case(merged):
    rows = [*sweep(), *sweep(harness_version="1.0.0+a")]
    rows[0].update(row("torch", 16, None, precision="bf16"))
    first, second = find_panels(merged(rows), "some/model")
    assert first[0] == ["some/model", "GPU A", "harness_version not recorded"]
    assert second[0] == ["some/model", "GPU A", "harness_version 1.0.0+a"]
    assert [(case.precision, case.batch_size) for case in second[1]] == [
        (p, b) for p in PRECISION_ORDER for b in (4, 16)
    ]
    # A gap between precisions, and room below the line of an item that failed.
    assert place_lines(second[1]) == [0, 1, 2.5, 3.5, 5, 6, 7.5, 8.5, 9.5]
    assert place_lines(first[1])[-3:] == [7.5, 8.5, 10.25]
