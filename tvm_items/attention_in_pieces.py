"""Attention that a model writes as two matrix products around a softmax, made PyTorch's operator: one kernel then.

softmax(query @ key^T * scale + mask) @ value, where the scale may be a tensor, of one number for each head
"""

import operator
import typing

import torch

from tvm_items.attention import SDPA, can_be_whole, shape
from tvm_items.constants import VIEWS
from tvm_items.exported_graph import insert_call

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.type_as.default, aten._to_copy.default)


class Term(typing.NamedTuple):
    """What scores are multiplied by, or what is added to them, while they have some shape: a view may regroup them."""

    node: object  # of the exported graph
    scores_shape: tuple[int, ...]


class Scores(typing.NamedTuple):
    """What a softmax reads: query @ transposed key * scale * all factors + all masks."""

    query: object  # a node
    transposed_key: object
    scale: float
    factors: list[Term]  # each of one number for all scores of a head, or of what else comes before queries and keys
    masks: list[Term]
    nodes: list  # that compute them, the last first: nothing else reads what they give


def join_attention(exported):
    """Makes one operator of attention in pieces in a torch.export.ExportedProgram that is not decomposed yet.

    Where attention.py has it as one task, and nothing but the product with the values reads the weights.
    """
    graph = exported.graph
    graph.eliminate_dead_code(has_effects)
    for softmax in graph.find_nodes(op="call_function", target=aten.softmax.int):
        if softmax.args[1] in (-1, len(shape(softmax)) - 1):
            scores, readers = read_scores(softmax.args[0], softmax), find_readers(softmax)
            if scores is not None and readers:
                join(scores, readers[-1])
                for node in (*readers[::-1], softmax, *scores.nodes):  # not all are dead code: some write in place
                    if not node.users:
                        graph.erase_node(node)
    graph.eliminate_dead_code(has_effects)
    exported.graph_module.recompile()


def has_effects(node):
    """Returns whether a node may do more than give a value, as the beginning and the end of a vmap() do."""
    is_operator = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
    return node.is_impure() or (node.op == "call_function" and not is_operator)


def find_readers(softmax):
    """Returns the casts and dropouts of a softmax, and last the product that reads them; [] where others read them."""
    readers = [softmax]
    while len(readers[-1].users) == 1:
        weights, (user,) = readers[-1], readers[-1].users
        readers.append(user)
        if user.target in PRODUCTS:
            is_output = any(reader.op == "output" for reader in user.users)  # which a program knows by its name
            is_left = user.args[0] is weights and user.args[1] is not weights
            return readers[1:] if is_left and not is_output else []
        is_dropout = user.target == aten.dropout.default and user.args[2:] == (False,)
        if not is_dropout and not (user.target in CASTS and user.args[0] is weights):
            return []
    return []


def read_scores(node, user):
    """Returns the Scores that a node is, None where it is something else; `user` alone reads it then."""
    if list(node.users) != [user] or node.op != "call_function":
        return None
    if node.target in PRODUCTS:
        return Scores(*node.args, 1.0, [], [], [node])
    if node.target == aten.baddbmm.default and not node.kwargs:
        mask, *operands = node.args
        return Scores(*operands, 1.0, [], [Term(mask, shape(node))], [node])
    if node.target in ADDITIONS and not node.kwargs and all(isinstance(each, torch.fx.Node) for each in node.args):
        ways = (node.args, node.args[::-1]) if node.target == aten.add.Tensor else (node.args,)
        for part, mask in ways:
            scores = read_scores(part, node)
            if scores is not None:
                masks = [*scores.masks, Term(mask, shape(node))]
                return scores._replace(masks=masks, nodes=[node, *scores.nodes])
        return None
    factors = factors_of_heads(node)
    factor = 1.0 if node.target in CASTS or factors or regroups_heads(node) else factor_of(node)
    scores = None if factor is None else read_scores(node.args[0], node)
    if scores is None or (scores.masks and (factors or factor != 1)):  # what is multiplied is the product alone
        return None
    factors = [*scores.factors, *factors]
    return scores._replace(scale=scores.scale * factor, factors=factors, nodes=[node, *scores.nodes])


def regroups_heads(node):
    """Returns whether a node is a view of another one whose last two axes, of queries and keys, are its own."""
    return node.target in VIEWS and shape(node)[-2:] == shape(node.args[0])[-2:]


def factors_of_heads(node):
    """Returns [the Term by which a node multiplies what comes first in it], one number for each head; else []."""
    if node.target != aten.mul.Tensor or not isinstance(node.args[1], torch.fx.Node):
        return []
    source, factor = node.args
    is_of_heads = all(size == 1 for size in shape(factor)[-2:]) and shape(source) == shape(node)
    return [Term(factor, shape(node))] if is_of_heads else []


