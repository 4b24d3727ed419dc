"""Inputs beyond plain text, images and sound: small instances of model types, fed what their configs ask for."""

import pytest
import torch

from conftest import make_case
from harness.check import output_arrays
from harness.errors import UserError
from harness.inputs import change_inputs, describe_shapes, make_inputs
from harness.models import find_model_class
from small_configs import SIZES, default_config, small_config

TEXT = "input_ids=1x16 attention_mask=1x16"
# model type -> its place in SIZES, the class that it gets, and what that is fed
INSTANCES = {
    "bros": (4, "BrosModel", f"{TEXT} bbox=1x16x8"),
    "layoutlm": (1, "LayoutLMForMaskedLM", f"{TEXT} bbox=1x16x4"),
    "canine": (0, "CanineModel", TEXT),
    "xmod": (0, "XmodForMaskedLM", f"{TEXT} lang_ids=1"),
    "siglip2": (0, "Siglip2Model", f"{TEXT} pixel_values=1x256x768 spatial_shapes=1x2 pixel_attention_mask=1x256"),
    "qwen3_vl_vision": (2, "Qwen3VLVisionModel", "hidden_states=196x1536 grid_thw=1x3"),
    "video_llama_3_vision": (0, "VideoLlama3VisionModel", "pixel_values=196x768 grid_thw=1x3 merge_sizes=1"),
    "gemma4_vision": (0, "Gemma4VisionModel", "pixel_values=1x144x768 pixel_position_ids=1x144x2"),
    "lxmert": (0, "LxmertModel", f"{TEXT} visual_feats=1x36x256 visual_pos=1x36x4"),
    "detr": (0, "DetrModel", "pixel_values=1x3x224x224"),
    "mask2former": (0, "Mask2FormerModel", "pixel_values=1x3x64x64"),
    "pix2struct": (
        0,
        "Pix2StructForConditionalGeneration",
        "flattened_patches=1x2025x770 decoder_input_ids=1x16",
    ),
    "sam": (0, "SamModel", "pixel_values=1x3x64x64"),
    "depth_anything": (0, "DepthAnythingForDepthEstimation", "pixel_values=1x3x56x56"),
    "slanet": (0, "SLANetForTableRecognition", "pixel_values=1x3x224x224"),
    "perceiver": (0, "PerceiverForImageClassificationLearned", "inputs=1x3x56x56"),
    "videoprism": (0, "VideoPrismClipModel", f"pixel_values_videos=1x16x3x64x64 {TEXT}"),
    "encodec": (0, "EncodecModel", "input_values=1x1x16000"),
    "neucodec": (0, "NeuCodecModel", "input_values=1x1x16000 input_features=1x50x160"),
    "granite_speech5_ctc": (0, "GraniteSpeech5ForCTC", "input_features=1x26x320"),
    "qwen3_asr_encoder": (0, "Qwen3ASREncoder", "input_features=1x128x100 input_features_mask=1x100"),
    "dia": (0, "DiaForConditionalGeneration", f"{TEXT} decoder_input_ids=1x16x9"),
    "speech-encoder-decoder": (0, "SpeechEncoderDecoderModel", "inputs=1x16000 decoder_input_ids=1x16"),
    "audioflamingo3_encoder": (0, "AudioFlamingo3Encoder", "input_features=1x128x1024 input_features_mask=1x1024"),
    "decision_transformer": (
        0,
        "DecisionTransformerModel",
        "states=1x16x17 actions=1x16x4 rewards=1x16x1 returns_to_go=1x16x1 timesteps=1x16",
    ),
    "patchtst": (0, "PatchTSTModel", "past_values=1x32x1"),
    "timesfm": (0, "TimesFmModel", "past_values=1x512 past_values_padding=1x512 freq=1x1"),
    "time_series_transformer": (
        0,
        "TimeSeriesTransformerModel",
        "past_values=1x31 past_time_features=1x31x2 past_observed_mask=1x31 "
        "future_values=1x24 future_time_features=1x24x2",
    ),
}


# Larger ones, since they do not survive more than fewer layers.
LARGE_INSTANCES = {
    "instructblip": (4, "InstructBlipModel", f"{TEXT} pixel_values=1x3x224x224 qformer_input_ids=1x16"),
    "instructblipvideo": (4, "InstructBlipVideoModel", f"{TEXT} pixel_values=1x4x3x224x224 qformer_input_ids=1x16"),
    "kyutai_speech_to_text": (
        4,
        "KyutaiSpeechToTextForConditionalGeneration",
        "input_ids=1x16x33 attention_mask=1x16x33",
    ),
    "musicgen": (4, "MusicgenForConditionalGeneration", f"{TEXT} decoder_input_ids=4x16"),
}
INSTANCES |= LARGE_INSTANCES
TAKE_LONG = {*LARGE_INSTANCES, "slanet", "encodec", "neucodec"}


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(model_type, marks=pytest.mark.slow if model_type in TAKE_LONG else ()) for model_type in INSTANCES],
)
def test_what_a_family_is_fed(model_type):
    """Its forward() takes it, on both sets of values, and gives numbers."""
    size, class_name, shapes = INSTANCES[model_type]
    config = small_config(default_config(model_type), SIZES[size])
    case = make_case(config, seq_len=16)
    assert case.model_class.__name__ == class_name
    assert describe_shapes(case) == shapes
    torch.manual_seed(0)
    model, inputs = case.model_class(config).eval(), make_inputs(case)
    with torch.no_grad():
        assert output_arrays(model(**inputs))
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        change_inputs(inputs, case)
        assert any(not torch.equal(before[name], tensor) for name, tensor in inputs.items())
        assert output_arrays(model(**inputs))


def test_boxes_have_their_upper_left_corner_first():
    case = make_case(small_config(default_config("layoutlm"), SIZES[1]))
    left, top, right, bottom = make_inputs(case)["bbox"].unbind(-1)
    assert (left <= right).all() and (top <= bottom).all() and left.min() >= 0 and bottom.max() < 1000


def test_models_that_match_two_images_get_a_pair():
    assert describe_shapes(make_case(default_config("superglue"))) == "pixel_values=1x2x3x224x224"


def test_a_prompt_image_and_the_other_make_one():
    pixels = "1x3x448x448"
    shapes = f"pixel_values={pixels} prompt_pixel_values={pixels} prompt_masks={pixels}"
    assert describe_shapes(make_case(default_config("seggpt"))) == shapes


def test_a_grid_holds_as_many_patches_as_there_are():
    case = make_case(small_config(default_config("qwen3_vl_vision"), SIZES[2]), batch_size=3)
    inputs = make_inputs(case)
    assert inputs["grid_thw"].prod(-1).sum() == len(inputs["hidden_states"])


def test_a_model_that_only_generates_is_refused():
    with pytest.raises(UserError, match="has no forward"):
        find_model_class("test", default_config("bark"))


def test_the_whole_gets_no_class_of_its_language_model():
    """Of a model that sees and reads: the class for text alone takes another config."""
    config = default_config("qwen3_5")
    assert find_model_class("test", config).config_class is type(config)


def test_an_argument_that_nobody_knows_is_named():
    with pytest.raises(UserError, match="takes noise_embeds, context_hidden_states, which"):
        describe_shapes(make_case(default_config("muse_glimmer_assistant")))
