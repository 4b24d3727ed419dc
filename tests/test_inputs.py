"""Inputs that are read off a config; tests/test_families.py has whole families."""

import time

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import make_case
from harness.architectures import BUILTIN_ARCHITECTURES, builtin_config
from harness.errors import UserError
from harness.inputs import input_shapes, make_tokens


def test_negative_positions_are_no_limit():
    case = make_case(CONFIG_MAPPING["xlnet"](n_layer=1))
    assert case.config.max_position_embeddings == -1
    assert input_shapes(case)["input_ids"] == (1, case.seq_len)


@pytest.mark.parametrize("name", [name for name in BUILTIN_ARCHITECTURES if "vocab_size" in vars(builtin_config(name))])
def test_token_ids_are_those_of_a_list_of_ordinary_ones(name):
    """As the ids of published rows were drawn: by their place in a list of all ids that are not special."""
    case = make_case(builtin_config(name))
    config = case.config.get_text_config()
    special = {
        token
        for key, value in [*vars(case.config).items(), *vars(config).items()]
        if key.endswith(("token_id", "token_index"))
        for token in (value if isinstance(value, list) else [value])
    }
    ordinary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    drawn = ordinary[torch.randint(len(ordinary), (4, 64), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(make_tokens(case, (4, 64), torch.Generator().manual_seed(0)), drawn)


def test_a_vast_vocabulary_takes_no_time():
    case = make_case(CONFIG_MAPPING["bert"](vocab_size=2**40))
    start = time.monotonic()
    tokens = make_tokens(case, (1, 64), torch.Generator().manual_seed(0))
    assert time.monotonic() - start < 1 and tokens.max() > 2**32


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"image_size": 10**7}, "needs .* GiB, more than this machine has"),
        ({"image_size": -5}, "of the shape"),
        ({"image_size": [[1, 2], 3]}, "of the shape"),
        ({"num_channels": "three"}, "of the shape"),
    ],
)
def test_inputs_that_cannot_be(fields, says):
    case = make_case(CONFIG_MAPPING["vit"]())
    vars(case.config).update(fields)
    with pytest.raises(UserError, match=says):
        input_shapes(case)
