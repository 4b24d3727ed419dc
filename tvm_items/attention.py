"""Scaled dot-product attention as one operator: whole through torch.export and TVM's importer, and one task to tune.

Its tensors have the layout (batch, tokens, heads, head dim), in which a Linear layer's product gives queries, keys and
values and the next one takes the result: the permutations around PyTorch's operator cancel out.
"""

import math
import typing

import torch

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
HEAD_DIMS = range(16, 129, 16)  # that attention is one kernel for: attention_kernels.py
OPAQUE = 8  # TVM's OpPatternKind of a function that FuseOps leaves alone
ATTRIBUTE = "attention"  # of the TIR function: what its buffers do not tell
LOG2_E = math.log2(math.e)
LOWEST_FP32 = torch.finfo(torch.float32).min


class Attention(typing.NamedTuple):
    """softmax(scale * queries keys^T + mask) values, for each head; heads / key_heads of them share keys and values.

    Its TIR function takes queries (batch, query_count, heads, head_dim), keys and values (batch, key_count, key_heads,
    head_dim), the mask where there is one, and gives the result, shaped as the queries are.
    """

    batch: int
    query_count: int
    key_count: int
    heads: int
    key_heads: int
    head_dim: int
    dtype: str  # of all but the mask
    scale: float
    is_causal: bool  # a query sees the keys up to its own index
    mask_shape: tuple[int, ...] | None  # (batch, heads, query_count, key_count), 1 where it is the same for all
    mask_dtype: str | None  # "bool", False for keys that are not seen, or that of numbers to add


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
    batch, heads, _, head_dim = query.shape
    same_dtype = query.dtype == key.dtype == value.dtype
    return (
        head_dim in HEAD_DIMS
        and key.shape[0] == batch
        and heads % key.shape[1] == 0
        and same_dtype
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and (mask is None or mask.dtype in (torch.bool, torch.float16, torch.bfloat16, torch.float32))
    )


def repeat_heads(tensor, heads):
    """Returns keys or values (..., key heads, tokens, head dim) repeated for so many heads of queries."""
    return tensor.repeat_interleave(heads // tensor.shape[-3], dim=-3)


# ---- Import ---------------------------------------------------------------------------------------------------------


def convert_attention(node, importer):
    """Converts PyTorch's operator to a call of the TIR function that define_attention() gives.

    A converter gets a node of the exported graph and TVM's importer, and returns the node's value as a Relax variable.
    Copies of keys and values for the heads that share them, and of a mask for all that it is the same for, are skipped.
    """
    from tvm import relax

    def argument(index, name, default):
        return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)

    query, key, value = node.args[0], *map(before_repeat, node.args[1:3])
    mask = argument(3, "attn_mask", None)
    is_causal, scale = bool(argument(5, "is_causal", False)), node.kwargs.get("scale")
    batch, heads, query_count, head_dim = shape(query)
    _, key_heads, key_count, _ = shape(key)
    if mask is not None and mask.target == aten.expand.default:
        mask = mask.args[0]
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
    )
    builder = importer.block_builder
    tensors = [builder.emit(relax.op.permute_dims(importer.env[n], [0, 2, 1, 3])) for n in (query, key, value)]
    if mask is not None:
        tensors.append(builder.emit(relax.op.reshape(importer.env[mask], mask_shape)))
    function = builder.add_func(define_attention(attention).without_attr("global_symbol"), "attention")
    result_type = relax.TensorType([batch, query_count, heads, head_dim], attention.dtype)
    result = builder.emit(relax.call_tir(function, tensors, result_type))
    return builder.emit(relax.op.permute_dims(result, [0, 2, 1, 3]))


