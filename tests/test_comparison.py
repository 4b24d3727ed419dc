"""Which rows stand side by side, under which names, and with how many digits."""

import pytest

from harness.reports.comparison import compare, drop_superseded, read_rows
from harness.reports.pictures import file_names
from harness.reports.tables import bandwidth_table, plus_minus, rounded
from made_up_rows import row, write_csv


def test_models_of_one_name_get_labels_that_tell_them_apart(tmp_path):
    shape = "pixel_values=1x3x384x384"
    rows = [
        row("torch", 1, 1.0),
        row("torch", 1, 1.0, input_shape=shape, model_class="A", config_hash="1"),
        row("torch", 1, 1.0, input_shape=shape, model_class="B", config_hash="1"),
        row("torch", 1, 1.0, input_shape=shape, model_class="B", config_hash="2"),
        row("torch", 1, 1.0, model_name="cut", weights="random, 4 of 24 layers"),
        row("torch", 1, 1.0, model_name="plain", model_class="A"),
        row("torch", 4, 1.0, model_name="plain", model_class="A", timestamp_utc="2026-01-02"),
    ]
    (comparison,) = compare(read_rows([write_csv(tmp_path / "rows.csv", rows)]))
    assert [case.label for case in comparison.cases] == [
        "cut (4 of 24 layers)",
        "plain",
        "plain",
        "some/model (pixel_values=3x224x224)",
        "some/model (pixel_values=3x384x384, A)",
        "some/model (pixel_values=3x384x384, B, 1)",
        "some/model (pixel_values=3x384x384, B, 2)",
    ]


def test_only_what_was_measured_again_in_full_gives_way_to_newer_versions(tmp_path):
    newer = {"torch_version": "3", "timestamp_utc": "2026-02-01"}
    rows = [
        *(row(item, 1, 1.0) for item in ("torch", "tvm")),
        *(row(item, 4, 1.0) for item in ("torch", "tvm")),
        *(row(item, 1, 2.0, **newer) for item in ("torch", "tvm", "tvm_tune")),
        row("torch", 4, 2.0, **newer),
    ]
    kept = drop_superseded(read_rows([write_csv(tmp_path / "rows.csv", rows)]))
    assert sorted((r["batch_size"], r["torch_version"]) for r in kept) == [
        *[("1", "3")] * 3,
        *[("4", "2")] * 2,  # the half of it that is newer stays away
    ]


def test_superseded_rows_have_no_say_in_labels(tmp_path):
    """As they are read now and as they will be when those rows have gone to the history, tables are the same."""
    newer = {"harness_version": "1", "timestamp_utc": "2026-02-01"}
    rows = [row("torch", 1, 1.0, model_class="A"), row("torch", 1, 1.0, model_class="B", **newer)]
    kept = drop_superseded(read_rows([write_csv(tmp_path / "rows.csv", rows)]))
    assert [r["label"] for r in kept] == ["some/model"]


def test_pictures_have_names_of_their_own():
    names = ["a/b", "a_b", "a/c", "/a/directory/", "x" * 300, "x" * 301, "a\0b", "a\nb"]
    files = file_names(names)
    assert files[2:4] == ["a_c_infer_time.png", "a_directory_infer_time.png"]
    assert len(set(files)) == len(files) and max(map(len, files)) <= 255
    assert "".join(files).isprintable()


@pytest.mark.parametrize(
    "value, spread, text",
    [
        (0.28312, 0.00123, "0.283 ± 0.001"),
        (3.456, 0.096, "3.5 ± 0.1"),  # the spread rounds up to a digit further left
        (2.744, 0.349, "2.7 ± 0.3"),
        (4.2, 0.0, "4.200 ± 0.000"),
        (4.2, 0.00001, "4.200 ± 0.000"),
        (12345.0, 234.0, "12,300 ± 200"),
        (12345.0, 7.0, "12,345 ± 7"),
        (0.4, 2.0, "0.4 ± 2.0"),  # a digit of the value stays
        (0.97, 40.0, "1 ± 40"),
    ],
)
def test_no_more_digits_than_the_spread_allows(value, spread, text):
    assert plus_minus(value, spread) == text


def test_rounding_to_hundreds():
    assert rounded(1251, -2) == "1,300"


def test_phases_and_contexts_never_meet(tmp_path):
    """And rows of before there were phases are forward passes, whether their file has the columns or not."""
    fields = {"phase": "decode", "tokens_per_s": 1000.0, "bandwidth_share": 0.5}
    steps = [
        row(item, 1, median, context_len=n, **fields)
        for n in (1024, 16384)
        for item, median in (("torch", 2.0), ("tvm", 1.0))
    ]
    passes = [row(item, 1, 3.0) for item in ("torch", "tvm")]
    new = write_csv(tmp_path / "new.csv", [*steps, *passes])
    old = tmp_path / "old.csv"
    lines = write_csv(old, passes).read_text().splitlines()
    old.write_text("".join(f"{line.rsplit(',', 5)[0]}\n" for line in lines))
    assert "phase" not in old.read_text()
    titles = [comparison.title for comparison in compare(read_rows([old, new]))]
    assert titles == [
        "GPU A, fp32",
        "GPU A, fp32, decode, context length 1024",
        "GPU A, fp32, decode, context length 16384",
    ]
    tables = [bandwidth_table(comparison) for comparison in compare(read_rows([new]))]
    assert tables[0] == "" and "1,000 tokens/s (50%)" in tables[1]
