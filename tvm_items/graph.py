"""The exported graph, made better to tune: less to run, and more that fuses with a convolution or a matrix product."""

import torch

aten = torch.ops.aten
VIEW, PERMUTE = aten.view.default, aten.permute.default
MATRIX_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


def simplify(exported):
    """Rewrites a decomposed torch.export.ExportedProgram in place; it computes the same as before.

    BatchNorm goes into the weights of the convolution before it, and pointwise operators behind matrix products.
    """
    graph = exported.graph
    fold_batch_norms(exported)
    remove_clones(graph)
    move_behind_products(graph)
    merge_views(graph)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


# ---- BatchNorm ------------------------------------------------------------------------------------------------------


def fold_batch_norms(exported):
    """Folds each BatchNorm into the convolution before it, where that has no other user and shares no weights."""
    constants = Constants(exported)
    for norm in exported.graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default):
        convolution = norm.args[0]
        is_plain = convolution.target == aten.convolution.default and not convolution.args[6]  # not a transposed one
        if is_plain and len(convolution.users) == 1 and constants.are_used_once(constants_to_fold(norm, convolution)):
            fold_batch_norm(norm, convolution, constants)


def constants_to_fold(norm, convolution):
    """Returns the nodes that folding writes, or drops: weight, gamma, beta and, where there is one, bias."""
    _, weight, bias, *_ = convolution.args
    _, gamma, beta, *_ = norm.args
    return [weight, gamma, beta, *([] if bias is None else [bias])]


def fold_batch_norm(norm, convolution, constants):
    """Replaces norm(convolution(x)) by a convolution whose weight and bias do the scaling and the shift.

    gamma (w x + b - mean) / sqrt(variance + epsilon) + beta = (s w) x + ((b - mean) s + beta), where
    s = gamma / sqrt(variance + epsilon).
    """
    read = constants.read
    source, weight, bias, *geometry = convolution.args
    _, gamma, beta, mean, variance, _, epsilon = norm.args
    scale = read(gamma) / (read(variance) + epsilon).sqrt()
    constants.write(beta, ((read(bias) if bias is not None else 0) - read(mean)) * scale + read(beta))
    constants.write(weight, read(weight) * scale.reshape(-1, *[1] * (weight.meta["val"].ndim - 1)))
    convolution.args = (source, weight, beta, *geometry)  # beta holds the bias now
    for output in list(norm.users):  # the other two are for training
        if output.args[1] == 0:
            output.replace_all_uses_with(convolution)
        norm.graph.erase_node(output)
    norm.graph.erase_node(norm)


class Constants:
    """The parameters and buffers of an ExportedProgram, by the nodes that stand for them in its graph."""

    def __init__(self, exported):
        signature = exported.graph_signature
        self.parameters = signature.parameters
        self.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.stores = (exported.state_dict, exported.constants)

    def are_used_once(self, nodes):
        """Returns whether all of `nodes` are constants, each with one user."""
        return all(node is not None and node.name in self.names and len(node.users) == 1 for node in nodes)

    def read(self, node):
        """Returns the constant's value in float64."""
        return self._store(node)[self.names[node.name]].double()

    def write(self, node, value):
        """Sets the constant to `value`, rounded to its dtype."""
        store, name = self._store(node), self.names[node.name]
        value = value.to(store[name].dtype)
        store[name] = torch.nn.Parameter(value, requires_grad=False) if name in self.parameters else value

    def _store(self, node):
        return next(store for store in self.stores if self.names[node.name] in store)


# ---- Clones and views -----------------------------------------------------------------------------------------------


def remove_clones(graph):
    """Removes clones that are not for another order in memory: dropout, which does nothing at inference."""
    for clone in graph.find_nodes(op="call_function", target=aten.clone.default):
        if not clone.kwargs:
            clone.replace_all_uses_with(clone.args[0])
            graph.erase_node(clone)


