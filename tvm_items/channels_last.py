"""Channels last: what TVM's ConvertLayout stops at, images with few channels, and the permutations that it leaves."""

import math

import torch

from tvm_items.reductions import size_of
from tvm_items.relax_rewrites import axes_of, convolution_like, mutate_functions, name_of, permute

# Of images or signals and of weights. Tensor cores need channels last, for which TVM 0.27 has no transposed
# convolutions; unless told so, its ConvertLayout gives it to them, too. Convolutions over three dimensions are left as
# they are: they cut videos into patches, whose lines are in one piece as it is.
LAYOUTS = {
    "relax.nn.conv2d": ["NHWC", "HWIO"],
    "relax.nn.conv1d": ["NWC", "WIO"],
    "relax.nn.conv2d_transpose": ["NCHW", "IOHW"],
    "relax.nn.conv1d_transpose": ["NCW", "IOW"],
}


def clear_the_way():
    """Returns a pass over what ConvertLayout of TVM 0.27 knows no layout of, and would permute in front of and behind.

    Zeros around an image become the padding of the convolution that reads them, and nothing where there are none (both
    as in MobileNetV2, which pads as TensorFlow does). clip() becomes maximum() and minimum(), a leaky ReLU maximum().
    """
    from tvm import relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    @mutator
    class Clearer(PyExprMutator):
        def visit_call_(self, call):
            call = super().visit_call_(call)
            rewrite = {
                "relax.clip": self.clip,
                "relax.nn.leakyrelu": self.leaky_relu,
                "relax.nn.pad": self.pad,
                "relax.nn.conv1d": self.convolution,
                "relax.nn.conv2d": self.convolution,
            }.get(name_of(call))
            return rewrite(call) if rewrite else call

        def clip(self, call):
            source, *bounds = call.args
            if not str(source.ty.dtype).startswith(("float", "bfloat")):
                return call
            for bound, narrow in zip(bounds, (relax.op.maximum, relax.op.minimum), strict=True):
                bound = float(bound.value)
                if not math.isinf(bound):
                    source = self.builder_.emit(narrow(source, relax.const(bound, source.ty.dtype)))
            return source

        def leaky_relu(self, call):
            (source,), slope = call.args, float(call.attrs.alpha)
            if not 0 <= slope <= 1:
                return call
            scaled = self.builder_.emit(relax.op.multiply(source, relax.const(slope, source.ty.dtype)))
            return relax.op.maximum(source, scaled)

        def pad(self, call):
            return call if any(map(int, call.attrs.pad_width)) else call.args[0]

        def convolution(self, call):
            source, weight = call.args
            pad = self.lookup_binding(source) if isinstance(source, relax.Var) else None
            if name_of(pad) != "relax.nn.pad":
                return call
            is_of_zeros = pad.attrs.pad_mode == "constant" and float(pad.attrs.pad_value) == 0
            widths = list(map(int, pad.attrs.pad_width))
            if not is_of_zeros or any(widths[:4]) or min(widths) < 0:  # of batch and channels, or images that are cut
                return call
            around = widths[4::2] + widths[5::2]  # in front of all axes, then behind them
            padding = [int(own) + more for own, more in zip(call.attrs.padding, around, strict=True)]
            return convolution_like(call, pad.args[0], weight, padding=padding)

    return mutate_functions(Clearer)


def widen_channels(allow_tf32):
    """Returns a pass that gives the images of some convolutions more channels, so that they are copied as vectors.

    Those for tensor cores, in 16 bits or TF32, with an odd number of channels, such as the three of colours. Where
    patches lie side by side, each line of one, of all its channels, is in one piece in memory: it counts as one point
    with so many channels. Elsewhere zeros fill the channels up to a multiple of four, unless that is more than a third
    of multiplications more. The convolutions are channels last, as ConvertLayout leaves them.
    """
    from tvm import relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    dtypes = ("float16", "bfloat16", "float32") if allow_tf32 else ("float16", "bfloat16")

    @mutator
    class Widener(PyExprMutator):
        def visit_call_(self, call):
            call = super().visit_call_(call)
            if name_of(call) != "relax.nn.conv2d" or call.attrs.groups != 1:
                return call
            image, weight = call.args
            batch, height, width, channels = map(int, image.ty.shape)
            rows, columns, _, outputs = map(int, weight.ty.shape)
            if image.ty.dtype not in dtypes or not channels % 4:
                return call
            strides, padding = ([int(value) for value in values] for values in (call.attrs.strides, call.attrs.padding))
            missing = -channels % 4
            if columns == strides[1] > 1 and width % columns == padding[1] == padding[3] == 0:
                image = relax.op.reshape(image, (batch, height, width // columns, columns * channels))
                weight = relax.op.reshape(weight, (rows, 1, columns * channels, outputs))
                strides[1] = 1
            elif 3 * missing <= channels:
                image = relax.op.nn.pad(image, [0] * 7 + [missing])
                weight = relax.op.nn.pad(weight, [0] * 5 + [missing, 0, 0])
            else:
                return call
            image, weight = map(self.builder_.emit, (image, weight))
            return convolution_like(call, image, weight, strides=strides, padding=padding)

    return mutate_functions(Widener)


def cancel_permutations():
    """Returns a pass that makes one of two permutations in a row, and a reshape of what moves nothing in memory.

    As of images, channels last, whose permutation to channels first is flattened and permuted back.
    """
    from tvm import relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    permutation, reshape = "relax.permute_dims", "relax.reshape"

    @mutator
    class Canceller(PyExprMutator):
        def visit_call_(self, call):
            call = super().visit_call_(call)
            if name_of(call) not in (permutation, reshape):
                return call
            for chain in self.chains(call):
                root = chain[-1].args[0]
                if moves_nothing(chain):
                    return root if shape_of(root) == shape_of(call) else relax.op.reshape(root, call.ty.shape)
            before = self.lookup(call.args[0])
            if name_of(call) == name_of(before) == permutation:
                first_axes = axes_of(before)
                return permute(before.args[0], [first_axes[axis] for axis in axes_of(call)])
            return call

        def lookup(self, value):
            return self.lookup_binding(value) if isinstance(value, relax.Var) else None

        def chains(self, call):
            """Returns rows of permutations and reshapes that `call` ends, the longest first and their last call first.

            A reshape alone is none.
            """
            calls = [call]
            while name_of(before := self.lookup(calls[-1].args[0])) in (permutation, reshape):
                calls.append(before)
            return [calls[:end] for end in range(len(calls), name_of(call) == reshape, -1)]

    return mutate_functions(Canceller)


def moves_nothing(calls):
    """Returns whether permutations and reshapes, the last one first, leave all elements in their order in memory."""
    if not all(map(size_of, [calls[-1].args[0], *calls])):  # the shape is known before it runs
        return False
    value = torch.empty(shape_of(calls[-1].args[0]), device="meta")
    for call in reversed(calls):
        if name_of(call) == "relax.permute_dims":
            value = value.permute(axes_of(call))
        else:
            try:
                value = value.view(shape_of(call))
            except RuntimeError:  # it would have to copy
                return False
    return value.is_contiguous()


def shape_of(value):
    return [int(extent) for extent in value.ty.shape]
