"""Small configs: a rule that shrinks any model type's default config by the names of its fields, no table of types.

Every width is divided by the same number, so that sums, ratios and divisibility stay; depths become two layers, or as
many as there are kinds of layers; vocabularies, experts, images and positions are capped. Where a family does not
survive that, the next of SIZES changes less.
"""

import contextlib
import copy
import functools
import re
import typing

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, POSITIONS, EXPERTS, QUERIES, PIXELS, CHUNK, STEPS = 1024, 512, 16, 16, 64, 16, 8


class Size(typing.NamedTuple):
    """How much of a config is made smaller."""

    name: str
    divisor: int = 1  # of widths
    heads: bool = False  # whether the numbers of heads are divided too, so that a head keeps its size
    images: bool = False  # whether images, positions and chunks are capped
    counts: bool = True  # whether vocabularies, experts and queries are capped
    depth: int = 1  # layers of each kind, at least two in all; 0: all that there are


SIZES = (
    Size("widths / 8", divisor=8, images=True),
    Size("widths / 8, images as they are", divisor=8),
    Size("widths and heads / 8", divisor=8, heads=True, images=True),
    Size("widths / 2", divisor=2, images=True),
    Size("depth and vocabulary"),
    Size("depth", counts=False),
    Size("widths / 8, two layers of each kind", divisor=8, images=True, depth=2),  # Zamba's share weights
    Size("widths / 8, all layers", divisor=8, images=True, depth=0),
    Size("widths / 8, vocabulary as it is", divisor=8, images=True, counts=False),
    Size("default", counts=False, depth=0),
)

# Names of fields, as the configs of transformers have them.
DEPTH = re.compile(r"(^|_)(layers?|blocks|depth)$")
NOT_DEPTH = re.compile(
    r"conv_|feat|scale|sampling|lstm|stage|random|top_?k|local|initial|mem_|^(min|max)_depth$|interval|every|per_token"
)
PART_OF_DEPTH = re.compile(
    r"shared|dense|sparse|first|last|window|skip|predict|replace|layer_(id|start|end)|insert|^merge_index$"
)
DEPTHS = re.compile(r"depths$|blocks$|block_repeats$|blocks_per_stage$|block_sizes$|(^|_)layers$|repeats$")
LAYERS = re.compile(r"indices|indexes|idxs|layer_ids|hook_ids|_layers$|attention_blocks$")
WIDTH = re.compile(
    r"(^|_)dims?($|_)|dim$|dimension$|sizes?$|size_global$|size_mlp$|width$|widths$|channels?(_list|_out)?$|^d_|_d_ssm|_rank$|^dff$"
    r"|n_embd|n_inner|hidden_size|embed_dims|units$|pos_feats$|headdim$|d_head$|mrope_section$|lowrank$"
)
NOT_WIDTH = re.compile(
    r"image|img|patch|kernel|window|vocab|chunk|block|group|pool|tile|crop|sampl|batch|cache|^max_|^min_|codebook_size|ngram"
    r"|grid|unit_size|temporal|frame|horizon|context|feature_sizes|(^|_)input_(size|dim)$|feat_size|hash|merge|freq_size"
    r"|stride|low_res|tubelet|parallel|queue|^num_channels|d_conv|d_state|state_size|mel|beam|rope_\w*sizes"
)
HEAD_SIZE = re.compile(r"head_?dim|d_head$|^d_kv$|dim_head$|head_size$|rotary_dim|mrope_section$")
HEADS = re.compile(r"(^|_)heads?$|^num_key_value_\w*heads$")
EXPERT_COUNT = re.compile(r"^(n|num|moe_num)_(?!shared)(\w+_)?experts$")
QUERY_COUNT = re.compile(r"^num_(object_)?queries$")  # objects that a detector looks for
STEP_COUNT = re.compile(r"^max_text_length$")  # of a loop in forward() that writes a text
IMAGE_SIZE = re.compile(r"(image|img)_size$")
CHUNK_SIZE = re.compile(r"(^|mamba_)chunk_size$")
POSITION_COUNT = re.compile(r"^(max|n)_\w*position(s|_embeddings)$|^n_ctx$|^max_seq_len$")
SPECIAL_TOKEN = re.compile(r"(_id|_ids|token_index|(pad|bos|eos|sep|cls|mask|unk)_index)$")


