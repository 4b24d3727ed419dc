"""Scaled dot-product attention as one operator: whole through torch.export and TVM's importer, and one task to tune.

What the task is, and in which layout it has its tensors, is in templates/attention_task.py: the permutations around
PyTorch's operator cancel out.
"""

import functools
import math

import torch

from tvm_items.constants import VIEWS, behind_views
from tvm_items.templates.attention_task import LOWEST_FP32, Attention, Source, define_attention

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


# ---- Export ---------------------------------------------------------------------------------------------------------


def decompose_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    """Decomposes PyTorch's operator, of its signature, where it cannot be one kernel; else returns NotImplemented.

    By that torch.export keeps an operator. The decomposition is in the tensors' dtype, with the softmax in fp32.
    """
    if can_be_whole(query, key, value, attn_mask, dropout_p):
        return NotImplemented
    if enable_gqa:
        key, value = (repeat_heads(tensor, query.shape[-3]) for tensor in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale @ key.transpose(-2, -1)).float()  # scaled first: in fp16 they must not overflow
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        weights = torch.where(visible, scores, -math.inf).softmax(-1)
    elif attn_mask is None:
        weights = scores.softmax(-1)
    elif attn_mask.dtype == torch.bool:  # a query that sees no key has weights of 0, as in PyTorch
        weights = torch.where(attn_mask, scores, LOWEST_FP32).softmax(-1) * attn_mask
    else:
        weights = aten._safe_softmax(scores + attn_mask, -1)
    return torch.nn.functional.dropout(weights.to(value.dtype), dropout_p) @ value


def can_be_whole(query, key, value, mask, dropout_p):
    """Returns whether define_attention() can define attention on these tensors, shaped as for PyTorch's operator."""
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape or dropout_p:
        return False
    sizes = (*query.shape, *key.shape, *(mask.shape if mask is not None else ()))
    if not all(isinstance(size, int) for size in sizes):
        return False
    batch, heads, query_count, head_dim = query.shape
    same_dtype = query.dtype == key.dtype == value.dtype
    return (
        head_dim in head_dims(query.dtype, query_count)
        and key.shape[0] == batch
        and heads % key.shape[1] == 0
        and same_dtype
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and (mask is None or mask.dtype in (torch.bool, torch.float16, torch.bfloat16, torch.float32))
    )


def head_dims(dtype, query_count):
    """Returns the head dims that attention is one kernel for: see templates/attention_kernels.py.

    Those that are no multiples of 8 are for tensor cores alone. One query may be over a cache: another kernel's work,
    which has a warp for a key at most, and so 128 elements of it in fp32.
    """
    if query_count == 1:
        return range(16, 129 if dtype == torch.float32 else 257, 8)
    return range(16, 257, 8 if dtype == torch.float32 else 4)


def repeat_heads(tensor, heads):
    """Returns keys or values (..., key heads, tokens, head dim) repeated for so many heads of queries."""
    return tensor.repeat_interleave(heads // tensor.shape[-3], dim=-3)


# ---- Import ---------------------------------------------------------------------------------------------------------


def convert_attention(node, importer):
    """Converts PyTorch's operator to a call of the TIR function that define_attention() gives.

    A converter gets a node of the exported graph and TVM's importer, and returns the node's value as a Relax variable.
    Copies of keys and values for the heads that share them, and of a mask for all that it is the same for, are skipped.
    So is a mask that hides nothing, as transformers gives ViT, or what causality does.
    """
    from tvm import relax

    def argument(index, name, default):
        return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)

    query, key, value = node.args[0], *map(before_repeat, node.args[1:3])
    mask = argument(3, "attn_mask", None)
    is_causal, scale = bool(argument(5, "is_causal", False)), node.kwargs.get("scale")
    batch, heads, query_count, head_dim = shape(query)
    _, key_heads, key_count, _ = shape(key)
    constant = constant_value(mask) if mask is not None else None
    if constant is not None and constant.dtype == torch.bool:
        visible = constant.expand(*constant.shape[:-2], query_count, key_count)
        if visible.all():
            mask = None
        elif torch.equal(visible, torch.ones_like(visible).tril()):
            mask, is_causal = None, True
    if mask is not None and mask.target == aten.expand.default:
        mask = mask.args[0]
    tensors, sources = find_sources(query, key, value)
    heads_first = all(is_cache(node) and sources[number].tensor == number for number, node in ((1, key), (2, value)))
    mask_shape = mask and (1,) * (4 - len(shape(mask))) + shape(mask)
    attention = Attention(
        batch,
        query_count,
        key_count,
        heads,
        key_heads,
        head_dim,
        dtype_name(query),
        1 / math.sqrt(head_dim) if scale is None else float(scale),
        is_causal,
        mask_shape,
        mask and dtype_name(mask),
        sources,
        heads_first,
    )
    builder = importer.block_builder
    arguments = []
    for (tensor, is_of_product), (tensor_shape, _) in zip(tensors, attention.inputs):
        argument = importer.env[tensor]
        if is_of_product:
            argument = builder.emit(relax.op.reshape(argument, tensor_shape))
        elif not (heads_first and tensor in (key, value)):
            argument = builder.emit(relax.op.permute_dims(argument, [0, 2, 1, 3]))
        arguments.append(argument)
    if mask is not None:
        arguments.append(builder.emit(relax.op.reshape(importer.env[mask], mask_shape)))
    function = builder.add_func(define_attention(attention).without_attr("global_symbol"), "attention")
    result_type = relax.TensorType([batch, query_count, heads, head_dim], attention.dtype)
    result = builder.emit(relax.call_tir(function, arguments, result_type))
    return builder.emit(relax.op.permute_dims(result, [0, 2, 1, 3]))


