"""What TVM's importer refuses or gets wrong, rewritten in the exported graph before the import."""

import operator

import torch
from torch.utils._pytree import tree_map

aten = torch.ops.aten

# Operators that give the values of their first argument in another shape or dtype.
SAME_VALUES = {
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.expand.default,
    aten.lift_fresh_copy.default,
    aten.permute.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view.default,
    aten._to_copy.default,
}


def compute_constants_once(exported):
    """Makes one of what several nodes of an ExportedProgram compute alike from constants alone, in place.

    TVM compiles each of them to know its value: 919 of BEiT, whose layers have the same positions.
    """
    graph, constants, numbers = exported.graph, find_constants(exported), number_values(exported)
    known, first = {node for node in graph.nodes if node.op == "get_attr" or node.name in constants}, {}
    for node in graph.nodes:
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op == "call_function" and known.issuperset(node.all_input_nodes) and not is_random:
            known.add(node)
            if (same := first.setdefault(numbers[node], node)) is not node:
                node.replace_all_uses_with(same)
    graph.eliminate_dead_code()


def subtract_integers_by_adding(graph):
    """Makes number - tensor of integers a sum, in place: PyTorch's type promotion pass cannot subtract there.

    XLNet does so with its mask.
    """
    for node in graph.find_nodes(op="call_function", target=aten.sub.Tensor):
        number, tensor = node.args
        if not isinstance(number, torch.fx.Node) and not tensor.meta["val"].is_floating_point() and not node.kwargs:
            with graph.inserting_before(node):
                negative = graph.call_function(aten.neg.default, (tensor,))
            negative.meta["val"] = -tensor.meta["val"]
            node.target, node.args = aten.add.Tensor, (negative, number)


def count_from_the_front(graph):
    """Replaces negative indices of select(), and negative axes of all operators, in place.

    With a negative index, as in hidden[:, -1], the kernel would read in front of the tensor. With a negative axis of
    squeeze() or permute() ConvertLayout, which tvm_tune uses, runs out of memory or makes a layout that is none.
    """
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target == aten.select.int and node.args[2] < 0:
            source, dim, index = node.args
            node.args = (source, dim, index + source.meta["val"].shape[dim])
        counted = []
        for argument, value in zip(node.target._schema.arguments, node.args):
            if argument.name in ("dim", "dims") and value is not None:
                of = node if node.target in (aten.unsqueeze.default, aten.stack.default) else first_tensor(node)
                value = tree_map(lambda axis, rank=of.meta["val"].ndim: axis % rank if rank else axis, value)
            counted.append(value)
        node.args = (*counted, *node.args[len(counted) :])


def first_tensor(node):
    """Returns the node that an operator has as its first argument, or as the first one of a list."""
    return node.args[0] if isinstance(node.args[0], torch.fx.Node) else node.args[0][0]


def count_indices_from_the_front(exported):
    """Adds the size of an axis to the negative indices in tensors, x[:, [-2]], in an ExportedProgram, in place.

    TVM's kernels take them as they are and read or write in front of the tensor (upstream: apache/tvm#20297).
    """
    constants = find_constants(exported)
    for node in exported.graph.nodes:
        if node.target not in (aten.index.Tensor, aten.index_put.default):
            continue
        source, indices, *rest = node.args
        counted = []
        for size, index in zip(source.meta["val"].shape, indices):
            may_be_negative = index is not None and has_negatives(index, constants)
            counted.append(add_to_negatives(exported.graph, node, index, size) if may_be_negative else index)
        node.args = (source, counted, *rest)


def clamp_integers_at_both_ends(graph):
    """Gives clamp() of integers the bound that it lacks, in place: TVM would make infinity an integer."""
    for node in graph.find_nodes(op="call_function", target=aten.clamp.default):
        dtype = node.meta["val"].dtype
        if dtype.is_floating_point or dtype == torch.bool:
            continue
        limits = torch.iinfo(dtype)
        low, high = (*node.args[1:], None, None)[:2]
        node.args = (node.args[0], limits.min if low is None else low, limits.max if high is None else high)


