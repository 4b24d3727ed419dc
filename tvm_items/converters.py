"""What TVM's importer does not know: operators of the exported graph, converted to Relax.

A converter gets a node of the exported graph and TVM's importer, and returns the node's value as a Relax variable.
"""

import functools
import math

import torch


def convert_element_type(node, importer):
    """Converts the cast that PyTorch's type promotion pass inserts."""
    from tvm import relax

    dtype = str(node.kwargs["dtype"]).removeprefix("torch.")
    return importer.block_builder.emit(relax.op.astype(importer.env[node.args[0]], dtype))


def convert_any(node, importer):
    """Converts any() of a whole tensor, by which T5 sees overflow in fp16.

    First along the last axis, then the rest: TVM's default schedule gives a reduction of all axes to one thread.
    """
    from tvm import relax

    *outer, length = map(int, node.args[0].meta["val"].shape or (1,))
    rows = relax.op.reshape(importer.env[node.args[0]], (math.prod(outer), length))
    largest = importer.block_builder.emit(relax.op.max(relax.op.astype(rows, "int32"), axis=-1))
    if math.prod(outer) > 1:
        largest = importer.block_builder.emit(relax.op.max(relax.op.reshape(largest, (1, -1)), axis=-1))
    return importer.block_builder.emit(relax.op.astype(relax.op.reshape(largest, ()), "bool"))


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


def convert_extreme(operator, node, importer):
    """Converts the largest or the smallest along axes, all of them where none is named. operator: of relax.op."""
    from tvm import relax

    axes, keep = (*node.args[1:], *((), False)[len(node.args) - 1 :])
    return importer.block_builder.emit(
        getattr(relax.op, operator)(importer.env[node.args[0]], axis=list(axes) or None, keepdims=keep)
    )


def convert_smallest(node, importer):
    """Converts the smallest along an axis, with its place."""
    from tvm import relax

    source = importer.env[node.args[0]]
    axis, keep = node.args[1], node.args[2] if len(node.args) > 2 else False
    results = relax.op.min(source, axis, keep), relax.op.argmin(source, axis, keep)
    return importer.block_builder.emit(relax.Tuple([importer.block_builder.emit(result) for result in results]))


def convert_unfold(node, importer):
    """Converts overlapping windows along an axis, as PatchTST cuts a series; the last axis has their elements."""
    from tvm import relax

    axis, size, step = node.args[1:]
    shape = node.args[0].meta["val"].shape
    axis %= len(shape)
    starts = torch.arange(0, shape[axis] - size + 1, step)
    places = relax.const((starts[:, None] + torch.arange(size)).numpy(), "int64")
    windows = importer.block_builder.emit(relax.op.take(importer.env[node.args[0]], places, axis))
    order = [*range(axis + 1), *range(axis + 2, len(shape) + 1), axis + 1]
    return importer.block_builder.emit(relax.op.permute_dims(windows, order))


def convert_index(node, importer):
    """Converts indices in tensors along several axes, x[:, i, j], that belong together element by element.

    TVM takes them one after another where an axis is left open, which gives every combination of their elements.
    """
    from tvm import relax

    source, indices = node.args
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if len(axes) in (1, len(indices)):
        return importer._index_tensor(node)
    emit, rank = importer.block_builder.emit, source.meta["val"].ndim
    others = [axis for axis in range(rank) if axis not in axes]
    data = emit(relax.op.permute_dims(importer.env[source], axes + others))
    result = emit(relax.op.index_tensor(data, [importer.env[indices[axis]] for axis in axes]))
    if axes != list(range(axes[0], axes[-1] + 1)):
        return result  # what is indexed comes first where other axes stand between
    # Else it comes where the indices stand.
    width = node.meta["val"].ndim - len(others)
    before = list(range(width, width + axes[0]))
    order = before + list(range(width)) + list(range(width + axes[0], width + len(others)))
    return emit(relax.op.permute_dims(result, order))