# What some config classes leave open, so that their default makes no model; from the config's other fields.
COMPLETIONS = {
    "head_dim": lambda fields: fields["hidden_size"] // fields["num_attention_heads"],
    "num_key_value_heads": lambda fields: fields["num_attention_heads"],
    "n_routed_experts": lambda fields: 8,
    "n_shared_experts": lambda fields: 1,
    "layer_types": lambda fields: ["full_attention"] * fields["num_hidden_layers"],
    "mlp_layer_types": lambda fields: ["dense"] + ["sparse"] * (fields["num_hidden_layers"] - 1),
    "sliding_window": lambda fields: 16 if fields["num_sliding_attention_heads"] else None,
    "vocabulary_map": lambda fields: {},
    "num_experts_per_tok": lambda fields: 2,
    "vocab_size": lambda fields: 32,
    "clip_qkv": lambda fields: 8.0 if fields["kv_n_heads"] else None,
    "prediction_length": lambda fields: 24,
    "num_time_features": lambda fields: 2,
    "image_token_index": lambda fields: 3 if fields["num_query_tokens"] else None,
    "video_token_index": lambda fields: 3 if fields["num_query_tokens"] else None,
}
# What some config classes lack though their models read it: the field beside which it stands, and its value.
MISSING = {
    "num_key_value_heads": ("head_dim", lambda fields: fields["num_attention_heads"]),
    "rope_theta": ("kv_n_heads", lambda fields: 10_000.0),
}
# Model types that join two others, which their config class leaves to the user.
JOINED = {
    "encoder-decoder": {"encoder": "bert", "decoder": "bert"},
    "vision-encoder-decoder": {"encoder": "vit", "decoder": "bert"},
    "speech-encoder-decoder": {"encoder": "wav2vec2", "decoder": "bert"},
    "vision-text-dual-encoder": {"vision_config": "vit", "text_config": "bert"},
    "nougat": {"encoder": "donut-swin", "decoder": "mbart"},
    "musicgen": {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"},
    "musicgen_melody": {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_melody_decoder"},
    "rag": {"question_encoder": "dpr", "generator": "bart"},
}


def default_config(model_type):
    """Returns the default config of a model type. Raises what its config class does."""
    parts = {name: {"model_type": part} for name, part in JOINED.get(model_type, {}).items()}
    if "encoder" in parts and "decoder" in parts and parts["decoder"]["model_type"] == "bert":
        parts["decoder"] |= {"is_decoder": True, "add_cross_attention": True}
    return CONFIG_MAPPING[model_type](**parts)


def small_config(default, size):
    """Returns a copy of a transformers config shrunk to one of SIZES. Raises what the config class does not accept."""
    fields = copy.deepcopy(default.to_dict())
    replace_missing_backbones(fields)
    complete(fields)
    shrink(fields, size)
    if size.counts:
        keep_special_tokens_apart(fields)
    drop_base_fields(fields)
    # from_dict() logs what differs from a default, which those that join two others need not have.
    config = type(default)(**fields) if default.model_type in JOINED else type(default).from_dict(fields)
    if not hasattr(config, "pad_token_id"):
        config.pad_token_id = None
    return config


def drop_base_fields(fields):
    """Drops what every config has, and has not changed, from the configs in one, in place: not all of them take it."""
    base = PretrainedConfig().to_dict()
    for part in fields.values():
        if isinstance(part, dict):
            for name in [n for n, value in part.items() if n in base and value == base[n] and n != "model_type"]:
                del part[name]


def complete(fields):
    """Fills in what a config and the configs in it leave open, in place."""
    for value in fields.values():
        if isinstance(value, dict):
            complete(value)
    if fields.get("vocab_size", "") is None and fields.get("pad_token_id", "") is None:
        fields["pad_token_id"] = 1
    if fields.get("num_time_features") == 0:  # an input without any values, and what is computed from that
        fields["num_time_features"] = None
        fields.pop("feature_size", None)
    for name, (beside, find) in MISSING.items():
        if name not in fields and beside in fields:
            with contextlib.suppress(KeyError):
                fields[name] = find(fields)
    for name, find in COMPLETIONS.items():
        if fields.get(name, "") is None:
            with contextlib.suppress(KeyError, TypeError):
                fields[name] = find(fields)


def shrink(fields, size):
    """Shrinks the fields of a config in place, and those of the configs in it."""
    for value in fields.values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                shrink(part, size)
    if size.depth:
        shrink_depth(fields, size.depth)
    patched = fields.get("image_embedding_size")
    patch = fields.get("patch_size")
    patch = patch if is_int(patch) else max(patch) if of_ints(patch) else 1
    pixels = max(4 * patch, PIXELS // patch * patch)
    for name, value in fields.items():
        if not isinstance(name, str) or not (is_int(value) or isinstance(value, (list, tuple))):
            continue
        if HEAD_SIZE.search(name) and size.heads:
            continue
        if HEADS.search(name) and size.heads:
            fields[name] = map_ints(lambda heads: max(heads // size.divisor, 1), value)
        elif WIDTH.search(name) and "moe" in name and is_int(value):  # PyTorch's products of groups take 16 bytes
            fields[name] = max(value // size.divisor // 8, 1) * 8
        elif WIDTH.search(name) and not NOT_WIDTH.search(name):
            least = 1 if name == "mrope_section" else 4  # pairs of a head's dimensions, which add up to half of it
            fields[name] = map_ints(functools.partial(narrow, size.divisor, least), value)
        elif size.counts and "vocab" in name and is_int(value):
            fields[name] = min(value, VOCABULARY)
        elif size.counts and EXPERT_COUNT.search(name):
            fields[name] = map_ints(lambda experts: min(experts, EXPERTS), value)
        elif size.counts and QUERY_COUNT.search(name) and is_int(value):
            fields[name] = min(value, QUERIES)
        elif size.depth and STEP_COUNT.search(name) and is_int(value):
            fields[name] = min(value, STEPS)
        elif size.images and IMAGE_SIZE.search(name) and not re.search("max|min", name):
            fields[name] = map_ints(lambda side: min(side, pixels), value)
        elif size.images and CHUNK_SIZE.search(name) and is_int(value):
            fields[name] = min(value, CHUNK)
        elif size.images and POSITION_COUNT.search(name) and is_int(value):
            fields[name] = min(value, POSITIONS)
    if is_int(patched) and is_int(fields.get("image_size")):  # how many patches an image has
        fields["image_embedding_size"] = fields["image_size"] // patch


def narrow(divisor, least, width):
    """Returns a width divided, or as it is where that leaves a rest or less than `least`."""
    return width // divisor if width % divisor == 0 and width // divisor >= least else width


def shrink_depth(fields, of_each):
    """Makes a config's depth two layers, or the first of each kind, in place, and what it says of layers fit that."""
    depths = {name: value for name, value in fields.items() if is_depth(name, value)}
    lists = {k: v for k, v in fields.items() if isinstance(k, str) and isinstance(v, (list, tuple)) and len(v)}
    deepest = max(depths.values(), default=0)
    kept = {depth: first_of_each_kind(depth, lists, of_each) for depth in set(depths.values())}
    chosen = {k: sorted(set(v)) for k, v in lists.items() if names_layers(k, v, deepest)}
    for layers in chosen.values():
        count = len(layers) + (max(layers) < deepest and min(layers) > 0)
        kept[deepest] = sorted(set(kept[deepest]) | set(range(min(count, deepest))))
    for name, value in lists.items():
        if name in chosen:
            new, ends = len(kept[deepest]), max(value) == deepest
            places = {v: new - len(chosen[name]) + i + ends for i, v in enumerate(chosen[name])}
            fields[name] = [places[v] for v in value]
        elif len(value) in kept and len(value) > 4:
            fields[name] = [value[layer] for layer in kept[len(value)]]
        elif DEPTHS.search(name) and of_ints(value) and min(value) > 0 and "conv_" not in name:
            fields[name] = [1] * len(value)
    for name, value in depths.items():
        fields[name] = len(kept[value])
    if not deepest:
        return
    depth = len(kept[deepest])
    for name, value in fields.items():
        if isinstance(value, dict) and value and "layer" in str(name):  # what differs from layer to layer
            if all(is_int(layer) or str(layer).isdecimal() for layer in value):
                fields[name] = {layer: v for layer, v in value.items() if int(layer) < depth}
        elif is_part_of_depth(name) and is_int(value) and 0 < value <= deepest:
            fields[name] = value * depth // deepest
    if "stage_names" in fields:  # the config class makes them anew
        fields.pop("stage_names")
        fields.pop("out_features", None)


def is_depth(name, value):
    """Returns whether a field is the number of a model's layers."""
    if not (isinstance(name, str) and DEPTH.search(name)) or NOT_DEPTH.search(name) or PART_OF_DEPTH.search(name):
        return False
    return is_int(value) and value > 2


def is_part_of_depth(name):
    """Returns whether a field says how many of the layers, or from which on, are of a kind."""
    return isinstance(name, str) and PART_OF_DEPTH.search(name) and re.search("layer|dense|merge", name)


def first_of_each_kind(depth, lists, of_each):
    """Returns the layers of `depth` that stay: the first few of each kind that a list tells apart, at least two."""
    kinds = [v for v in lists.values() if len(v) == depth > 4 and all(isinstance(kind, str) for kind in v)]
    places = [[layer for layer, name in enumerate(names) if name == kind] for names in kinds for kind in set(names)]
    firsts = {layer for of_kind in places for layer in of_kind[:of_each]}
    return sorted(firsts if len(firsts) >= 2 else firsts | {0, 1})


def names_layers(name, value, deepest):
    """Returns whether a field lists some of a model's layers by their numbers."""
    if not (of_ints(value) and LAYERS.search(name)) or len(value) >= deepest or min(value) < 0 or max(value) > deepest:
        return False
    return not DEPTHS.search(name) or list(value) == sorted(set(value))


def keep_special_tokens_apart(fields):
    """Gives every special token beyond the capped vocabulary an id of its own inside it, in place."""
    found = set()
    change_special_tokens(fields, lambda token: found.add(token) or token)
    beyond = sorted(token for token in found if token >= VOCABULARY)
    places = {token: VOCABULARY - 1 - i for i, token in enumerate(beyond)}
    change_special_tokens(fields, lambda token: places.get(token, token))


def change_special_tokens(fields, change):
    for name, value in fields.items():
        if isinstance(value, dict):
            change_special_tokens(value, change)
        elif isinstance(name, str) and SPECIAL_TOKEN.search(name):
            fields[name] = map_ints(change, value)


def replace_missing_backbones(fields):
    """Puts the library's own ResNet in the place of a backbone that needs another library, in place."""
    for name, value in fields.items():
        if isinstance(value, dict):
            if value.get("model_type") == "timm_backbone":
                stages = value.get("out_indices") or (1, 2, 3, 4)
                fields[name] = {"model_type": "resnet", "out_indices": [stage for stage in stages if stage < 5]}
            else:
                replace_missing_backbones(value)


def is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def of_ints(value):
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_int, value))


def map_ints(function, value):
    """Returns `value` with `function` of every whole number in it and in its nested lists."""
    if isinstance(value, (list, tuple)):
        return [map_ints(function, item) for item in value]
    return function(value) if is_int(value) else value
