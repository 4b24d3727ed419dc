"""What a model says of its inputs: the parameters of its forward(), what transformers documents of them, its config."""

import inspect
import re

from transformers import PretrainedConfig

PART_CONFIGS = """
vision_config image_config audio_config encoder_config backbone_config semantic_model_config model_config decoder_config
""".split()


def forward_parameters(case):
    """Returns {name: inspect.Parameter} of the named arguments of the model's forward()."""
    parameters = inspect.signature(case.model_class.forward).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name not in ("self", "args", "kwargs") and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }


def main_inputs(case):
    """Returns the names of the model's main inputs: OneFormer's kind has two; a tower may inherit another's."""
    main, parameters = case.model_class.main_input_name, forward_parameters(case)
    return [name for name in (main if isinstance(main, list) else [main]) if name in parameters]


def find_field(config, *names, default=None):
    """Returns the first of the fields `names` that a config, or one of the configs that it consists of, gives a value.

    The config's own come first, then those of PART_CONFIGS, depth first.
    """
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            return value
    for part in PART_CONFIGS:
        inner = getattr(config, part, None)
        if isinstance(inner, PretrainedConfig) and (value := find_field(inner, *names)) is not None:
            return value
    return default


def documented_shape(case, name):
    """Returns the names of an input's dimensions as the docstring of forward() has them, [] where it says nothing."""
    documented = re.search(rf"^\s*{name} \(`?torch\.\w+`? of shape `?\((.*?)\)`?", forward_doc(case), re.MULTILINE)
    return documented[1].split(", ") if documented else []


def forward_doc(case):
    return case.model_class.forward.__doc__ or ""


def family_source(case):
    """Returns the source text of the module that the model's class stands in."""
    return inspect.getsource(inspect.getmodule(case.model_class))


def find_config(config, *names):
    """Returns the first of a config's configs `names` that it has, or the config itself."""
    return next((part for name in names if (part := getattr(config, name, None)) is not None), config)