def merge_views(graph):
    """Makes one of two views in a row, and nothing of one that changes nothing; all become reshapes."""
    views = graph.find_nodes(op="call_function", target=VIEW)
    for node in views:
        source = node.args[0]
        if source in views:
            node.replace_input_with(source, source.args[0])
            source = source.args[0]
        if shape(source) == shape(node):
            node.replace_all_uses_with(source)
        node.target = aten.reshape.default  # what it reads may have another order in memory now


# ---- What follows a matrix product ----------------------------------------------------------------------------------


def move_behind_products(graph):
    """Moves pointwise operators in front of the view or permutation that stands between them and a matrix product.

    A Linear layer's product has the shape (tokens, features). Bias, activation, layer scale and residual then fuse with
    it. What else they read is brought into the product's form, where that costs nothing.
    """
    # Nodes that a pointwise operator may come to stand behind: products, their views, and what was moved behind them.
    behind = {node for product in MATRIX_PRODUCTS for node in graph.find_nodes(op="call_function", target=product)}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target == VIEW and node.args[0] in behind:
            behind.add(node)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
            while move_in_front_of_an_operand(node, behind):
                behind.add(node)
                behind.update(user for user in node.users if user.target == VIEW)


def move_in_front_of_an_operand(node, behind):
    """Moves a pointwise operator in front of one of its operands, and returns whether there was one that allows it.

    It must be a view or a permutation of a node of `behind` that nothing else reads, and the operator's other operands
    must be there in the form of that node.
    """
    for operand in node.all_input_nodes:
        if operand.target not in (VIEW, PERMUTE) or len(operand.users) != 1 or operand.args[0] not in behind:
            continue
        if shape(node) != shape(operand):
            continue
        others = [other for other in node.all_input_nodes if other is not operand]
        others_before = [in_form_before(operand, other) for other in others]
        if None not in others_before:
            for other, before in zip(others, others_before):
                node.replace_input_with(other, before)
            swap_with_operand(node, operand)
            return True
    return False


def swap_with_operand(node, operand):
    """Turns node(operand(source)) into operand(node(source))."""
    graph, value = node.graph, node.meta["val"]
    source, arguments = operand.args
    node.replace_input_with(operand, source)
    node.meta["val"] = value.new_empty(shape(source))
    with graph.inserting_after(node):
        after = graph.call_function(operand.target, (node, arguments))
    after.meta["val"] = value
    node.replace_all_uses_with(after, lambda user: user is not after)
    graph.erase_node(operand)


def in_form_before(moved, other):
    """Returns a node with the values of `other`, in the form of what the view or permutation `moved` reads.

    None where that would cost something. A node is inserted where `other` itself or what it reads will not do.
    """
    source, arguments = moved.args
    if other.meta["val"].numel() == 1:
        return other
    if moved.target == VIEW and shape(other) == shape(source)[-1:] == shape(moved)[-1:]:  # one value for each feature
        return other
    if shape(other) != shape(moved):
        return None
    if other.target == moved.target and shape(other.args[0]) == shape(source) and other.args[1] == arguments:
        return other.args[0]
    if moved.target == VIEW and other.meta["val"].is_contiguous():
        return insert_after(other, VIEW, list(shape(source)), other.meta["val"].view(shape(source)))
    if moved.target == PERMUTE and other.target == aten.convolution.default:  # channels-last soon, as `source` is
        axes = [arguments.index(axis) for axis in range(len(arguments))]
        return insert_after(other, PERMUTE, axes, other.meta["val"].permute(axes).contiguous())
    return None


def insert_after(node, target, arguments, value):
    """Returns a new node target(node, arguments) behind `node`; `value` has its shape, dtype and order in memory."""
    with node.graph.inserting_after(node):
        inserted = node.graph.call_function(target, (node, arguments))
    inserted.meta["val"] = value
    return inserted


def shape(node):
    return node.meta["val"].shape