def convert_index_put(node, importer):
    """Converts what is written to the places that an index or a mask names along one axis, or to those of a mask.

    TVM wants as many indices as the tensor has axes, and lays the values out in another order where one is left open.
    """
    from tvm import relax

    emit = importer.block_builder.emit
    target, (_, indices, *rest) = importer.env[node.args[0]], node.args
    places = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    accumulate = bool(rest[1]) if len(rest) > 1 else False
    (axis, index), values = places[0], importer.env[rest[0]]
    shape, index_value = list(node.args[0].meta["val"].shape), index.meta["val"]
    behind = len(shape) - index_value.ndim - axis  # axes behind those of a mask
    is_same_everywhere = rest[0].meta["val"].numel() == 1 or rest[0].meta["val"].ndim <= behind
    if len(places) == 1 and index_value.dtype == torch.bool and is_same_everywhere and not accumulate:
        mask = relax.op.reshape(importer.env[index], (*index_value.shape, *[1] * behind))
        values = relax.op.reshape(values, ()) if rest[0].meta["val"].numel() == 1 else values
        return emit(relax.op.where(mask, values, target))
    is_in_order = axis == 0 and rest[0].meta["val"].ndim == 1 + behind  # a row for each place of a mask
    if len(places) == 1 and index_value.dtype == torch.bool and is_in_order and not accumulate:
        mask = relax.op.reshape(importer.env[index], (*index_value.shape, *[1] * behind))
        return write_in_order(importer.block_builder, target, emit(mask), values, shape)
    if len(places) > 1 or index_value.dtype == torch.bool:
        return importer._index_put(node)
    count = index_value.numel()
    written = [*shape[:axis], *index_value.shape, *shape[axis + 1 :]]
    flat = [*shape[:axis], count, *shape[axis + 1 :]]
    values = relax.op.reshape(relax.op.broadcast_to(values, written), flat)
    spread = relax.op.reshape(importer.env[index], [1] * axis + [count] + [1] * (len(shape) - axis - 1))
    spread = emit(relax.op.broadcast_to(spread, flat))
    reduction = "add" if accumulate else "update"
    return emit(relax.op.scatter_elements(target, spread, emit(values), axis, reduction=reduction))


def convert_scatter_reduce(node, importer):
    """Converts what is scattered to the same place and becomes a sum, a product, a mean or an extreme there."""
    from tvm import relax

    emit = importer.block_builder.emit
    target, axis, indices, values, kind = (importer.env[a] if isinstance(a, torch.fx.Node) else a for a in node.args)
    with_self, dtype = node.kwargs.get("include_self", True), target.ty.dtype
    axis %= target.ty.ndim
    name, start = {
        "sum": ("add", 0),
        "mean": ("add", 0),
        "prod": ("mul", 1),
        "amax": ("max", -math.inf),
        "amin": ("min", math.inf),
    }[kind]
    zeros, ones = relax.op.zeros_like(target), relax.op.ones_like(values)
    count = emit(relax.op.scatter_elements(zeros, indices, ones, axis, reduction="add"))
    is_met = relax.op.greater(count, relax.const(0, dtype))
    base = target if with_self else emit(relax.op.where(is_met, relax.const(start, dtype), target))
    result = emit(relax.op.scatter_elements(base, indices, values, axis, reduction=name))
    if kind == "mean":
        count = (
            relax.op.add(count, relax.const(1, dtype)) if with_self else relax.op.maximum(count, relax.const(1, dtype))
        )
        result = emit(relax.op.divide(result, emit(count)))
    return result


def convert_scatter_add(node, importer):
    """Converts a sum of what is scattered to the same place."""
    from tvm import relax

    target, axis, indices, values = (importer.env[a] if isinstance(a, torch.fx.Node) else a for a in node.args)
    axis %= target.ty.ndim
    return importer.block_builder.emit(relax.op.scatter_elements(target, indices, values, axis, reduction="add"))


def convert_masked_scatter(node, importer):
    """Converts what is written in its order to the places that a mask names, as an image's features into a text."""
    target, mask, values = (importer.env[argument] for argument in node.args)
    return write_in_order(importer.block_builder, target, mask, values, list(node.args[0].meta["val"].shape))


def write_in_order(builder, target, mask, values, shape):
    """Emits what a target of `shape` becomes with one value after another at the places that a mask names."""
    from tvm import relax

    emit = builder.emit
    places = emit(relax.op.broadcast_to(mask, shape))
    flat_places, flat_target, flat_values = (emit(relax.op.reshape(t, (-1,))) for t in (places, target, values))
    written = emit(relax.op.cumsum(emit(relax.op.astype(flat_places, "int64")), 0))  # up to each place, and it
    number = emit(relax.op.maximum(emit(relax.op.subtract(written, relax.const(1, "int64"))), relax.const(0, "int64")))
    result = emit(relax.op.where(flat_places, emit(relax.op.take(flat_values, number, 0)), flat_target))
    return emit(relax.op.reshape(result, shape))


def convert_grid_sampler(node, importer):
    """Converts the reading of an image between its pixels; TVM's kernel has the places' two numbers in front.

    In fp32: in half precision the kernel's result has another dtype than TVM says.
    """
    from tvm import relax

    emit = importer.block_builder.emit
    dtype = importer.env[node.args[0]].ty.dtype
    image, places = (importer.env[argument] for argument in node.args[:2])
    if dtype != "float32":
        image, places = (emit(relax.op.astype(argument, "float32")) for argument in (image, places))
    method, padding, align_corners = node.args[2:]
    read = emit(
        relax.op.image.grid_sample(
            image,
            emit(relax.op.permute_dims(places, [0, 3, 1, 2])),
            method=("bilinear", "nearest", "bicubic")[method],
            layout="NCHW",
            padding_mode=("zeros", "border", "reflection")[padding],
            align_corners=align_corners,
        )
    )
    return read if dtype == "float32" else emit(relax.op.astype(read, dtype))


