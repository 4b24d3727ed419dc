"""Rows that a mask selects, of which nobody knows how many there are, computed as all rows in an exported graph.

x[mask] becomes all of x, and with it goes the mask. An operator that takes each row by itself gives all rows as well,
and what is written to the places of the rows leaves out those that the mask does. So every size is a number again.
"""

import operator
import typing

import torch

from tvm_items.exported_graph import SAME_VALUES, insert_call, number_values
from tvm_items.known_values import has_unknown_size, insert_value, is_unknown

aten = torch.ops.aten
# Operators that compute along axes, which may not be that of the rows, and where in their arguments these axes stand.
ALONG_AXES = {
    aten._softmax.default: 1,
    aten.amax.default: 1,
    aten.mean.dim: 1,
    aten.sum.dim_IntList: 1,
    aten.select.int: 1,
    aten.slice.Tensor: 1,
    aten.squeeze.dims: 1,
    aten.split_with_sizes.default: 2,
    aten.cat.default: 1,
}
OF_FORM = {aten.view.default, aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.permute.default}
FORMS_OF_PLACES = {aten.alias.default, aten.select.int, aten.slice.Tensor, aten.squeeze.dims, operator.getitem}
FORMS_OF_PLACES |= {aten.split_with_sizes.default, aten.clone.default}
CHECKS = {
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


class Rows(typing.NamedTuple):
    """All rows in the place of those that a mask selects."""

    values: torch.fx.Node  # with all rows along `axis`; a list of tensors where the operator gives several
    mask: torch.fx.Node  # (rows,) of bool: which of them are there
    axis: int | None  # None of the sizes themselves


def compute_all_rows(exported):
    """Gives every tensor of a decomposed ExportedProgram whose size a mask decides all rows of the mask, in place.

    Raises NotImplementedError for what more than the rows that are there would change, and for what is not known here.
    """
    writer = Writer(exported)
    for node in list(exported.graph.nodes):
        if node.target in CHECKS and any(map(has_unknown_size, node.all_input_nodes)):
            exported.graph.erase_node(node)
        elif has_unknown_size(node) or any(source in writer.rows for source in node.all_input_nodes):
            writer.rewrite(node)
    for node in reversed(exported.graph.nodes):
        if has_unknown_size(node) and not node.users:
            exported.graph.erase_node(node)
    exported.graph.lint()


def unknown_axes(value):
    return [axis for axis, size in enumerate(value.shape) if is_unknown(size)]


def is_known_place(node):
    """Returns whether a node has places of a mask as nonzero() gives them."""
    while node.target in FORMS_OF_PLACES:
        node = node.args[0]
    return node.target == aten.lift_fresh_copy.default


class Writer:
    """What the nodes of an ExportedProgram become that depend on how many places masks name."""

    def __init__(self, exported):
        self.exported, self.rows, self.node = exported, {}, None
        self.numbers, self.flat_masks = number_values(exported), {}

    def rewrite(self, node):
        self.node, target = node, node.target
        if node.op == "output":
            raise NotImplementedError("as many outputs as a mask has places")
        if target == aten.nonzero.default:
            self.rows[node] = self.find_places(*node.args)
        elif target == aten.index.Tensor:
            self.rows[node] = self.select(*node.args)
        elif target == aten.index_put.default:
            self.replace(self.write(*node.args))
        elif target == aten.masked_scatter.default:
            self.replace(self.write_in_order(*node.args))
        elif target == aten.sym_size.int:
            if node.args[0] in self.rows:
                self.rows[node] = self.rows[node.args[0]]._replace(axis=None)
        elif isinstance(node.meta.get("val"), torch.SymBool):  # for an assertion
            pass
        elif target is operator.getitem and node.args[0] in self.rows:
            rows = self.rows[node.args[0]]
            self.rows[node] = rows._replace(values=self.call(target, rows.values, node.args[1]))
        else:
            self.rows[node] = self.take_each_row(node)

    def replace(self, new):
        self.node.replace_all_uses_with(new)
        self.exported.graph.erase_node(self.node)

    def call(self, target, *args, **kwargs):
        return insert_call(self.node, target, *args, **kwargs)

    def refuse(self):
        raise NotImplementedError(f"what depends on how many places a mask names, in {self.node.target}")

    def find_places(self, mask):
        """All places of a mask, in the place of those of them that it names."""
        shape = mask.meta["val"].shape
        places = torch.cartesian_prod(*[torch.arange(size) for size in shape]).view(-1, len(shape))
        return Rows(insert_value(self.exported, self.node, places), self.flat(mask), 0)

    def flat(self, mask):
        """Returns a mask with its places in one axis."""
        number = self.numbers.get(mask, mask)
        if number not in self.flat_masks:
            named = mask if mask.meta["val"].dtype == torch.bool else self.call(aten.ne.Scalar, mask, 0)
            self.flat_masks[number] = self.call(aten.reshape.default, named, [mask.meta["val"].numel()])
        return self.flat_masks[number]

    def select(self, source, indices):
        """x[mask], and x[places] of places that a mask named."""
        given = [index for index in indices if index is not None]
        axis = indices.index(given[0])
        if any(index is None for index in indices[axis:]) or source in self.rows:
            self.refuse()
        if len(given) == 1 and given[0] not in self.rows and given[0].meta["val"].dtype == torch.bool and axis == 0:
            mask, shape = self.flat(given[0]), source.meta["val"].shape
            shape = [mask.meta["val"].numel(), *shape[given[0].meta["val"].ndim :]]
            return Rows(self.call(aten.reshape.default, source, shape), mask, 0)
        places, mask = self.all_of(given)
        if not all(map(is_known_place, places)):  # those of rows that are not there could lie anywhere
            self.refuse()
        return Rows(self.call(aten.index.Tensor, source, [*indices[:axis], *places]), mask, axis)

    def all_of(self, nodes):
        """Returns what places, nodes of one axis, become, and the mask that they have in common."""
        if not all(node in self.rows and node.meta["val"].ndim == 1 for node in nodes):
            self.refuse()
        masks = {self.rows[node].mask for node in nodes}
        if len(masks) > 1:
            self.refuse()
        return [self.rows[node].values for node in nodes], masks.pop()

    def write(self, target, indices, values, accumulate=False):
        """x[places] = values, or += where they accumulate; what is left out goes to a row that is dropped then."""
        if target in self.rows:
            self.refuse()
        if len(indices) == 1 and indices[0] is not None and indices[0].meta["val"].dtype == torch.bool:
            return self.write_where(target, indices[0], values, accumulate)
        places, mask = self.all_of(indices)
        shape = list(target.meta["val"].shape)
        sizes, others = shape[: len(places)], shape[len(places) :]
        place = places[0]
        for size, following in zip(sizes[1:], places[1:]):
            place = self.call(aten.add.Tensor, self.call(aten.mul.Tensor, place, size), following)
        last, count = torch.Size(sizes).numel(), mask.meta["val"].numel()
        nowhere = insert_value(self.exported, self.node, torch.full((count,), last))
        place = self.call(aten.where.self, mask, place, nowhere)
        if values in self.rows:
            if self.rows[values].mask is not mask or values.meta["val"].ndim != len(others) + 1:
                self.refuse()
            values = self.rows[values].values
        values = self.call(aten.expand.default, values, [count, *others])
        rows = self.call(aten.reshape.default, target, [last, *others])
        dropped = self.call(aten.slice.Tensor, rows, 0, 0, 1)
        longer = self.call(aten.cat.default, [rows, dropped], 0)
        written = self.call(aten.index_put.default, longer, [place], values, accumulate)
        return self.call(aten.reshape.default, self.call(aten.slice.Tensor, written, 0, 0, last), shape)

    def write_where(self, target, mask, values, accumulate):
        """x[mask] = values, of the rows that the same mask has selected."""
        if values not in self.rows or self.rows[values].mask is not self.flat(mask) or accumulate:
            self.refuse()
        shape, ones = list(target.meta["val"].shape), [1] * (target.meta["val"].ndim - mask.meta["val"].ndim)
        if (
            values.meta["val"].ndim != len(ones) + 1
            or list(values.meta["val"].shape[1:]) != shape[mask.meta["val"].ndim :]
        ):
            self.refuse()
        values = self.call(aten.reshape.default, self.rows[values].values, shape)
        mask = self.call(aten.reshape.default, mask, [*mask.meta["val"].shape, *ones])
        return self.call(aten.where.self, mask, values, target)

    def write_in_order(self, target, mask, source):
        """masked_scatter(): the rows that are there come first, in their order, before it reads as many as it needs."""
        if source not in self.rows or mask in self.rows or target in self.rows or self.rows[source].axis != 0:
            self.refuse()
        rows = self.rows[source]
        count = rows.mask.meta["val"].numel()
        number = insert_value(self.exported, self.node, torch.arange(count))
        later = self.call(aten.add.Tensor, number, count)
        order = self.call(aten.sort.default, self.call(aten.where.self, rows.mask, number, later))
        order = self.call(operator.getitem, order, 1)
        return self.call(aten.masked_scatter.default, target, mask, self.call(aten.index.Tensor, rows.values, [order]))

    def take_each_row(self, node):
        """Returns all rows of an operator that takes each by itself; of one that makes a tensor of as many rows too."""
        sources = [source for source in node.all_input_nodes if source in self.rows]
        masks = {self.rows[source].mask for source in sources}
        value = node.meta["val"]
        first = value[0] if isinstance(value, (list, tuple)) else value
        if len(masks) != 1 or not isinstance(first, torch.Tensor) or len(unknown_axes(first)) != 1:
            self.refuse()
        (mask,), (axis,) = masks, unknown_axes(first)
        if not self.keeps_rows(node, axis):
            self.refuse()
        count = mask.meta["val"].numel()

        def with_all_rows(argument):
            if isinstance(argument, torch.fx.Node) and argument in self.rows:
                return self.rows[argument].values if self.rows[argument].axis is not None else count
            if isinstance(argument, (list, tuple)):
                return type(argument)(map(with_all_rows, argument))
            return argument

        args = with_all_rows(tuple(node.args))
        if node.target in (aten.view.default, aten.reshape.default, aten.expand.default):
            args = (args[0], [count if is_unknown(size) else size for size in value.shape])
        return Rows(self.call(node.target, *args, **node.kwargs), mask, axis)

    def keeps_rows(self, node, axis):
        """Returns whether a node's rows, which it has along `axis`, are those of what it reads, each by itself."""
        tensors = [
            source for source in node.all_input_nodes if source in self.rows and self.rows[source].axis is not None
        ]
        value, target = node.meta["val"], node.target
        if not tensors:  # as many rows, of a number
            return target in (aten.full.default, aten.ones.default, aten.zeros.default)
        source = tensors[0]
        before = source.meta["val"]
        rows_before = self.rows[source].axis
        if target in (aten.mm.default, aten.bmm.default, aten.addmm.default):
            return node.args[-2] is source and tensors == [source] and rows_before == before.ndim - 2
        if target in ALONG_AXES:
            axes = node.args[ALONG_AXES[target]] if len(node.args) > ALONG_AXES[target] else 0
            axes = [a % before.ndim for a in (axes if isinstance(axes, (list, tuple)) else [axes])]
            return len(axes) > 0 and rows_before not in axes and all(self.rows[t].axis == rows_before for t in tensors)
        if target == aten.native_layer_norm.default:
            return rows_before < before.ndim - len(node.args[1]) and tensors == [source]
        if target in OF_FORM:
            in_front = before.shape[:rows_before], value.shape[:axis]
            behind = before.shape[rows_before + 1 :], value.shape[axis + 1 :]
            if target == aten.permute.default:
                return True
            if any(map(is_unknown, (*in_front[0], *in_front[1], *behind[0], *behind[1]))):
                return False
            grows = target == aten.expand.default
            sizes = [tuple(torch.Size(part).numel() for part in pair) for pair in (in_front, behind)]
            return (grows and before.ndim == value.ndim) or all(first == second for first, second in sizes)
        is_pointwise = torch.Tag.pointwise in target.tags or target in SAME_VALUES
        return is_pointwise and all(value.ndim - t.meta["val"].ndim + self.rows[t].axis == axis for t in tensors)