def factor_of(node):
    """Returns the number by which a node is multiplied, None where it is something else."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or not isinstance(node.args[1], int | float):
        return None
    return node.args[1] if node.target == aten.mul.Tensor else 1 / node.args[1]


def join(scores, product):
    """Puts PyTorch's operator in the place of the product with the values, where it can be one kernel."""
    query, scale = without_factor(scores.query, scores.scale)
    key, scale = without_factor(transpose(scores.transposed_key, product), scale)
    operands = [query, key, product.args[1]]
    if shape(query)[:-1] != shape(product)[:-1]:  # a mask may be larger than what it is added to
        return
    if any(shape(each)[:-2] != shape(product)[:-2] for each in operands):  # a product may repeat its operands
        return
    groups, batch_and_heads = shape(query)[:-2], None
    if len(groups) == 1:
        operands = with_batch(operands, product)
        batch_and_heads = shape(operands[0])[:2]
    factors, masks = (
        [with_groups(term, groups, batch_and_heads, product) for term in terms]
        for terms in (scores.factors, scores.masks)
    )
    for factor in factors:
        operands[0] = insert_call(product, aten.mul.Tensor, operands[0], factor)
    mask = masks[0] if masks else None
    for other in masks[1:]:
        mask = insert_call(product, aten.add.Tensor, mask, other)
    values = [each if each is None else each.meta["val"] for each in (*operands, mask)]
    if not can_be_whole(*values, 0.0):
        return
    whole = insert_call(product, SDPA, *operands, mask, scale=scale)
    if len(shape(product)) == 3:
        for user in list(product.users):
            if is_exchange(user, 0, 1) and shape(whole)[0] == 1:  # the heads go behind the tokens in one step
                exchanged = insert_call(user, aten.transpose.int, whole, 1, 2)
                user.replace_all_uses_with(view(exchanged, shape(user), user))
                user.graph.erase_node(user)
        whole = view(whole, shape(product), product)
    product.replace_all_uses_with(whole)


def without_factor(node, scale):
    """Returns a node without the number that multiplies it, and the scale with it."""
    factor = factor_of(node)
    return (node, scale) if factor is None else (node.args[0], scale * factor)


def transpose(node, user):
    """Returns a node with its last two axes exchanged, which `user` reads then."""
    last = len(shape(node)) - 1
    return node.args[0] if is_exchange(node, last - 1, last) else insert_call(user, aten.transpose.int, node, -2, -1)


def with_batch(operands, user):
    """Returns tensors (batch * heads, tokens, head dim) as (batch, heads, tokens, head dim), of one batch if need be.

    Where heads have been put in front of the tokens, that is done once more behind the view, as attention.py knows it.
    """
    apart = [before_views(node) for node in operands]
    if all(apart) and len({shape(node)[:2] for node in apart}) == 1:
        return apart
    return [
        insert_call(user, aten.transpose.int, view(node.args[0], [1, *shape(node.args[0])], user), 1, 2)
        if is_exchange(node, 0, 1)
        else view(node, [1, *shape(node)], user)
        for node in operands
    ]


def before_views(node):
    """Returns the node of four axes that one is a view of, which has batch and heads in one; None where it is none."""
    sizes = shape(node)[1:]
    while node.target in (*VIEWS, aten.contiguous.default, aten.clone.default):
        node = node.args[0]
        if len(shape(node)) == 4 and shape(node)[2:] == sizes:
            return node
    return None


def with_groups(term, groups, batch_and_heads, user):
    """Returns a Term's node for scores (*groups, queries, keys), or (*batch_and_heads, queries, keys) if not None."""
    if batch_and_heads is None:
        return regrouped(term, groups, user)
    if term.scores_shape[:-2] == batch_and_heads:  # where the model has added it, they were apart
        return term.node
    return mask_with_batch(regrouped(term, groups, user), batch_and_heads, user)


def regrouped(term, groups, user):
    """Returns a Term's node for scores (*groups, queries, keys).

    What is the same for all groups stays so; else it is repeated for those axes that are grouped in another way.
    """
    before, axes = term.scores_shape[:-2], shape(term.node)
    if before == groups:
        return term.node
    axes = (1,) * (len(term.scores_shape) - len(axes)) + axes
    same = 0
    while same < min(len(before), len(groups)) and before[-1 - same] == groups[-1 - same]:
        same += 1
    first, rest = axes[: len(before) - same], axes[len(before) - same :]
    node, groups = view(term.node, axes, user), groups[: len(groups) - same]
    if any(size > 1 for size in first):
        node = insert_call(user, aten.expand.default, node, [*before[: len(first)], *rest])
    else:
        groups = (1,) * len(groups)
    return view(node, [*groups, *rest], user)


def mask_with_batch(mask, batch_and_heads, user):
    """Returns a mask for (batch * heads, tokens, keys) as one for (batch, heads, tokens, keys)."""
    if len(shape(mask)) < 3:
        return mask
    return view(mask, [*((1, 1) if shape(mask)[0] == 1 else batch_and_heads), *shape(mask)[1:]], user)


def view(node, sizes, user):
    return insert_call(user, aten.reshape.default, node, list(sizes))  # a view of a view is none: graph.py


def is_exchange(node, first, second):
    """Returns whether a node exchanges two axes of another one, of which the first comes first."""
    rank = len(shape(node))
    if node.target == aten.transpose.int:
        return sorted(axis % rank for axis in node.args[1:]) == [first, second]
    exchanged = list(range(rank))
    exchanged[first], exchanged[second] = second, first
    return node.target == aten.permute.default and [axis % rank for axis in node.args[1]] == exchanged
