"""What is done alike to queries and keys, head by head, is done to both at once: rotary positions, norms of heads.

Both are heads of one product, and attention reads queries and keys in what that gives.
"""

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from tvm_items.attention import SDPA, before_repeat, is_slice_of_heads, projection_of
from tvm_items.constants import VIEWS, Constants, aten, behind_views, is_pointwise, shape
from tvm_items.exported_graph import insert_call

RANK = 4
HEADS, HEADS_OF_PRODUCT = 1, 2  # axes of (batch, heads, tokens, head dim) and of (batch, tokens, heads, head dim)
EXCHANGE = [0, 2, 1, 3]  # makes one of these the other
WITHIN_A_HEAD = (RANK - 1, -1)
REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList)


def compute_at_once(exported):
    """Rewrites a decomposed program in place: what is done alike to queries and keys is done to the heads of both."""
    graph, constants = exported.graph, nodes_of_weights(exported)
    for attention in graph.find_nodes(op="call_function", target=SDPA):
        query, key = attention.args[0], before_repeat(attention.args[1])
        last = max(query, key)
        is_read_later = all(user > last for node in (query, key) for user in node.users)
        # What is not computed at all attention reads where it is.
        is_computed = not any(is_slice_of_heads(projection_of(node), shape(node)[-1]) for node in (query, key))
        if query is not key and is_computed and is_read_later:
            joined = Joiner(constants, last.next).join(query, key)
            if joined is not None and joined[1] == HEADS:
                read_parts(joined[0], query, key)
    graph.eliminate_dead_code()


def nodes_of_weights(exported):
    """Returns the nodes of a program whose values depend on the model's weights alone."""
    weights, constants = Constants(exported), set()
    for node in exported.graph.nodes:
        is_weight = node.op == "placeholder" and weights.include([node])
        if is_weight or (node.op == "call_function" and constants.issuperset(node.all_input_nodes)):
            constants.add(node)
    return constants


def read_parts(both, query, key):
    """Puts parts of a node with the heads of both in the place of queries and keys, as if it were a product."""
    batch, heads, tokens, head_dim = shape(both)
    place, begin = both.next, 0
    both = insert_call(place, aten.permute.default, both, EXCHANGE)
    both = insert_call(place, aten.reshape.default, both, [batch, tokens, heads * head_dim])
    for node in (query, key):
        heads = shape(node)[HEADS]
        part = insert_call(place, aten.slice.Tensor, both, 2, begin, begin + heads * head_dim)
        part = insert_call(place, aten.reshape.default, part, [batch, tokens, heads, head_dim])
        node.replace_all_uses_with(insert_call(place, aten.permute.default, part, EXCHANGE))
        begin += heads * head_dim


