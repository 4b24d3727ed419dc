"""Rewrites of the exported graph that change its weights: BatchNorm folded, products of the same input made one."""

import functools

import torch

from tvm_items.exported_graph import insert_call

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)

# ---- BatchNorm ------------------------------------------------------------------------------------------------------


def fold_batch_norms(exported):
    """Folds BatchNorms into the convolution or Linear layer before them, if no other reads that, nor its weights."""
    constants = Constants(exported)
    for norm in exported.graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default):
        product = product_before(norm)
        if product is not None:
            weight, *bias = constants_of_product(product)
            _, gamma, beta, *_ = norm.args
            if constants.are_used_once([weight, *bias, gamma, beta]):
                fold_batch_norm(norm, product, weight, bias, constants)


def product_before(norm):
    """Returns the node whose channels a BatchNorm normalizes, which nothing else reads; None where it is no product."""
    product = source = norm.args[0]
    while product.target in VIEWS and len(product.users) == 1:
        product = product.args[0]
    if len(product.users) != 1:
        return None
    if product.target == aten.convolution.default:
        is_transposed = product.args[6]
        return product if product is source and not is_transposed else None
    is_linear = product.target in (aten.mm.default, aten.addmm.default)
    return product if is_linear and shape(source)[1:] == shape(product)[1:] else None


def fold_batch_norm(norm, product, weight, bias, constants):
    """Replaces norm(product(x)) by a product whose weight and bias do the scaling and the shift.

    gamma (w x + b - mean) / sqrt(variance + epsilon) + beta = (s w) x + ((b - mean) s + beta), where
    s = gamma / sqrt(variance + epsilon). bias: a list of its node, or an empty one.
    """
    read = constants.read
    _, gamma, beta, mean, variance, _, epsilon = norm.args
    scale = read(gamma) / (read(variance) + epsilon).sqrt()
    constants.write(beta, (sum(map(read, bias)) - read(mean)) * scale + read(beta))
    constants.write(weight, read(weight) * scale.reshape(-1, *[1] * (weight.meta["val"].ndim - 1)))
    if product.target == aten.convolution.default:  # beta holds the bias now
        product.args = (*product.args[:2], beta, *product.args[3:])
    else:
        product.target, product.args = aten.addmm.default, (beta, *product.args[-2:])
    for output in list(norm.users):  # the other two are for training
        if output.args[1] == 0:
            output.replace_all_uses_with(norm.args[0])
        norm.graph.erase_node(output)
    norm.graph.erase_node(norm)


# ---- Products of the same input -------------------------------------------------------------------------------------


def merge_parallel_products(exported):
    """Makes one product of those that read the same input, as the projections to queries, keys and values do.

    Their weights and biases become one, which is computed once, and each result is a slice of its columns: one launch,
    which fills more of a GPU than each of them. A product that something pointwise follows stays alone: that fuses with
    it, and would not with a slice. Not so where it is normalized, as Qwen3's queries and keys are.
    """
    constants = Constants(exported)
    groups = {}
    for target in (aten.mm.default, aten.addmm.default):
        for product in exported.graph.find_nodes(op="call_function", target=target):
            is_alone = is_followed_by_pointwise(product) and not is_normalized(product)
            if constants.include(constants_of_product(product)) and not is_alone:
                source = input_of_product(product)
                groups.setdefault((behind_views(source), shape(source), source.meta["val"].dtype), []).append(product)
    for products in groups.values():
        if len(products) > 1:
            merge_products(sorted(products))


def input_of_product(product):
    return product.args[-2]


def constants_of_product(product):
    """Returns the nodes of a layer's weight and, where there is one, bias: Linear or a convolution; else [None]."""
    if product.target == aten.convolution.default:
        return [node for node in product.args[1:3] if node is not None]
    *bias, _, weight = product.args
    is_linear = weight.target == aten.permute.default and len(weight.users) == 1 and not product.kwargs
    return [weight.args[0], *bias] if is_linear else [None]


