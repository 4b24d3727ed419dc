"""Decode: one step of a language model, a new token for each sample, against a static cache of keys and values.

A step's inputs are the token ids, the position that they take, and the cache: `keys_0`, `values_0`, `keys_1`, … of
shape (batch, heads, context, head dim). The decoder of an encoder-decoder also reads `cross_keys_0`, … and
`encoder_hidden_states`, which it never changes.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from harness.case import SEED
from harness.check import output_arrays
from harness.errors import UserError
from harness.inputs import CHANGED_SEED, input_shapes, make_inputs, make_tokens, token_name
from harness.shapes import position_limit
from harness.signature import forward_parameters

CHAIN_STEPS = 8  # one after another, each with the cache that the one before left: what is checked beside the one step
TEXT = ("input_ids", "attention_mask")


# ---- Which models ---------------------------------------------------------------------------------------------------


def check_decodes(case):
    """Raises UserError unless the case's model can decode against a static cache of its context length."""
    name, decoder = case.model_name, case.config.get_text_config(decoder=True)
    takes = forward_parameters(case)
    if not {"past_key_values", "use_cache", token_name(case)} <= takes.keys():
        raise UserError(f"{name}: {case.model_class.__name__} does not decode; --phase decode is for language models")
    if not case.config.is_encoder_decoder and (others := input_shapes(case).keys() - set(TEXT)):
        raise UserError(f"{name} takes {', '.join(sorted(others))} beside its text, which --phase decode does not give")
    try:
        kinds = {type(layer) for layer in StaticCache(config=case.config, max_cache_len=1).layers}
    except Exception:  # a kind of layer that transformers has no static cache for
        kinds = {None}
    if not kinds <= {StaticLayer, StaticSlidingWindowLayer}:
        raise UserError(f"{name} keeps something else than keys and values from token to token: no --phase decode")
    limit = position_limit(case, decoder)
    if limit is not None and case.context_len > limit:
        raise UserError(f"--context-len {case.context_len}: {name} has {limit} positions")
    if case.context_len < 2:
        raise UserError("--context-len takes at least 2: a step needs a token before it")


# ---- The step -------------------------------------------------------------------------------------------------------


class StepLayer(StaticLayer):
    """A layer of transformers' static cache that does not count on: a step that is repeated writes the same place."""

    def __init__(self, keys, values, position):
        super(StaticLayer, self).__init__()
        self.keys, self.values, self.max_cache_len = keys, values, keys.shape[2]
        self.cumulative_length = position  # from which the model takes the token's position and the mask
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        self.keys.index_copy_(2, self.cumulative_length, keys)
        self.values.index_copy_(2, self.cumulative_length, values)
        return self.keys, self.values


def make_cache(config, inputs):
    """Returns transformers' cache on a step's inputs, {name: tensor}."""
    cache = Cache(layers=[StepLayer(*pair, inputs["position"]) for pair in cache_pairs(inputs)])
    crossed = cache_pairs(inputs, "cross_")
    if not config.is_encoder_decoder:
        return cache
    layers = []
    for keys, values in crossed:
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layers.append(layer)
    return EncoderDecoderCache(cache, Cache(layers=layers))


def cache_pairs(inputs, prefix=""):
    """Returns the keys and values of each layer among a step's inputs."""
    count = sum(name.startswith(f"{prefix}keys_") for name in inputs)
    return [(inputs[f"{prefix}keys_{i}"], inputs[f"{prefix}values_{i}"]) for i in range(count)]


class DecodeStep(torch.nn.Module):
    """A model's step as a function of all its inputs; it returns the logits and writes into the cache's tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return run_step(self.model, make_cache(self.model.config, inputs), inputs)

    def bind(self, inputs):
        """Returns the step as transformers documents it, with a cache that stays, and what changes from call to call.

        torch.compile takes the addresses of tensors that are marked as static for constants: only so can a CUDA graph
        write into them.
        """
        for name, tensor in inputs.items():
            if name not in ("input_ids", "decoder_input_ids"):
                torch._dynamo.mark_static_address(tensor)
        tokens = {name: tensor for name, tensor in inputs.items() if name.endswith("input_ids")}
        return BoundStep(self.model, inputs), tokens


class BoundStep(torch.nn.Module):
    """A model's step on a cache of its own."""

    def __init__(self, model, inputs):
        super().__init__()
        self.model, self.cache = model, make_cache(model.config, inputs)
        self.encoder_hidden_states = inputs.get("encoder_hidden_states")

    def forward(self, **tokens):
        return run_step(self.model, self.cache, tokens | {"encoder_hidden_states": self.encoder_hidden_states})


def run_step(model, cache, inputs):
    """Returns the logits (batch, 1, vocabulary) of one step."""
    arguments = {name: tensor for name, tensor in inputs.items() if name.endswith("input_ids")}
    if model.config.is_encoder_decoder:
        arguments["encoder_outputs"] = (inputs["encoder_hidden_states"],)
    return model(**arguments, past_key_values=cache, use_cache=True).logits