def sort_largest(graph):
    """Makes every topk() a sorted one, in place: TVM has no other, and an order that nobody asked for may be any."""
    for node in graph.find_nodes(op="call_function", target=aten.topk.default):
        values, k, dim, largest, _ = (*node.args, *(-1, True, True)[len(node.args) - 2 :])
        node.args = (values, k, dim, largest, True)


def sort_plainly(graph):
    """Makes every stable sort() a plain one, in place: TVM's is stable."""
    for node in graph.find_nodes(op="call_function", target=aten.sort.stable):
        dim, descending = node.kwargs.get("dim", -1), node.kwargs.get("descending", False)
        node.target, node.args, node.kwargs = aten.sort.default, (node.args[0], dim, descending), {}


def count_upwards(graph):
    """Makes every arange() that counts down one that counts up, times its step, in place.

    Of whole numbers TVM takes two more steps than there are: its formula for their number rounds as for a step upwards.
    """
    for node in list(graph.find_nodes(op="call_function", target=aten.arange.start_step)):
        start, _, step = (*node.args, 1)[:3]
        if step >= 0:
            continue
        value = node.meta["val"]
        if not value.is_floating_point():
            step = int(step)  # XLNet's is -1.0
        with graph.inserting_before(node):
            upwards = graph.call_function(aten.arange.start_step, (0, value.shape[0], 1), dict(node.kwargs))
            scaled = graph.call_function(aten.mul.Tensor, (upwards, step))
            shifted = graph.call_function(aten.add.Tensor, (scaled, start))
        upwards.meta["val"] = scaled.meta["val"] = shifted.meta["val"] = value
        node.replace_all_uses_with(shifted)
        graph.erase_node(node)


def combine_booleans(graph):
    """Makes products and sums of booleans what they are, in place: TVM's code generator knows those of numbers only."""
    for target, logical in ((aten.mul.Tensor, aten.logical_and.default), (aten.add.Tensor, aten.logical_or.default)):
        for node in graph.find_nodes(op="call_function", target=target):
            if node.meta["val"].dtype == torch.bool and all(isinstance(arg, torch.fx.Node) for arg in node.args):
                node.target = logical


def cut_windows(graph):
    """Makes windows of average pooling no larger than the image, in place: TVM would pad the image to their size.

    Along such an axis there is one window, and PyTorch divides by what of the image is in it. EfficientNet's windows
    are as large as it has channels: the padded images would take 67 GB.
    """
    for node in graph.find_nodes(op="call_function", target=aten.avg_pool2d.default):
        image, window, *rest = node.args
        sides = image.meta["val"].shape[-2:]
        has_padding, has_divisor = len(rest) > 1 and any(rest[1]), len(rest) > 4 and rest[4] is not None
        if any(map(operator.gt, window, sides)) and not has_padding and not has_divisor:
            stride, *others = rest  # TVM adds it to the image too
            node.args = (image, list(map(min, window, sides)), list(map(min, stride, sides)), *others)


def keep_statistics_in_fp32(exported):
    """Makes BatchNorms' means and variances fp32 in a program, in place, where nothing else reads them.

    Half precision is cast to fp32 there (operators_in_input_dtype() in importer.py), and these are constants for TVM,
    which compiles a program for the cast of each: 106 in ResNet-50, 2.4 s on one core.
    """
    buffers = exported.graph_signature.inputs_to_buffers
    for norm in exported.graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default):
        for node in norm.args[3:5]:
            if node.name in buffers and all(user.target == norm.target for user in node.users):
                name = buffers[node.name]
                store = exported.state_dict if name in exported.state_dict else exported.constants
                store[name], node.meta["val"] = store[name].float(), node.meta["val"].float()