def before_repeat(node):
    """Returns the node with the keys or values of which `node` is a copy for the heads that share them, or `node`.

    It is recognised by its shapes: (batch, key heads, tokens, head dim) -> unsqueeze -> expand -> reshape to all heads.
    """
    repeated = node
    for targets in (
        (aten.view.default, aten.reshape.default, aten._unsafe_view.default),
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


def shape(node):
    return tuple(node.meta["val"].shape)


def dtype_name(node):
    return str(node.meta["val"].dtype).removeprefix("torch.")


# ---- The TIR function -----------------------------------------------------------------------------------------------


def define_attention(attention):
    """Returns the TIR function of an Attention, not yet scheduled.

    Scores, softmax and all sums are in fp32; the weights are rounded to the tensors' dtype before their product with
    the values. A query that sees no key gets zeros, as in PyTorch.
    """
    from tvm import te, tirx

    a = attention
    shapes = {
        "queries": (a.batch, a.query_count, a.heads, a.head_dim),
        "keys": (a.batch, a.key_count, a.key_heads, a.head_dim),
        "values": (a.batch, a.key_count, a.key_heads, a.head_dim),
    }
    queries, keys, values = (te.placeholder(size, a.dtype, name) for name, size in shapes.items())
    mask = te.placeholder(a.mask_shape, a.mask_dtype, "mask") if a.mask_shape else None
    sharing = a.heads // a.key_heads
    per_query, per_key = (a.batch, a.heads, a.query_count), (a.batch, a.heads, a.query_count, a.key_count)
    minus_infinity = tirx.const(-math.inf, "float32")

    def fp32(value):
        return value.astype("float32")

    def mask_score(*indices):
        score = products(*indices) * tirx.const(a.scale, "float32")
        if a.is_causal:
            return tirx.if_then_else(indices[3] <= indices[2], score, minus_infinity)
        if mask is None:
            return score
        at = mask(*(index if size > 1 else 0 for index, size in zip(indices, a.mask_shape)))
        return tirx.if_then_else(at, score, minus_infinity) if a.mask_dtype == "bool" else score + fp32(at)

    depth, *over_keys = (te.reduce_axis((0, size)) for size in (a.head_dim, a.key_count, a.key_count, a.key_count))
    products = te.compute(
        per_key,
        lambda b, h, i, j: te.sum(fp32(queries[b, i, h, depth]) * fp32(keys[b, j, h // sharing, depth]), axis=depth),
        name="products",
    )
    scores = te.compute(per_key, mask_score, name="scores")
    largest = te.compute(
        per_query, lambda b, h, i: te.max(scores[b, h, i, over_keys[0]], axis=over_keys[0]), name="largest"
    )
    # TVM's maximum begins with the smallest finite number: of a query that sees no key, all exponentials are 0.
    exponentials = te.compute(
        per_key, lambda b, h, i, j: te.exp(scores[b, h, i, j] - largest[b, h, i]), name="exponentials"
    )
    totals = te.compute(
        per_query, lambda b, h, i: te.sum(exponentials[b, h, i, over_keys[1]], axis=over_keys[1]), name="totals"
    )
    weights = te.compute(
        per_key,
        lambda b, h, i, j: (exponentials[b, h, i, j] / te.max(totals[b, h, i], tirx.const(1e-30, "float32"))).astype(
            a.dtype
        ),
        name="weights",
    )
    j = over_keys[2]
    sums = te.compute(
        shapes["queries"],
        lambda b, i, h, d: te.sum(fp32(weights[b, h, i, j]) * fp32(values[b, j, h // sharing, d]), axis=j),
        name="sums",
    )
    result = te.compute(shapes["queries"], lambda *indices: sums(*indices).astype(a.dtype), name="result")
    tensors = [queries, keys, values, *([mask] if mask is not None else []), result]
    parameters = {"scale": float(a.scale), "is_causal": a.is_causal}
    return te.create_prim_func(tensors).with_attrs({ATTRIBUTE: parameters, "op_pattern": OPAQUE})


def read_attention(module):
    """Returns the Attention whose TIR function is a task's IRModule's main; None where it is another operator's."""
    function = module["main"]
    if ATTRIBUTE not in (function.attrs or {}):
        return None
    types = [parameter.ty for parameter in function.params]
    queries, keys, _, *masks, _ = [tuple(int(size) for size in type_.shape) for type_ in types]
    batch, query_count, heads, head_dim = queries
    return Attention(
        batch,
        query_count,
        keys[1],
        heads,
        keys[2],
        head_dim,
        str(types[0].dtype),
        float(function.attrs[ATTRIBUTE]["scale"]),
        bool(function.attrs[ATTRIBUTE]["is_causal"]),
        masks[0] if masks else None,
        str(types[3].dtype) if masks else None,
    )


# ---- What its kernels share -----------------------------------------------------------------------------------------


class Softmax:
    """How a kernel computes exp(score - largest): as a power of 2 whose exponent is exponent(score, largest).

    Multiplied by a positive scale the largest score stays the largest: the products can then be scaled late, which
    takes one fused multiplication and addition for each. Else they are scaled, and the mask is added, first.
    """

    def __init__(self, attention):
        self.has_mask = attention.mask_shape is not None
        self.scales_late = attention.scale > 0 and attention.mask_dtype in (None, "bool")
        self.factor = LOG2_E * (attention.scale if self.scales_late else 1)
        # What stands for the largest score until there is one: finite, as -inf - -inf is NaN. A mask that adds numbers
        # may add the lowest to all of a row; times a factor that one is infinite.
        self.lowest = -1e30 if self.scales_late else LOWEST_FP32

    def exponent(self, score, largest):
        """Returns the exponent as a TIR expression."""
        if self.scales_late:
            return score * self.factor - largest * self.factor
        return (score - largest) * self.factor


def masked(attention, score, mask, *indices):
    """Returns a score with the mask, as TIR; indices: of batch, head, query and key, which may be behind the last."""
    from tvm.script import tirx as T

    at = mask[tuple(T.min(i, size - 1) if size > 1 else 0 for i, size in zip(indices, attention.mask_shape))]
    if attention.mask_dtype == "bool":
        return T.if_then_else(at, score, T.float32(-math.inf))
    return score + T.Cast("float32", at)


def kernel_function(attention, compute):
    """Returns the TIR function of a kernel, of the signature that define_attention()'s has.

    compute: an inline function of TVMScript for (queries, keys, values, mask or None, result).
    """
    from tvm.script import tirx as T

    a = attention
    query_shape = (a.batch, a.query_count, a.heads, a.head_dim)
    key_shape = (a.batch, a.key_count, a.key_heads, a.head_dim)

    if a.mask_shape is None:

        @T.prim_func
        def main(q: T.handle, k: T.handle, v: T.handle, r: T.handle):
            queries = T.match_buffer(q, query_shape, a.dtype)
            keys = T.match_buffer(k, key_shape, a.dtype)
            values = T.match_buffer(v, key_shape, a.dtype)
            result = T.match_buffer(r, query_shape, a.dtype)
            compute(queries, keys, values, None, result)

    else:

        @T.prim_func
        def main(q: T.handle, k: T.handle, v: T.handle, m: T.handle, r: T.handle):
            queries = T.match_buffer(q, query_shape, a.dtype)
            keys = T.match_buffer(k, key_shape, a.dtype)
            values = T.match_buffer(v, key_shape, a.dtype)
            mask = T.match_buffer(m, a.mask_shape, a.mask_dtype)
            result = T.match_buffer(r, query_shape, a.dtype)
            compute(queries, keys, values, mask, result)

    return main.with_attr("global_symbol", "main")
