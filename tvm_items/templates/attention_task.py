"""A task that is attention: its parameters, its TIR function before scheduling, and what its kernels share.

Its tensors have the layout (batch, tokens, heads, head dim), in which a Linear layer's product gives queries, keys and
values and the next one takes the result.
"""

import math
import typing

OPAQUE = 8  # TVM's OpPatternKind of a function that FuseOps leaves alone
ATTRIBUTE = "attention"  # of the TIR function: what its buffers do not tell
LOG2_E = math.log2(math.e)
LOWEST_FP32 = -3.4028234663852886e38


class Source(typing.NamedTuple):
    """Where queries, keys or values are: consecutive heads of a tensor, perhaps of one that they share."""

    tensor: int  # number of the tensor among the function's parameters
    heads: int  # of the tensor
    first: int  # of these heads


class Attention(typing.NamedTuple):
    """softmax(scale * queries keys^T + mask) values, for each head; heads / key_heads of them share keys and values.

    Its TIR function takes the tensors with queries (batch, query_count, heads, head_dim), keys and values (batch,
    key_count, key_heads, head_dim), then the mask where there is one, and gives the result, shaped as the queries are.
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
    sources: tuple[Source, Source, Source]  # of queries, keys and values
    heads_first: bool = False  # keys and values are (batch, key_heads, key_count, head_dim), as a cache has them

    @property
    def inputs(self):
        """The (shape, dtype) of each tensor that the function reads, in the order of its parameters."""
        tensors = {}
        for number, source in enumerate(self.sources):
            tokens = self.key_count if number else self.query_count
            middle = (source.heads, tokens) if number and self.heads_first else (tokens, source.heads)
            tensors[source.tensor] = (self.batch, *middle, self.head_dim), self.dtype
        masks = [(self.mask_shape, self.mask_dtype)] if self.mask_shape else []
        return [tensors[number] for number in sorted(tensors)] + masks

    @property
    def result_shape(self):
        return self.batch, self.query_count, self.heads, self.head_dim


def define_attention(attention):
    """Returns the TIR function of an Attention, not yet scheduled.

    Scores, softmax and all sums are in fp32; the weights are rounded to the tensors' dtype before their product with
    the values. A query that sees no key gets zeros, as in PyTorch.
    """
    from tvm import te, tirx

    a = attention
    inputs = [te.placeholder(shape, dtype, f"input{number}") for number, (shape, dtype) in enumerate(a.inputs)]
    mask = inputs[-1]  # where there is one

    def reader(source, heads_first):
        def read(batch, token, head, d):
            head = source.first + head
            return inputs[source.tensor][(batch, head, token, d) if heads_first else (batch, token, head, d)]

        return read

    queries, keys, values = map(reader, a.sources, (False, a.heads_first, a.heads_first))
    sharing = a.heads // a.key_heads
    per_query, per_key = (a.batch, a.heads, a.query_count), (a.batch, a.heads, a.query_count, a.key_count)
    minus_infinity = tirx.const(-math.inf, "float32")

    def fp32(value):
        return value.astype("float32")

    def mask_score(*indices):
        score = products(*indices) * tirx.const(a.scale, "float32")
        if a.is_causal:
            return tirx.if_then_else(indices[3] <= indices[2], score, minus_infinity)
        if a.mask_shape is None:
            return score
        at = mask(*(index if size > 1 else 0 for index, size in zip(indices, a.mask_shape)))
        return tirx.if_then_else(at, score, minus_infinity) if a.mask_dtype == "bool" else score + fp32(at)

    depth, *over_keys = (te.reduce_axis((0, size)) for size in (a.head_dim, a.key_count, a.key_count, a.key_count))
    products = te.compute(
        per_key,
        lambda b, h, i, j: te.sum(fp32(queries(b, i, h, depth)) * fp32(keys(b, j, h // sharing, depth)), axis=depth),
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
        a.result_shape,
        lambda b, i, h, d: te.sum(fp32(weights[b, h, i, j]) * fp32(values(b, j, h // sharing, d)), axis=j),
        name="sums",
    )
    result = te.compute(a.result_shape, lambda *indices: sums(*indices).astype(a.dtype), name="result")
    parameters = {
        "scale": float(a.scale),
        "is_causal": a.is_causal,
        "key_heads": a.key_heads,
        "sources": [list(source) for source in a.sources],
        **({"heads_first": True} if a.heads_first else {}),
    }
    return te.create_prim_func([*inputs, result]).with_attrs({ATTRIBUTE: parameters, "op_pattern": OPAQUE})


def read_attention(module):
    """Returns the Attention whose TIR function is a task's IRModule's main; None where it is another operator's."""
    function = module["main"]
    if ATTRIBUTE not in (function.attrs or {}):
        return None
    parameters = function.attrs[ATTRIBUTE]
    *inputs, result = [
        (tuple(int(size) for size in parameter.ty.shape), str(parameter.ty.dtype)) for parameter in function.params
    ]
    sources = tuple(Source(*map(int, source)) for source in parameters["sources"])
    (batch, query_count, heads, head_dim), dtype = result
    heads_first = bool(parameters.get("heads_first", False))
    has_mask = len(inputs) > 1 + max(source.tensor for source in sources)
    return Attention(
        batch,
        query_count,
        inputs[sources[1].tensor][0][2 if heads_first else 1],
        heads,
        int(parameters["key_heads"]),
        head_dim,
        dtype,
        float(parameters["scale"]),
        bool(parameters["is_causal"]),
        *(inputs[-1] if has_mask else (None, None)),
        sources,
        heads_first,
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
    inputs = a.inputs

    def operand(index, *buffers):  # of queries, keys, values and mask
        if index < len(a.sources):
            return buffers[a.sources[index].tensor]
        return buffers[-1] if a.mask_shape else None

    # TVMScript has no functions of any number of parameters.
    if len(inputs) == 1:

        @T.prim_func
        def main(x: T.handle, r: T.handle):
            X = T.match_buffer(x, *inputs[0])
            R = T.match_buffer(r, a.result_shape, a.dtype)
            compute(*[operand(i, X) for i in range(4)], R)

    elif len(inputs) == 2:

        @T.prim_func
        def main(x: T.handle, y: T.handle, r: T.handle):
            X, Y = T.match_buffer(x, *inputs[0]), T.match_buffer(y, *inputs[1])
            R = T.match_buffer(r, a.result_shape, a.dtype)
            compute(*[operand(i, X, Y) for i in range(4)], R)

    elif len(inputs) == 3:

        @T.prim_func
        def main(x: T.handle, y: T.handle, z: T.handle, r: T.handle):
            X, Y = T.match_buffer(x, *inputs[0]), T.match_buffer(y, *inputs[1])
            Z = T.match_buffer(z, *inputs[2])
            R = T.match_buffer(r, a.result_shape, a.dtype)
            compute(*[operand(i, X, Y, Z) for i in range(4)], R)

    else:

        @T.prim_func
        def main(x: T.handle, y: T.handle, z: T.handle, m: T.handle, r: T.handle):
            X, Y = T.match_buffer(x, *inputs[0]), T.match_buffer(y, *inputs[1])
            Z, M = T.match_buffer(z, *inputs[2]), T.match_buffer(m, *inputs[3])
            R = T.match_buffer(r, a.result_shape, a.dtype)
            compute(*[operand(i, X, Y, Z, M) for i in range(4)], R)

    return main.with_attrs({"global_symbol": "main", "tirx.is_scheduled": True})
