"""What TVM's importer does not know: operators of the exported graph, converted to Relax.

A converter gets a node of the exported graph and TVM's importer, and returns the node's value as a Relax variable.
"""

import torch


def convert_element_type(node, importer):
    """Converts the cast that PyTorch's type promotion pass inserts."""
    from tvm import relax

    dtype = str(node.kwargs["dtype"]).removeprefix("torch.")
    return importer.block_builder.emit(relax.op.astype(importer.env[node.args[0]], dtype))


def convert_any(node, importer):
    """Converts any() of a whole tensor, by which T5 sees overflow in fp16.

    Axis by axis: TVM's default schedule gives a reduction to a scalar one thread of the GPU.
    """
    from tvm import relax

    largest = relax.op.astype(importer.env[node.args[0]], "int32")
    for _ in node.args[0].meta["val"].shape:
        largest = importer.block_builder.emit(relax.op.max(largest, axis=-1))
    return importer.block_builder.emit(relax.op.astype(largest, "bool"))


def convert_histc(node, importer):
    """Converts a histogram, by which mixtures of experts count the tokens of each expert."""
    from tvm import te, tirx

    bins, low, high = (*node.args, 100, 0, 0)[1:4]
    if low == high:  # PyTorch takes the range of the values then
        raise NotImplementedError("histc() without a range")

    def count(values):
        flat = values.shape[0]
        i = te.reduce_axis((0, flat), "i")

        def is_in(value, number):
            place = tirx.floor((value - low) * (bins / (high - low)))
            number_of_value = tirx.min(place.astype("int32"), bins - 1)
            inside = tirx.all(value >= low, value <= high, number_of_value == number)
            return tirx.if_then_else(inside, tirx.const(1, "float32"), tirx.const(0, "float32"))

        return te.compute((bins,), lambda b: te.sum(is_in(values[i].astype("float32"), b), axis=i), name="histogram")

    from tvm import relax

    values = importer.block_builder.emit(relax.op.reshape(importer.env[node.args[0]], (-1,)))
    counts = importer.block_builder.emit_te(count, values)
    return importer.block_builder.emit(relax.op.astype(counts, importer.env[node.args[0]].ty.dtype))


def convert_grouped_matmul(node, importer):
    """Converts the product of each group of rows with a matrix of its own, which mixtures of experts are made of.

    Rows (rows, k) sorted by group, weights (groups, k, columns), and where each group ends; sums are in fp32. It is one
    kernel that reads each row's weight where it stands: gathering the weights first would copy one for each row.
    """
    from tvm import relax, te

    emit = importer.block_builder.emit
    rows, weight = (importer.env[argument] for argument in node.args[:2])
    ends = importer.env[node.args[2] if len(node.args) > 2 else node.kwargs["offs"]]
    count, groups = int(rows.ty.shape[0]), int(weight.ty.shape[0])
    places = relax.op.arange(0, count, 1, "int32")
    ended = relax.op.less_equal(
        relax.op.astype(relax.op.expand_dims(ends, 0), "int32"), relax.op.expand_dims(places, 1)
    )
    group = emit(relax.op.minimum(relax.op.sum(relax.op.astype(ended, "int32"), 1), relax.const(groups - 1, "int32")))

    def multiply(x, w, g):
        k = te.reduce_axis((0, x.shape[1]), "k")

        def product(i, j):
            return te.sum(x[i, k].astype("float32") * w[g[i], k, j].astype("float32"), axis=k)

        return te.compute((x.shape[0], w.shape[2]), product, name="grouped_matmul")

    product = importer.block_builder.emit_te(multiply, rows, weight, group)
    return emit(relax.op.astype(product, rows.ty.dtype))


def convert_division(node, importer):
    """Converts a division with a rounding: TVM gives a number it divides by a dtype that the tensor may not have."""
    from tvm import relax

    rounding = node.kwargs.get("rounding_mode", "floor")
    dividend, divisor = (importer.env[part] if isinstance(part, torch.fx.Node) else part for part in node.args)
    if not isinstance(divisor, relax.Expr):
        divisor = relax.const(divisor, dividend.ty.dtype)
    if rounding is None:
        return importer.block_builder.emit(relax.op.divide(dividend, divisor))
    quotient = importer.block_builder.emit(relax.op.floor_divide(dividend, divisor))
    if rounding == "floor":
        return quotient
    # Towards zero: one more where the quotient is negative and has a rest.
    has_rest = relax.op.not_equal(relax.op.multiply(quotient, divisor), dividend)
    is_negative = relax.op.less(quotient, relax.const(0, dividend.ty.dtype))
    one_more = relax.op.astype(relax.op.logical_and(has_rest, is_negative), dividend.ty.dtype)
    return importer.block_builder.emit(relax.op.add(quotient, one_more))


CONVERTERS = {
    "convert_element_type.default": convert_element_type,
    "any.default": convert_any,
    "floor_divide.default": convert_division,
    "div.Tensor_mode": convert_division,
    "histc.default": convert_histc,
    "grouped_mm_fallback.default": convert_grouped_matmul,
    "_grouped_mm.default": convert_grouped_matmul,
}
