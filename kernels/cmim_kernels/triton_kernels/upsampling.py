"""Bilinear upsampling in registers: shared code of the kernels of the two ops on upsampled logits.

The centres of n cells divide an axis into n + 1 spans: span i lies between cell i - 1, its first cell, and cell i, its
second cell; before the first and after the last cell, both are that cell. All pixels of a row span and a column span
interpolate between the same four cells, the corners. Positions are fractions of integers, so that spans and weights are
exact."""

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from cmim_kernels.triton_kernels.common import cdiv

LOG2E = tl.constexpr(1.4426950408889634)
AXES = [f"row_{name}" for name in ("cells", "pixels", "step", "start", "unit")]
AXES += [f"column_{name}" for name in ("cells", "step", "start", "unit")]
"""Parameters of the two axes that are not specialised, because otherwise many image sizes would compile variants of their
own. They are not tuples, which Triton always specialises. `column_pixels`, the length of rows in memory, is left out because
it affects the alignment of addresses."""


def axes(logits, size, align_corners):
    """The axes of rows and columns, each (cells, pixels, step, start, unit): pixel p is at (p step + start) / unit, whose
    integer part is its span and whose fraction is the weight of the second cell."""
    return [_axis(cells, pixels, align_corners) for cells, pixels in zip(logits.shape[2:], size, strict=True)]


def _axis(cells, pixels, align_corners):
    if align_corners and cells > 1:
        unit = max(1, pixels - 1)
        return cells, pixels, cells - 1, unit, unit
    return cells, pixels, 2 * cells, cells + pixels, 2 * pixels


def pixels_of_span(axis):
    """The largest number of pixels in a span."""
    _, _, step, _, unit = axis
    return cdiv(unit, step)


class TileLaunch(NamedTuple):
    ROWS: int
    COLUMNS: int
    num_warps: int
    maxnreg: int


@functools.cache
def tile_launch(rows):
    """The launch configuration for spans of up to `rows` pixels. A thread has ROWS pixels of one span in one column: a class
    costs it about 8 instructions for each pixel and 24 more."""
    cost = lambda r: cdiv(rows, r) * (8 * r + 24)  # noqa: E731
    return TileLaunch(min((8, 4, 2, 1), key=cost), COLUMNS=64, num_warps=2, maxnreg=128)


def tile_grid(launch, batch, row_axis, column_axis):
    """The grid of tiles, and into how many tiles a row span is divided, vertically and horizontally."""
    down = cdiv(pixels_of_span(row_axis), launch.ROWS)
    along = cdiv(column_axis[1], launch.COLUMNS)
    return (batch * (row_axis[0] + 1) * down * along,), down, along


@triton.jit
def first_pixel(span, axis):
    """The first pixel in or after the int64 `span`; the number of pixels if there is none."""
    _, pixels, step, start, unit = axis
    return tl.minimum((tl.maximum(span * unit - start, 0) + step - 1) // step, pixels)


@triton.jit
def weight_of_second(pixel, span, axis):
    """float32 weight of the second cell of its span for each int64 pixel: 1 before the first cell and 0 after the last, so
    that in spans with a single cell this cell gets the full weight."""
    cells, _, step, start, unit = axis
    fraction = (pixel * step + start - span * unit).to(tl.float32)
    weight = tl.div_rn(fraction, tl.zeros_like(fraction) + unit)
    return tl.where(span == 0, 1.0, tl.where(span < cells, weight, 0.0))


@triton.jit
def corners(row_span, column_span, row_axis, column_axis, strides):
    """Offsets of the four cells in a (B, K, h, w) tensor: top left, top right, bottom left, bottom right."""
    top = tl.maximum(row_span - 1, 0) * strides[2]
    bottom = tl.minimum(row_span, row_axis[0] - 1) * strides[2]
    left = tl.maximum(column_span - 1, 0) * strides[3]
    right = tl.minimum(column_span, column_axis[0] - 1) * strides[3]
    return top + left, top + right, bottom + left, bottom + right


@triton.jit
def tile(strides, row_axis, column_axis, tiles_down, tiles_along, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of this program: int64 image, rows (ROWS, 1) and columns (1, COLUMNS), which pixels exist, and the arguments
    of `upsample`: offsets (1, COLUMNS) of the corners in the logits, weights of the right and of the bottom corners."""
    program = tl.program_id(0)
    column = (program % tiles_along).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    program //= tiles_along
    part, program = program % tiles_down, program // tiles_down
    row_span, image = (program % (row_axis[0] + 1)).to(tl.int64), (program // (row_axis[0] + 1)).to(tl.int64)
    row = first_pixel(row_span, row_axis) + part * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (row < first_pixel(row_span + 1, row_axis)) & (column < column_axis[1])
    _, pixels, step, start, unit = column_axis
    column_span = (tl.minimum(column, pixels - 1) * step + start) // unit
    offsets = corners(row_span, column_span, row_axis, column_axis, strides)
    along = weight_of_second(column, column_span, column_axis)
    down = weight_of_second(row, row_span, row_axis)
    return image, row, column, inside, offsets, along, down


@triton.jit
def upsample(plane, offsets, along, down):
    """float32 upsampled logits of a tile for the class whose plane begins at the pointer."""
    top = mix(load_cells(plane + offsets[0]), load_cells(plane + offsets[1]), along)
    bottom = mix(load_cells(plane + offsets[2]), load_cells(plane + offsets[3]), along)
    return mix(top, bottom, down)


@triton.jit
def load_cells(pointers):
    """float32 logits. They are loaded as one flat axis: with two axes, the compiler may distribute elements over threads in
    an order that suits the load, and keep that order for all following code."""
    return tl.reshape(tl.load(tl.ravel(pointers)), pointers.shape).to(tl.float32)


@triton.jit
def mix(first, second, weight_of_second):
    return first + (second - first) * weight_of_second


@triton.jit
def add_exponential(largest, total, z):
    """Update the largest logit so far, and the sum of exponentials relative to it, by the logit z of another class. Either
    the sum or the new term is scaled, whichever is relative to the smaller logit, so one exponential is enough."""
    scale = tl.exp2(-tl.abs(z - largest) * LOG2E)
    return tl.maximum(largest, z), tl.where(z > largest, total * scale + 1, total + scale)