def is_cache(node):
    """Returns whether a node is a cache of keys or values: an input of the model, or what is written into one."""
    return node.op == "placeholder" or node.target == aten.index_copy.default


def before_repeat(node):
    """Returns the node with the keys or values of which `node` is a copy for the heads that share them, or `node`.

    It is recognised by its shapes: (batch, key heads, tokens, head dim) -> unsqueeze -> expand -> reshape to all heads.
    """
    repeated = node
    for targets in (
        VIEWS,
        (aten.clone.default,),
        (aten.expand.default,),
        (aten.unsqueeze.default,),
    ):
        if repeated.target in targets:
            repeated = repeated.args[0]
        elif aten.clone.default not in targets:
            return node
        if aten.expand.default in targets:
            expanded = shape(repeated)
    batch, _, tokens, head_dim = shape(node)
    key_heads = shape(repeated)[1]
    return repeated if expanded == (batch, key_heads, 1, tokens, head_dim) else node


def constant_value(node):
    """Returns the tensor that a node has whatever the model's inputs and weights are, None where it depends on them."""

    @functools.cache
    def evaluate(node):
        if node.op != "call_function":
            return None
        values = {source: evaluate(source) for source in node.all_input_nodes}
        if any(value is None for value in values.values()):
            return None
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.get)
        return node.target(*args, **kwargs)

    return evaluate(node)


def find_sources(query, key, value):
    """Returns ([(node, whether it is what a product gives)], Sources of queries, keys and values among these tensors).

    Where a node is a slice of another one's last dimension, brought into PyTorch's layout, it is read where it is: one
    product gives queries, keys and values, or keys and values of several layers. The way into PyTorch's layout is
    (batch, tokens, heads * head dim) -> (batch, tokens, heads, head dim) -> permuted.
    """
    tensors, sources = [], []
    for node in (query, key, value):
        _, heads, _, head_dim = shape(node)
        tensor, first, part = (node, False), 0, projection_of(node)
        if is_slice_of_heads(part, head_dim):
            shared, _, start, _ = part.args
            first, heads = start // head_dim, shape(shared)[-1] // head_dim
            tensor = behind_views(shared), True  # one more view is none; of two views TVM would make a launch
        if tensor not in tensors:
            tensors.append(tensor)
        sources.append(Source(tensors.index(tensor), heads, first))
    return tensors, tuple(sources)


def is_slice_of_heads(node, head_dim):
    """Returns whether a node, or None, is a slice of whole heads of another one's last dimension."""
    if node is None or node.target != aten.slice.Tensor or len(node.args) != 4:
        return False
    source, axis, start, _ = node.args
    is_last = axis == len(shape(source)) - 1
    return is_last and start % head_dim == 0 and shape(source)[-1] % head_dim == 0


def projection_of(node):
    """Returns the node (..., heads * head dim) that has been brought into PyTorch's layout by views and a permutation.

    None where that is not what `node` (batch, heads, tokens, head dim) is.
    """
    if node.target != aten.permute.default or list(node.args[1]) != [0, 2, 1, 3]:
        return None
    source = behind_views(node.args[0])
    _, heads, _, head_dim = shape(node)
    return source if shape(source)[-1] == heads * head_dim else None


def shape(node):
    return tuple(node.meta["val"].shape)


def dtype_name(node):
    return str(node.meta["val"].dtype).removeprefix("torch.")
