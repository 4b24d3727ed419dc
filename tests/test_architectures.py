"""The built-in architectures: as large as the checkpoints that they are named after."""

import pytest
import torch

from conftest import make_case
from harness.architectures import BUILTIN_ARCHITECTURES, builtin_config, describe_weights
from harness.inputs import input_shapes
from harness.models import find_model


# Parameters of the published checkpoints, as their papers and model cards round them, in millions.
@pytest.mark.parametrize(
    "name, millions, pixels",
    [
        ("facebook/convnext-tiny-224", 28.6, 224),
        ("microsoft/resnet-50", 25.6, 224),
        ("google/vit-base-patch16-224", 86.6, 224),
        ("microsoft/swin-tiny-patch4-window7-224", 28.3, 224),
        ("facebook/dinov2-base", 86.6, 518),
    ],
)
def test_built_in_architectures_are_those_of_the_checkpoints(name, millions, pixels):
    config, weights_dir = find_model(name, "random")
    case = make_case(config)
    with torch.device("meta"):
        model = case.model_class(config)
    assert weights_dir is None
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert input_shapes(case) == {"pixel_values": (1, 3, pixels, pixels)}
    if "dinov2" not in name:
        assert config.num_labels == 1000


def test_builtin_architectures():
    """Each is a family of its own, has a head and inputs, and says where it was cut in depth."""
    configs = {name: builtin_config(name) for name in BUILTIN_ARCHITECTURES}
    assert len({config.model_type for config in configs.values()}) == len(configs) >= 40
    for name, config in configs.items():
        case = make_case(config, model_name=name)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in case.model_class(config).parameters())
        assert 1e6 < parameters < 2e9, name
        assert all(min(shape) > 0 for shape in input_shapes(case).values())
        assert describe_weights(name, config, "pretrained") == "pretrained"
    of_llama = describe_weights("meta-llama/Llama-3.2-1B", configs["meta-llama/Llama-3.2-1B"], "random")
    assert of_llama == "random, 4 of 16 layers"
    assert describe_weights("microsoft/resnet-50", configs["microsoft/resnet-50"], "random") == "random"
