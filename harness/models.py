"""From a model's name to its config and class: a directory, the hub or its cache, or a built-in architecture.

Code from the hub is never run, pickled weights are never opened, and once the model's own files are here nothing else
is fetched, whatever they name.
"""

import contextlib
import os
import re
from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from harness.architectures import BUILTIN_ARCHITECTURES, builtin_config
from harness.checkpoints import INDEX, SINGLE_FILE, find_safetensors
from harness.errors import UserError, one_line, warn
from harness.untrusted import limited_memory, read_json, without_hub

DOWNLOADED = ["config.json", SINGLE_FILE, INDEX, "model-*-of-*.safetensors"]
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_CONFIG_BYTES = 2**24
MAX_CONFIG_MEMORY_BYTES = 2**28
RANDOM_ADVICE = "random weights (latency does not depend on their values)"


def find_model(name, weights, layers=None):
    """Returns a model's transformers config and the directory that holds its safetensors, or None for random weights.

    name: hub id, or path of a directory. weights: "auto", "pretrained" or "random". layers: of builtin_config(). Raises
    UserError with what to do.
    """
    is_offline = False
    if os.path.isdir(name):
        directory, advice = Path(name), "give a directory with model.safetensors, or use --weights random"
    elif os.path.exists(name) or name.startswith((".", "/", "~")):
        raise UserError(f"{name} is not a directory; --model takes a hub id or a directory with a config.json")
    elif weights == "random" and name in BUILTIN_ARCHITECTURES:
        return builtin_config(name, layers), None
    else:
        try:
            directory, is_offline = download(name, with_weights=weights != "random")
        except hub_errors.LocalEntryNotFoundError:
            if weights == "auto" and name in BUILTIN_ARCHITECTURES:
                warn(f"{name}: the hub cannot be reached; {RANDOM_ADVICE}")
                return builtin_config(name, layers), None
            raise UserError(
                f"{name}: the hub cannot be reached and the model is not in the cache; check the network, HF_ENDPOINT "
                f"and HF_HUB_OFFLINE, or take one of the {len(BUILTIN_ARCHITECTURES)} that are built in (see --help)"
            ) from None
        advice = "use --weights random, or convert the checkpoint to safetensors"
    if layers not in (None, "all"):
        raise UserError(f"--layers {layers} is for built-in models with random weights; {name} runs with all it has")
    config = read_config(name, directory)
    if weights == "random":
        return config, None
    if find_safetensors(directory):
        return config, directory
    if any(file for pattern in PICKLED for file in directory.glob(pattern)):
        raise UserError(f"{name} has only pickled weights, which are never opened (they can run code); {advice}")
    if weights == "auto" and is_offline:
        warn(f"{name}: the hub cannot be reached and the cache has only the config.json; {RANDOM_ADVICE}")
    elif weights == "auto" and os.path.isdir(name):
        warn(f"{name} has a config.json but no weights; {RANDOM_ADVICE}")
    else:
        raise UserError(f"{name} has no safetensors weights (pickled ones are never opened); {advice}")
    return config, None


def download(name, with_weights):
    """Returns the directory of the hub's, or the cache's, config.json and safetensors, and whether it is the cache's.

    Raises LocalEntryNotFoundError where neither has the model, UserError where the hub refuses it.
    """
    offline = hub_constants.HF_HUB_OFFLINE
    if not offline:  # one short request tells whether there is a network: the client would retry for 20 s and more
        try:
            huggingface_hub.utils.get_session().head(hub_constants.ENDPOINT, timeout=5)
        except Exception:  # of whatever HTTP library the hub client uses
            offline = True
    try:
        allowed = DOWNLOADED if with_weights else ["config.json"]
        directory = huggingface_hub.snapshot_download(name, allow_patterns=allowed, local_files_only=offline)
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
    if offline and not os.path.isfile(os.path.join(directory, "config.json")):  # another program's part of the model
        raise hub_errors.LocalEntryNotFoundError(f"no config.json of {name} in the cache")
    return Path(directory), offline


