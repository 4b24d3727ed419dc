"""A model's inputs, read off its config and the signature of its forward(): there is no table of models."""

import inspect
import math
import re

import torch

from harness.case import SEED
from harness.device import host_memory_bytes
from harness.errors import UserError, one_line

CHANGED_SEED = SEED + 1  # of the inputs that an item gets once it was timed
AUDIO_SAMPLES = 16_000  # one second at 16 kHz, what speech models are trained on


def input_shapes(case):
    """Returns {name: shape} of the arguments of the model's forward().

    Images are (batch, channels, height, width), videos (batch, frames, channels, height, width), token ids and their
    mask (batch, tokens), raw audio (batch, samples), spectrograms as the family lays them out. Raises UserError for a
    model whose main input is none of these, and for shapes that no machine holds.
    """
    try:
        shapes = find_shapes(case)
    except UserError:
        raise
    except Exception as error:  # a config of a kind that find_shapes() has not met
        raise UserError(f"{case.model_name}: its config does not say what it takes: {one_line(error)}") from None
    for name, shape in shapes.items():
        if not all(isinstance(size, int) and size > 0 for size in shape):
            raise UserError(f"{case.model_name}: its config asks for {name} of the shape {shape!r:.80}")
        if 4 * math.prod(shape) > host_memory_bytes():
            size = f"{4 * math.prod(shape) / 2**30:,.0f} GiB"
            raise UserError(f"{case.model_name}: {name} of the shape {shape} needs {size}, more than this machine has")
    return shapes


def find_shapes(case):
    """Does the work of input_shapes(), and believes what the config says."""
    config, batch = case.config, case.batch_size
    parameters = inspect.signature(case.model_class.forward).parameters
    main = case.model_class.main_input_name
    vision, text = getattr(config, "vision_config", None), getattr(config, "text_config", None)
    image_text = vision is not None and text is not None and {"input_ids", "pixel_values"} <= set(parameters)
    # Language models that see put image tokens into their text; they are fed text alone.
    image_text = image_text and not any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))
    shapes = {}
    if main == "input_ids" or image_text:
        shapes["input_ids"] = (batch, token_count(case, config.get_text_config()))
        if "attention_mask" in parameters:
            shapes["attention_mask"] = shapes["input_ids"]
    if main == "pixel_values" or image_text:
        of_images = vision if vision is not None else config
        size = case.image_size or getattr(of_images, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
        shapes["pixel_values"] = (batch, *frames, getattr(of_images, "num_channels", 3), height, width)
    if main == "input_values":
        spectrogram = hasattr(config, "num_mel_bins") and hasattr(config, "max_length")
        shapes[main] = (batch, config.max_length, config.num_mel_bins) if spectrogram else (batch, AUDIO_SAMPLES)
    if main == "input_features":
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):  # Whisper's fixed window
            shapes[main] = (batch, config.num_mel_bins, 2 * config.max_source_positions)
        else:
            bins = getattr(config, "input_feat_per_channel", None) or getattr(config, "num_mel_bins", 80)
            shapes[main] = (batch, AUDIO_SAMPLES // 160, bins)  # a frame every 10 ms
    if not shapes:
        raise UserError(f"{case.model_name} takes {main}, which this benchmark does not know how to make")
    if config.is_encoder_decoder and "decoder_input_ids" in parameters:
        shapes["decoder_input_ids"] = (batch, token_count(case, config.get_text_config(decoder=True)))
    return shapes


def describe_shapes(case):
    """Returns the shapes in one line, as the row's `input_shape` has them."""
    return " ".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in input_shapes(case).items())


def token_count(case, config):
    """Returns the number of tokens of a text: the case's seq_len, capped by the positions that the model has."""
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    limits = [getattr(config, name, None) or 0 for name in names]
    positions = min((limit for limit in limits if limit > 0), default=case.seq_len)  # XLNet's -1: as many as one likes
    # RoBERTa's kin count positions from behind the padding id; the library does so in a function of this name.
    source = inspect.getsource(inspect.getmodule(case.model_class))
    if "create_position_ids_from_input_ids" in source:
        positions -= (config.pad_token_id or 0) + 1
    return min(case.seq_len, positions)


def make_inputs(case, seed=SEED):
    """Returns {name: tensor} for the model's forward(), on the CPU: seeded fp32 normal noise, or int64 token ids."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, shape in input_shapes(case).items():
        if name == "attention_mask":
            inputs[name] = torch.ones(shape, dtype=torch.long)
        elif name.endswith("input_ids"):
            inputs[name] = make_tokens(case, shape, generator)
        else:
            inputs[name] = torch.randn(shape, generator=generator)
    return inputs


def change_inputs(inputs, case):
    """Gives a case's inputs other values in place: other noise and other token ids; attention masks stay all ones.

    inputs: make_inputs()'s {name: tensor} on any device and in any dtype. Whoever reads these tensors later reads the
    new values.
    """
    for name, tensor in make_inputs(case, CHANGED_SEED).items():
        inputs[name].copy_(tensor)


def make_tokens(case, shape, generator):
    """Returns seeded int64 token ids of the given shape, with an end of text where the model's head looks for one.

    The others are ordinary ones: a special token would mask, end or pad.
    """
    config = case.config.get_text_config()
    special = set()
    for key, value in [*vars(case.config).items(), *vars(config).items()]:
        if re.search(r"token_(id|index)$", key):  # some models have several ends
            values = value if isinstance(value, (list, tuple)) else [value]
            special.update(token for token in values if isinstance(token, int) and 0 <= token < config.vocab_size)
    tokens = torch.randint(config.vocab_size - len(special), shape, generator=generator)  # the n-th ordinary one
    for token in sorted(special):
        tokens += tokens >= token
    if case.config.is_encoder_decoder and case.model_class.__name__.endswith("ForSequenceClassification"):
        tokens[:, -1] = config.eos_token_id  # T5's and BART's classifiers read the state at the end of the text
    return tokens
