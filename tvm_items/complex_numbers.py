"""Complex numbers and Fourier transforms, of which TVM has neither, as real arithmetic in an exported graph.

A complex tensor becomes two real ones of its shape. A transform becomes a product with the matrix of its cosines and
one with that of its sines: n² operations for n values, where a fast one takes n log n.
"""

import math

import torch

from tvm_items.exported_graph import SAME_VALUES, find_constants, insert_call
from tvm_items.known_values import insert_value

MAX_TRANSFORM = 4096  # values along an axis: a matrix of 64 MiB
aten = torch.ops.aten


def make_real(exported):
    """Replaces every complex tensor of a decomposed ExportedProgram by its real and imaginary part, in place.

    Raises NotImplementedError for an operator on complex numbers that is not known here, and for complex inputs.
    """
    if not any(is_complex(node) for node in exported.graph.nodes):
        return
    rewriter = Rewriter(exported)
    for node in list(exported.graph.nodes):
        if is_complex(node) or any(map(is_complex, node.all_input_nodes)):
            rewriter.rewrite(node)
    for node in reversed(exported.graph.nodes):
        if is_complex(node):
            exported.graph.erase_node(node)
    exported.graph.lint()


def is_complex(node):
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


class Rewriter:
    """The nodes of an ExportedProgram's graph that are complex, and the two real ones that each of them becomes."""

    def __init__(self, exported):
        self.exported, self.constants = exported, find_constants(exported)
        self.parts = {}  # complex node -> (real part, imaginary part or None where it is zero)
        self.node = None  # that is being rewritten: new ones stand before it

    def rewrite(self, node):
        self.node = node
        if node.op == "placeholder":
            self.parts[node] = self.read_constant(node)
        elif node.target == aten._assert_tensor_metadata.default:
            self.exported.graph.erase_node(node)
        elif node.target in SAME_VALUES or node.target == aten.cat.default:
            self.parts[node] = self.change_form(node)
        elif node.target in OPERATORS:
            result = OPERATORS[node.target](self, *node.args, **node.kwargs)
            if is_complex(node):
                self.parts[node] = result
            else:
                node.replace_all_uses_with(result)
                self.exported.graph.erase_node(node)
        else:
            raise NotImplementedError(f"complex numbers in {node.target}")

    def read_constant(self, node):
        if node.name not in self.constants:
            raise NotImplementedError("complex numbers among the inputs")
        value = self.constants[node.name]
        self.node = next(other for other in self.exported.graph.nodes if other.op != "placeholder")
        specs = self.exported.graph_signature.input_specs
        spec = next(spec for spec in specs if getattr(spec.arg, "name", None) == node.name)
        specs.remove(spec)
        self.exported.constants.pop(spec.target, None)
        return tuple(insert_value(self.exported, self.node, part) for part in (value.real, value.imag))

    def change_form(self, node):
        """Returns the parts of what only gives its argument another form, or the first of what was real."""
        kwargs = {name: value for name, value in node.kwargs.items() if name != "dtype"}
        first, *rest = node.args
        if not is_complex(node):
            raise NotImplementedError("complex numbers made real by a cast")
        if node.target == aten.cat.default:
            parts = [self.both(part) for part in first]
            return tuple(self.call(node.target, list(side), *rest) for side in zip(*parts))
        if not is_complex(first):  # a cast
            dtype = node.meta["val"].real.dtype
            return self.call(aten._to_copy.default, first, dtype=dtype), None
        if node.target == aten._to_copy.default:
            kwargs["dtype"] = node.meta["val"].real.dtype
        return tuple(part and self.call(node.target, part, *rest, **kwargs) for part in self.parts[first])

    def call(self, target, *args, **kwargs):
        """Returns a new node of an operator, in front of the node that is being rewritten."""
        return insert_call(self.node, target, *args, **kwargs)

    def both(self, value):
        """Returns a node's real and imaginary part, the second one zeros where it is real; of a number, these."""
        if not isinstance(value, torch.fx.Node):
            return value.real, value.imag
        real, imaginary = self.parts[value] if is_complex(value) else (value, None)
        return real, self.call(aten.full_like.default, real, 0.0) if imaginary is None else imaginary

    def of(self, value):
        """Returns a node's parts, or a number's, None for an imaginary one of zero."""
        if isinstance(value, torch.fx.Node):
            return self.parts[value] if is_complex(value) else (value, None)
        return value.real, value.imag or None

    def add(self, left, right):
        """Returns the sum of two real parts, of which each may be a number, or None for zero."""
        if left is None or right is None:
            return right if left is None else left
        return self.call(aten.add.Tensor, *self.tensor_first(left, right))

    def multiply(self, left, right):
        """Returns the product of two real parts, of which each may be a number, or None for zero."""
        if left is None or right is None:
            return None
        return self.call(aten.mul.Tensor, *self.tensor_first(left, right))

    def tensor_first(self, left, right):
        return (left, right) if isinstance(left, torch.fx.Node) else (right, left)

    def negative(self, part):
        return part if part is None else self.call(aten.neg.default, part)


# ---- Operators: of the rewriter and a node's arguments; (real part, imaginary part), or a node where that is real ----


def view_as_complex(rewriter, pairs):
    axis = pairs.meta["val"].ndim - 1
    return tuple(rewriter.call(aten.select.int, pairs, axis, side) for side in (0, 1))


