"""The shapes of a model's inputs, read off its config, its forward()'s signature and what transformers documents of it.

There is no table of models. A name of an argument stands for one kind of input in the whole library; SHAPES says which.
"""

import math
import re

from harness.errors import UserError
from harness.signature import (
    documented_shape,
    family_source,
    find_config,
    find_field,
    forward_doc,
    forward_parameters,
    main_inputs,
)

AUDIO_SAMPLES = 16_000  # one second at 16 kHz, what speech models are trained on
AUDIO_FRAMES = AUDIO_SAMPLES // 160  # of a spectrogram: one every 10 ms
BINS = """
input_feat_per_channel input_size num_mel_bins n_mels feature_projection_input_dim feature_size input_dim
""".split()  # of a spectrogram
VIDEO_FRAMES = 4  # of a clip where the config does not say: what the library's processors for language models sample
MAX_FLATTENED_PATCHES = 2048  # of an image, by the library's processor
BOXES = 36  # regions of an image that a detector has found, for models that read those
# Of models that see and read, the configs of their two halves.
VISION_CONFIGS = ("vision_config", "image_config")
AUDIO_CONFIGS = ("audio_config", "speech_config")


def find_shapes(case):
    """Returns {name: shape} for the arguments of the model's forward(), and believes what the config says.

    Raises UserError for an argument that forward() cannot do without and that is not in SHAPES.
    """
    config, parameters = case.config, forward_parameters(case)
    mains = main_inputs(case)
    if is_image_text(case):  # text first, as the library's own processors give it
        mains = ["input_ids", "pixel_values", *mains]
    names = dict.fromkeys([*mains, *(name for name, p in parameters.items() if p.default is p.empty)])
    for name, test in OPTIONAL.items():
        if name in parameters and test(case, names):
            names[name] = None
    if "input_ids" in names and "attention_mask" in parameters:
        order = list(names)
        order.insert(order.index("input_ids") + 1, "attention_mask")
        names = dict.fromkeys(order)
    if config.is_encoder_decoder and "decoder_input_ids" in parameters:
        names["decoder_input_ids"] = None
    unknown = [name for name in names if name not in SHAPES]
    if unknown or not names:
        takes = ", ".join(unknown or main_inputs(case) or ["nothing that is named"])
        raise UserError(f"{case.model_name} takes {takes}, which this benchmark does not know how to make")
    return {name: SHAPES[name](case) for name in names}


# ---- Which optional inputs a model cannot do without -----------------------------------------------------------------


def is_image_text(case):
    """Returns whether the model compares or joins an image and a text that are given side by side.

    Language models that see put image tokens into their text; they are fed text alone, unless it is images first.
    """
    config = case.config
    if not {"input_ids", "pixel_values"} <= set(forward_parameters(case)):
        return False
    if has_image_tokens(config):
        return "pixel_values" in main_inputs(case)
    halves = any(getattr(config, name, None) is not None for name in VISION_CONFIGS)
    return (halves and hasattr(config, "text_config")) or "pixel_values" in main_inputs(case)


def has_image_tokens(config):
    return any(getattr(config, name, None) is not None for name in ("image_token_id", "image_token_index"))


def is_audio_text(case):
    """Returns whether the model compares a sound and a text that are given side by side."""
    config = case.config
    halves = hasattr(config, "text_config") and any(hasattr(config, name) for name in AUDIO_CONFIGS)
    return halves and not any(hasattr(config, name) for name in ("audio_token_id", "audio_token_index"))


def looks_at_its_own_image(case, names):
    """Returns whether one transformer reads text and image together: its own config says how large an image is."""
    own = ("image_size", "max_img_size")
    is_one = any(getattr(case.config, name, None) for name in own) and "input_ids" in names
    return is_one and not has_image_tokens(case.config)


