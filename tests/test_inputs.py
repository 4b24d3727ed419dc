"""Inputs that are read off a config; tests/test_families.py has whole families."""

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import make_case
from harness.inputs import input_shapes


def test_negative_positions_are_no_limit():
    case = make_case(CONFIG_MAPPING["xlnet"](n_layer=1))
    assert case.config.max_position_embeddings == -1
    assert input_shapes(case)["input_ids"] == (1, case.seq_len)
