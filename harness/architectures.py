"""The built-in architectures: what runs, with random weights, where there is no network.

The library's source names the checkpoint that each default configuration is taken from; where another one stands here,
the overrides are its config.json's. Large language models are cut to BUILTIN_LAYERS unless --layers says otherwise; the
row says how many there are.
"""

import functools
import typing

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from harness.errors import UserError


class Architecture(typing.NamedTuple):
    model_type: str
    overrides: dict  # what differs from the library's default configuration of that type
    checkpoint_layers: int | None = None  # of a model that is cut in depth


IMAGENET = {"num_labels": 1000}
BUILTIN_LAYERS = 4
BUILTIN_ARCHITECTURES = {
    "facebook/convnext-tiny-224": Architecture("convnext", IMAGENET),
    "microsoft/resnet-50": Architecture("resnet", IMAGENET),
    "google/vit-base-patch16-224": Architecture("vit", IMAGENET),
    "microsoft/swin-tiny-patch4-window7-224": Architecture("swin", IMAGENET),
    "facebook/dinov2-base": Architecture("dinov2", {"image_size": 518, "architectures": ["Dinov2Model"]}),
    "facebook/convnextv2-tiny-1k-224": Architecture("convnextv2", IMAGENET),
    "facebook/deit-base-distilled-patch16-224": Architecture("deit", IMAGENET),
    "microsoft/beit-base-patch16-224": Architecture(
        "beit",
        {**IMAGENET, "use_relative_position_bias": True, "use_mean_pooling": True, "layer_scale_init_value": 0.1},
    ),
    "microsoft/swinv2-tiny-patch4-window8-256": Architecture(
        "swinv2", {**IMAGENET, "image_size": 256, "window_size": 8}
    ),
    "google/mobilenet_v2_1.0_224": Architecture("mobilenet_v2", {"num_labels": 1001}),
    "apple/mobilevit-small": Architecture("mobilevit", IMAGENET),
    "google/efficientnet-b0": Architecture(
        "efficientnet",
        {**IMAGENET, "image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    ),
    "facebook/regnet-y-040": Architecture("regnet", IMAGENET),
    "nvidia/segformer-b0-finetuned-ade-512-512": Architecture(
        "segformer",
        {"num_labels": 150, "image_size": 512, "architectures": ["SegformerForSemanticSegmentation"]},
    ),
    "facebook/levit-128S": Architecture("levit", IMAGENET),
    "sail/poolformer_s12": Architecture("poolformer", IMAGENET),
    "openai/clip-vit-base-patch32": Architecture("clip", {}),
    "google/siglip-base-patch16-224": Architecture("siglip", {}),
    "google-bert/bert-base-uncased": Architecture("bert", {}),
    "FacebookAI/roberta-base": Architecture(
        "roberta",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "distilbert/distilbert-base-uncased": Architecture("distilbert", {}),
    "google/electra-small-discriminator": Architecture("electra", {"architectures": ["ElectraForPreTraining"]}),
    "FacebookAI/xlm-roberta-base": Architecture(
        "xlm-roberta",
        {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "microsoft/deberta-v3-base": Architecture(
        "deberta-v2",
        {
            "vocab_size": 128100,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "max_relative_positions": -1,
        },
    ),
    "microsoft/mpnet-base": Architecture("mpnet", {"max_position_embeddings": 514}),
    "answerdotai/ModernBERT-base": Architecture("modernbert", {}),
    "albert/albert-base-v2": Architecture(
        "albert",
        {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "openai-community/gpt2": Architecture("gpt2", {}),
    "facebook/opt-125m": Architecture("opt", {}),
    "EleutherAI/pythia-70m": Architecture(
        "gpt_neox",
        {
            "vocab_size": 50304,
            "hidden_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
        },
    ),
    "meta-llama/Llama-3.2-1B": Architecture(
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
        },
        16,
    ),
    "mistralai/Mistral-7B-v0.1": Architecture("mistral", {}, 32),
    "Qwen/Qwen2-0.5B": Architecture(
        "qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        24,
    ),
    "Qwen/Qwen3-0.6B": Architecture(
        "qwen3",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        28,
    ),
    "google/gemma-2b": Architecture(
        "gemma",
        {"hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8, "num_key_value_heads": 1},
        18,
    ),
    "microsoft/phi-1": Architecture("phi", {}, 24),
    "google-t5/t5-small": Architecture("t5", {}),
    "facebook/bart-large": Architecture("bart", {}),
    "facebook/wav2vec2-base-960h": Architecture("wav2vec2", {}),
    "facebook/hubert-base-ls960": Architecture("hubert", {"architectures": ["HubertModel"]}),
    "microsoft/wavlm-base": Architecture("wavlm", {"architectures": ["WavLMModel"]}),
    "openai/whisper-tiny": Architecture("whisper", {}),
    "MIT/ast-finetuned-audioset-10-10-0.4593": Architecture(
        "audio-spectrogram-transformer",
        {"num_labels": 527, "architectures": ["ASTForAudioClassification"]},
    ),
}


def builtin_config(name, layers=None):
    """Returns the transformers config of a built-in architecture.

    layers: how many of its layers, or "all"; None cuts those that are too large in depth. Raises UserError where it has
    fewer, or is no language model of a single stack of layers.
    """
    model_type, overrides, checkpoint_layers = BUILTIN_ARCHITECTURES[name]
    make_config = functools.partial(CONFIG_MAPPING[model_type], **overrides)
    default = make_config()
    whole = checkpoint_layers or layer_count(default)
    if layers is None:
        layers = BUILTIN_LAYERS if checkpoint_layers else "all"
    depth = whole if layers == "all" else layers
    if depth == layer_count(default):
        return default
    if whole is None:
        raise UserError(f"--layers {depth} is for language models that are one stack of layers, which {name} is not")
    if depth > whole:
        raise UserError(f"--layers {depth}: {name} has {whole} layers")
    return make_config(num_hidden_layers=depth)


def layer_count(config):
    """Returns how many layers the config of a language model asks for; None where it is no single stack of layers."""
    is_one_stack = hasattr(config, "vocab_size") and not config.is_encoder_decoder
    return getattr(config, "num_hidden_layers", None) if is_one_stack else None


def describe_weights(name, config, weights):
    """Returns the row's `weights`: "pretrained", "random", or what is left of a built-in model that is cut in depth."""
    if weights == "random" and name in BUILTIN_ARCHITECTURES:
        depth, whole = layer_count(config), layer_count(builtin_config(name, "all"))
        if depth and whole and depth < whole:
            return f"random, {depth} of {whole} layers"
    return weights