# Optional argument -> whether the model needs it; given the case and the names of the arguments so far.
OPTIONAL = {
    "bbox": lambda case, names: "input_ids" in names,
    "pixel_values": looks_at_its_own_image,
    "qformer_input_ids": lambda case, names: "pixel_values" in names,
    "spatial_shapes": lambda case, names: "pixel_values" in names,
    "pixel_attention_mask": lambda case, names: "spatial_shapes" in names,
    "input_features": lambda case, names: "input_ids" in names and is_audio_text(case),
    "input_features_mask": lambda case, names: (
        "input_features" in names and "input_features_mask.sum(" in family_source(case)
    ),
    "visual_feats": lambda case, names: "input_ids" in names,
    "visual_pos": lambda case, names: "input_ids" in names,
    "lang_ids": lambda case, names: hasattr(case.config, "languages") and not case.config.default_language,
    "actions": lambda case, names: "states" in names,
    "rewards": lambda case, names: "states" in names,
    "returns_to_go": lambda case, names: "states" in names,
    "timesteps": lambda case, names: "states" in names,
    "future_values": lambda case, names: "past_time_features" in names,
    "future_time_features": lambda case, names: "past_time_features" in names,
    "image_embeds_position_mask": lambda case, names: "pixel_values" in names and "input_ids" in names,
    "decoder_input_values": lambda case, names: case.config.is_encoder_decoder,
}


# ---- Text -----------------------------------------------------------------------------------------------------------


def text_shape(case):
    """(batch, tokens); where a token has several codes, of sound say, (batch, tokens, codes)."""
    config = text_config(case)
    codes = documented_shape(case, "input_ids")[2:]
    count = getattr(config, "num_codebooks", None) if codes else None
    # One table embeds a token of text, which comes first, and the codes of what was heard meanwhile.
    if re.search(r"vocab_size \+ \(config\.num_codebooks \* config\.codebook_vocab_size\)", family_source(case)):
        count = config.num_codebooks + 1
    return (case.batch_size, token_count(case, config), *([count] if count else []))


def text_config(case):
    """Returns the config of the part that reads the model's text."""
    config = case.config
    if not config.is_encoder_decoder:
        return config.get_text_config()
    # A library's config that generates sound calls its decoder the text's, whatever is asked for.
    encoder = getattr(config, "encoder_config", None)
    return encoder if hasattr(encoder, "vocab_size") else config.get_text_config(encoder=True)


def decoder_text_shape(case):
    """(batch, tokens); where a token of sound has several codes, (batch, tokens, codes) or (batch * codes, tokens)."""
    config = case.config.get_text_config(decoder=True)
    tokens = token_count(case, config)
    if documented_shape(case, "decoder_input_ids")[:1] != ["batch_size * num_codebooks"]:
        return (case.batch_size, tokens)
    codes = find_field(config, "num_codebooks", "num_channels")
    if "(batch_size, target_sequence_length, num_codebooks)" in forward_doc(case):
        return (case.batch_size, tokens, codes)
    return (case.batch_size * codes, tokens)


def token_count(case, config):
    """Returns the number of tokens of a text: the case's seq_len, capped by the positions that the model has.

    There are never fewer than the places that an image's features take in it.
    """
    limit, tokens = position_limit(case, config), max(case.seq_len, getattr(case.config, "latent_query_num", 0))
    return tokens if limit is None else min(tokens, limit)


def position_limit(case, config):
    """Returns how many positions the part of the model with this config has, None where there is no limit."""
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    limits = [limit for name in names if (limit := getattr(config, name, None) or 0) > 0]  # XLNet's -1: no limit
    if not limits:
        return None
    # RoBERTa's kin count positions from behind the padding id; the library does so in a function of this name.
    is_shifted = "create_position_ids_from_input_ids" in family_source(case)
    return min(limits) - ((config.pad_token_id or 0) + 1 if is_shifted else 0)


def box_shape(case):
    """(batch, tokens, 4): where each token stands on the page; BROS has all four corners."""
    return (*text_shape(case), getattr(case.config, "dim_bbox", 4))


# ---- Images and videos ----------------------------------------------------------------------------------------------


def image_shape(case):
    """(batch, channels, height, width); with frames or the two images of a pair behind the batch.

    (batch * patches, values of a patch) or (batch, patches, values of a patch) where the model is given patches.
    """
    parameters = forward_parameters(case)
    if "grid_thw" in parameters:
        return packed_patches_shape(case)
    if "spatial_shapes" in parameters or "pixel_position_ids" in parameters:
        height, width = patch_grid(case)
        return (case.batch_size, height * width, patch_values(case))
    config = image_config(case)
    frames = find_field(config, "num_frames")
    if frames is None and re.search(r"frames, \w+, height, width = pixel_values\.shape", family_source(case)):
        frames = VIDEO_FRAMES
    # Models that match two images say what they take when they are given something else.
    pair = () if "(batch_size, 2, num_channels, height, width)" not in family_source(case) else (2,)
    height, width = image_size(case)
    if "prompt_pixel_values" in parameters and case.image_size is None:  # the prompt's image and the other, in one
        height = height // 2 if height == 2 * width else height
    return (case.batch_size, *pair, *((frames,) if frames else ()), channel_count(config), height, width)