class Joiner:
    """Makes nodes that compute for the heads of queries and keys at once what nodes for each compute alike."""

    def __init__(self, constants, place):
        self.constants, self.place = constants, place  # the new nodes stand in front of the node `place`
        self.joined = {}  # what join() has returned

    def insert(self, target, *args, **kwargs):
        return insert_call(self.place, target, *args, **kwargs)

    def join(self, one, other):
        """Returns (a node for the heads of both, their axis) of a node for queries and one for keys.

        None where they do not compute the same from neighbouring heads of one product on.
        """
        if (one, other) not in self.joined:
            ways = (self.join_heads, self.join_same, self.join_with_factor)
            self.joined[one, other] = next(filter(None, (way(one, other) for way in ways)), None)
        return self.joined[one, other]

    def join_heads(self, one, other):
        """Does it for heads of a product, viewed as (batch, tokens, heads, head dim)."""
        if not (is_view_of_heads(one) and is_view_of_heads(other)):
            return None
        parts, (batch, tokens, _, head_dim) = [behind_views(node) for node in (one, other)], shape(one)
        if (*shape(other)[:2], shape(other)[-1]) != (batch, tokens, head_dim):
            return None
        (product, axis, start, middle), (also_product, _, also_middle, end) = (part.args for part in parts)
        if product is not also_product or middle != also_middle:
            return None
        both = self.insert(aten.slice.Tensor, product, axis, start, end)
        return self.insert(aten.reshape.default, both, [batch, tokens, -1, head_dim]), HEADS_OF_PRODUCT

    def join_same(self, one, other):
        """Does it for nodes of the same operator, which does the same to each head."""
        (operands, form), (others, other_form) = tree_flatten(one.args), tree_flatten(other.args)
        if one.op != "call_function" or one.target != other.target or one.kwargs != other.kwargs or form != other_form:
            return None
        is_exchange = one.target == aten.permute.default and one.args[1:] == other.args[1:] == (EXCHANGE,)
        if not is_exchange and not is_done_to_each_head(one):
            return None
        pairs = list(zip(operands, others))
        joined = [self.join(*pair) if all(isinstance(node, torch.fx.Node) for node in pair) else None for pair in pairs]
        axes = {axis for _, axis in filter(None, joined)}
        if len(axes) != 1:
            return None
        (axis,) = axes
        after = HEADS_OF_PRODUCT + HEADS - axis if is_exchange else axis
        heads = [shape(node)[after] for node in (one, other)]
        if any(each and [shape(node)[axis] for node in pair] != heads for each, pair in zip(joined, pairs)):
            return None
        both = [each[0] if each else self.join_others(*pair, axis, heads) for each, pair in zip(joined, pairs)]
        if any(new is None and old is not None for new, old in zip(both, operands)):
            return None
        return self.insert(one.target, *tree_unflatten(both, form), **one.kwargs), after

    def join_with_factor(self, one, other):
        """Does it where queries alone are multiplied by a constant: keys then are by ones."""
        if one.target != aten.mul.Tensor:
            return None
        for value, factor in (one.args, one.args[::-1]):
            joined = self.join(value, other) if factor in self.constants and isinstance(value, torch.fx.Node) else None
            if joined is not None and shape(value) == shape(one):
                both, axis = joined
                of_keys = self.insert(aten.ones_like.default, factor)
                factor = self.join_constants(factor, of_keys, axis, (shape(one)[axis], shape(other)[axis]))
                return factor and (self.insert(aten.mul.Tensor, both, factor), axis)
        return None

    def join_others(self, one, other, axis, heads):
        """Returns what stands for two operands that are not computed from heads; None where nothing can."""
        if not isinstance(one, torch.fx.Node):
            return one if one == other else None
        if one is other and (len(shape(one)) < RANK - axis or shape(one)[axis - RANK] == 1):
            return one  # it is the same for each head
        return self.join_constants(one, other, axis, heads) if self.constants.issuperset((one, other)) else None

    def join_constants(self, one, other, axis, heads):
        """Returns one constant for the heads of both from that of queries and that of keys; None where none can be."""
        sizes = [[1] * (RANK - len(shape(node))) + list(shape(node)) for node in (one, other)]
        expanded = [[*each[:axis], count, *each[axis + 1 :]] for each, count in zip(sizes, heads)]
        is_of_heads = all(len(each) == RANK and each[axis] in (1, count) for each, count in zip(sizes, heads))
        is_alike = [*expanded[0][:axis], *expanded[0][axis + 1 :]] == [*expanded[1][:axis], *expanded[1][axis + 1 :]]
        if not (is_of_heads and is_alike) or one.meta["val"].dtype != other.meta["val"].dtype:
            return None
        parts = [
            self.insert(aten.expand.default, self.insert(aten.reshape.default, node, before), after)
            for node, before, after in zip((one, other), sizes, expanded)
        ]
        return self.insert(aten.cat.default, parts, axis)


def is_view_of_heads(node):
    """Returns whether a node is a view (batch, tokens, heads, head dim) of columns of a product, whole heads of it."""
    if node.target not in VIEWS or len(shape(node)) != RANK:
        return False
    part, (_, _, heads, head_dim) = behind_views(node), shape(node)
    return is_slice_of_heads(part, head_dim) and shape(part)[-1] == heads * head_dim  # and not samples for heads


def is_done_to_each_head(node):
    """Returns whether an operator does the same to each head, and to none with another one."""
    if len(shape(node)) != RANK:
        return False
    is_along_an_axis = node.target in (aten.slice.Tensor, aten.cat.default) and len(node.args) > 1
    is_reduction = node.target in REDUCTIONS and node.args[1:] in [([axis], True) for axis in WITHIN_A_HEAD]
    return is_pointwise(node) or is_reduction or (is_along_an_axis and node.args[1] in WITHIN_A_HEAD)
