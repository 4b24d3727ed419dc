"""What a model computes whatever it is fed, such as masks and grids of patches: known while torch.export traces it.

Sizes, loops and choices of rows may depend on such values. PyTorch keeps the values of single numbers only, and takes
what depends on others for unknown: the exported graph then has sizes without a number, of which TVM makes nothing.
"""

import contextlib
import functools
import unittest.mock

import torch
from torch._subclasses import fake_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from harness.inputs import LAYOUT
from tvm_items.exported_graph import find_constants

MAX_KNOWN = 2**18  # elements of a tensor whose values are kept
aten = torch.ops.aten
FACTORIES = {
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.full.default,
    aten.ones.default,
    aten.scalar_tensor.default,
    aten.zeros.default,
}


LACKING = {aten.erfinv.default}  # of TVM, and models give them numbers that they know


class WithKnownInputs(torch.nn.Module):
    """A model with some of its inputs as constants."""

    def __init__(self, model, inputs):
        super().__init__()
        self.model = model
        self.known = {name: tensor.tolist() for name, tensor in inputs.items()}

    def forward(self, **inputs):
        return self.model(**inputs, **{name: torch.tensor(values) for name, values in self.known.items()})


def fix_inputs(model, inputs, fix_masks=False):
    """Returns a model that needs only some of `inputs`, {name: tensor}, and these.

    What only says how the others are laid out, such as a grid of patches, is fixed, and on request masks of ones are.
    """
    known = {
        name: tensor
        for name, tensor in inputs.items()
        if name in LAYOUT or (fix_masks and name.endswith("_mask") and not tensor.is_floating_point() and tensor.all())
    }
    return WithKnownInputs(model, known), {name: tensor for name, tensor in inputs.items() if name not in known}


@contextlib.contextmanager
def known_values(model):
    """Makes torch.export of a model keep the values of what does not depend on the inputs while it lasts."""
    dispatch = fake_tensor.FakeTensorMode._dispatch_impl
    convert = fake_tensor.FakeTensorConverter.from_real_tensor
    to_list = fake_tensor.FakeTensor.tolist
    numbers = {id(buffer) for buffer in model.buffers() if not buffer.dtype.is_floating_point}

    def convert_and_keep(converter, mode, tensor, make_constant=False, *args, **kwargs):
        is_known = make_constant or (id(tensor) in numbers and mode.may_turn_const(tensor))
        return convert(converter, mode, tensor, is_known, *args, **kwargs)

    def dispatch_and_keep(mode, func, types, args, kwargs):
        sizes = tree_leaves((args, kwargs))
        if func not in FACTORIES or any(isinstance(size, torch.SymInt) for size in sizes):
            return dispatch(mode, func, types, args, kwargs)
        with fake_tensor.no_dispatch():
            value = func(*args, **kwargs)
        is_small = mode.may_turn_const(value)
        return mode.fake_tensor_converter.from_real_tensor(mode, value, make_constant=is_small)

    def to_list_of_tensors(tensor):  # numbers that are not known stay in tensors, which KnownNumbers reads
        return list(tensor.unbind()) if tensor.ndim == 1 and is_unknown_number(tensor) else to_list(tensor)

    with (
        unittest.mock.patch.object(fake_tensor.FakeTensor, "tolist", to_list_of_tensors),
        unittest.mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", MAX_KNOWN),
        unittest.mock.patch.object(fake_tensor.FakeTensorMode, "_dispatch_impl", dispatch_and_keep),
        unittest.mock.patch.object(fake_tensor.FakeTensorConverter, "from_real_tensor", convert_and_keep),
        unittest.mock.patch.object(torch.nn.Module, "to", functools.partialmethod(convert_module, torch.nn.Module.to)),
    ):
        fake_tensor.FakeTensorMode.cache_clear()  # of results without values
        with KnownNumbers():
            yield


class KnownNumbers(TorchFunctionMode):
    """Makes torch.tensor() and texts of known numbers work in a trace, and slices and parts of unknown sizes.

    Such slices and parts become rows that masks select, for selected_rows.py.
    """

    def __init__(self):
        super().__init__()
        self.masks, self.size = [], None  # of the last tensor that was split: of each part; its rows

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_listed = function is torch.tensor and args and isinstance(args[0], (list, tuple))
        if is_listed or (function is torch.Tensor.__format__ and not args[0].ndim):
            args = tree_map(lambda value: value.item() if isinstance(value, torch.Tensor) else value, args)
            function = format if function is torch.Tensor.__format__ else function
        elif function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and is_between_unknown(args[1]):
            args = (args[0], mask_between(args[0].shape[0], args[1]), *args[2:])
        elif function in (torch.split, torch.Tensor.split) and any(map(is_unknown_number, tree_leaves(args[1]))):
            return self.split(args[0], args[1], *args[2:], **kwargs)
        elif function is torch.cat and args and self.are_parts(args[0]) and (*args[1:], *kwargs.values()) in ((), (0,)):
            return self.join(args[0])
        return function(*args, **kwargs)

    def split(self, tensor, sizes, dim=0):
        """Returns the parts of a tensor, whose sizes, numbers in tensors, add up to its first axis."""
        if dim != 0:
            raise NotImplementedError("parts of unknown sizes along another axis than the first")
        ends = torch.stack(list(map(torch.as_tensor, sizes))).cumsum(0)
        self.size = tensor.shape[0]
        self.masks = [mask_between(self.size, slice(end - size, end)) for end, size in zip(ends, sizes)]
        return tuple(tensor[mask] for mask in self.masks)

    def are_parts(self, tensors):
        """Returns whether tensors may be the parts that split() has made last, or what became of them."""
        return len(tensors) == len(self.masks) and all(is_unknown(tensor.shape[0]) for tensor in tensors)

    def join(self, parts):
        """Returns what was split and is joined again: selected_rows.py refuses parts of another order."""
        joined = parts[0].new_zeros((self.size, *parts[0].shape[1:]))
        for mask, part in zip(self.masks, parts):
            joined[mask] = part
        return joined


