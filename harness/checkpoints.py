"""The checkpoint: which files hold a model's weights, whether they are the model's, and whether it fits the machine.

Weights are read from safetensors alone, by the library of that name. transformers is given tensors, never a directory:
what else lies in that (pickles, adapters, code) is not looked at.
"""

import contextlib
import itertools
import os
import re
from pathlib import Path

import safetensors
import torch
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from harness import processes
from harness.device import host_memory_bytes
from harness.errors import UserError, one_line, warn
from harness.untrusted import limited_memory, read_json, without_hub

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_BYTES = 2**26
MAX_PARAMETERS = 100_000  # tensors; the largest models of transformers have some 50,000
MAX_MODULE_BYTES = 2**33  # of Python objects, for a model without its weights
CHECK_TIMEOUT_S = 120
# Parameters that stand for what is masked in training; no forward pass without a mask uses them.
TRAINING_ONLY = re.compile(r"(^|\.)(masked_spec_embed|mask_token)$")
RANDOM_HEAD = "pretrained, random head"


def find_safetensors(directory):
    """Returns the paths of a directory's safetensors files, none where it has no checkpoint in that format.

    Raises UserError for an index that names anything but safetensors files of this directory. A file may be a link: the
    hub's cache consists of them, and whatever it leads to is read as safetensors.
    """
    single, index = Path(directory, SINGLE_FILE), Path(directory, INDEX)
    if os.path.isfile(single):
        return [single]
    if not os.path.lexists(index):
        return []
    content = read_json(index, MAX_INDEX_BYTES)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r:.80}, which is not a safetensors file of its directory")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not os.path.isfile(Path(directory, name)):
            raise UserError(f"{index} names {name!r:.80}, which is missing")
    return [Path(directory, name) for name in names]


@contextlib.contextmanager
def open_checkpoint(directory):
    """Gives {name: slice of safetensors, read when it is indexed} of all weights in a directory's checkpoint."""
    with contextlib.ExitStack() as stack:
        weights = {}
        for path in find_safetensors(directory):
            file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
            weights |= {name: file.get_slice(name) for name in file.offset_keys()}
        yield weights


def check_model(name, model_class, config, weights_dir):
    """Returns what the case's weights are: "pretrained", "pretrained, random head" or "random".

    Raises UserError where the config makes no model, where that does not fit the machine, and where the checkpoint in
    `weights_dir` (None: random weights) is not the model's. Nothing as large as the weights is made for that.
    """
    try:
        with processes.Worker(isolated=True) as worker:
            weights = worker.call(examine, model_class, config, weights_dir, timeout_s=CHECK_TIMEOUT_S)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except processes.WorkerError as error:
        raise UserError(f"{name} cannot be loaded: {error}") from None
    if weights == RANDOM_HEAD:
        warn(f"{name}: the checkpoint has no weights for the head of {model_class.__name__}; those are random")
    return weights


def examine(model_class, config, weights_dir):
    """Does the work of check_model() in a process of its own, which a config may exhaust."""
    torch.set_num_threads(1)  # threads that the forking process may have used are not here
    try:
        with without_hub(), limited_memory(MAX_MODULE_BYTES):
            check_size(model_class, config)
            if weights_dir is None:
                return "random"
            if getattr(config, "quantization_config", None):
                return "pretrained"  # only a library of its own knows what belongs to it: load_pretrained() will see
            return RANDOM_HEAD if lacks_head(*load_names(model_class, config, weights_dir)) else "pretrained"
    except UserError:
        raise
    except Exception as error:  # a damaged checkpoint, fields that do not fit one another, a missing library
        raise UserError(f"it cannot be loaded: {one_line(error)}") from None


