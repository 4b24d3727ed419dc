"""From a model's name to its config and class: a directory, the hub or its cache, or a built-in architecture.

The hub's own code is never run and pickled weights are never opened.
"""

import contextlib
import json
import os
from pathlib import Path

import huggingface_hub
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from harness.architectures import BUILTIN_ARCHITECTURES, builtin_config
from harness.errors import UserError, one_line, warn

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
DOWNLOADED = ["config.json", *SAFETENSORS, "model-*-of-*.safetensors"]
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_model(name, weights):
    """Returns a model's transformers config and the directory that holds its safetensors, or None for random weights.

    name: hub id, or path of a directory. weights: "auto", "pretrained" or "random". Raises UserError with what to do.
    """
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


def download(name, with_weights):
    """Returns the directory of the hub's, or the cache's, config.json and safetensors.

    Raises LocalEntryNotFoundError where neither has the model, UserError where the hub refuses it.
    """
    offline = hub_constants.HF_HUB_OFFLINE
    if (
        not offline
    ):  # one short request tells whether there is a network: the hub's client would retry for 20 s and more
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
    """Returns the transformers config of `directory`/config.json. Raises UserError where it is none."""
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
    """Returns the class for `task`, else the one that config.architectures names, else the family's first default head.

    task: the name that transformers.pipeline uses, or None. Raises UserError where there is no such class.
    """
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
                _ = model_class.forward  # refused where a library that the family needs is missing
            except ImportError as error:
                raise UserError(f"{name}: {one_line(error)}") from None
            return model_class
    family = type(config).__name__
    if task:
        raise UserError(f"{name}: transformers has no model class with a head for --task {task} for {family}")
    raise UserError(f"{name}: its config names no model class of transformers, and {family} has no usual one")