def behind_views(node):
    """Returns what the node is a view of, or a view of a view and so on; itself where it is none."""
    while node.target in VIEWS:
        node = node.args[0]
    return node


def is_followed_by_pointwise(node):
    """Returns whether a pointwise operator reads the node, or a view of it."""
    return any(
        is_followed_by_pointwise(user) if user.target == aten.view.default else is_pointwise(user)
        for user in node.users
    )


def is_normalized(node):
    """Returns whether a mean over the last axis reads the node, or views, casts or squares of it."""
    return any(
        is_normalized(user) if user.target in VIEWS or is_cast(user) or is_square(user) else is_mean_of_rows(user)
        for user in node.users
    )


def is_square(node):
    is_power = node.target == aten.pow.Tensor_Scalar and node.args[1] == 2
    return is_power or (node.target == aten.mul.Tensor and node.args[0] is node.args[1])


def is_mean_of_rows(node):
    if node.target != aten.mean.dim or not node.args[1]:  # of all axes
        return False
    rank = len(shape(node.args[0]))
    return [axis % rank for axis in node.args[1]] == [rank - 1]


def is_cast(node):
    return node.target == aten._to_copy.default and node.kwargs.keys() == {"dtype"}


def is_pointwise(node):
    """Returns whether each element of the node's value depends on one element of what it reads; casts have no tag."""
    return is_cast(node) or torch.Tag.pointwise in getattr(node.target, "tags", ())


def merge_products(products):
    """Replaces Linear layers' products of the same input, in the graph's order, by slices of one that comes first."""
    insert = functools.partial(insert_call, products[0])
    weights, biases = zip(*((constants_of_product(product) + [None])[:2] for product in products))
    widths = [shape(weight)[0] for weight in weights]
    bias, like = None, weights[0].meta["val"]
    if any(biases):
        zeros = functools.partial(insert, aten.full.default, dtype=like.dtype, device=like.device)
        parts = [bias or zeros([width], 0) for bias, width in zip(biases, widths)]
        bias = insert(aten.cat.default, parts)
    merged = insert_product(insert, input_of_product(products[0]), insert(aten.cat.default, list(weights)), bias)
    start = 0
    for product, width in zip(products, widths):
        product.replace_all_uses_with(insert(aten.slice.Tensor, merged, 1, start, start + width))
        start += width


def insert_product(insert, source, weight, bias=None):
    """Inserts the product of a Linear layer, and returns it; all are nodes, and insert is insert_call() at a place."""
    operands = source, insert(aten.permute.default, weight, [1, 0])
    return insert(aten.addmm.default, bias, *operands) if bias else insert(aten.mm.default, *operands)


class Constants:
    """The parameters and buffers of an ExportedProgram, by the nodes that stand for them in its graph."""

    def __init__(self, exported):
        signature = exported.graph_signature
        self.parameters = signature.parameters
        self.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.stores = (exported.state_dict, exported.constants)

    def include(self, nodes):
        """Returns whether all of `nodes` are constants."""
        return all(node is not None and node.name in self.names for node in nodes)

    def are_used_once(self, nodes):
        """Returns whether all of `nodes` are constants, each with one user."""
        return self.include(nodes) and all(len(node.users) == 1 for node in nodes)

    def read(self, node):
        """Returns the constant's value in float64."""
        return self._store(node)[self.names[node.name]].double()

    def write(self, node, value):
        """Sets the constant to `value`, rounded to its dtype; it may have another shape."""
        store, name = self._store(node), self.names[node.name]
        value = value.to(store[name].dtype)
        node.meta["val"] = node.meta["val"].new_empty(value.shape)
        store[name] = torch.nn.Parameter(value, requires_grad=False) if name in self.parameters else value

    def _store(self, node):
        return next(store for store in self.stores if self.names[node.name] in store)


def shape(node):
    return node.meta["val"].shape
