"""Convolutions whose windows TMA can copy: boxes of an image with channels last, as the left operand of a product.

For one place in the window and one line of 128 bytes of channels, what all positions of some lines of an output read is
a box of the image, moved by that place. What is outside the image becomes 0, as padding asks for.
"""

import itertools
import math
import typing

from tvm_items.templates.expressions import linear_coefficients, substitute, zero
from tvm_items.templates.product_task import buffer_shape

LINE_BYTES = 128  # of the terms of a step: what TMA and wgmma swizzle
MAX_BOX, MAX_STRIDE = 256, 8  # cuTensorMapEncodeTiled() takes no larger ones along a dimension


class Spatial(typing.NamedTuple):
    """One of the two dimensions of a convolution: output position y and place k read y * stride + k * step + start."""

    size: int  # of the image
    outputs: int
    window: int
    stride: int
    step: int  # the dilation
    start: int  # the padding, negative


class Windows(typing.NamedTuple):
    """How a convolution reads its images."""

    images: int
    vertical: Spatial
    horizontal: Spatial
    channels: int

    def box(self, rows):
        """Returns the Box that a tile of so many rows of the product has room for, None where not one line fits."""
        height, width = self.vertical.outputs, self.horizontal.outputs
        if height * width <= rows:
            return Box(self, min(self.images, rows // (height * width)), height)
        if width > rows:
            return None
        boxes = math.ceil(height / (rows // width))
        return Box(self, 1, math.ceil(height / boxes))  # all of about the same height


class Box(typing.NamedTuple):
    """What a tile of a product's rows reads for one place in the window: lines of one image, or whole images."""

    windows: Windows
    images: int
    lines: int  # of the output

    @property
    def boxes_per_image(self):
        return math.ceil(self.windows.vertical.outputs / self.lines)

    @property
    def count(self):
        """How many there are of the whole product."""
        return math.ceil(self.windows.images / self.images) * self.boxes_per_image

    @property
    def rows(self):
        """How many rows of the product a whole one has."""
        return self.images * self.lines * self.windows.horizontal.outputs

    @property
    def shape(self):
        """TMA's sizes of it: (width, height, images). Where there is a stride, it loads every so-many-th element."""
        vertical, horizontal = self.windows.vertical, self.windows.horizontal
        return horizontal.outputs * horizontal.stride, self.lines * vertical.stride, self.images

    def locate(self, number):
        """Returns (first image, first line of the output, first row of the product, the one behind its last).

        number: of the box, an expression.
        """
        from tvm import tirx

        images, height, width = self.windows.images, self.windows.vertical.outputs, self.windows.horizontal.outputs
        image = number // self.boxes_per_image * self.images
        line = number % self.boxes_per_image * self.lines
        first, end_of_images = (image * height + line) * width, (image + self.images) * height * width
        if height % self.lines:
            end = tirx.Min(first + self.rows, end_of_images)
        elif images % self.images:
            end = tirx.Min(end_of_images, images * height * width)
        else:
            end = first + self.rows
        return image, line, first, end

    def corner(self, image, line, term):
        """Returns the coordinates (channel, column, line, image) of a box in the images, as expressions.

        image, line: locate()'s. term: the first one of a step.
        """
        _, vertical, horizontal, channels = self.windows
        place = term // channels
        column = place % horizontal.window * horizontal.step + horizontal.start
        row = line * vertical.stride + place // horizontal.window * vertical.step + vertical.start
        return term % channels, column, row, image


class Loop(typing.NamedTuple):
    """A loop of a product that moves along a dimension of an image."""

    variable: object  # TIR
    extent: int
    stride: int


NO_LOOP = Loop(None, 1, 1)


def find_windows(operand):
    """Returns the Windows of a product's left operand, None where it reads something else, or TMA cannot copy it."""
    shape, found = buffer_shape(operand.load.source), find_loops(operand)
    if len(shape) != 4 or shape[3] * operand.element_bytes % LINE_BYTES or not operand.along_terms or found is None:
        return None
    of_rows, of_terms, first = found
    spatial = [
        Spatial(shape[d], of_rows[d].extent, of_terms[d].extent, of_rows[d].stride, of_terms[d].stride, first[d])
        for d in (1, 2)
    ]
    windows = Windows(shape[0], *spatial, shape[3])
    is_whole = (of_rows[0].extent, of_rows[0].stride, of_rows[3].extent, first[0]) == (shape[0], 1, 1, 0)
    has_all_channels = (of_terms[3].extent, of_terms[3].stride, of_terms[0].extent, first[3]) == (shape[3], 1, 1, 0)
    if not is_whole or not has_all_channels or not all(s.stride <= MAX_STRIDE for s in spatial):
        return None
    if max(s.outputs * s.stride for s in spatial) > MAX_BOX:
        return None
    loops = [(of_rows[d].variable, of_terms[d].variable) for d in (1, 2)]
    return windows if is_inside_the_image(operand, spatial, loops) else None


def find_loops(operand):
    """Returns ([Loop of each dimension over rows], [over terms], [first index]) of an operand's load, or None.

    None where a dimension has two loops of one kind, or an outer dimension an inner loop.
    """
    (batch, *axes), indices = operand.axes, operand.load.indices
    variables = [variable for axis in axes for variable in axis.variables]
    equations = [linear_coefficients(index, variables) for index in indices]
    if batch.extent > 1 or None in equations:
        return None
    *strides, first = zip(*equations)  # of each variable along the dimensions, and the first index along each
    of_variables, kinds = iter(strides), []
    for axis in axes:
        loops = [NO_LOOP] * len(indices)
        for variable, extent, of_dimensions in zip(axis.variables, axis.extents, of_variables):
            if extent == 1:
                continue
            moved = [d for d, stride in enumerate(of_dimensions) if stride]
            if len(moved) != 1 or of_dimensions[moved[0]] < 1:
                return None
            (dimension,) = moved
            if any(loop.variable is not None for loop in loops[dimension:]):
                return None
            loops[dimension] = Loop(variable, extent, of_dimensions[dimension])
        kinds.append(loops)
    return *kinds, first


def is_inside_the_image(operand, spatial, loops):
    """Returns whether an operand's condition is that its element is inside the image, which is what TMA looks at.

    Looked at along each of the two dimensions, at each index, while the other one is in the image.
    spatial, loops: of both dimensions, a Spatial and the variables of (positions, places in the window).
    """
    from tvm import tirx
    from tvm.sym import Analyzer

    def index_of(dimension, place):
        position, within = place
        return position * dimension.stride + within * dimension.step + dimension.start

    # {index: one of the pairs of position and place that read it} of each dimension.
    places = [
        {index_of(s, place): place for place in itertools.product(range(s.outputs), range(s.window))} for s in spatial
    ]
    if operand.condition is None:
        return all(0 <= index < s.size for s, of_dimension in zip(spatial, places) for index in of_dimension)
    zeros = {variable: zero() for axis in operand.axes for variable in axis.variables}

    def meets_condition(values):
        chosen = {variable: tirx.const(value, "int32") for variable, value in values if variable is not None}
        return bool(Analyzer().simplify(substitute(operand.condition, zeros | chosen)))

    for this, other in ((0, 1), (1, 0)):
        inside = next((place for index, place in places[other].items() if 0 <= index < spatial[other].size), None)
        if inside is None:
            return False
        for index, place in places[this].items():
            values = [*zip(loops[this], place), *zip(loops[other], inside)]
            if meets_condition(values) != (0 <= index < spatial[this].size):
                return False
    return True