# ---- Its inputs -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def make_step_inputs(model, case, with_values=True):
    """Returns {name: tensor} of a step's inputs on the model's device; a real prefill fills all positions but the last.

    One sample after another, so that the prefill needs little more memory than the step does. with_values: whether what
    the tensors hold matters; where it does not, one token is prefilled, to see their shapes.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    tokens = decoder_tokens(case, case.context_len, SEED).to(device)
    encoder = {}
    if case.config.is_encoder_decoder:
        encoder = {name: tensor.to(device) for name, tensor in make_inputs(case).items()}
        encoder = {name: t.to(dtype) if t.is_floating_point() else t for name, t in encoder.items()}
        encoder = {name: t for name, t in encoder.items() if name not in ("decoder_input_ids", "attention_mask")}
    inputs = {token_name(case): tokens[:, -1:].clone(), "position": torch.tensor([case.context_len - 1], device=device)}
    filled = case.context_len - 1 if with_values else 1
    for sample in range(case.batch_size if with_values else 1):
        one = slice(sample, sample + 1)
        of_sample = {name: tensor[one] for name, tensor in encoder.items()}
        for name, tensor in prefill(model, case, tokens[one, :filled], of_sample).items():
            if name not in inputs:
                inputs[name] = tensor.new_zeros(case.batch_size, *tensor.shape[1:])
            inputs[name][one] = tensor
    return inputs


def decoder_tokens(case, count, seed):
    """Returns (batch, count) seeded token ids for the part of the model that decodes."""
    generator = torch.Generator().manual_seed(seed)
    reader = token_name(case).removesuffix("input_ids")
    return make_tokens(case, (case.batch_size, count), generator, reader)


def prefill(model, case, tokens, encoder):
    """Returns {name: tensor}, the cache that a forward pass over a sample's tokens leaves.

    Layers with a sliding window keep all of the context too, and hide what is outside the window: transformers' own
    layers move the whole window by one at each step, after which no step is the same again.
    """
    cache = StaticCache(config=case.config, max_cache_len=case.context_len)
    cache.layers = [StaticLayer(max_cache_len=case.context_len) for _ in cache.layers]
    crossed = DynamicCache()
    past = EncoderDecoderCache(cache, crossed) if case.config.is_encoder_decoder else cache
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(case) else {}
    outputs = model(**encoder, **{token_name(case): tokens}, past_key_values=past, use_cache=True, **last_only)
    tensors = {}
    for i, layer in enumerate(cache.layers):
        tensors[f"keys_{i}"], tensors[f"values_{i}"] = layer.keys, layer.values
    if encoder:
        for i, layer in enumerate(crossed.layers):
            tensors[f"cross_keys_{i}"], tensors[f"cross_values_{i}"] = layer.keys, layer.values
        tensors["encoder_hidden_states"] = outputs.encoder_last_hidden_state
    return tensors


# ---- What is checked ------------------------------------------------------------------------------------------------


def run_chain(run, inputs, case):
    """Yields what run() gives at each of the context's last positions, one after another, with other tokens.

    inputs: of the step, which change in place.
    """
    count = min(CHAIN_STEPS, case.context_len - 1)
    tokens = decoder_tokens(case, count, CHANGED_SEED)
    for step in range(count):
        inputs[token_name(case)].copy_(tokens[:, step : step + 1])
        inputs["position"].fill_(case.context_len - count + step)
        yield run()


def cache_arrays(inputs):
    """Returns what stands for the cache in a comparison, as fp32 NumPy arrays: for keys and for values, two a layer.

    The rows that a chain of steps writes are there as they are, and all positions as a sum with a weight for each: the
    cache itself may be larger than the host's memory.
    """
    arrays = []
    for tensor in (tensor for pair in cache_pairs(inputs) for tensor in pair):
        weights = torch.arange(tensor.shape[2], device=tensor.device).cos()
        sums = (tensor.float() * weights[:, None]).sum(2)
        arrays += output_arrays([tensor[:, :, -CHAIN_STEPS:], sums])
    return arrays


# ---- What it moves --------------------------------------------------------------------------------------------------


class ReadParameters(TorchDispatchMode):
    """Notes which of a model's parameters operators read while it lasts; of an embedding only rows are read."""

    def __init__(self, model):
        super().__init__()
        self.unread = {parameter.data_ptr(): parameter for parameter in model.parameters()}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.embedding.default and not function.is_view:
            for argument in args:
                if isinstance(argument, torch.Tensor) and argument.numel():
                    parameter = self.unread.pop(argument.data_ptr(), None)
                    self.bytes += 0 if parameter is None else parameter.nbytes
        return function(*args, **(kwargs or {}))


def step_bytes(step, inputs):
    """Returns the bytes that one step must at least move: weights and cache read, the new keys and values written.

    It runs the step, and then empties its position in the cache: what an item leaves there is its own.
    """
    with ReadParameters(step) as read:
        step(**inputs)
    cache = [tensor for pair in cache_pairs(inputs) for tensor in pair]
    for tensor in cache:
        tensor.index_fill_(2, inputs["position"], 0)
    crossed = [tensor for pair in cache_pairs(inputs, "cross_") for tensor in pair]
    written = sum(tensor.nbytes // tensor.shape[2] for tensor in cache)
    return read.bytes + sum(tensor.nbytes for tensor in cache + crossed) + written
