"""From arguments to cases, and the columns that all rows of a case share."""

import hashlib
import importlib.metadata
import itertools
import os
import typing
from pathlib import Path

import torch
import transformers

from harness.architectures import describe_weights, layer_count
from harness.case import Case
from harness.checkpoints import check_model
from harness.decode import check_decodes
from harness.inputs import describe_shapes
from harness.models import find_model, find_model_class
from harness.version import harness_version

# Of a config: where it was read, what wrote it, and how an output is wrapped change nothing that is timed.
NOT_HASHED = ("_name_or_path", "transformers_version", "return_dict", "use_cache")


class Model(typing.NamedTuple):
    """A model as it was found: find_model(), find_model_class() and check_model() say more."""

    name: str
    model_class: type
    config: transformers.PretrainedConfig
    weights_dir: Path | None
    weights: str


def find_models(names, weights, task, layers=None):
    """Returns a Model for each name. Raises UserError for the first that cannot be had."""
    models = []
    for name in names:
        config, weights_dir = find_model(name, weights, layers)
        name = os.path.realpath(name) if os.path.isdir(name) else name  # two directories of one name are two models
        model_class = find_model_class(name, config, task)
        checked = check_model(name, model_class, config, weights_dir)
        models.append(Model(name, model_class, config, weights_dir, checked))
    return models


def make_cases(models, args, device, tuning_dirs, stack):
    """Returns a Case for each of the models, batch sizes and precisions that the command line names, in this order.

    device: describe_device()'s columns. stack: closes the files in memory that hold random weights, one for a model.
    Raises UserError for a model that cannot decode where the command line asks for that.
    """
    cases = []
    for model in models:
        made_weights = os.memfd_create("random weights")
        stack.callback(os.close, made_weights)
        for batch_size, precision in itertools.product(args.batch_size, args.precision):
            case = Case(
                model_name=model.name,
                model_class=model.model_class,
                config=model.config,
                weights=model.weights,
                weights_dir=model.weights_dir and str(model.weights_dir),
                batch_size=batch_size,
                seq_len=args.seq_len,
                image_size=args.image_size,
                precision=precision,
                device=device["device"],
                device_name=device["device_name"],
                tuning_dirs=tuning_dirs,
                iterations=args.iterations,
                made_weights=f"/proc/{os.getpid()}/fd/{made_weights}",
                phase=args.phase,
                context_len=args.context_len if args.phase == "decode" else None,
            )
            if case.phase == "decode":
                check_decodes(case)
            cases.append(case)
    return cases


def describe_case(case):
    """Returns the CSV's columns that all rows of the case share, but for those on the device.

    Raises UserError where the config does not say what the model takes.
    """
    return {
        "model_name": case.model_name,
        "model_class": case.model_class.__name__,
        "config_hash": config_hash(case.config),
        "batch_size": case.batch_size,
        "precision": case.precision,
        "weights": describe_weights(case.model_name, case.config, case.weights),
        "input_shape": describe_shapes(case),
        "phase": case.phase,
        "context_len": case.context_len,
        "layers": layer_count(case.config),
        "torch_version": torch.__version__,
        "tvm_version": version("apache-tvm"),
        "transformers_version": transformers.__version__,
        "harness_version": harness_version(),
    }


def config_hash(config):
    """Returns eight hexadecimal digits that stand for all that a transformers config says of the model."""
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_HASHED}
    return hashlib.sha256(repr(sort_fields(fields)).encode(errors="surrogatepass")).hexdigest()[:8]


def sort_fields(value):
    """Returns a JSON value with each dict as a sorted list of its items: equal values then have equal texts."""
    if isinstance(value, dict):
        return sorted(((str(name), sort_fields(part)) for name, part in value.items()), key=lambda item: item[0])
    if isinstance(value, (list, tuple)):
        return [sort_fields(part) for part in value]
    return str(value)


def version(package):
    """Returns the version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
