"""A case's model with its weights: loaded from safetensors, or random ones that keep the signal's size."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import statistics
import unittest.mock

import torch
from transformers import PretrainedConfig

from harness.case import SEED
from harness.check import output_arrays, relative_error
from harness.checkpoints import load_pretrained, load_state
from harness.decode import DecodeStep, make_step_inputs
from harness.errors import UserError, one_line
from harness.inputs import change_inputs, make_inputs
from harness.untrusted import without_hub

# Random weights by which a small relative change of the inputs grows more than this are not what training gives.
MAX_CHANGE_GROWTH = 4
# Of an output of few numbers, one draw of the noise says little: it may leave SigLIP's one logit almost as it was.
FEW_NUMBERS, DRAWS = 4, 4


def load_on_device(case, dtype, with_values=True):
    """Returns the case's model and inputs on its device, with weights and floating-point inputs in `dtype`.

    Of a case that decodes, the DecodeStep and its inputs. with_values: whether what weights and cache hold matters.
    """
    try:
        with without_hub():
            model = load_model(case, with_values)
    except Exception as error:  # a damaged checkpoint, sizes that do not fit the config, a missing optional library
        raise UserError(f"{case.model_name} cannot be loaded: {one_line(error)}") from error
    if case.phase == "decode":
        select_device(case)
        move(model, case.device, dtype)
        return DecodeStep(model), make_step_inputs(model, case, with_values)
    inputs = inputs_on_device(case, dtype)
    return move(model, case.device, dtype), inputs


def move(model, device, dtype):
    """Returns the model on a device and in a dtype, but for the frequencies of rotary positions, which stay in fp32.

    Transformers loads models so: in bf16 a frequency is off by up to 0.4 %, and the angle of the thousandth token by
    four radians.
    """
    frequencies = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model.to(device, dtype)
    for name, buffer in frequencies.items():
        module, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module), own_name, buffer.to(device))
    return model


def select_device(case):
    """Makes the case's device PyTorch's current one."""
    if case.device != "cpu":
        torch.cuda.set_device(case.device)


def inputs_on_device(case, dtype):
    """Returns {name: tensor}, the case's inputs, on its device, which becomes PyTorch's current one."""
    if case.phase == "decode":  # only the model can fill the cache
        return load_on_device(case, dtype)[1]
    select_device(case)
    inputs = make_inputs(case)
    return {
        name: tensor.to(case.device, dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()
    }


def turn_off_caches(config):
    """Makes a config, and those in it, ask for named outputs without the keys and values for the next token."""
    config.return_dict, config.use_cache = True, False
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            turn_off_caches(part)


def load_model(case, with_values=True):
    """Returns the case's model: fp32, on the CPU, in evaluation mode, without gradients.

    with_values: as in load_on_device().
    """
    turn_off_caches(case.config)
    torch.manual_seed(SEED)  # a head that a checkpoint may lack
    if case.weights_dir:
        model = load_pretrained(case.model_class, case.config, case.weights_dir)
    elif case.made_weights and os.path.getsize(case.made_weights):
        made = torch.load(case.made_weights, mmap=True, weights_only=True)
        if case.device == "cpu" and with_values:  # nothing is computed on pages of a mapped file
            made = {name: tensor.clone() for name, tensor in made.items()}
        model, _ = load_state(case.model_class, case.config, made)
    else:
        model = make_random_model(case)
        if case.made_weights:
            torch.serialization.set_crc32_options(False)  # most of the time of writing gigabytes
            torch.save(model.state_dict(), case.made_weights)
    return model.eval().requires_grad_(False)


def make_random_model(case):
    """Returns the case's model with seeded random weights that keep the signal's size and small changes small.

    Some layers are small for a reason: T5 has small queries instead of a 1/sqrt(d), and with larger ones its softmax
    makes small changes 200 times larger. So outputs of every size up to 1 are left alone in a second try. Then comes
    another seed: with the first, SigLIP's one logit is a sum that cancels out, and shows rounding errors tenfold.
    """
    case_of_one = dataclasses.replace(case, batch_size=1)
    inputs, others = make_inputs(case_of_one), make_inputs(case_of_one)
    change_inputs(others, case_of_one)
    for seed, smallest_std in itertools.product((SEED, SEED + 1), (1, 1 / 16)):
        torch.manual_seed(seed)
        with zeros_before_initialisation():
            model = case.model_class(case.config).float().eval().requires_grad_(False)
        if keep_signal_size(model, inputs, others, smallest_std) <= MAX_CHANGE_GROWTH:
            break
    return model.train()  # drops what LeViT keeps from a run in evaluation mode: its biases in that run's dtype


@contextlib.contextmanager
def zeros_before_initialisation():
    """Makes PyTorch's large layers begin with zeros while it lasts.

    The random numbers of their own take as long as those that transformers puts in their place. Where it puts none,
    keep_signal_size() does.
    """

    def reset_parameters(module):
        for parameter in module.parameters(recurse=False):
            torch.nn.init.zeros_(parameter)

    with contextlib.ExitStack() as stack:
        for layer in (torch.nn.Linear, torch.nn.Embedding):
            stack.enter_context(unittest.mock.patch.object(layer, "reset_parameters", reset_parameters))
        yield


@torch.no_grad()
def keep_signal_size(model, inputs, others, smallest_std):
    """Rescales random weights in place so that every layer's output on `inputs` has standard deviation 1.

    Or one between `smallest_std` and 1, which is left alone. Returns the growth_of_a_change() that is left, on `inputs`
    and on others.

    The libraries' own initialisations shrink or blow up the signal over many layers, or switch whole blocks off
    (ConvNeXt multiplies each block by 1e-6), and then rel_error sees nothing. This is layer-sequential unit variance
    (Mishkin and Matas, arXiv:1511.06422) in one forward pass.

    BatchNorm gets statistics of what it is fed, as training would give it: without, the channels' means can drown what
    comes from the input. But taking the whole mean away makes some networks blow up rounding errors layer by layer
    (Yang et al., arXiv:1902.08129), more than trained ones do: as much of it goes as leaves small changes small.
    """
    add_noise_to_constants(model)
    layers = [module for module in model.modules() if has_matrix(module)]
    norms = [module for module in model.modules() if has_running_statistics(module)]
    for share_of_mean in (1, 1 / 8, 0) if norms else (1,):
        rescale = functools.partial(rescale_layer, smallest_std)
        hooks = [layer.register_forward_hook(rescale) for layer in layers]
        hooks += [norm.register_forward_pre_hook(functools.partial(take_statistics, share_of_mean)) for norm in norms]
        model(**inputs)
        for hook in hooks:
            hook.remove()
        growth = growth_of_a_change(model, inputs, others)
        if growth <= MAX_CHANGE_GROWTH:
            break
    return growth


def add_noise_to_constants(model):
    """Adds noise to parameters that start as a constant (biases, norm and layer scales): else they may do nothing."""
    for parameter in model.parameters():
        if not parameter.numel():  # DINOv3's register tokens where it has none
            continue
        constant = parameter.flatten()[0].item()
        if constant == 0 and not parameter.any():
            parameter.normal_(0, 0.02)
        elif parameter.ndim == 1 and (parameter == constant).all():
            parameter.normal_(1, 0.1)


def has_matrix(module):
    """Returns whether a module multiplies by a weight: whether its output's size is its weight's."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.nn.Parameter) and weight.ndim >= 2 and not isinstance(module, torch.nn.Embedding)