def read_config(name, directory):
    """Returns the transformers config of `directory`/config.json. Raises UserError where it is none."""
    path = directory / "config.json"
    if not os.path.isfile(path):
        raise UserError(f"{name} has no config.json; give a hub id or a directory in the transformers format")
    fields = read_json(path, MAX_CONFIG_BYTES)
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(model_type, str):
        raise UserError(f"{path} is not the config of a transformers model (JSON with a model_type)")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in fields:
            raise UserError(f"{name} needs code of its own from the hub, which is never run; take another model")
        known = f"transformers {transformers.__version__} does not know model_type {model_type!r:.80}"
        raise UserError(f"{name}: {known}; a newer one may")
    try:
        if kernels := find_hub_kernels(fields):
            raise UserError(f"{path} asks for kernels from the hub ({kernels:.80}): that is code, which is never run")
        config_class = CONFIG_MAPPING[model_type]
        with without_hub(), limited_memory(MAX_CONFIG_MEMORY_BYTES):
            return config_class.from_dict(fields)
    except UserError:
        raise
    except hub_errors.OfflineModeIsEnabled:
        what = "another model of the hub, as its backbone say"
        raise UserError(f"{path} names {what}, which is never fetched; write its config in its place") from None
    except Exception as error:  # whatever a family makes of fields that it does not expect
        raise UserError(f"{path}: {one_line(error)}") from None


def find_hub_kernels(value, names_implementation=False):
    """Returns what a part of a config names as an implementation of attention, say, and is a hub id; None if nothing.

    value: any JSON value. names_implementation: whether it stands under such a key.
    """
    if isinstance(value, str):
        return value if names_implementation and "/" in value else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found = find_hub_kernels(part, names_implementation or "_implementation" in str(key))
        if found:
            return found
    return None


# What a family is for where its config names no head: the first of these that it has.
DEFAULT_HEADS = (
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "CTC",
    "MASK_GENERATION",
)
# And then the plain model, or whatever table of the library's has the family: detection, segmentation, depth, ….
OTHER_TABLES = tuple(name for name in vars(modeling_auto) if re.fullmatch(r"MODEL_\w+_MAPPING", name))


def find_model_class(name, config, task=None):
    """Returns the class for `task`, else the first that config.architectures names, else the family's default head.

    task: the name that transformers.pipeline uses, or None. Raises UserError where there is no such class.
    """
    if task:
        from transformers.pipelines import SUPPORTED_TASKS

        if task not in SUPPORTED_TASKS:
            raise UserError(f"--task {task} is unknown; transformers knows {', '.join(SUPPORTED_TASKS)}")
        candidates = [auto._model_mapping.get(type(config), None) for auto in SUPPORTED_TASKS[task]["pt"]]
    else:
        candidates = find_named_classes(name, config.architectures)
        for mapping in (*(f"MODEL_FOR_{head}_MAPPING" for head in DEFAULT_HEADS), "MODEL_MAPPING", *OTHER_TABLES):
            with contextlib.suppress(ValueError):  # the library's table names a class that the library does not have
                model_class = getattr(modeling_auto, mapping).get(type(config), None)
                candidates.append(None if is_for_text_alone(model_class, config) else model_class)
    for model_class in candidates:
        # Some families map to several classes that share a configuration: the first is the plain one.
        model_class = model_class[0] if isinstance(model_class, (list, tuple)) else model_class
        if model_class is not None:
            try:
                _ = model_class.forward  # refused where a library that the family needs is missing
            except ImportError as error:
                raise UserError(f"{name}: {one_line(error)}") from None
            if model_class.forward is torch.nn.Module.forward:
                raise UserError(f"{name}: {model_class.__name__} has no forward(): it generates, step by step")
            return model_class
    family = type(config).__name__
    if task:
        raise UserError(f"{name}: transformers has no model class with a head for --task {task} for {family}")
    raise UserError(f"{name}: its config names no model class of transformers, and {family} has no usual one")


def is_for_text_alone(model_class, config):
    """Returns whether a class takes the config of the language model inside a model, of which `config` is the whole."""
    text = type(config.get_text_config(decoder=True))
    return text is not type(config) and getattr(model_class, "config_class", None) is text


def find_named_classes(name, architectures):
    """Returns the model classes of transformers among the names in a config's `architectures`.

    Raises UserError where one names something else in transformers.
    """
    if not isinstance(architectures, (list, tuple, type(None))) or not all(
        isinstance(architecture, str) for architecture in architectures or []
    ):
        raise UserError(f"{name}: the architectures in its config.json are not a list of names")
    found = []
    for architecture in architectures or []:
        if not re.fullmatch(r"\w+", architecture):
            continue
        try:
            model_class = getattr(transformers, architecture, None)
        except Exception as error:  # a module of the library's that needs what is not installed
            raise UserError(f"{name}: {architecture} cannot be imported: {one_line(error)}") from None
        is_model = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
        if model_class is not None and not (is_model or hasattr(model_class, "_backends")):  # of a missing library
            raise UserError(f"{name}: its config names {architecture:.80}, which is no model class of transformers")
        found.append(model_class)
    return found
