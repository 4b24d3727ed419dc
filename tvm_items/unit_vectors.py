"""Vectors divided by their length, as cosine attention and CLIP's embeddings are: one reduction and what follows it.

PyTorch has an operator for the length, which TVM's importer makes a launch of its own, with a power of each element.
"""

import functools

import torch

from tvm_items.constants import aten, shape
from tvm_items.exported_graph import insert_call


def divide_by_root_of_squares(graph):
    """Rewrites a decomposed graph in place: x / max(length, limit) becomes x * rsqrt(max(sum of squares, limit ** 2)).

    In fp32, as PyTorch computes the length, and before a permutation that leaves the vectors whole: attention reads
    tokens before heads. A factor that is the same for a whole vector goes with it.
    """
    for division in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        source, divisor = division.args
        limit = limit_of_length(divisor, source)
        if limit is not None and source.meta["val"].dtype in (torch.float16, torch.bfloat16, torch.float32):
            replace(division, limit)
    graph.eliminate_dead_code()


def limit_of_length(node, source):
    """Returns the least that a node is which is the length of `source` along its last axis, 0 where it has no limit.

    None where it is something else.
    """
    if not isinstance(node, torch.fx.Node):
        return None
    limit = 0
    if node.target == aten.expand.default:
        node = node.args[0]
    if node.target == aten.clamp.default and len(node.args) == 2:
        node, limit = node.args
    if node.target != aten.linalg_vector_norm.default or node.kwargs or not isinstance(limit, int | float):
        return None
    last = len(shape(source)) - 1
    is_length = node.args[1:] in [(2, [axis], True) for axis in (-1, last)]
    has_square = limit == 0 or (limit > 0 and limit**2 >= torch.finfo(torch.float32).tiny)
    return limit if is_length and node.args[0] is source and has_square else None


def replace(division, limit):
    """Puts the product with the reciprocal of the length in the place of a division, and of a factor behind it."""
    source, last, factor, order = division.args[0], division, None, None
    if len(division.users) == 1:
        (user,) = division.users
        factor = factor_of_vectors(user, division)
        last = user if factor is not None else division
    dtype, rank = last.meta["val"].dtype, len(shape(source))
    if source.target == aten.permute.default and source.args[1][-1] % rank == rank - 1:
        source, order = source.args
    insert = functools.partial(insert_call, last)
    source = cast(source, torch.float32, insert)
    # TVM fuses what follows with a mean, and not with a sum.
    squares = insert(aten.mean.dim, insert(aten.mul.Tensor, source, source), [-1], True)
    squares = insert(aten.mul.Tensor, squares, float(shape(source)[-1]))
    if limit:
        squares = insert(aten.clamp.default, squares, limit**2)
    value = insert(aten.mul.Tensor, source, insert(aten.rsqrt.default, squares))
    if factor is not None:
        value = insert(aten.mul.Tensor, value, before_permutation(factor, order, rank, insert))
    value = cast(value, dtype, insert)
    last.replace_all_uses_with(value if order is None else insert(aten.permute.default, value, order))


def cast(node, dtype, insert):
    return node if node.meta["val"].dtype == dtype else insert(aten._to_copy.default, node, dtype=dtype)


def factor_of_vectors(node, vectors):
    """Returns what a node multiplies `vectors` by, where that is one number for each or for several; else None."""
    if node.target != aten.mul.Tensor or shape(node) != shape(vectors):
        return None
    others = [other for other in node.args if other is not vectors]
    is_of_vectors = len(others) == 1 and isinstance(others[0], torch.fx.Node) and shape(others[0])[-1:] == (1,)
    return others[0] if is_of_vectors else None


def before_permutation(node, order, rank, insert):
    """Returns what becomes `node`, which is repeated along some axes of a tensor of this rank, by a permutation."""
    if order is None:
        return node
    node = insert(aten.view.default, node, [1] * (rank - len(shape(node))) + list(shape(node)))
    axes = [axis % rank for axis in order]
    return insert(aten.permute.default, node, [axes.index(axis) for axis in range(rank)])
