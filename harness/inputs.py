"""A model's inputs: tensors of the shapes that harness/shapes.py finds, with values that mean something to it."""

import math
import re

import torch

from harness.case import SEED
from harness.device import host_memory_bytes
from harness.errors import UserError, one_line
from harness.shapes import find_shapes, has_image_tokens, image_config, patch_grid, text_config
from harness.signature import find_field, forward_parameters

CHANGED_SEED = SEED + 1  # of the inputs that an item gets once it was timed
CHARACTERS = 256  # that a model without a vocabulary is fed: it reads code points or bytes
# What only says how the other inputs are laid out: it is the same whatever the seed.
LAYOUT = ("grid_thw", "spatial_shapes", "merge_sizes", "pixel_position_ids", "lang_ids")
PAGE = 1000  # what layout models divide a page's width and height into


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


def describe_shapes(case):
    """Returns the shapes in one line, as the row's `input_shape` has them; of a step, less those of its cache."""
    shapes = input_shapes(case)
    if case.phase == "decode":
        tokens = token_name(case)
        encoder = {name: shape for name, shape in shapes.items() if name != tokens}
        shapes = {**(encoder if case.config.is_encoder_decoder else {}), tokens: (case.batch_size, 1)}
    return " ".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in shapes.items())


def token_name(case):
    """Returns the name of the argument that takes the token ids of the part of a model that decodes."""
    return "decoder_input_ids" if case.config.is_encoder_decoder else "input_ids"


def make_inputs(case, seed=SEED):
    """Returns {name: tensor} for the model's forward(), on the CPU: seeded fp32 normal noise, or int64 ids and masks.

    Masks let everything through; grids and positions of patches are those of whole images.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, parameters = {}, forward_parameters(case)
    for name, shape in input_shapes(case).items():
        if name.endswith("input_ids") or (name == "inputs" and len(shape) == 2 and "input_ids" in parameters):
            inputs[name] = make_tokens(case, shape, generator, reader=name.removesuffix("input_ids"))
        elif name in ("past_values_padding", "freq", "lang_ids"):  # nothing is padded; the first language, frequency
            inputs[name] = torch.zeros(shape, dtype=torch.long)
        elif name in LAID_OUT:
            inputs[name] = LAID_OUT[name](case, shape, generator)
        elif name.endswith("_mask"):
            inputs[name] = torch.ones(shape, dtype=torch.long)
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


def make_tokens(case, shape, generator, reader=""):
    """Returns seeded int64 token ids of the given shape, with an end of text where the model's head looks for one.

    The others are ordinary ones: a special token would mask, end or pad. Only where an image must come with its text,
    and leaves its features in the places of image tokens, does the text begin with these. reader: "decoder_" or
    "qformer_" where that part of the model gets them.
    """
    if reader == "decoder_":
        config = case.config.get_text_config(decoder=True)
    else:
        config = getattr(case.config, f"{reader}config", None) or text_config(case)
    vocabulary = find_field(config, "vocab_size", default=CHARACTERS)
    special = set()
    for key, value in [*vars(case.config).items(), *vars(config).items()]:
        if re.search(r"token_(id|index)$", key):  # some models have several ends
            values = value if isinstance(value, (list, tuple)) else [value]
            special.update(token for token in values if isinstance(token, int) and 0 <= token < vocabulary)
    tokens = torch.randint(vocabulary - len(special), shape, generator=generator)  # the n-th ordinary one
    for token in sorted(special):
        tokens += tokens >= token
    if case.config.is_encoder_decoder and case.model_class.__name__.endswith("ForSequenceClassification"):
        tokens[:, -1] = config.eos_token_id  # T5's and BART's classifiers read the state at the end of the text
    if not reader and has_image_tokens(case.config) and "pixel_values" in find_shapes(case):
        count = find_field(case.config, "num_query_tokens", "image_seq_length", default=0)
        tokens[:, :count] = find_field(case.config, "image_token_id", "image_token_index")
    return tokens


# ---- What has a place, of a case, its shape and a generator ----------------------------------------------------


def make_boxes(case, shape, generator):
    """Returns int64 corners of boxes on a page of PAGE x PAGE: x and y of the upper left one come first."""
    corners = torch.randint(PAGE, (*shape[:-1], shape[-1] // 2, 2), generator=generator)
    return corners.sort(dim=-2).values.flatten(-2)


def make_grids(case, shape, generator):
    """Returns (frames, rows, columns) of each image's patches."""
    return torch.tensor([[1, *patch_grid(case)]] * case.batch_size)


def make_rows_and_columns(case, shape, generator):
    """Returns (rows, columns) of each image's patches."""
    return torch.tensor([patch_grid(case)] * case.batch_size)


def make_patch_positions(case, shape, generator):
    """Returns (column, row) of each patch of each image."""
    rows, columns = patch_grid(case)
    positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
    return positions.expand(shape).clone()


def make_flattened_patches(case, shape, generator):
    """Returns noise with the row and column of each patch in front, counted from 1: 0 is what is padded."""
    patches = torch.randn(shape, generator=generator)
    sides = [torch.arange(math.isqrt(shape[1]))] * 2
    patches[..., :2] = torch.cartesian_prod(*sides) + 1
    return patches


def make_merge_sizes(case, shape, generator):
    """Returns for each image how many patches a side are merged into one."""
    return torch.full(shape, find_field(image_config(case), "spatial_merge_size", default=1))


def make_steps(case, shape, generator):
    """Returns the numbers of an episode's steps."""
    return torch.arange(shape[1]).expand(shape).clone()


def make_image_places(case, shape, generator):
    """Returns a mask of the places in a text that an image's features take: the first ones."""
    mask = torch.zeros(shape, dtype=torch.long)
    mask[:, : find_field(case.config, "latent_query_num", default=0)] = 1
    return mask


LAID_OUT = {
    "bbox": make_boxes,
    "grid_thw": make_grids,
    "spatial_shapes": make_rows_and_columns,
    "pixel_position_ids": make_patch_positions,
    "merge_sizes": make_merge_sizes,
    "flattened_patches": make_flattened_patches,
    "timesteps": make_steps,
    "image_embeds_position_mask": make_image_places,
}
