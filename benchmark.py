#!/usr/bin/env python3
"""Time one Hugging Face model with eager PyTorch, torch.compile and TVM, and append one CSV row per test item.

    python benchmark.py --model microsoft/resnet-50 --batch-size 1

The file reads in the order of the data: arguments -> model -> inputs -> test items -> check -> timing -> row.
docs/methodology.md says what each number means and how we know that it is right.
Exit code: 0 all rows ok, 1 a row is failed or wrong, 2 bad input (nothing written), 130 interrupted.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import fcntl
import functools
import gc
import importlib
import importlib.metadata
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import unittest.mock
from pathlib import Path

import huggingface_hub
import numpy as np
import pynvml
import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from tqdm import tqdm
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tuning

DEFAULT_RESULTS = Path(__file__).resolve().parent / "results" / "benchmark.csv"
DEFAULT_TUNING = DEFAULT_RESULTS.parent / "tuning"

# ---- Settings that change the numbers -------------------------------------------------------------------------------

SEED = 0  # of random weights and of inputs
STEADY = 4  # random weights that make a small change grow more than this, relatively, are not what training gives
TIMING_BUDGET_S = 2.0  # as many timed runs as fit into this,
MIN_ITERATIONS, MAX_ITERATIONS = 20, 10_000  # within these bounds,
SLOW_RUN_S, MIN_SLOW_ITERATIONS = 0.5, 3  # and at least 3 runs where one takes over 0.5 s.
WARMUP_WINDOW_S = 0.1  # Warm is when two windows of runs in a row agree in their mean time:
WARMUP_AGREEMENT = 0.01
WARMUP_LIMIT_S = 3.0  # a machine that never settles is timed all the same, and its row says so (`warnings`).
OUTLIER_SHARE, DRIFT, CLOCK_DROP = 0.01, 0.02, 0.05  # above these a row gets a warning: see disturbances()
TUNE_TRIALS, TUNE_MINUTES = 100, 10.0  # trials for each kernel on average, and the end of tuning a case
ENERGY_MIN_S = 1.0  # NVML's energy counter ticks every 20 to 100 ms: shorter runs get no energy figure

MAKE_TASKS_TIMEOUT_S = 600

# precision -> (dtype of weights and floating inputs, TF32 allowed, largest rel_error that is still `ok`)
PRECISIONS = {
    "fp32": (torch.float32, False, 1e-4),
    "tf32": (torch.float32, True, 5e-3),
    "fp16": (torch.float16, False, 2e-2),
    "bf16": (torch.bfloat16, False, 5e-2),
}

COLUMNS = (
    "model_name test_item batch_size compile_time_s infer_time_mean_ms infer_time_median_ms infer_time_std_ms "
    "infer_time_min_ms infer_time_p90_ms infer_time_p99_ms iterations throughput_samples_per_s peak_memory_mib "
    "rel_error precision device_name weights input_shape status error torch_version tvm_version transformers_version "
    "cuda_version driver_version timestamp_utc energy_mj_per_sample warnings concurrent_cases "
    "tune_time_s tune_trials"
).split()


# --skip -> the statuses of a row that need no second run
SKIPPED_STATUSES = {"nothing": (), "ended": ("ok", "wrong", "failed"), "ok": ("ok",)}


class UserError(Exception):
    """A mistake of the user's, or a model that cannot be had: one line on stderr and exit code 2."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What every test item of one run shares."""

    model_name: str
    model_class: type
    config: transformers.PretrainedConfig
    weights: str  # "pretrained" or "random"
    weights_dir: str | None  # holds the safetensors of pretrained weights
    batch_size: int
    seq_len: int
    image_size: int | None
    precision: str
    device: str  # "cpu" or "cuda:N"
    device_name: str
    tuning_dir: Path  # of the databases of all devices
    iterations: int | None  # None: as many as the time budget gives
    made_weights: str | None = None  # file in memory: random weights, made by the first process that needs them


# ---- Arguments ------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least_one(text):
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return value