def video_shape(case):
    """(batch, frames, channels, height, width)"""
    config = image_config(case)
    frames = find_field(config, "num_frames", "frames_per_clip", default=16)
    return (case.batch_size, frames, channel_count(config), *image_size(case))


def image_config(case):
    """Returns the config of the part that looks at images."""
    for name in VISION_CONFIGS:
        if (config := getattr(case.config, name, None)) is not None:
            return config
    return case.config


def channel_count(config):
    return find_field(config, "num_channels", "in_channels", "in_chans", default=3)


def image_size(case):
    """Returns (height, width) in pixels: the case's, else the model's own, else 224."""
    config = image_config(case)
    size = case.image_size or find_field(config, "image_size", "max_img_size") or 224
    if ratios := getattr(config, "scaled_images_ratios", None):  # the smallest copy of the image holds one patch
        size = case.image_size or math.ceil(config.patch_size / min(ratios))
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def patch_grid(case):
    """Returns (rows, columns) of the patches of one image, in multiples of what the model merges into one."""
    config = image_config(case)
    merged = find_field(config, "spatial_merge_size", "pooling_kernel_size", default=1)
    patches = find_field(config, "num_patches")  # of models that take images of any shape: the most that they take
    sides = [math.isqrt(patches)] * 2 if patches else [side // config.patch_size for side in image_size(case)]
    return tuple(max(side // merged, 1) * merged for side in sides)


def patch_values(case):
    """Returns how many numbers a patch has: channels x frames x height x width."""
    config = image_config(case)
    return channel_count(config) * find_field(config, "temporal_patch_size", default=1) * config.patch_size**2


def packed_patches_shape(case):
    """(patches of all images, values of a patch)"""
    height, width = patch_grid(case)
    return (case.batch_size * height * width, patch_values(case))


def patch_mask_shape(case):
    """(batch, patches)"""
    height, width = patch_grid(case)
    return (case.batch_size, height * width)


def flattened_patches_shape(case):
    """(batch, patches, 2 + values of a patch): row and column of each patch stand in front of its values."""
    config = image_config(case)
    side = math.isqrt(min(config.seq_len, MAX_FLATTENED_PATCHES))
    return (case.batch_size, side * side, 2 + config.patch_embed_hidden_size)


def region_shape(case, field):
    return (case.batch_size, BOXES, getattr(case.config, field))


# ---- Sound ----------------------------------------------------------------------------------------------------------


def sound_shape(case):
    """(batch, samples), (batch, channels, samples), or (batch, frames, bins) of a spectrogram."""
    config = case.config
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return (case.batch_size, config.max_length, config.num_mel_bins)
    channels = documented_shape(case, "input_values")[1:-1]
    return (case.batch_size, *([find_field(config, "audio_channels", default=1)] if channels else []), AUDIO_SAMPLES)


def spectrogram_shape(case):
    """(batch, frames, bins), or (batch, bins, frames) where the documentation or the first convolution says so.

    (batch, 1, frames, bins) where the model looks at it as at an image.
    """
    config = find_config(case.config, *AUDIO_CONFIGS)
    bins = find_field(config, *BINS, default=80)
    # Of a model that is fed two frames as one, this field alone tells the bins.
    is_paired = bins == find_field(config, "feature_projection_input_dim")
    window = 2 * find_field(config, "n_window", default=1)
    positions = find_field(config, "max_source_positions")
    if positions and find_field(config, "num_mel_bins"):  # Whisper's fixed window
        return (case.batch_size, bins, math.ceil(2 * positions / window) * window)
    if find_field(config, "spec_size"):
        return (case.batch_size, 1, AUDIO_FRAMES, bins)
    source = family_source(case)
    stacked = re.search(r"Linear\(config\.num_mel_bins \* (\d+)", source)  # so many frames are fed as one
    stacked = int(stacked[1]) if stacked else 1
    bins *= stacked
    frames = math.ceil(AUDIO_FRAMES / (2 if is_paired else stacked) / window) * window
    is_first = documented_shape(case, "input_features")[1:2] == ["feature_size"]
    is_first |= bool(re.search(r"batch_size, (num_mel_bins|feature_size), \w+ = input_features\.shape", source))
    if is_first or re.search(r"Conv1d\(\s*[\w.]+\.(num_mel_bins|feature_size)", source):
        return (case.batch_size, bins, frames)
    return (case.batch_size, frames, bins)


def spectrogram_mask_shape(case):
    """(batch, frames)"""
    bins_first = spectrogram_shape(case)[1] == find_field(case.config, "num_mel_bins")
    return (case.batch_size, spectrogram_shape(case)[2 if bins_first else 1])


# ---- Time series and episodes ---------------------------------------------------------------------------------------


def series_shape(case, *features):
    """(batch, time) or (batch, time, variables): what was seen, with what lags look back at.

    features: names of the fields with the number of variables, where they are not those of the series.
    """
    config = case.config
    time = config.context_length + max(getattr(config, "lags_sequence", None) or [0])
    return (case.batch_size, time, *variable_count(config, features))


def future_shape(case, *features):
    """(batch, time) or (batch, time, variables): what is to be forecast."""
    return (case.batch_size, case.config.prediction_length, *variable_count(case.config, features))


def variable_count(config, features):
    if features:
        return (getattr(config, features[0]),)
    count = find_field(config, "num_input_channels", "input_size", default=1)
    return (count,) if hasattr(config, "num_input_channels") or count > 1 else ()


def episode_shape(case, size):
    """(batch, steps, values of a step)"""
    steps = min(case.seq_len, find_field(case.config, "max_ep_len", default=case.seq_len))
    return (case.batch_size, steps, size)


def inputs_shape(case):
    """The shape of what a model of several kinds of inputs takes: the kind that its class names as well."""
    parameters = forward_parameters(case)
    if "pixel_values" in parameters:
        return (case.batch_size, channel_count(case.config), *image_size(case))
    return sound_shape(case) if "input_values" in parameters else text_shape(case)


# Name of an argument of forward() -> its shape, of a case.
SHAPES = {
    "input_ids": text_shape,
    "attention_mask": text_shape,
    "token_type_ids": text_shape,
    "decoder_input_ids": decoder_text_shape,
    "qformer_input_ids": text_shape,
    "bbox": box_shape,
    "lang_ids": lambda case: (case.batch_size,),
    "inputs": inputs_shape,
    "pixel_values": image_shape,
    "prompt_pixel_values": image_shape,
    "prompt_masks": image_shape,
    "pixel_values_videos": video_shape,
    "hidden_states": packed_patches_shape,
    "grid_thw": lambda case: (case.batch_size, 3),
    "merge_sizes": lambda case: (case.batch_size,),
    "spatial_shapes": lambda case: (case.batch_size, 2),
    "pixel_attention_mask": patch_mask_shape,
    "pixel_position_ids": lambda case: (*patch_mask_shape(case), 2),
    "visual_feats": lambda case: region_shape(case, "visual_feat_dim"),
    "visual_pos": lambda case: region_shape(case, "visual_pos_dim"),
    "task_inputs": lambda case: (case.batch_size, case.config.task_seq_len),
    "image_embeds_position_mask": text_shape,
    "query_embeds": lambda case: (case.batch_size, BOXES, case.config.hidden_size),
    "flattened_patches": flattened_patches_shape,
    "input_values": sound_shape,
    "decoder_input_values": lambda case: (case.batch_size, case.seq_len, case.config.num_mel_bins),
    "input_features": spectrogram_shape,
    "audio_mel": spectrogram_shape,
    "input_features_mask": spectrogram_mask_shape,
    "audio_mel_mask": spectrogram_mask_shape,
    "past_values": series_shape,
    "past_observed_mask": series_shape,
    "past_values_padding": series_shape,
    "past_time_features": lambda case: series_shape(case, "num_time_features"),
    "future_values": future_shape,
    "future_time_features": lambda case: future_shape(case, "num_time_features"),
    "freq": lambda case: (case.batch_size, 1),
    "states": lambda case: episode_shape(case, case.config.state_dim),
    "actions": lambda case: episode_shape(case, case.config.act_dim),
    "rewards": lambda case: episode_shape(case, 1),
    "returns_to_go": lambda case: episode_shape(case, 1),
    "timesteps": lambda case: episode_shape(case, 1)[:2],
}