def shorten_convolutions(graph):
    """Gives convolutions whose output is cut at its ends, [:, :, :-1], less padding there, in place.

    wav2vec 2.0's positions and Mamba's causal convolution are such. TVM would compute what is cut off, too: of wav2vec
    2.0's its default schedule keeps all sums in the shared memory of one block, more than a kernel may declare.
    A padding with two numbers for each dimension is TVM's, not PyTorch's: nothing may run the graph from here on.
    """
    for node in list(graph.find_nodes(op="call_function", target=aten.slice.Tensor)):
        convolution, axis, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
        if convolution.target != aten.convolution.default or len(convolution.users) > 1 or axis < 2 or step != 1:
            continue
        *operands, strides, padding, dilation, transposed, offset, groups = convolution.args
        size, dimensions = convolution.meta["val"].shape[axis], len(strides)
        start, end, _ = slice(start, end).indices(size)
        padding = (2 * list(padding))[: 2 * dimensions]  # in front of each dimension, then behind each
        padding[axis - 2] -= start * strides[axis - 2]
        padding[axis - 2 + dimensions] -= (size - end) * strides[axis - 2]
        if transposed or min(padding) < 0:
            continue
        convolution.args = (*operands, strides, padding, dilation, transposed, offset, groups)
        convolution.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(convolution)
        graph.erase_node(node)


def drop_empty_parts(graph):
    """Drops tensors without an element from concatenations, in place, and makes those that are left anew.

    XLM's cache of keys and values begins with one. TVM refuses parts without the others' axes, and takes a size of 0 in
    the shape of a reshape() for that of its input.
    """
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        parts, *rest = node.args
        node.args = ([part for part in parts if part.meta["val"].numel()] or parts[:1], *rest)
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor) and not value.numel():
            node.target, node.args, node.kwargs = aten.full.default, (list(value.shape), 0), {"dtype": value.dtype}


def drop_numbers_from_output(exported):
    """Drops from an ExportedProgram's output what is no tensor, such as the sizes of Swin's feature maps, in place."""
    output = exported.graph.output_node()
    specs = exported.graph_signature.output_specs
    kept = [i for i, value in enumerate(output.args[0]) if isinstance(value, torch.fx.Node) or value is None]
    output.args = (tuple(output.args[0][i] for i in kept),)
    specs[:] = [specs[i] for i in kept]


def find_constants(exported):
    """Returns {name of a placeholder: tensor} of an ExportedProgram's buffers and constants."""
    signature = exported.graph_signature
    targets = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    values = {**exported.state_dict, **exported.constants}
    return {name: values[target] for name, target in targets.items() if target in values}


def number_values(exported):
    """Returns {node: number}, by which nodes have the same number that compute the same from the same."""
    numbers, known = {}, {}
    for node in exported.graph.nodes:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: f"%{numbers[source]}")
        if node.op == "placeholder" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            key = node.name
        elif node.op == "get_attr" and torch.is_tensor(value := getattr(exported.graph_module, node.target)):
            key = (value.dtype, value.shape, repr(value.tolist()))
        else:
            key = (node.op, node.target, repr(args), repr(kwargs))
        numbers[node] = known.setdefault(key, len(known))
    return numbers


def has_negatives(index, constants):
    """Returns whether an index, a node of an exported graph, may hold negative numbers: a mask never does."""
    if index.meta["val"].dtype == torch.bool:
        return False
    while index.target in SAME_VALUES:
        index = index.args[0]
    if index.op == "placeholder" and index.name in constants:
        return bool((constants[index.name] < 0).any())
    if index.target == aten.arange.start_step:
        start, _, step = (*index.args, 1)[:3]
        return start < 0 or step < 0
    return True


def add_to_negatives(graph, user, index, size):
    """Returns a node of what `index` is to its node `user` when it is counted from the front of an axis."""
    with graph.inserting_before(user):
        is_negative = graph.call_function(aten.lt.Scalar, (index, 0))
        from_the_front = graph.call_function(aten.add.Tensor, (index, size))
        counted = graph.call_function(aten.where.self, (is_negative, from_the_front, index))
    value = index.meta["val"]
    is_negative.meta["val"], from_the_front.meta["val"], counted.meta["val"] = value < 0, value + size, value
    return counted


def insert_call(user, target, *args, **kwargs):
    """Returns a new node of an operator in front of the node `user`."""
    with user.graph.inserting_before(user):
        node = user.graph.call_function(target, args, kwargs)
    args, kwargs = torch.fx.map_arg((args, kwargs), without_values)
    node.meta["val"] = target(*args, **{**kwargs, **({"device": "meta"} if "device" in kwargs else {})})
    return node


def without_values(node):
    """Returns what has the form of a node's tensors, on the device `meta`, which has no values."""
    return tree_map(
        lambda value: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta"),
        node.meta["val"],
    )