def positive(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")
    return value


def parse_args(argv=None):
    parser = OneLineParser(
        prog="benchmark.py",
        description="Time one Hugging Face model with eager PyTorch, torch.compile and TVM.",
        epilog=f"Built in, with random weights and no network: {', '.join(BUILTIN_ARCHITECTURES)}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="microsoft/resnet-50", help="hub id, or a local directory with a config.json")
    add("--batch-size", type=at_least_one, default=1, help="samples per inference")
    add(
        "--test-items",
        nargs="+",
        default=["torch", "torch_compile", "tvm"],
        choices=[*TEST_ITEMS, "all"],
        metavar="ITEM",
        help=f"what to run: {' '.join(TEST_ITEMS)}, or all",
    )
    add("--device", default="auto", help="auto (CUDA when there is one), cuda, cuda:N or cpu")
    add("--precision", choices=PRECISIONS, default="fp32", help="arithmetic of every item")
    add(
        "--weights",
        choices=["auto", "pretrained", "random"],
        default="auto",
        help="auto: pretrained where they can be had, else random weights of the same architecture",
    )
    add("--task", help="the head, by the name that transformers.pipeline uses (default: the one the config names)")
    add("--seq-len", type=at_least_one, default=128, help="tokens per text, capped by the model's positions")
    add("--image-size", type=at_least_one, help="height and width of the images in pixels (default: the model's own)")
    add("--iterations", type=at_least_one, help=f"timed runs (default: as many as fit into {TIMING_BUDGET_S:g} s)")
    add("--timeout", type=positive, default=900.0, help="seconds after which an item is given up as failed")
    add(
        "--tune-trials",
        type=at_least_one,
        help=f"tvm_tune: candidates to measure for each kernel, on average (default: {TUNE_TRIALS} without a database)",
    )
    add("--tune-minutes", type=positive, help=f"tvm_tune: end of the tuning of one case (default: {TUNE_MINUTES:g})")
    add("--tuning-dir", type=Path, default=DEFAULT_TUNING, help="where the tuning databases are")
    add("--results", type=Path, default=DEFAULT_RESULTS, help="the CSV that rows are appended to")
    add(
        "--skip",
        choices=SKIPPED_STATUSES,
        default="nothing",
        help="leave out items whose latest row of the same case, device and versions is there (ended), or is ok",
    )
    add("--concurrent-cases", type=at_least_one, default=1, help="for the row: cases that run on this host at once")
    add("--verbose", action="store_true", help="show what the frameworks print, and whole tracebacks")
    args = parser.parse_args(argv)
    args.test_items = list(TEST_ITEMS) if "all" in args.test_items else list(dict.fromkeys(args.test_items))
    return args


# ---- Model ----------------------------------------------------------------------------------------------------------

# Architectures that need no network: checkpoint -> (model type, what differs from the library's default configuration
# of that type, and for large language models the checkpoint's depth: they are cut to BUILTIN_LAYERS, as the row says).
# The library's source names the checkpoint that each default configuration is taken from; where another one stands
# here, the overrides are its config.json's.
IMAGENET = {"num_labels": 1000}
BUILTIN_LAYERS = 4
BUILTIN_ARCHITECTURES = {
    "facebook/convnext-tiny-224": ("convnext", IMAGENET),
    "microsoft/resnet-50": ("resnet", IMAGENET),
    "google/vit-base-patch16-224": ("vit", IMAGENET),
    "microsoft/swin-tiny-patch4-window7-224": ("swin", IMAGENET),
    "facebook/dinov2-base": ("dinov2", {"image_size": 518, "architectures": ["Dinov2Model"]}),
    "facebook/convnextv2-tiny-1k-224": ("convnextv2", IMAGENET),
    "facebook/deit-base-distilled-patch16-224": ("deit", IMAGENET),
    "microsoft/beit-base-patch16-224": (
        "beit",
        {**IMAGENET, "use_relative_position_bias": True, "use_mean_pooling": True, "layer_scale_init_value": 0.1},
    ),
    "microsoft/swinv2-tiny-patch4-window8-256": ("swinv2", {**IMAGENET, "image_size": 256, "window_size": 8}),
    "google/mobilenet_v2_1.0_224": ("mobilenet_v2", {"num_labels": 1001}),
    "apple/mobilevit-small": ("mobilevit", IMAGENET),
    "google/efficientnet-b0": (
        "efficientnet",
        {**IMAGENET, "image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    ),
    "facebook/regnet-y-040": ("regnet", IMAGENET),
    "nvidia/segformer-b0-finetuned-ade-512-512": (
        "segformer",
        {"num_labels": 150, "image_size": 512, "architectures": ["SegformerForSemanticSegmentation"]},
    ),
    "facebook/levit-128S": ("levit", IMAGENET),
    "sail/poolformer_s12": ("poolformer", IMAGENET),
    "openai/clip-vit-base-patch32": ("clip", {}),
    "google/siglip-base-patch16-224": ("siglip", {}),
    "google-bert/bert-base-uncased": ("bert", {}),
    "FacebookAI/roberta-base": (
        "roberta",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "distilbert/distilbert-base-uncased": ("distilbert", {}),
    "google/electra-small-discriminator": ("electra", {"architectures": ["ElectraForPreTraining"]}),
    "FacebookAI/xlm-roberta-base": (
        "xlm-roberta",
        {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "microsoft/deberta-v3-base": (
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
    "microsoft/mpnet-base": ("mpnet", {"max_position_embeddings": 514}),
    "answerdotai/ModernBERT-base": ("modernbert", {}),
    "albert/albert-base-v2": (
        "albert",
        {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "openai-community/gpt2": ("gpt2", {}),
    "facebook/opt-125m": ("opt", {}),
    "EleutherAI/pythia-70m": (
        "gpt_neox",
        {
            "vocab_size": 50304,
            "hidden_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
        },
    ),
    "meta-llama/Llama-3.2-1B": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
        16,
    ),
    "mistralai/Mistral-7B-v0.1": ("mistral", {}, 32),
    "Qwen/Qwen2-0.5B": (
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
    "Qwen/Qwen3-0.6B": (
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
    "google/gemma-2b": (
        "gemma",
        {"hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8, "num_key_value_heads": 1},
        18,
    ),
    "microsoft/phi-1": ("phi", {}, 24),
    "google-t5/t5-small": ("t5", {}),
    "facebook/bart-large": ("bart", {}),
    "facebook/wav2vec2-base-960h": ("wav2vec2", {}),
    "facebook/hubert-base-ls960": ("hubert", {"architectures": ["HubertModel"]}),
    "microsoft/wavlm-base": ("wavlm", {"architectures": ["WavLMModel"]}),
    "openai/whisper-tiny": ("whisper", {}),
    "MIT/ast-finetuned-audioset-10-10-0.4593": (
        "audio-spectrogram-transformer",
        {"num_labels": 527, "architectures": ["ASTForAudioClassification"]},
    ),
}
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
DOWNLOADED = ["config.json", *SAFETENSORS, "model-*-of-*.safetensors"]
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_model(name, weights):
    """-> (config, directory that holds its safetensors or None); raises UserError with what to do."""
    if os.path.isdir(name):
        directory, advice = Path(name), "give a directory with model.safetensors, or use --weights random"
    elif os.path.exists(name) or name.startswith((".", "/", "~")):
        raise UserError(f"{name} is not a directory; --model takes a hub id or a directory with a config.json")
    elif weights == "random" and name in BUILTIN_ARCHITECTURES:
        return builtin_config(name), None
    else:
        try:
            directory = download(name, with_weights=weights != "random")
        except hub_errors.LocalEntryNotFoundError:
            if weights == "auto" and name in BUILTIN_ARCHITECTURES:
                warn(f"{name}: the hub cannot be reached; random weights (latency does not depend on their values)")
                return builtin_config(name), None
            raise UserError(
                f"{name}: the hub cannot be reached and the model is not in the cache; check the network, HF_ENDPOINT "
                f"and HF_HUB_OFFLINE, or take one of the {len(BUILTIN_ARCHITECTURES)} that are built in (see --help)"
            ) from None
        advice = "use --weights random, or convert the checkpoint to safetensors"
    config = read_config(name, directory)
    if weights == "random":
        return config, None
    if any((directory / file).is_file() for file in SAFETENSORS):
        return config, directory
    if any(file for pattern in PICKLED for file in directory.glob(pattern)):
        raise UserError(f"{name} has only pickled weights, which are never opened (they can run code); {advice}")
    if weights == "pretrained" or not os.path.isdir(name):
        raise UserError(f"{name} has no safetensors weights (pickled ones are never opened); {advice}")
    warn(f"{name} has a config.json but no weights; random weights (latency does not depend on their values)")
    return config, None


def builtin_config(name):
    model_type, overrides, *depth = BUILTIN_ARCHITECTURES[name]
    return CONFIG_MAPPING[model_type](**overrides, **({"num_hidden_layers": BUILTIN_LAYERS} if depth else {}))


def describe_weights(name, config, weights):
    """-> the row's `weights`: "pretrained", "random", or what is left of a built-in model that is cut in depth."""
    depth = BUILTIN_ARCHITECTURES.get(name, ())[2:]
    if weights == "random" and depth and config.num_hidden_layers == BUILTIN_LAYERS:
        return f"random, {BUILTIN_LAYERS} of {depth[0]} layers"
    return weights


def download(name, with_weights):
    """-> directory of the hub's (or the cache's) config.json and safetensors; LocalEntryNotFoundError: neither has it.

    One short request tells whether there is a network: the hub client itself would retry for 20 s and more.
    """
    offline = hub_constants.HF_HUB_OFFLINE
    if not offline:
        try:
            huggingface_hub.utils.get_session().head(hub_constants.ENDPOINT, timeout=5)
        except Exception:  # of whatever HTTP library the hub client uses
            offline = True
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=DOWNLOADED if with_weights else ["config.json"], local_files_only=offline
            )
        )
    except hub_errors.HFValidationError:
        raise UserError(f"{name!r} is neither a hub id (owner/name) nor a directory") from None
    except hub_errors.GatedRepoError:
        raise UserError(f"{name} is gated: accept its terms on the hub and set HF_TOKEN") from None
    except hub_errors.RepositoryNotFoundError:
        raise UserError(f"{name} is not on the hub; check the spelling (a private one needs HF_TOKEN)") from None
    except hub_errors.LocalEntryNotFoundError:
        raise
    except Exception as error:  # a server's error, a connection that breaks, a full disk
        raise UserError(f"{name} cannot be downloaded: {one_line(error)}") from None


def read_config(name, directory):
    """-> the transformers config of `directory`/config.json; the hub's own code is never run."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{name} has no config.json; give a hub id or a directory in the transformers format")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model_type = fields["model_type"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the config of a transformers model (JSON with a model_type)") from None
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in fields:
            raise UserError(f"{name} needs code of its own from the hub, which is never run; take another model")
        raise UserError(
            f"{name}: transformers {transformers.__version__} does not know model_type {model_type!r}; a newer one may"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:
        raise UserError(f"{path}: {one_line(error)}") from None


# What a family is for where its config names no head: the first of these that it has.
DEFAULT_HEADS = (
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "CTC",
)


def find_model_class(name, config, task=None):
    """-> the class for `task`, else the one that config.architectures names, else the family's first default head."""
    if task:
        from transformers.pipelines import SUPPORTED_TASKS

        if task not in SUPPORTED_TASKS:
            raise UserError(f"--task {task} is unknown; transformers knows {', '.join(SUPPORTED_TASKS)}")
        candidates = [auto._model_mapping.get(type(config), None) for auto in SUPPORTED_TASKS[task]["pt"]]
    else:
        candidates = [getattr(transformers, architecture, None) for architecture in config.architectures or []]
        for mapping in (*(f"MODEL_FOR_{head}_MAPPING" for head in DEFAULT_HEADS), "MODEL_MAPPING"):
            with contextlib.suppress(ValueError):  # the library's table names a class that the library does not have
                candidates.append(getattr(modeling_auto, mapping).get(type(config), None))
    for model_class in candidates:
        if model_class is not None:
            # Some families map to several classes that share a configuration: the first is the plain one.
            model_class = model_class[0] if isinstance(model_class, (list, tuple)) else model_class
            try:
                model_class.forward  # refused where a library that the family needs is missing
            except ImportError as error:
                raise UserError(f"{name}: {one_line(error)}") from None
            return model_class
    family = type(config).__name__
    if task:
        raise UserError(f"{name}: transformers has no model class with a head for --task {task} for {family}")
    raise UserError(f"{name}: its config names no model class of transformers, and {family} has no usual one")


def load_model(case):
    """-> the model of the case: fp32, on the CPU, in evaluation mode, without gradients."""
    for config in (case.config, case.config.get_text_config(), case.config.get_text_config(decoder=True)):
        config.return_dict, config.use_cache = True, False
    from_pretrained = functools.partial(case.model_class.from_pretrained, dtype=torch.float32)
    torch.manual_seed(SEED)  # a head that a checkpoint may lack
    if case.weights == "pretrained":
        model = from_pretrained(case.weights_dir, use_safetensors=True)
    elif case.made_weights and os.path.getsize(case.made_weights):
        made = torch.load(case.made_weights, mmap=True, weights_only=True)
        if case.device == "cpu":  # nothing is computed on pages of a mapped file
            made = {name: tensor.clone() for name, tensor in made.items()}
        model = from_pretrained(None, config=case.config, state_dict=made)
    else:
        model = make_random_model(case)
        if case.made_weights:
            torch.serialization.set_crc32_options(False)  # most of the time of writing gigabytes
            torch.save(model.state_dict(), case.made_weights)
    return model.eval().requires_grad_(False)


def make_random_model(case):
    """-> the case's model with seeded random weights that keep the signal's size and small changes small."""
    inputs = make_inputs(dataclasses.replace(case, batch_size=1))
    for least in (1, 1 / 16):
        torch.manual_seed(SEED)
        model = case.model_class(case.config).float().eval().requires_grad_(False)
        if keep_signal_size(model, inputs, least) <= STEADY:
            break
    return model.train()  # drops what LeViT keeps from a run in evaluation mode: its biases in that run's dtype


@torch.no_grad()
def keep_signal_size(model, inputs, least):
    """Rescale random weights in place so that every layer's output on `inputs` has standard deviation 1.

    Or one between `least` and 1, which is left alone. -> growth_of_a_change().

    The libraries' own initialisations shrink or blow up the signal over many layers, or switch whole blocks off
    (ConvNeXt multiplies each block by 1e-6), and then rel_error sees nothing. This is layer-sequential unit variance
    (Mishkin and Matas, arXiv:1511.06422) in one forward pass. Parameters that start as a constant (biases, norm and
    layer scales) get some noise, so that no operation on them is the identity. Some layers are small for a reason: T5
    has small queries instead of a 1/sqrt(d), and with larger ones its softmax makes small changes 200 times larger.

    BatchNorm gets statistics of what it is fed, as training would give it: without, the channels' means can drown what
    comes from the input. But taking the whole mean away makes some networks blow up rounding errors layer by layer
    (Yang et al., arXiv:1902.08129), more than trained ones do: as much of it goes as leaves small changes small.
    """
    for parameter in model.parameters():
        if not parameter.numel():  # DINOv3's register tokens where it has none
            continue
        constant = parameter.flatten()[0].item()
        if constant == 0 and not parameter.any():
            parameter.normal_(0, 0.02)
        elif parameter.ndim == 1 and (parameter == constant).all():
            parameter.normal_(1, 0.1)

    layers = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
        and module.weight.ndim >= 2
        and not isinstance(module, torch.nn.Embedding)
    ]
    norms = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]

    def rescale(module, _, output):
        if not isinstance(output, torch.Tensor):  # a router of experts, say
            return output
        scale = output.std()
        if least <= scale <= 1 or not (scale > 0 and scale.isfinite()):
            return output
        module.weight.div_(scale)
        if getattr(module, "bias", None) is not None:
            module.bias.div_(scale)
        return output / scale

    def take_statistics(share_of_mean, module, arguments):
        features = arguments[0].movedim(1, 0).flatten(1)  # (channels, everything else)
        if features.shape[1] > 1:
            module.running_mean.copy_(share_of_mean * features.mean(1))
            module.running_var.fill_((features - module.running_mean[:, None]).square().mean())

    for share_of_mean in (1, 1 / 8, 0) if norms else (1,):
        hooks = [layer.register_forward_hook(rescale) for layer in layers]
        hooks += [norm.register_forward_pre_hook(functools.partial(take_statistics, share_of_mean)) for norm in norms]
        model(**inputs)
        for hook in hooks:
            hook.remove()
        growth = growth_of_a_change(model, inputs)
        if growth <= STEADY:
            break
    return growth


def growth_of_a_change(model, inputs, size=1e-3):
    """-> how many times larger the output changes than what goes in, relatively, when noise of `size` multiplies it.

    What goes in are inputs of numbers, and the embeddings of ids.
    """
    generator = torch.Generator().manual_seed(SEED + 1)  # not the noise that the inputs are made of

    def change(tensor):
        return tensor * (1 + size * torch.randn(tensor.shape, generator=generator))

    reference = output_arrays(model(**inputs))
    hooks = [
        module.register_forward_hook(lambda module, arguments, embedded: change(embedded))
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
    ]
    changed = {name: change(tensor) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    outputs = output_arrays(model(**changed))
    for hook in hooks:
        hook.remove()
    with contextlib.suppress(ValueError):  # an output that says nothing: the check of every item will say so
        return relative_error(outputs, reference) / size
    return math.inf


# ---- Inputs ---------------------------------------------------------------------------------------------------------


# Read off the model's config and the signature of its forward(): no table per model.

AUDIO_SAMPLES = 16_000  # one second at 16 kHz, what speech models are trained on


def input_shapes(case):
    """-> {name: shape} for the model's forward.

    Images are (batch, channels, height, width), videos (batch, frames, channels, height, width), token ids and their
    mask (batch, tokens), raw audio (batch, samples), spectrograms as the family lays them out. Raises UserError for a
    model whose main input is none of these.
    """
    config, batch = case.config, case.batch_size
    takes = inspect.signature(case.model_class.forward).parameters
    main = case.model_class.main_input_name
    vision, text = getattr(config, "vision_config", None), getattr(config, "text_config", None)
    image_text = vision is not None and text is not None and {"input_ids", "pixel_values"} <= set(takes)
    # Language models that see put image tokens into their text; they are fed text alone.
    image_text = image_text and not any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))
    shapes = {}
    if main == "input_ids" or image_text:
        shapes["input_ids"] = (batch, token_count(case, config.get_text_config()))
        if "attention_mask" in takes:
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
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        shapes["decoder_input_ids"] = (batch, token_count(case, config.get_text_config(decoder=True)))
    return shapes


def describe_shapes(case):
    """-> the row's `input_shape`."""
    return " ".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in input_shapes(case).items())


def token_count(case, config):
    """-> --seq-len, capped by the positions that the model has."""
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    limits = [getattr(config, name, None) or 0 for name in names]
    positions = min((limit for limit in limits if limit > 0), default=case.seq_len)  # XLNet's -1: as many as one likes
    # RoBERTa's kin count positions from behind the padding id; the library does so in a function of this name.
    source = inspect.getsource(inspect.getmodule(case.model_class))
    if "create_position_ids_from_input_ids" in source:
        positions -= (config.pad_token_id or 0) + 1
    return min(case.seq_len, positions)


def make_inputs(case):
    """-> {name: tensor} for the model's forward, seeded, on the CPU: fp32 standard normal noise, or int64 token ids."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = {}
    for name, shape in input_shapes(case).items():
        if name == "attention_mask":
            inputs[name] = torch.ones(shape, dtype=torch.long)
        elif name.endswith("input_ids"):
            inputs[name] = make_tokens(case, shape, generator)
        else:
            inputs[name] = torch.randn(shape, generator=generator)
    return inputs


def make_tokens(case, shape, generator):
    """-> ordinary token ids (a special one would mask, end or pad), with an end where the head looks for one."""
    config = case.config.get_text_config()
    special = set()
    for key, value in [*vars(case.config).items(), *vars(config).items()]:
        if re.search(r"token_(id|index)$", key):  # some models have several ends
            special.update(value if isinstance(value, (list, tuple)) else [value])
    ordinary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    tokens = ordinary[torch.randint(len(ordinary), shape, generator=generator)]
    if case.config.is_encoder_decoder and case.model_class.__name__.endswith("ForSequenceClassification"):
        tokens[:, -1] = config.eos_token_id  # T5's and BART's classifiers read the state at the end of the text
    return tokens


# ---- Test items -----------------------------------------------------------------------------------------------------
# Each is a function (model, inputs, case) -> callable without arguments that runs one inference and returns its
# outputs. Model and inputs are already on the device in the case's precision. Nothing but the inference may happen
# inside the callable.


def eager(model, inputs, case):
    return functools.partial(model, **inputs)


def inductor(mode, model, inputs, case):
    return functools.partial(torch.compile(model, mode=mode), **inputs)


def tvm_default(model, inputs, case):
    """torch.export -> Relax -> tvm.compile with TVM's default pipeline -> VM closure over inputs and weights."""
    import tvm

    exported = export_for_tvm(model, inputs)
    module, weights = import_to_relax(exported)
    target = tvm.target.Target.from_device(tvm.runtime.device(case.device))
    # No checks of every kernel's arguments at every launch: the shapes are static, and the checks are most of the host
    # code that LLVM would have to compile.
    vm = compile_with_tvm(module, target, case, "default", {"tirx.disable_assert": True})
    return bind(vm, exported, inputs, on_device(weights, case))


def tvm_tuned(model, inputs, case):
    """The same with the graph simplified, the operators on weights run once, and each kernel's best schedule so far."""
    import tvm

    database = tuning.read_database(tuning_path(case), tuning_origin(case))
    exported = export_for_tvm(model, inputs)
    target = tvm.target.Target(json.loads(tuning.find_target(case.device)))
    module, weights = tuned_module(exported, target)
    module = tuning.apply_database(module, target, database)
    vm = compile_with_tvm(module, target, case, tuning.lowering(target), tuning.build_options(target))
    weights = vm["main_transform_params"](on_device(weights, case))
    return bind(vm, exported, inputs, weights)


def tuned_module(exported, target):
    """-> (Relax module of a function for each distinct kernel, not yet scheduled; the model's weights)."""
    tuning.simplify(exported)
    module, weights = import_to_relax(exported)
    return tuning.prepare(module, target), weights


def export_for_tvm(model, inputs):
    """-> the model's decomposed ExportedProgram.

    On the CPU: TVM 0.27 folds BatchNorm's buffers into constants and can hash those on the host only. Attention as
    matrix products: the decomposition of PyTorch's fused one for the CPU fails for gpt2 at batch size 2. Only a draft
    gets past an `if` on values (BART clamps what overflows in fp16); it follows one branch and asserts the rest, which
    TVM does not know.
    """
    arguments = model.cpu(), (), {name: tensor.cpu() for name, tensor in inputs.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        try:
            return torch.export.export(*arguments).run_decompositions()
        except GuardOnDataDependentSymNode:
            exported = torch.export.draft_export(*arguments).run_decompositions()
    for assertion in exported.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        exported.graph.erase_node(assertion)
    exported.graph.eliminate_dead_code()
    return exported


def compile_with_tvm(module, target, case, pipeline, options):
    """Relax module -> virtual machine on the case's device, with the whole model as one CUDA graph."""
    import tvm
    from tvm import relax

    options = {"relax.backend.use_cuda_graph": case.device != "cpu", **options}
    with tvm.transform.PassContext(opt_level=3, config=options):
        executable = tvm.compile(module, target, relax_pipeline=pipeline)
    return relax.VirtualMachine(executable, tvm.runtime.device(case.device))


def on_device(weights, case):
    import tvm

    return [tvm.runtime.tensor(weight, tvm.runtime.device(case.device)) for weight in weights]


def bind(vm, exported, inputs, weights):
    """-> the compiled function as a closure over its arguments; inputs share the tensors' memory.

    vm["main"](x, *weights) would hand over every weight on every call.
    """
    import tvm

    _, keywords = exported.example_inputs  # in the order of the compiled function's arguments
    arguments = [tvm.runtime.from_dlpack(inputs[name]) for name in keywords]
    vm.save_function("main", "inference", *arguments, *weights)
    return vm["inference"]


def import_to_relax(exported):
    """-> (Relax module, weights) of a decomposed ExportedProgram; what TVM 0.27's importer gets wrong is rewritten.

    Type promotion: the logarithm of an integer tensor is refused, a sum of booleans and integers breaks the code
    generator. PyTorch's own pass for its ONNX exporter makes the casts explicit; it cannot subtract integers from a
    number, as XLNet does with its mask. Negative indices of select(), as in hidden[:, -1]: the kernel would read in
    front of the tensor. Negative axes of squeeze(): ConvertLayout, which tvm_tune uses, runs out of memory. any() of a
    whole tensor, by which T5 sees overflow in fp16, is not known to it.
    """
    from torch.onnx._internal.fx.passes import InsertTypePromotion
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    def convert_element_type(node, importer):
        dtype = str(node.kwargs["dtype"]).removeprefix("torch.")
        return importer.block_builder.emit(relax.op.astype(importer.env[node.args[0]], dtype))

    def any_of_all(node, importer):
        # Axis by axis: TVM's default schedule gives a reduction to a scalar one thread of the GPU.
        largest = relax.op.astype(importer.env[node.args[0]], "int32")
        for _ in node.args[0].meta["val"].shape:
            largest = importer.block_builder.emit(relax.op.max(largest, axis=-1))
        return importer.block_builder.emit(relax.op.astype(largest, "bool"))

    for node in exported.graph.find_nodes(op="call_function", target=torch.ops.aten.sub.Tensor):
        number, tensor = node.args
        if not isinstance(number, torch.fx.Node) and not tensor.meta["val"].is_floating_point() and not node.kwargs:
            with exported.graph.inserting_before(node):
                negative = exported.graph.call_function(torch.ops.aten.neg.default, (tensor,))
            negative.meta["val"] = -tensor.meta["val"]
            node.target, node.args = torch.ops.aten.add.Tensor, (negative, number)
    InsertTypePromotion(exported.graph_module).run()
    for node in exported.graph.nodes:
        if node.target == torch.ops.aten.select.int and node.args[2] < 0:
            source, dim, index = node.args
            node.args = (source, dim, index + source.meta["val"].shape[dim])
        elif node.target == torch.ops.aten.squeeze.dims:
            source, dims = node.args
            node.args = (source, [dim % source.meta["val"].ndim for dim in dims])
    with operators_in_input_dtype():
        module = from_exported_program(
            exported,
            keep_params_as_input=True,
            custom_convert_map={"convert_element_type.default": convert_element_type, "any.default": any_of_all},
            run_ep_decomposition=False,
        )
    module, weights = relax.frontend.detach_params(module)
    return module, weights["main"]


@contextlib.contextmanager
def operators_in_input_dtype():
    """While it lasts, TVM's importer gives operators their inputs' dtype, as PyTorch does.

    TVM 0.27 gives convolutions and matrix products fp32 results whatever the inputs are, and then cannot add a bias in
    fp16 or bf16. BatchNorm's results it calls fp16 and lowers to fp32, which the next operators may not go with; other
    normalizations, and powers, it does not have in bf16. Sums, normalizations and powers are still computed in fp32,
    then rounded: PyTorch does so too.
    """
    from tvm import relax

    def rounded(operator):
        @functools.wraps(operator)
        def call(x, *args, **kwargs):
            product = operator(x, *args, **kwargs)
            return product if x.ty.dtype == "float32" else relax.op.astype(product, x.ty.dtype)

        return call

    def in_fp32(operator, dtypes, outputs=1):
        def cast(value):
            return relax.op.astype(value, "float32") if isinstance(value, relax.Expr) else value

        @functools.wraps(operator)
        def call(*args, **kwargs):
            # Of the last tensor: the first may be an expression that has no type yet.
            *_, tensor = (value for value in (*args, *kwargs.values()) if isinstance(value, relax.Expr))
            dtype = tensor.ty.dtype
            if dtype not in dtypes:
                return operator(*args, **kwargs)
            results = operator(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})
            if outputs == 1:
                return relax.op.astype(results, dtype)
            return relax.Tuple([relax.op.astype(relax.TupleGetItem(results, i), dtype) for i in range(outputs)])

        return call

    op, nn = relax.op, relax.op.nn
    wrapped = {(op.linear_algebra, "matmul"): rounded}
    for name in ("conv1d", "conv2d", "conv3d", "conv1d_transpose", "conv2d_transpose"):
        wrapped[nn, name] = rounded
    wrapped[nn, "batch_norm"] = functools.partial(in_fp32, dtypes=("float16", "bfloat16"), outputs=3)
    for module, name in ((op, "power"), (nn, "layer_norm"), (nn, "group_norm"), (nn, "instance_norm")):
        wrapped[module, name] = functools.partial(in_fp32, dtypes=("bfloat16",))
    with contextlib.ExitStack() as stack:
        for (module, name), wrap in wrapped.items():
            stack.enter_context(unittest.mock.patch.object(module, name, wrap(getattr(module, name))))
        yield


def import_tvm(precision):
    """Import what TVM needs for `precision`.

    Where CUDA comes from pip alone, TVM and NVRTC are pointed at the wheels' library and headers.
    """
    from cuda.bindings import nvrtc
    from cuda.pathfinder import find_nvidia_header_directory, load_nvidia_dynamic_lib

    with contextlib.suppress(RuntimeError):  # a system-wide CUDA is found by the dynamic linker
        load_nvidia_dynamic_lib("cudart")
    cccl = find_nvidia_header_directory("cccl")
    if cccl and Path(cccl).name == "cccl" and "CUDA_PATH" not in os.environ:  # the wheels' layout: <root>/include/cccl
        os.environ["CUDA_PATH"] = str(Path(cccl).parents[1])
        os.environ["TVM_CUDA_NVRTC_EXTRA_OPTS"] = f"-I{cccl} {os.environ.get('TVM_CUDA_NVRTC_EXTRA_OPTS', '')}"
    # The last two are imported lazily by torch.export and by import_to_relax().
    for module in ("tvm.relax.frontend.torch", "torch.export._trace", "torch.onnx._internal.fx.passes"):
        importlib.import_module(module)
    import tvm_ffi

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_kernels, override=True)
    nvrtc.nvrtcCompileProgram = functools.partial(call_nvrtc, nvrtc.nvrtcCompileProgram)
    if PRECISIONS[precision][0] != torch.float32:
        # The schedules for tensor cores, which TVM would import while it compiles. It asks for the call stack hundreds
        # of times here, and each time inspect looks for the source text of every frame: minutes in a process that has
        # imported transformers. TVM copes where that text is None.
        with unittest.mock.patch.object(inspect, "stack", call_stack):
            importlib.import_module("tvm.s_tir.tensor_intrin")


def call_stack(context=0):
    """inspect.stack() without the source text."""
    frame, frames = sys._getframe(1), []
    while frame:
        code = frame.f_code
        frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return frames


def import_tvm_for_tuning(_):
    """With the schedules for tensor cores at every precision: MetaSchedule looks at them."""
    import_tvm("fp16")


def compile_kernels(source):
    """CUDA C++ of all of a model's kernels -> one cubin: what TVM's own callback gives, on every core.

    TVM hands NVRTC all kernels as one program, which keeps one core busy for most of the compile time. Kernels do not
    call one another: they are dealt out to programs that compile at once and are linked again. In processes, because
    NVRTC's front end holds a lock; forked, because they only need what is imported, and never touch CUDA.
    """
    import tvm
    from cuda.bindings import nvjitlink
    from tvm.support import nvcc

    preamble, *kernels = re.split(r'(?=^extern "C" __global__)', without_type_traits(source), flags=re.MULTILINE)
    # Helpers of fp16 arithmetic, which every program gets: without `static` the linker would meet each many times.
    preamble = re.sub(r"^(?=(__host__ )?__device__ )", "static ", preamble, flags=re.MULTILINE)
    version = nvcc.get_target_compute_version(tvm.target.Target.current(allow_none=True))
    arch = f"sm_{version.replace('.', '')}"
    workers = min(len(kernels), len(os.sched_getaffinity(0)))
    kernels.sort(key=len)
    programs = [preamble + "".join(kernels[i::workers]) for i in range(workers)]
    compile_program = functools.partial(nvcc.compile_cuda, target_format="cubin", arch=arch, options=["-rdc=true"])
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        cubins = list(pool.map(compile_program, programs))
    linker = nvjitlink.create(1, [f"-arch={arch}"])
    for cubin in cubins:
        nvjitlink.add_data(linker, nvjitlink.InputType.CUBIN, bytes(cubin), len(cubin), "kernels")
    nvjitlink.complete(linker)
    linked = bytearray(nvjitlink.get_linked_cubin_size(linker))
    nvjitlink.get_linked_cubin(linker, linked)
    nvjitlink.destroy(linker)
    return linked


def compile_candidate(source):
    """The same for one kernel in one process: a tuner has a core for each candidate, not for each kernel of a model."""
    from tvm.support import nvcc

    return nvcc.compile_cuda(without_type_traits(source), target_format="cubin")


def without_type_traits(source):
    """-> the same CUDA C++ without <cuda/std/type_traits>, which TVM always includes, where nothing in it is used.

    NVRTC takes about a second for that header, more than for most kernels.
    """
    pattern = r"^ *#include <cuda/std/type_traits>\n *namespace std {.*?^ *}\n"
    without = re.sub(pattern, "", source, flags=re.MULTILINE | re.DOTALL)
    return source if re.search(r"(?<!cuda::)\bstd::", without) else without


def call_nvrtc(compile_program, program, _, options):
    """NVRTC's compile call without the --use_fast_math that TVM always adds, which is not fp32 arithmetic.

    By it a power is 2^(y log2 x), NaN for every negative x (GPT-2's x**3, Llama's x**2), and a tanh has 11 bits. And
    without warnings, which are of NVIDIA's own headers and would stand in front of the error in a row's one line. What
    TVM writes for infinity in bf16 is defined: no header has it.
    """
    options = [option for option in options if option != b"--use_fast_math"]
    options += [b"--disable-warnings", b"-Dinff=__int_as_float(0x7f800000)"]
    return compile_program(program, len(options), options)


def import_inductor(precision):
    importlib.import_module("torch._inductor.compile_fx")


# name -> (function, what imports its compiler: importing Python modules is not compiling, and is not timed)
TEST_ITEMS = {
    "torch": (eager, None),
    "torch_compile": (functools.partial(inductor, None), import_inductor),
    "torch_compile_reduce_overhead": (functools.partial(inductor, "reduce-overhead"), import_inductor),
    "torch_compile_max_autotune": (functools.partial(inductor, "max-autotune"), import_inductor),
    "tvm": (tvm_default, import_tvm),
    "tvm_tune": (tvm_tuned, import_tvm_for_tuning),
}


# ---- Tuning ---------------------------------------------------------------------------------------------------------
# What tvm_tune needs before its turn, as far as it is not the search itself, which is in tuning.py.


def tuning_path(case):
    """-> where the case's tuning database is, without the ends of its files' names."""
    name = ".".join((case.model_name, describe_shapes(case), case.precision))
    device, name = (re.sub(r"[^\w.=-]+", "_", text).strip("_") for text in (case.device_name, name))
    return case.tuning_dir / device / name


def tuning_origin(case):
    """-> what a database must have been made on to be good for the case."""
    return f"{case.device_name}, TVM {version('apache-tvm')}"


def plan_tuning(case, args):
    """-> (trials for each kernel, seconds) to tune the case with, None where its database needs nothing more.

    Without --tune-trials and --tune-minutes any database will do.
    """
    path = tuning_path(case)
    try:
        database = tuning.read_database(path, tuning_origin(case))
        tuning.read_journal(path, tuning_origin(case))
    except tuning.DatabaseError as error:
        raise UserError(str(error)) from None
    databases = case.tuning_dir.glob(f"*/{tuning.database_path(path).name}")
    if of_others := sorted({file.parent.name for file in databases} - {path.parent.name}):
        there = ", ".join(of_others)
        warn(f"tuning databases of other devices are not used here: {there}; this is {case.device_name}")
    asked_trials = args.tune_trials or TUNE_TRIALS
    if database and (database["asked_trials"] >= asked_trials or not (args.tune_trials or args.tune_minutes)):
        return None
    return asked_trials, 60 * (args.tune_minutes or TUNE_MINUTES)


def tune_case(case, asked_trials, limit_s, turn):
    """Search for the case's best schedules and write its database, in a process that computes nothing itself."""
    turn.report("importing")
    # TVM's import asks PyTorch whether there is a GPU. By NVML, then: by CUDA, no fork of this process could use one.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import_tvm_for_tuning(case.precision)
    importlib.import_module("xgboost")
    import tvm_ffi

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_candidate, override=True)
    turn.report("looking for kernels")
    target = tuning.call(MAKE_TASKS_TIMEOUT_S, tuning.find_target, case.device)
    tasks = tuning.call(MAKE_TASKS_TIMEOUT_S, make_tasks, case, target)
    cores = len(os.sched_getaffinity(0))
    tuning.tune(
        tasks,
        target,
        case.device,
        tuning_path(case),
        tuning_origin(case),
        PRECISIONS[case.precision][2],
        asked_trials,
        limit_s,
        cores if case.device == "cpu" else max(1, cores - 1),  # one launches what the GPU measures
        tempfile.gettempdir(),
        turn.report,
    )


def make_tasks(case, target):
    """-> the kernels of the case's model that can be tuned, as tuning.Tasks."""
    import tvm

    with arithmetic(case.precision) as dtype, torch.no_grad():
        model, inputs = load_on_device(dataclasses.replace(case, device="cpu"), dtype)
        exported = export_for_tvm(model, inputs)
    target = tvm.target.Target(json.loads(target))
    return tuning.extract_tasks(tuned_module(exported, target)[0], target)


def tuning_columns(case):
    """-> the row's columns on what all the tuning behind the case's database took."""
    database = tuning.read_database(tuning_path(case), tuning_origin(case))
    return {name: database[name] for name in ("tune_time_s", "tune_trials")}


# ---- Check ----------------------------------------------------------------------------------------------------------


def output_arrays(outputs):
    """-> the floating-point tensors of a model's outputs, in order, as fp32 arrays of their own on the host."""
    if outputs is None:
        return []
    if hasattr(outputs, "__dlpack__"):
        tensor = torch.from_dlpack(outputs)
        return [tensor.detach().float().cpu().numpy().copy()] if tensor.is_floating_point() else []
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return [array for part in parts for array in output_arrays(part)]


def relative_error(outputs, reference):
    """-> the largest ||out - ref|| / ||ref|| over pairs of arrays, in float64; inf where a shape or a value is off.

    Raises ValueError where a reference says nothing: none at all, not finite, or all zero.
    """
    if not reference:
        raise ValueError("the reference has no floating-point output")
    if [array.shape for array in outputs] != [array.shape for array in reference]:
        return math.inf
    errors = []
    for out, ref in zip(outputs, reference):
        norm = np.linalg.norm(ref.astype(np.float64))
        if not (np.isfinite(norm) and norm > 0):
            raise ValueError("the reference is not finite" if norm != 0 else "the reference is all zero")
        error = np.linalg.norm(out.astype(np.float64) - ref) / norm
        errors.append(error if np.isfinite(error) else math.inf)
    return float(max(errors))


# ---- Timing ---------------------------------------------------------------------------------------------------------


def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize()


def warm_up(run, device):
    """Run until two windows of WARMUP_WINDOW_S in a row agree -> seconds per run in the last one."""
    began = time.perf_counter()
    previous, per_run, count = math.inf, math.inf, 1
    while True:
        start = time.perf_counter()
        for _ in range(count):
            run()
        synchronize(device)
        now = time.perf_counter()
        previous, per_run = per_run, (now - start) / count
        if abs(per_run - previous) <= WARMUP_AGREEMENT * per_run or now - began > WARMUP_LIMIT_S:
            return per_run
        # Windows only grow: a window that a stall ended early must not shorten the next ones.
        count = max(count, math.ceil(WARMUP_WINDOW_S / per_run))


def choose_iterations(per_run_s):
    """-> timed runs for an inference of `per_run_s` seconds."""
    least = MIN_SLOW_ITERATIONS if per_run_s > SLOW_RUN_S else MIN_ITERATIONS
    return min(max(least, round(TIMING_BUDGET_S / per_run_s)), MAX_ITERATIONS)


def time_runs(run, iterations, device):
    """Call `run` `iterations` times -> (milliseconds of each call, the last outputs).

    CUDA: one event before and one after each call on the current stream, no host synchronisation in between.
    CPU: time.perf_counter.
    """
    if device == "cpu":
        times_ms = []
        for _ in range(iterations):
            start = time.perf_counter()
            outputs = run()
            times_ms.append((time.perf_counter() - start) * 1e3)
    else:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iterations)]
        for start, end in pairs:  # the first record() creates the event: that must not fall into the loop
            start.record()
            end.record()
        torch.cuda.synchronize()
        for start, end in pairs:
            start.record()
            outputs = run()
            end.record()
        torch.cuda.synchronize()
        times_ms = [start.elapsed_time(end) for start, end in pairs]
    return np.array(times_ms), outputs


def statistics(times_ms, batch_size):
    """-> the CSV's timing columns (and the maximum) for an array of milliseconds per inference."""
    return {
        "infer_time_mean_ms": times_ms.mean(),
        "infer_time_median_ms": np.median(times_ms),
        "infer_time_std_ms": times_ms.std(ddof=1) if len(times_ms) > 1 else 0.0,
        "infer_time_min_ms": times_ms.min(),
        "infer_time_max_ms": times_ms.max(),
        "infer_time_p90_ms": np.percentile(times_ms, 90),
        "infer_time_p99_ms": np.percentile(times_ms, 99),
        "iterations": len(times_ms),
        "throughput_samples_per_s": batch_size * 1e3 / times_ms.mean(),
    }


# ---- The device: what it is, and whether it kept still --------------------------------------------------------------


def describe_device(choice, turn):
    """-> the CSV's columns on the device, plus `device` ("cpu" or "cuda:N"); UserError where there is no such device.

    Runs in a process of its own: asking CUDA anything in the parent would keep its forked children from using it.
    """
    turn.report("looking for the device")
    count = torch.cuda.device_count()
    if choice == "cpu" or (choice == "auto" and count == 0):
        return {"device": "cpu", "device_name": f"{cpu_name()}, {torch.get_num_threads()} threads"}
    kind, _, index = choice.partition(":")
    if choice != "auto" and (kind != "cuda" or not (index.isdecimal() or choice == "cuda")):
        raise UserError(f"--device takes auto, cuda, cuda:N or cpu, not {choice!r}")
    if count == 0:
        raise UserError(
            f"--device {choice}: no CUDA device is visible to PyTorch {torch.__version__}; use --device cpu"
        )
    if int(index or 0) >= count:
        raise UserError(f"--device {choice}: there are {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    device = f"cuda:{int(index or 0)}"
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name(device),
        "cuda_version": torch.version.cuda,
        "driver_version": Gpu(device).driver_version(),
    }


def cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine


class Gpu:
    """NVML's view of one CUDA device; what the driver or the device does not offer reads as None."""

    LIMITS = {
        pynvml.nvmlClocksEventReasonSwPowerCap: "power cap",
        pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
        pynvml.nvmlClocksEventReasonSwThermalSlowdown: "temperature",
        pynvml.nvmlClocksEventReasonHwThermalSlowdown: "temperature",
        pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
    }

    def __init__(self, device):
        self.handle = None
        if device != "cpu":
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                uuid = torch.cuda.get_device_properties(device).uuid  # CUDA_VISIBLE_DEVICES renumbers, UUIDs stay
                self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def ask(self, function, *args):
        with contextlib.suppress(pynvml.NVMLError):
            return function(self.handle, *args) if self.handle else None

    def driver_version(self):
        return pynvml.nvmlSystemGetDriverVersion() if self.handle else None

    def state(self):
        """-> dict: energy_mj (since the driver was loaded), sm_clock_mhz, limits (set of names), processes (number)."""
        reasons = self.ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
        return {
            "energy_mj": self.ask(pynvml.nvmlDeviceGetTotalEnergyConsumption),
            "sm_clock_mhz": self.ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            "limits": {text for bit, text in self.LIMITS.items() if reasons & bit},
            "processes": len(self.ask(pynvml.nvmlDeviceGetComputeRunningProcesses) or ()),
        }


def disturbances(times_ms, before, after):
    """-> what says that the machine did not keep still while `times_ms` was measured, as a list of short texts.

    `before` and `after` are Gpu.state() at both ends. An outlier lies further from the median than 10 standard
    deviations, taken as 1.4826 x the median absolute deviation (that of a normal distribution), plus 5 % of the median.
    """
    found = []
    median = np.median(times_ms)
    deviations = np.abs(times_ms - median)
    outliers = np.mean(deviations > 10 * 1.4826 * np.median(deviations) + 0.05 * median)
    if outliers > OUTLIER_SHARE:
        found.append(f"{outliers:.1%} of the runs are outliers")
    first, second = np.array_split(times_ms, 2)
    if len(second) and abs(drift := np.median(second) / np.median(first) - 1) > DRIFT:
        found.append(f"the second half is {drift:+.1%} against the first")
    if limits := before["limits"] | after["limits"]:
        found.append(f"GPU clock limited by {' and '.join(sorted(limits))}")
    if before["sm_clock_mhz"] and after["sm_clock_mhz"] < (1 - CLOCK_DROP) * before["sm_clock_mhz"]:
        found.append(f"SM clock fell from {before['sm_clock_mhz']} to {after['sm_clock_mhz']} MHz")
    if max(before["processes"], after["processes"]) > 1:
        found.append("another process was on the GPU")
    return found


def process_memory_bytes(device):
    """-> device memory in use as the CUDA driver counts it; on the CPU this process's peak resident set.

    The driver's count is the same for PyTorch's allocator and for TVM's. It is of the whole device: only a difference
    between two readings belongs to this process, and only while no other one allocates.
    """
    if device != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


# ---- One item, in a process of its own ------------------------------------------------------------------------------


@contextlib.contextmanager
def arithmetic(precision):
    """Allow or forbid TF32 everywhere while it lasts; -> the dtype of weights and floating-point inputs."""
    dtype, tf32, _ = PRECISIONS[precision]
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = tf32
        yield dtype
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


def load_on_device(case, dtype):
    """-> (model, inputs) on the case's device, with weights and inputs in `dtype`."""
    try:
        model = load_model(case)
    except Exception as error:  # a damaged checkpoint, sizes that do not fit the config, a missing optional library
        raise UserError(f"{case.model_name} cannot be loaded: {one_line(error)}") from error
    inputs = make_inputs(case)
    if case.device != "cpu":
        torch.cuda.set_device(case.device)
    model = model.to(case.device, dtype)
    return model, {
        name: tensor.to(case.device, dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()
    }


@torch.no_grad()
def compute_reference(case, turn):
    """-> the outputs of eager PyTorch in IEEE fp32, which every item is checked against."""
    turn.report("computing")
    with arithmetic("fp32") as dtype:
        model, inputs = load_on_device(case, dtype)
        return output_arrays(model(**inputs))


@torch.no_grad()
def run_item(name, precision, turn):
    """-> the CSV columns that one test item gives, plus timing_s, the wall seconds of warm-up and timed runs.

    It imports its compiler at once, while others compute, and begins when it is given the case and the reference.
    """
    build, import_compiler = TEST_ITEMS[name]
    if import_compiler:
        try:
            import_compiler(precision)
        except Exception as error:
            raise RuntimeError(f"{name} cannot be imported; pip install -r requirements.txt ({error})") from error
    case, reference = turn.wait()
    with arithmetic(case.precision) as dtype:
        return measure_item(build, import_compiler is not None, case, dtype, reference, turn)


def measure_item(build, compiles, case, dtype, reference, turn):
    """-> what run_item() returns. Load, compile, warm up, time, check: the order of the lines defines the columns."""
    turn.report("loading")
    gpu = Gpu(case.device)
    memory_before = 0 if case.device == "cpu" else process_memory_bytes(case.device)
    model, inputs = load_on_device(case, dtype)
    synchronize(case.device)

    turn.report("compiling" if compiles else "first run")
    start = time.perf_counter()
    run = build(model, inputs, case)
    outputs = run()
    synchronize(case.device)
    compile_time_s = time.perf_counter() - start
    first = output_arrays(outputs)
    del model, outputs  # TVM holds its own copy of the weights, and must not be charged for PyTorch's
    gc.collect()
    if case.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts anew: man 5 proc
    else:
        torch.cuda.empty_cache()  # what compiling needed is not what running needs

    turn.report("timing")
    start = time.perf_counter()
    gc.disable()  # a collection would fall into one run of many; the process ends with this item
    per_run_s = warm_up(run, case.device)
    before = gpu.state()
    times_ms, outputs = time_runs(run, case.iterations or choose_iterations(per_run_s), case.device)
    after = gpu.state()
    timing_s = time.perf_counter() - start
    peak_memory = process_memory_bytes(case.device) - memory_before

    turn.report("checking")
    # The first output and the last: a replayed CUDA graph must give what the first call gave.
    rel_error = max(relative_error(first, reference), relative_error(output_arrays(outputs), reference))
    tolerance = PRECISIONS[case.precision][2]
    energy_mj = None
    if before["energy_mj"] is not None and times_ms.sum() > ENERGY_MIN_S * 1e3:
        energy_mj = (after["energy_mj"] - before["energy_mj"]) / (len(times_ms) * case.batch_size)
    return {
        **statistics(times_ms, case.batch_size),
        "compile_time_s": compile_time_s if compiles else None,
        "peak_memory_mib": peak_memory / 2**20,
        "energy_mj_per_sample": energy_mj,
        "rel_error": rel_error,
        "status": "ok" if rel_error <= tolerance else "wrong",
        "error": "" if rel_error <= tolerance else f"rel_error {rel_error:.2e} is above {tolerance:g}",
        "warnings": "; ".join(disturbances(times_ms, before, after)),
        "timing_s": timing_s + (0 if compiles else compile_time_s),
    }


STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class ItemError(Exception):
    """Why an isolated call gave no result, in one line."""


class Isolated:
    """A function that runs in a forked process of its own; a context manager, whose end kills what is left of it.

    Forked, because the imports are paid once and every item still starts with no CUDA context, no compiled code and no
    thread of its neighbours: this process never computes. Its caches and temporary files are a directory that goes
    with it. The function gets `args` and a Turn: the process starts at once, and works when result() gives it its turn.
    """

    def __init__(self, function, *args, verbose):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they would leave a process that nobody knows
        self.scratch = tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True)
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        target_args = (function, args, theirs, self.scratch.name, verbose, os.getpid())
        self.process = context.Process(target=isolated_main, args=target_args)
        self.process.start()
        theirs.close()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        except BaseException:  # what the handler of one that came meanwhile raises
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.connection.closed:
            return  # ended already, and its process id may be another's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the compilers' worker processes too
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.scratch.cleanup()

    def wait_until_ready(self, timeout_s):
        """Return when the function waits for its turn, or has failed before, or after `timeout_s`."""
        self.connection.poll(timeout_s)

    def result(self, message=None, *, timeout_s, on_stage):
        """-> what the function returns, given its turn with `message`.

        Raises UserError where the function does, ItemError for every other end without a result.
        """
        deadline, stage = time.monotonic() + timeout_s, "starting"
        with contextlib.suppress(BrokenPipeError):  # it has died already: recv() below says so
            self.connection.send(message)
        while True:
            if not self.connection.poll(0.5):
                on_stage(stage)
                if time.monotonic() > deadline:
                    raise ItemError(f"gave no result in {timeout_s:g} s (--timeout), while {stage}")
                if self.process.is_alive() or self.connection.poll():
                    continue
            try:
                kind, value = self.connection.recv()
            except (EOFError, ConnectionResetError):
                self.process.join(5)
                raise ItemError(f"{death(self.process.exitcode)} while {stage}") from None
            if kind == "stage":
                on_stage(stage := value)
            elif kind == "result":
                return value
            else:
                raise {"user error": UserError, "error": ItemError}[kind](value)


class Turn:
    """The isolated function's end of the line."""

    def __init__(self, connection):
        self.connection = connection

    def wait(self):
        """Block until the parent gives this process its turn; -> the parent's message."""
        self.report("waiting")
        return self.connection.recv()

    def report(self, stage):
        self.connection.send(("stage", stage))


def isolated_main(function, args, connection, scratch, verbose, parent):
    os.setsid()  # a group that can be killed as a whole; Ctrl-C reaches the parent alone, which does that
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives a parent that was killed
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"):  # cold caches for everyone
        os.environ[variable] = os.path.join(scratch, variable.lower())
    if not verbose:
        log = os.open(os.path.join(scratch, "log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
    try:
        connection.send(("result", function(*args, Turn(connection))))
    except UserError as error:
        connection.send(("user error", str(error)))
    except Exception as error:
        if verbose:
            traceback.print_exc()
        connection.send(("error", one_line(error)))


def death(exit_code):
    if exit_code is None or exit_code >= 0:
        return f"the process ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"the process died of {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def one_line(error, limit=300):
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---- Row ------------------------------------------------------------------------------------------------------------


def csv_line(values):
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def check_results_file(path):
    """Raise UserError unless rows can be appended to `path`; writes nothing."""
    if path.is_dir():
        raise UserError(f"--results {path} is a directory; give the path of a CSV file")
    if not path.parent.is_dir():
        raise UserError(f"--results {path}: there is no directory {path.parent}; make it first")
    try:
        with path.open("r+b") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--results {path} is not writable: {error.strerror}") from None
    if path.exists() and path.stat().st_size:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            if file.readline().rstrip("\r\n") != ",".join(COLUMNS):
                raise UserError(f"--results {path} has another header than this version's rows; give another path")


def append_row(path, row, unless=()):
    """Append one row (and the header where the file is empty) with one write, under a lock: rows never mix.

    On the disk before it returns. The lock holds between hosts too, where the file system has locks (NFS 4 has). What a
    writer that lost its power left half written, a last line without its end, is cut off. Nothing is appended where
    the item's latest row, which another process may have written meanwhile, has one of the statuses in `unless`.
    """
    values = [f"{row[name]:.6g}" if isinstance(row.get(name), float) else row.get(name) for name in COLUMNS]
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if unless and find_statuses(path, row).get(row["test_item"]) in unless:
            return
        file.seek(0)
        _, _, last = file.read().rpartition(b"\n")
        if last and len(next(csv.reader([last.decode(errors="replace")]))) == len(COLUMNS):
            file.write(b"\n")  # a whole row: an editor saved the file without the last line's end
        elif last:
            file.truncate(file.tell() - len(last))
        header = csv_line(COLUMNS) if file.seek(0, os.SEEK_END) == 0 else ""
        file.write((header + csv_line(values)).encode())
        file.flush()
        os.fsync(file.fileno())


SAME_CASE = (
    "model_name batch_size precision device_name weights input_shape torch_version tvm_version transformers_version"
).split()


def find_statuses(path, row):
    """-> {test item: status of its latest row in `path`} over the rows of the case, device and versions of `row`."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        whole = (other for other in csv.DictReader(file) if None not in other.values())  # all but a half written line
        same = (other for other in whole if all(other[name] == str(row[name] or "") for name in SAME_CASE))
        return {other["test_item"]: other["status"] for other in same}


def describe_row(row):
    """-> the terminal's line on one row, in the manner of hyperfine."""
    name = f"{row['test_item']:<{max(map(len, TEST_ITEMS))}}"
    if row["status"] == "failed":
        return f"{name}  FAILED: {row['error']}"
    text = (
        f"{name}  {row['infer_time_mean_ms']:8.3f} ms ± {row['infer_time_std_ms']:.3f} ms"
        f"  [{row['infer_time_min_ms']:.3f} ms … {row['infer_time_max_ms']:.3f} ms]  {row['iterations']} runs"
    )
    if row["compile_time_s"] is not None:
        text += f"  compiled in {row['compile_time_s']:.1f} s"
    if row.get("tune_trials") is not None:
        text += f"  tuned in {row['tune_time_s']:.0f} s ({row['tune_trials']} trials)"
    text += f"  rel_error {row['rel_error']:.1e}"
    if row["status"] == "wrong":
        text += f"  WRONG: {row['error']}"
    if row["warnings"]:
        text += f"\n{'':<{len(name)}}  warning: {row['warnings']}"
    return text


def describe_comparison(rows):
    """-> who is how many times faster than whom; the spread is that of a ratio of two means with independent errors."""
    fastest, *others = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["infer_time_mean_ms"])
    lines = [f"{fastest['test_item']} ran"]
    for row in others:
        ratio = row["infer_time_mean_ms"] / fastest["infer_time_mean_ms"]
        spread = ratio * math.hypot(*(r["infer_time_std_ms"] / r["infer_time_mean_ms"] for r in (row, fastest)))
        lines.append(f"  {ratio:.2f} ± {spread:.2f} times faster than {row['test_item']}")
    return "\n".join(lines)


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def process_age_s():
    """-> seconds since this process was started, its imports included; man 5 proc: field 22 of stat, in clock ticks."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def warn(message):
    print(f"benchmark.py: warning: {message}", file=sys.stderr)


# ---- The whole story ------------------------------------------------------------------------------------------------


def benchmark(args):
    """-> the exit code; every row that came to an end is in the CSV, whatever happens after it."""
    check_results_file(args.results)
    config, weights_dir = find_model(args.model, args.weights)
    model_class = find_model_class(args.model, config, args.task)

    isolated = functools.partial(Isolated, verbose=args.verbose)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(args.test_items), unit="item", leave=False, disable=None))

        def result(who, process, message=None, timeout_s=args.timeout):
            def show(stage):
                bar.set_description_str(f"{who}: {stage}")

            return process.result(message, timeout_s=timeout_s, on_stage=show)

        made_weights = os.memfd_create("random weights")  # before the forks, so that every process has it
        stack.callback(os.close, made_weights)
        items = {name: stack.enter_context(isolated(run_item, name, args.precision)) for name in args.test_items}
        with isolated(describe_device, args.device) as process:
            try:
                device = result("device", process)
            except ItemError as error:
                raise UserError(f"--device {args.device}: {error}") from None
        case = Case(
            model_name=args.model,
            model_class=model_class,
            config=config,
            weights="pretrained" if weights_dir else "random",
            weights_dir=weights_dir and str(weights_dir),
            batch_size=args.batch_size,
            seq_len=args.seq_len,
            image_size=args.image_size,
            precision=args.precision,
            device=device["device"],
            device_name=device["device_name"],
            tuning_dir=args.tuning_dir,
            iterations=args.iterations,
            made_weights=f"/proc/self/fd/{made_weights}",
        )
        try:
            shapes = describe_shapes(case)
        except (AttributeError, ValueError) as error:  # a config of a kind that input_shapes() has not met
            raise UserError(f"{args.model}: its config does not say what it takes: {one_line(error)}") from None
        of_case = {
            "model_name": args.model,
            "batch_size": args.batch_size,
            "precision": args.precision,
            "weights": describe_weights(args.model, config, case.weights),
            "input_shape": shapes,
            "torch_version": torch.__version__,
            "tvm_version": version("apache-tvm"),
            "transformers_version": transformers.__version__,
            "concurrent_cases": args.concurrent_cases,
            **device,
        }
        title = f"{args.model}, batch size {args.batch_size}, {args.precision}, {of_case['weights']} weights, "
        title += f"{device['device_name']}, {model_class.__name__}: {of_case['input_shape']}"
        statuses = find_statuses(args.results, of_case) if args.skip != "nothing" else {}
        skipped = {name: statuses[name] for name in items if statuses.get(name) in SKIPPED_STATUSES[args.skip]}
        items = {name: process for name, process in items.items() if name not in skipped}
        if skipped:
            there = ", ".join(f"{name} ({status})" for name, status in skipped.items())
            tqdm.write(f"{title}\nalready in {args.results}: {there}")
        all_skipped_ok = all(status == "ok" for status in skipped.values())
        if not items:
            return 0 if all_skipped_ok else 1
        tuning_options = plan_tuning(case, args) if "tvm_tune" in items else None
        reference, reference_error = None, None
        with isolated(compute_reference, case) as process:
            try:
                reference = result("reference", process)
            except ItemError as error:
                reference_error = f"no reference to check against: {error}"
        if not skipped:
            tqdm.write(title)
        for process in items.values():  # nothing is timed while another item still imports its compiler
            process.wait_until_ready(args.timeout)
        rows = []
        for name, process in items.items():
            try:
                if reference_error:
                    raise ItemError(reference_error)
                if name == "tvm_tune" and tuning_options:
                    with isolated(tune_case, case, *tuning_options) as tuner:
                        _, limit_s = tuning_options
                        result(name, tuner, timeout_s=limit_s + args.timeout)
                with process:
                    columns = result(name, process, (case, reference))
                if name == "tvm_tune":
                    columns |= tuning_columns(case)
            except ItemError as error:
                columns = {"status": "failed", "error": str(error)}
            row = {
                "test_item": name,
                "timestamp_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                **of_case,
                **columns,
            }
            append_row(args.results, row, unless=SKIPPED_STATUSES[args.skip])
            rows.append(row)
            tqdm.write(describe_row(row))
            bar.update()

    if sum(row["status"] == "ok" for row in rows) > 1:
        print(describe_comparison(rows))
    compiling_s = sum(row.get("compile_time_s") or 0 for row in rows)
    timing_s = sum(row.get("timing_s") or 0 for row in rows)
    total_s = process_age_s()
    print(
        f"{total_s:.1f} s: {compiling_s:.1f} s compiling, {timing_s:.1f} s timing, "
        f"{total_s - compiling_s - timing_s:.1f} s for all else; rows in {args.results}"
    )
    if any(row["status"] == "failed" for row in rows) and not args.verbose:
        print("--verbose shows the whole traceback of what failed")
    return 0 if all_skipped_ok and all(row["status"] == "ok" for row in rows) else 1


def stop(number, _):
    """End as an exception does, so that `with` kills the children, and let no second signal interrupt that."""
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def main(argv=None):
    sys.stdout.reconfigure(line_buffering=True)  # a log shows each row as it ends
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    tqdm.monitor_interval = 0  # no thread in the process that forks
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    try:
        return benchmark(parse_args(argv))
    except UserError as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark.py: interrupted; the rows of the items that had ended are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
