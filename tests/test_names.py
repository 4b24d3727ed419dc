"""File names made from models' names."""

import pytest

from harness.names import file_stem


def test_hub_ids_stay_readable():
    assert file_stem("microsoft/resnet-50") == "microsoft--resnet-50"
    assert file_stem("gpt2") == "gpt2"


@pytest.mark.parametrize(
    "one, other",
    [("a/b", "a_b"), ("a/b", "a--b"), ("/home/x/model", "/home/y/model"), ("a b", "a_b"), ("a" * 300, "b" + "a" * 299)],
)
def test_other_names_give_other_stems(one, other):
    assert file_stem(one) != file_stem(other)
    assert all(0 < len(file_stem(name)) < 100 or name == "a_b" for name in (one, other))
    assert all("/" not in file_stem(name) for name in (one, other))


def test_a_long_hub_id_fits_a_file_name():
    assert len(file_stem("a" * 96 + "/" + "b" * 96)) < 200  # the hub allows 96 characters each