def convert_cumulative_extreme(name, node, importer):
    """Converts the largest or smallest so far along an axis; its place cannot be had. name: "max" or "min"."""
    from tvm import relax, te, tirx

    if any(user.args[1] != 0 for user in node.users):
        raise NotImplementedError(f"cum{name}() with its places")

    def so_far(values):
        axis = node.args[1] % len(values.shape)
        j = te.reduce_axis((0, values.shape[axis]), "j")
        worst = tirx.min_value if name == "max" else tirx.max_value

        def extreme(*place):
            source = values(*place[:axis], j, *place[axis + 1 :])
            return getattr(te, name)(tirx.if_then_else(j <= place[axis], source, worst(values.dtype)), axis=j)

        return te.compute(values.shape, extreme, name=f"cum{name}")

    values = importer.block_builder.emit_te(so_far, importer.env[node.args[0]])
    return importer.block_builder.emit(relax.Tuple([values, values]))


def convert_as_strided(node, importer):
    """Converts a view of a tensor's memory, such as windows that overlap; its axes may lie there in another order."""
    from tvm import relax, te

    source, size, strides, *offset = node.args
    offset = offset[0] if offset else node.kwargs.get("storage_offset") or 0
    value = source.meta["val"]
    order = sorted(range(value.ndim), key=lambda axis: value.stride(axis), reverse=True)
    if value.storage_offset() or not value.permute(order).is_contiguous():
        raise NotImplementedError("as_strided() of a part of what lies in memory")

    def read(flat):
        def element(*place):
            return flat(sum((i * stride for i, stride in zip(place, strides)), offset))

        return te.compute(size, element, name="as_strided")

    in_memory = importer.block_builder.emit(relax.op.permute_dims(importer.env[source], order))
    return importer.block_builder.emit_te(read, importer.block_builder.emit(relax.op.reshape(in_memory, (-1,))))


def convert_fill(convert, node, importer):
    """Converts a tensor of one number, which may not be infinite in TVM's kernel. convert: TVM's converter."""
    from tvm import relax

    number, value = node.args[1], node.meta["val"]
    if not isinstance(number, float) or math.isfinite(number) or not value.is_floating_point():
        return getattr(importer, convert)(node)
    constant = relax.const(number, str(value.dtype).removeprefix("torch."))
    return importer.block_builder.emit(relax.op.broadcast_to(constant, tuple(value.shape)))


def convert_clamp(node, importer):
    """Converts clamp() to bounds in tensors, as type promotion makes those of int32: TVM adds infinite ones to them."""
    from tvm import relax

    low, high = (*node.args[1:], None, None)[:2]
    if node.meta["val"].is_floating_point():
        return importer._clamp(node)
    value = importer.env[node.args[0]]
    for bound, operator in ((low, relax.op.maximum), (high, relax.op.minimum)):
        if bound is not None:
            value = importer.block_builder.emit(operator(value, importer.env[bound]))
    return value


def convert_known_value(node, importer):
    """Converts a value that fold_known_values() has put into the graph; a copy of anything else is that itself."""
    from tvm import relax

    value = importer.env[node.args[0]]
    if not torch.is_tensor(value):
        return value
    if value.dtype == torch.bfloat16:  # of which NumPy knows nothing
        return importer.block_builder.emit(relax.op.astype(relax.const(value.float().numpy(), "float32"), "bfloat16"))
    return relax.const(value.numpy(), str(value.dtype).removeprefix("torch."))


CONVERTERS = {
    "lift_fresh_copy.default": convert_known_value,
    "convert_element_type.default": convert_element_type,
    "any.default": convert_any,
    "amax.default": functools.partial(convert_extreme, "max"),
    "amin.default": functools.partial(convert_extreme, "min"),
    "min.dim": convert_smallest,
    "clamp.Tensor": convert_clamp,
    "unfold.default": convert_unfold,
    "as_strided.default": convert_as_strided,
    "full.default": functools.partial(convert_fill, "_full"),
    "full_like.default": functools.partial(convert_fill, "_full_like"),
    "index.Tensor": convert_index,
    "index_put.default": convert_index_put,
    "scatter_reduce.two": convert_scatter_reduce,
    "scatter_add.default": convert_scatter_add,
    "masked_scatter.default": convert_masked_scatter,
    "floor_divide.default": convert_division,
    "div.Tensor_mode": convert_division,
    "histc.default": convert_histc,
    "grid_sampler_2d.default": convert_grid_sampler,
    "cummax.default": functools.partial(convert_cumulative_extreme, "max"),
    "cummin.default": functools.partial(convert_cumulative_extreme, "min"),
    "grouped_mm_fallback.default": convert_grouped_matmul,
    "_grouped_mm.default": convert_grouped_matmul,
}
