"""The picture of many models: who is where in it."""

import pytest

from harness.reports.comparison import compare, read_rows
from harness.reports.overview import lines_of, names_of, save_overview
from harness.reports.tables import totals_table
from made_up_rows import row, write_csv
from plot import most_families

ITEMS = "torch", "torch_compile", "torch_compile_reduce_overhead", "tvm", "tvm_tune"


@pytest.fixture
def comparison(tmp_path):
    medians = {  # by ITEMS; 0: it failed, None: it was not run
        "a/slow": (9.0, 2.0, 1.0, 4.0, 2.0),
        "a/failed": (9.0, 2.0, None, 0, 0),
        "a/fast": (9.0, 2.0, 1.5, 3.0, 1.0),
        "a/untuned": (9.0, 2.0, None, 2.0, None),
        "a/without-a-mode": (9.0, None, None, 1.0, 1.0),
    }
    rows = [
        row(item, 1, median or None, model_name=model)
        for model, of_model in medians.items()
        for item, median in zip(ITEMS, of_model)
        if median is not None
    ]
    (found,) = compare(read_rows([write_csv(tmp_path / "rows.csv", rows)]))
    return found


def test_models_are_sorted_by_the_best_of_tvm_against_the_best_torch_compile_mode(comparison):
    lines = lines_of(comparison)
    assert names_of([case for case, _ in lines]) == ["fast", "untuned", "slow", "failed"]
    assert lines[0][1] == dict(zip(ITEMS, (6.0, pytest.approx(4 / 3), 1.0, 2.0, pytest.approx(2 / 3))))
    assert lines[3][1] == {"torch": 4.5, "torch_compile": 1.0}


def test_names_are_short_and_have_batch_sizes_that_differ(tmp_path):
    long_name = "owner/" + 40 * "m"
    rows = [row("torch", 1, 1.0, model_name=long_name), row("torch", 16, 1.0, model_name="owner/b")]
    (found,) = compare(read_rows([write_csv(tmp_path / "rows.csv", rows)]))
    assert names_of(found.cases) == ["b, 16", 32 * "m" + " …, 1"]


def test_the_picture_is_saved_whatever_the_names(comparison, tmp_path):
    comparison.cases[0].rows[0]["model_name"] = "a/$b_{c}$"
    save_overview(comparison, tmp_path / "overview.png")
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_families_of_several_versions_are_counted_together(tmp_path):
    """Not with rows of fewer items, nor with those of another device."""
    rows = [
        row(item, 1, 1.0, model_name=model, harness_version=version, device_name=device)
        for model, version, device in (("a", "1.0.0+x", "A"), ("b", "1.0.0+y", "A"), ("c", "1.0.0+x", "B"))
        for item in ITEMS
    ]
    rows += [row(ITEMS[0], 1, 1.0, model_name=name, device_name="A", tvm_version="0") for name in "defg"]
    families = most_families(compare(read_rows([write_csv(tmp_path / "rows.csv", rows)])))
    assert [case.label for case in families.cases] == ["a", "b"]
    (line, *_) = [line for line in totals_table([families]).splitlines() if "| tvm_tune" in line]
    assert "| 2 versions | tvm_tune" in line and "| 2 of 2 |" in line
