"""Bilinear upsampling in registers: what the kernels of the two ops on upsampled logits share.

The centres of n cells cut an axis into n + 1 spans: span i lies between cells i - 1 and i; before the first and after the
last cell both are the cell at the border. All pixels of a row span and a column span mix the same four cells, their
corners. Positions are fractions of integers, so that spans and weights are exact.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


def axis(cells, pixels, align_corners):
    """(cells, pixels, step, start, unit): pixel p is at (p step + start) / unit, whose integer part is its span and whose
    fraction is the weight of the span's second cell."""
    if align_corners and cells > 1:
        unit = max(1, pixels - 1)
        return cells, pixels, cells - 1, unit, unit
    return cells, pixels, 2 * cells, cells + pixels, 2 * pixels


def pixels_of_span(axis):
    """The most pixels that a span has."""
    _, _, step, _, unit = axis
    return triton.cdiv(unit, step)


class TileLaunch(NamedTuple):
    ROWS: int
    COLUMNS: int
    num_warps: int


def tile_launch(rows):
    """ROWS pixels of one column in each thread, where a span has up to `rows`. A class costs a thread about 10 instructions
    for each of them and 20 more."""
    cost = lambda r: triton.cdiv(rows, r) * (10 * r + 20)  # noqa: E731
    return TileLaunch(min((16, 8, 4, 2, 1), key=cost), COLUMNS=64, num_warps=2)


def tile_grid(launch, batch, row_axis, column_axis):
    """Tiles of ROWS x COLUMNS pixels: the grid, how many a span of rows has, and how many a row of tiles has."""
    in_span = triton.cdiv(pixels_of_span(row_axis), launch.ROWS)
    in_row = triton.cdiv(column_axis[1], launch.COLUMNS)
    return (batch * (row_axis[0] + 1) * in_span * in_row,), in_span, in_row


@triton.jit
def first_pixel(span, axis):
    """The first pixel that is in int64 `span` or behind it; the number of pixels if there is none."""
    cells, pixels, step, start, unit = axis
    return tl.minimum((tl.maximum(span * unit - start, 0) + step - 1) // step, pixels)


@triton.jit
def span_of(pixel, axis):
    cells, pixels, step, start, unit = axis
    return (pixel * step + start) // unit


@triton.jit
def weight_of_second(pixel, span, axis):
    """float32 weight of the second cell of its span in each int64 pixel: at the borders, where both are the same, all or
    nothing."""
    cells, pixels, step, start, unit = axis
    fraction = (pixel * step + start - span * unit).to(tl.float32)
    weight = tl.div_rn(fraction, tl.zeros_like(fraction) + unit)
    return tl.where(span == 0, 1.0, tl.where(span < cells, weight, 0.0))


@triton.jit
def corners(row_span, column_span, row_axis, column_axis, row_stride, column_stride):
    """Offsets of the four cells: top left, top right, bottom left, bottom right."""
    top = tl.maximum(row_span - 1, 0) * row_stride
    bottom = tl.minimum(row_span, row_axis[0] - 1) * row_stride
    left = tl.maximum(column_span - 1, 0) * column_stride
    right = tl.minimum(column_span, column_axis[0] - 1) * column_stride
    return top + left, top + right, bottom + left, bottom + right


@triton.jit
def mix(first, second, weight):
    return first + (second - first) * weight


@triton.jit
def tile(program, row_axis, column_axis, in_span, in_row, row_stride, column_stride,
         ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A program's tile: int64 image, rows (ROWS, 1), columns (1, COLUMNS), which of them exist, and for `upsample` the
    offsets (1, COLUMNS) of the corners and the weights of the right and of the bottom ones."""
    column = (program % in_row).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    program //= in_row
    part, program = program % in_span, program // in_span
    row_span = (program % (row_axis[0] + 1)).to(tl.int64)
    image = (program // (row_axis[0] + 1)).to(tl.int64)
    row = first_pixel(row_span, row_axis) + part * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (row < first_pixel(row_span + 1, row_axis)) & (column < column_axis[1])
    column_span = span_of(tl.minimum(column, column_axis[1] - 1), column_axis)
    offsets = corners(row_span, column_span, row_axis, column_axis, row_stride, column_stride)
    along = weight_of_second(column, column_span, column_axis)
    down = weight_of_second(row, row_span, row_axis)
    return image, row, column, inside, offsets, along, down


@triton.jit
def upsample(logits, offsets, along, down):
    """float32 logits of a tile, of the class whose plane begins at `logits`."""
    top = mix(tl.load(logits + offsets[0]).to(tl.float32), tl.load(logits + offsets[1]).to(tl.float32), along)
    bottom = mix(tl.load(logits + offsets[2]).to(tl.float32), tl.load(logits + offsets[3]).to(tl.float32), along)
    return mix(top, bottom, down)


@triton.jit
def add_exponential(largest, total, z):
    """The largest logit so far, and the sum of exponentials relative to it, with logit z of one more class. Of the sum and
    the new term the smaller is scaled: one exponential."""
    scale = tl.exp2(-tl.abs(z - largest) * LOG2E)
    return tl.maximum(largest, z), tl.where(z > largest, total * scale + 1, total + scale)