def is_unknown_number(value):
    """Returns whether a value is a tensor of numbers that depend on the inputs."""
    return isinstance(value, torch.Tensor) and getattr(value, "constant", None) is None


def is_between_unknown(places):
    """Returns whether an index is a slice, all of whose rows count, with an end that depends on the inputs."""
    if not isinstance(places, slice) or places.step not in (None, 1):
        return False
    return is_unknown_number(places.start) or is_unknown_number(places.stop)


def mask_between(size, places):
    """Returns which of `size` rows a slice names, whose ends may be tensors and count from the back, as a mask."""
    row, mask = torch.arange(size), torch.ones(size, dtype=torch.bool)
    for end, is_start in ((places.start, True), (places.stop, False)):
        if end is not None:
            end = torch.as_tensor(end)
            end = torch.where(end < 0, end + size, end)
            mask = mask & ((row >= end) if is_start else (row < end))
    return mask


def convert_module(module, convert, *args, **kwargs):
    """Calls torch.nn.Module.to(), as a model's forward() may, where there is something to do: a trace cannot."""
    _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    numbers = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    if dtype and all(tensor.dtype == dtype for tensor in numbers):
        return module
    return convert(module, *args, **kwargs)


def has_unknown_sizes(exported):
    """Returns whether a size in the graph of an ExportedProgram depends on values of tensors."""
    return any(map(has_unknown_size, exported.graph.nodes))


def has_unknown_size(node):
    """Returns whether a node is a number that values decide, or a tensor with such a size."""
    values = tree_leaves(node.meta.get("val"))
    return any(any(map(is_unknown, v.shape if isinstance(v, torch.Tensor) else [v])) for v in values)


def is_unknown(size):
    return isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))


# ---- In the exported graph ------------------------------------------------------------------------------------------


def fold_known_values(exported):
    """Puts the values themselves in the place of what an ExportedProgram computes from constants alone, in place.

    A mask among indices becomes the places that it names: TVM takes no others.
    """
    graph, values = exported.graph, find_constants(exported)
    for node in graph.nodes:
        if node.op == "call_function" and all(source.name in values for source in node.all_input_nodes):
            evaluate(node, values)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.name not in values:
            for source in node.all_input_nodes:
                if source.op == "call_function" and isinstance(values.get(source.name), torch.Tensor):
                    node.replace_input_with(source, insert_value(exported, node, values[source.name]))
            if node.target in (aten.index.Tensor, aten.index_put.default):
                replace_masks(exported, node)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.name in values and not node.users:  # an assertion of them too
            graph.erase_node(node)


def fold_what_tvm_lacks(exported):
    """Puts known values into an ExportedProgram in place, if it has an operator that is there for no others."""
    if any(node.target in LACKING for node in exported.graph.nodes):
        fold_known_values(exported)


def evaluate(node, values):
    """Adds a node's value to {name: value} where that is not random, nor too large."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: values[source.name])
    value = node.target(*args, **kwargs)
    if sum(leaf.numel() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)) <= MAX_KNOWN:
        values[node.name] = value


def insert_value(exported, user, value):
    """Returns a node of a tensor's value, in front of the node `user`."""
    names = vars(exported.graph_module)["_buffers"]
    name = f"known_value_{len(names)}"
    exported.graph_module.register_buffer(name, value.contiguous().clone())
    with exported.graph.inserting_before(user):
        node = exported.graph.call_function(aten.lift_fresh_copy.default, (exported.graph.get_attr(name),))
    node.meta["val"] = value.to("meta")
    return node


def replace_masks(exported, node):
    """Replaces known masks among the indices of a node by the places that they name, in place."""
    source, indices, *rest = node.args
    places = []
    for index in indices:
        if index is not None and index.meta["val"].dtype == torch.bool and is_known(index):
            mask = getattr(exported.graph_module, index.args[0].target)
            places += [insert_value(exported, node, place) for place in mask.nonzero(as_tuple=True)]
        else:
            places.append(index)
    node.args = (source, places, *rest)


def is_known(node):
    return node.target == aten.lift_fresh_copy.default and node.args[0].op == "get_attr"