def has_running_statistics(module):
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.track_running_stats


def rescale_layer(smallest_std, module, _, output):
    """Divides a layer's weights and its output by the output's standard deviation; a forward hook."""
    if not isinstance(output, torch.Tensor):  # a router of experts, say
        return output
    scale = output.std()
    if smallest_std <= scale <= 1 or not (scale > 0 and scale.isfinite()):
        return output
    module.weight.div_(scale)
    if getattr(module, "bias", None) is not None:
        module.bias.div_(scale)
    return output / scale


def take_statistics(share_of_mean, module, arguments):
    """Gives a BatchNorm the statistics of what it is fed, with a share of the channels' means; a forward pre-hook."""
    features = arguments[0].movedim(1, 0).flatten(1)  # (channels, everything else)
    if features.shape[1] > 1:
        module.running_mean.copy_(share_of_mean * features.mean(1))
        module.running_var.fill_((features - module.running_mean[:, None]).square().mean())


def growth_of_a_change(model, *several_inputs, size=1e-3):
    """Returns how many times more the output changes than what goes in, relatively, when noise multiplies that.

    several_inputs: for the model's forward; but for the first they count only where an output has few numbers, which is
    looked at with several draws of the noise, too. The worst inputs count, and the root mean square over the draws.
    size: relative standard deviation of the noise. What goes in are inputs of numbers, and the embeddings of ids.
    """
    growths = []
    for inputs in several_inputs:
        reference = output_arrays(model(**inputs))
        says_much = min((array.size for array in reference), default=0) >= FEW_NUMBERS
        outputs = [
            output_arrays(run_with_noise(model, inputs, size, draw)) for draw in range(1 if says_much else DRAWS)
        ]
        try:
            errors = [relative_error(arrays, reference) for arrays in outputs]
        except ValueError:  # an output that says nothing: the check of every item will say so
            return math.inf
        growths.append(math.sqrt(statistics.fmean(error**2 for error in errors)) / size)
        if says_much:
            break
    return max(growths)


def run_with_noise(model, inputs, size, draw):
    """Returns what the model makes of inputs and embeddings that noise of a relative size multiplies."""
    generator = torch.Generator().manual_seed(SEED + 1 + draw)  # not the noise that the inputs are made of

    def change(tensor):
        return tensor * (1 + size * torch.randn(tensor.shape, generator=generator))

    hooks = [
        module.register_forward_hook(lambda module, arguments, embedded: change(embedded))
        for module in model.modules()
        if type(module).forward is torch.nn.Embedding.forward  # others may return more
    ]
    outputs = model(
        **{name: change(tensor) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    )
    for hook in hooks:
        hook.remove()
    return outputs
