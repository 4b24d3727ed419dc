"""Random weights: outputs have a size, and every layer shows in them."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import TINY_RESNET, make_case
from harness import weights
from harness.check import output_arrays, relative_error
from harness.inputs import make_inputs
from harness.weights import growth_of_a_change, load_model, load_on_device

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}


@pytest.mark.parametrize(
    "model_type, fields",
    [
        ("resnet", {**TINY_RESNET, "depths": [3, 3]}),
        ("convnext", {"hidden_sizes": [16, 16, 16, 16], "depths": [2, 2, 4, 2], "num_labels": 10, "image_size": 64}),
        pytest.param("vit", SMALL, marks=pytest.mark.slow),
        pytest.param(
            "swin",
            {
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [1, 2],
                "window_size": 4,
                "image_size": 32,
                "num_labels": 10,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param("dinov2", {**SMALL, "architectures": ["Dinov2Model"]}, marks=pytest.mark.slow),
        pytest.param("dinov3_vit", SMALL, marks=pytest.mark.slow),  # has a parameter without elements
        pytest.param(
            "mobilenet_v2",
            {"image_size": 64, "depth_multiplier": 0.35, "num_labels": 10},
            marks=pytest.mark.slow,
        ),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99, "eos_token_id": 98, "bos_token_id": 98}),
        pytest.param(
            "t5",
            {"d_model": 64, "d_kv": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "vocab_size": 99},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_random_weights_keep_the_signal(model_type, fields, tmp_path):
    """The output has a size, and noise of 20 % on any one layer's weights shows in it well above fp32's tolerance."""
    made_weights = tmp_path / "weights"
    made_weights.touch()
    config = CONFIG_MAPPING[model_type](**{k: v for k, v in fields.items() if k != "model_type"})
    case = make_case(config, made_weights=str(made_weights))
    model, inputs = load_model(case), make_inputs(case)
    reference = output_arrays(model(**inputs))
    for again in (load_model(case), load_model(case, with_values=False), load_model(make_case(config))):
        assert relative_error(output_arrays(again(**inputs)), reference) == 0
    assert 0.1 < reference[0].std() < 10
    assert growth_of_a_change(model, inputs) <= weights.MAX_CHANGE_GROWTH
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            weight = layer.weight.clone()
            layer.weight.mul_(1 + 0.2 * torch.randn_like(weight))
            error = relative_error(output_arrays(model(**inputs)), reference)
            layer.weight.copy_(weight)
            assert error > 2e-4, layer


@torch.no_grad()
def test_making_random_weights_leaves_nothing_behind_in_fp32():
    """LeViT keeps its attention biases from the first run in evaluation mode."""
    fields = {"hidden_sizes": [16, 24, 32], "depths": [1, 1, 1], "num_attention_heads": [2, 2, 2], "image_size": 64}
    fields |= {"key_dim": [8, 8, 8], "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]]}
    case = make_case(CONFIG_MAPPING["levit"](**fields))
    model, inputs = load_on_device(case, torch.float16)
    assert model(**inputs).logits.dtype == torch.float16


@torch.no_grad()
def test_one_logit_is_no_sum_that_cancels_out():
    """As SigLIP's would be with the first seed; one draw of the noise does not show it."""
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CONFIG_MAPPING["siglip"](
        text_config={"vocab_size": 99, **tower}, vision_config={"image_size": 16, "patch_size": 8, **tower}
    )
    case = make_case(config)
    model = load_model(case)
    assert abs(model(**make_inputs(case)).logits_per_text) > abs(model.logit_bias)