def view_as_real(rewriter, value):
    axis = value.meta["val"].ndim
    parts = [rewriter.call(aten.unsqueeze.default, part, axis) for part in rewriter.both(value)]
    return rewriter.call(aten.cat.default, parts, axis)


def from_polar(rewriter, length, angle):
    return tuple(
        rewriter.call(aten.mul.Tensor, length, rewriter.call(function, angle))
        for function in (aten.cos.default, aten.sin.default)
    )


def multiply(rewriter, left, right):
    (a, b), (c, d) = rewriter.of(left), rewriter.of(right)
    real = rewriter.add(rewriter.multiply(a, c), rewriter.negative(rewriter.multiply(b, d)))
    return real, rewriter.add(rewriter.multiply(a, d), rewriter.multiply(b, c))


def add(rewriter, left, right, alpha=1):
    if alpha != 1:
        raise NotImplementedError("complex numbers in a sum with a factor")
    return tuple(map(rewriter.add, rewriter.both(left), rewriter.both(right)))


def conjugate(rewriter, value):
    real, imaginary = rewriter.of(value)
    return real, rewriter.negative(imaginary)


def absolute(rewriter, value):
    squares = [rewriter.multiply(part, part) for part in rewriter.both(value)]
    return rewriter.call(aten.sqrt.default, rewriter.add(*squares))


# ---- Fourier transforms: X[k] = sum of x[n] * exp(-+ 2 pi i k n / N), as torch.fft defines them ----------------------


def transform_complex(rewriter, value, axes, normalization, is_forward):
    """Transforms along each of `axes`; forward with exp(-i ...), backward with exp(i ...)."""
    parts = rewriter.of(value)
    for axis in axes:
        size = value.meta["val"].shape[axis]
        parts = along(rewriter, parts, axis, *matrices(size, size, size, -1 if is_forward else 1, normalization))
    return parts


def transform_real(rewriter, value, axes, normalization, is_onesided):
    """Transforms real values forward; if one-sided, only frequencies up to the half are left of the last of `axes`."""
    parts = (value, None)
    for axis in reversed(axes):
        size = value.meta["val"].shape[axis]
        kept = size // 2 + 1 if is_onesided and axis == axes[-1] else size
        parts = along(rewriter, parts, axis, *matrices(size, size, kept, -1, normalization))
    return parts


def transform_to_real(rewriter, value, axes, normalization, size):
    """Transforms backward to `size` real values along the last of `axes`, from the frequencies up to the half.

    Every other frequency than the first, and the last where `size` is even, stands for its mirror image as well.
    """
    *others, last = axes
    parts = transform_complex(rewriter, value, others, normalization, False)
    cosines, sines = matrices(size, size // 2 + 1, size, 1, normalization)
    twice = torch.full((size // 2 + 1, 1), 2.0, dtype=torch.float64)
    twice[0] = 1
    if size % 2 == 0:
        twice[-1] = 1
    return along(rewriter, parts, last, twice * cosines, twice * sines, only_real=True)


def matrices(size, rows, columns, sign, normalization):
    """Returns the matrices of the cosines and of the sines in a transform of `size` values, both float64.

    normalization: PyTorch's number for a division by nothing, by the square root of `size`, by it.
    """
    if size > MAX_TRANSFORM:
        raise NotImplementedError(f"a Fourier transform of {size} values")
    places = torch.outer(torch.arange(rows), torch.arange(columns)) % size  # exact, where an angle of its own is not
    angles = places.double() * (sign * 2 * math.pi / size)
    scale = (1, 1 / math.sqrt(size), 1 / size)[normalization]
    return angles.cos() * scale, angles.sin() * scale


def along(rewriter, parts, axis, cosines, sines, only_real=False):
    """Returns the parts of the product of complex values with cosines + i * sines along an axis."""
    real, imaginary = (part and to_last(rewriter, part, axis) for part in parts)
    dtype = real.meta["val"].dtype
    cosines, sines = (insert_value(rewriter.exported, rewriter.node, m.to(dtype)) for m in (cosines, sines))

    def product(part, matrix):
        return part and rewriter.call(aten.matmul.default, part, matrix)

    results = [rewriter.add(product(real, cosines), rewriter.negative(product(imaginary, sines)))]
    if not only_real:
        results.append(rewriter.add(product(real, sines), product(imaginary, cosines)))
    results = [to_last(rewriter, result, axis) for result in results]
    return results[0] if only_real else tuple(results)


def to_last(rewriter, node, axis):
    """Returns a node with an axis and the last one in each other's place."""
    order = list(range(node.meta["val"].ndim))
    order[axis], order[-1] = order[-1], order[axis]
    return rewriter.call(aten.permute.default, node, order)


OPERATORS = {
    aten.view_as_complex.default: view_as_complex,
    aten.view_as_real.default: view_as_real,
    aten.polar.default: from_polar,
    aten.complex.default: lambda rewriter, real, imaginary: (real, imaginary),
    aten.mul.Tensor: multiply,
    aten.add.Tensor: add,
    aten._conj.default: conjugate,
    aten.abs.default: absolute,
    aten._fft_c2c.default: transform_complex,
    aten._fft_r2c.default: transform_real,
    aten._fft_c2r.default: transform_to_real,
}
