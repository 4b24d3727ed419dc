"""Rotary positions: queries and keys, which they turn alike, are turned at once, in one launch.

Both are heads of one product, and what is done to each head is the same: so it is done to all of them together, and
attention reads queries and keys in what that gives.
"""

import functools

import torch

from tvm_items.attention import SDPA, before_repeat, is_slice_of_heads, projection_of
from tvm_items.constants import aten, is_pointwise, shape
from tvm_items.exported_graph import insert_call

HEADS, WITHIN_A_HEAD = 1, 3  # axes of (batch, heads, tokens, head dim)
INTO_HEADS = [0, 2, 1, 3]  # from (batch, tokens, heads, head dim), and back


def turn_at_once(graph):
    """Rewrites a graph in place: what is done alike to queries and keys is done to the heads of both at once."""
    for attention in graph.find_nodes(op="call_function", target=SDPA):
        query, key = attention.args[0], before_repeat(attention.args[1])
        alike, last = find_what_is_alike(query, key), max(query, key)
        if alike is not None and all(user > last for node in (query, key) for user in node.users):
            compute_at_once(query, key, *alike)
    graph.eliminate_dead_code()


def find_what_is_alike(query, key):
    """Returns (heads from which the queries are computed, those for the keys, the nodes that compute the queries).

    The keys are computed alike, from the heads behind the others in the same product. None where that is not so.
    """
    roots, computed = set(), set()

    @functools.cache
    def is_alike(one, other):
        if one is other:  # it is the same for each head
            return len(shape(one)) < WITHIN_A_HEAD or shape(one)[-WITHIN_A_HEAD] == 1
        if is_root(one) and is_root(other):
            roots.add((one, other))
            return True
        if one.target != other.target or one.kwargs != other.kwargs or len(one.args) != len(other.args):
            return False
        computed.add(one)
        return is_done_to_each_head(one) and all(map(are_alike, one.args, other.args))

    def are_alike(one, other):
        if isinstance(one, (list, tuple)):
            return len(one) == len(other) and all(map(are_alike, one, other))
        return is_alike(one, other) if isinstance(one, torch.fx.Node) else one == other

    if query is key or is_root(query) or not is_alike(query, key) or len(roots) != 1:
        return None
    ((first, second),) = roots
    (product, _, _, end), (also_product, _, start, _) = (projection_of(root).args for root in (first, second))
    are_neighbours = product is also_product and end == start
    return (first, second, computed) if are_neighbours and shape(query)[-1] == shape(first)[-1] else None


def is_root(node):
    """Returns whether a node is heads of a product, in the layout of PyTorch's attention."""
    return node.op == "call_function" and is_slice_of_heads(projection_of(node), shape(node)[-1])


def is_done_to_each_head(node):
    """Returns whether an operator does the same to each head, and to none with another one."""
    if node.op != "call_function" or len(shape(node)) != WITHIN_A_HEAD + 1:
        return False
    is_along_an_axis = node.target in (aten.slice.Tensor, aten.cat.default) and len(node.args) > 1
    return is_pointwise(node) or (is_along_an_axis and node.args[1] in (WITHIN_A_HEAD, -1))


def compute_at_once(query, key, first, second, computed):
    """Replaces queries and keys by parts of what gives both: what is `computed`, from the heads of both at once.

    query, key: nodes; the rest is find_what_is_alike()'s.
    """
    insert = functools.partial(insert_call, max(query, key).next)
    product, axis, start, _ = projection_of(first).args
    batch, _, tokens, head_dim = shape(first)
    heads = shape(query)[HEADS] + shape(key)[HEADS]
    both = insert(aten.slice.Tensor, product, axis, start, start + heads * head_dim)
    both = insert(aten.reshape.default, both, [batch, tokens, heads, head_dim])
    copies = {first: insert(aten.permute.default, both, INTO_HEADS)}

    def copy(node):
        if node in computed and node not in copies:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), copy)
            copies[node] = insert(node.target, *args, **kwargs)
        return copies.get(node, node)

    turned = insert(aten.permute.default, copy(query), INTO_HEADS)
    turned = insert(aten.reshape.default, turned, [batch, tokens, heads * head_dim])
    begin = 0
    for node in (query, key):
        heads = shape(node)[HEADS]
        part = insert(aten.slice.Tensor, turned, 2, begin, begin + heads * head_dim)
        part = insert(aten.reshape.default, part, [batch, tokens, heads, head_dim])
        node.replace_all_uses_with(insert(aten.permute.default, part, INTO_HEADS))
        begin += heads * head_dim