def check_size(model_class, config):
    """Raises UserError where the model's weights do not fit the machine in fp32; builds it without memory for them."""
    register, counter = torch.nn.Module.register_parameter, itertools.count(1)

    def count(module, name, parameter):
        if next(counter) > MAX_PARAMETERS:
            raise UserError(f"its config makes a model of more than {MAX_PARAMETERS:,} tensors")
        register(module, name, parameter)

    torch.nn.Module.register_parameter = count
    try:
        with torch.device("meta"), no_init_weights():
            model = model_class(config)
    finally:
        torch.nn.Module.register_parameter = register
    tied = getattr(model, "all_tied_weights_keys", {})  # without memory they are not the same tensor
    numbers = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in tied)
    needed, there = 4 * numbers, host_memory_bytes()
    if needed > there:
        sizes = f"{needed / 2**30:,.1f} GiB of memory in fp32, and this machine has {there / 2**30:,.1f} GiB"
        raise UserError(f"its weights need {sizes}")


def load_pretrained(model_class, config, weights_dir):
    """Returns the model in fp32 with the weights of a checkpoint. Raises UserError where that is not the model's."""
    with open_checkpoint(weights_dir) as weights:
        model, loading_info = load_state(model_class, config, weights)
    lacks_head(model, loading_info)
    return model


def load_names(model_class, config, weights_dir):
    """Returns a model into which a checkpoint's names, but none of its numbers, were loaded, and the loading info."""
    with open_checkpoint(weights_dir) as weights:
        state = {}
        for name, piece in weights.items():
            dtype = torch.float32 if piece.get_dtype().startswith(("F", "BF")) else torch.int64
            state[name] = torch.zeros((), dtype=dtype).expand(piece.get_shape())  # one number, whatever the shape
    with no_init_weights():
        return load_state(model_class, config, state, ignore_mismatched_sizes=True)


def load_state(model_class, config, state, **options):
    """Returns the model with the weights in `state`, and what transformers says of the names: its loading info."""
    return model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True, **options
    )


def lacks_head(model, loading_info):
    """Returns whether the checkpoint lacks the model's head alone. Raises UserError where it is not the model's.

    Not the model's is one that lacks weights of the base model, has them in another shape, or has more of them than the
    model: further layers, say. A pooler counts as a head: checkpoints of masked language models have none, and
    transformers draws it at random. Heads of the checkpoint's own are left out, as transformers does.
    """
    tensors, buffers = model.state_dict(), dict(model.named_buffers())
    prefix = f"{model.base_model_prefix}."

    def part(name):
        return name.removeprefix(prefix).partition(".")[0]

    base_parts = set(map(part, find_base_model(model).state_dict())) - {"pooler"}
    places = base_parts & set(map(part, tensors))  # an encoder alone has none for a decoder

    def is_computed(name):  # older versions of transformers saved it all the same
        return bool({name, prefix + name, name.removeprefix(prefix)} & buffers.keys())

    def is_used(name):
        return tensors[name].is_floating_point() and not TRAINING_ONLY.search(name)

    missing = sorted(filter(is_used, loading_info["missing_keys"]))
    unexpected = sorted(loading_info["unexpected_keys"])
    faults = {
        "are missing": [name for name in missing if part(name) in base_parts],
        "have no place in the model": [name for name in unexpected if part(name) in places and not is_computed(name)],
        "have another shape": sorted(name for name, *_ in loading_info["mismatched_keys"]),
    }
    if any(faults.values()):
        found = ", ".join(f"{len(names)} {fault} ({names[0]}, …)" for fault, names in faults.items() if names)
        raise UserError(f"its checkpoint is not of this model: of the weights {found}; --weights random does without")
    return bool(missing)


def find_base_model(model):
    """Returns what of a model is not its head: a part of it, or where it has no such part its family's plain model.

    That one is without numbers. Where there is none either, all of the model is.
    """
    base = getattr(model, model.base_model_prefix, None)
    if isinstance(base, torch.nn.Module):
        return base
    base_class = modeling_auto.MODEL_MAPPING.get(type(model.config), type(model))
    base_class = base_class[0] if isinstance(base_class, (list, tuple)) else base_class
    if isinstance(model, base_class):
        return model
    with torch.device("meta"), no_init_weights():
        return base_class(model.config)
