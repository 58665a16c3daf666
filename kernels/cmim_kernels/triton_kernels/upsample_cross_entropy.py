"""Cross-entropy of bilinearly upsampled logits: one kernel forward, one backward. Upsampled logits stay in registers.

Forward: a program has a tile of pixels and loops over the classes (`upsampling.py`). Backward: a program has the cells of
some classes and loops over the pixels around them, so that each gradient is written by one thread and summed in a fixed
order."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cmim_kernels.numerics import empty_like_layout, multiprocessors
from cmim_kernels.triton_kernels.common import cdiv
from cmim_kernels.triton_kernels.upsampling import (
    AXES,
    LOG2E,
    add_exponential,
    axes,
    corners,
    first_pixel,
    load_cells,
    mix,
    pixels_of_span,
    tile,
    tile_grid,
    tile_launch,
    upsample,
    weight_of_second,
)

RESIDENT_WARPS = 8
"""Warps of the backward pass that a multiprocessor holds at a time, with at most 248 registers a thread."""


class CellLaunch(NamedTuple):
    CLASSES: int
    SPANS: int
    num_warps: int
    maxnreg: int


@functools.cache
def cell_launch(num_classes, width):
    """CLASSES x SPANS elements, 8 in each thread: as few as cover all classes and spans. The first span of a program has no
    cell. Reading the pixels, once for each block of classes, costs as much as one additional class."""
    blocks = lambda classes, spans: cdiv(num_classes, classes) * cdiv(width, spans - 1)  # noqa: E731
    cost = lambda shape: blocks(*shape) * (shape[0] + 1) * shape[1]  # noqa: E731
    classes, spans = min([(4, 64), (8, 32), (16, 16), (32, 16)], key=cost)
    return CellLaunch(classes, spans, num_warps=classes * spans // 256, maxnreg=248)


@functools.cache
def rows_of_program(blocks, height, places):
    """The number of rows of cells of a program, where `blocks` programs share the same rows and the device holds `places`
    programs at a time. A program computes one span more than it has rows, so that all are done after rounds x (rows + 1)
    spans."""

    def spans(rows):
        """One after another, and of all programs."""
        programs = blocks * cdiv(height, rows)
        return cdiv(programs, places) * (rows + 1), programs * (rows + 1)

    return min(range(1, min(height, 64) + 1), key=spans)


@triton.jit(do_not_specialize=[*AXES, "tiles_down", "tiles_along"])
def _upsample_cross_entropy_forward_kernel(
    logits,  # (B, K, h, w)
    target,  # (B, H, W)
    loss, logsumexp,  # (B, H, W) float32, contiguous
    logits_strides, target_strides, num_classes, tiles_down, tiles_along,
    row_cells, row_pixels, row_step, row_start, row_unit,
    column_cells, column_pixels, column_step, column_start, column_unit,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): logits, target, loss and logsumexp. Every tile around a cell reads it, after the first
    time from the cache. A pixel has 8 bytes of state, for any number of classes."""
    row_axis = (row_cells, row_pixels, row_step, row_start, row_unit)
    column_axis = (column_cells, column_pixels, column_step, column_start, column_unit)
    image, row, column, inside, offsets, along, down = tile(
        logits_strides, row_axis, column_axis, tiles_down, tiles_along, ROWS, COLUMNS
    )
    logits += image * logits_strides[0]
    plane = logits
    largest = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in tl.range(0, num_classes, loop_unroll_factor=2):
        largest, total = add_exponential(largest, total, upsample(plane, offsets, along, down))
        plane += logits_strides[1]
    rest = tl.log(total)

    place = target + image * target_strides[0] + row * target_strides[1] + column * target_strides[2]
    label = tl.load(place, mask=inside, other=0).to(tl.int64)
    valid = (label >= 0) & (label < num_classes)
    z = upsample(logits + tl.where(valid, label, 0) * logits_strides[1], offsets, along, down)
    pixel = (image * row_axis[1] + row) * column_axis[1] + column
    tl.store(loss + pixel, tl.where(valid, largest - z + rest, 0.0), mask=inside)
    tl.store(logsumexp + pixel, largest + rest, mask=inside)


@triton.jit(do_not_specialize=[*AXES, "rows", "column_blocks", "row_blocks"])
def _upsample_cross_entropy_backward_kernel(
    grad,  # (B, H, W)
    logits,  # (B, K, h, w)
    target,  # (B, H, W)
    logsumexp,  # (B, H, W) float32
    out,  # (B, K, h, w)
    grad_strides, logits_strides, target_strides, logsumexp_strides, out_strides,
    num_classes, most_columns, rows, class_blocks, column_blocks, row_blocks,
    row_cells, row_pixels, row_step, row_start, row_unit,
    column_cells, column_pixels, column_step, column_start, column_unit,
    CLASSES: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): grad, logits, target, logsumexp, and the gradient of the logits. Spans on the border of two
    programs are read by both, and each block of classes reads the pixels again.

    The gradient at a cell is a sum over the pixels of the four spans that meet there::

                  column span s        column span s + 1
        row span r       bottom right | bottom left
                         -------------+------------     the cell between spans r and r + 1, s and s + 1
        row span r + 1      top right | top left

    An element of the tile has one class and one column span s, and loops over the row spans from top to bottom. In each span
    it sums (softmax - one hot) grad, times the weight of the corner, into four numbers, one for each corner of the span. The
    sums of the two bottom corners are kept for the next span below, where they start the sums of the top corners. After span
    r + 1, this element has the part of its left cell from its own span, and the element before it has the other part (its
    right corners): they exchange these parts, and the cell is written.
    """
    row_axis = (row_cells, row_pixels, row_step, row_start, row_unit)
    column_axis = (column_cells, column_pixels, column_step, column_start, column_unit)
    program = tl.program_id(0)
    class_block, program = program % class_blocks, program // class_blocks
    column_block, program = program % column_blocks, program // column_blocks
    first_row, image = (program % row_blocks).to(tl.int64) * rows, (program // row_blocks).to(tl.int64)
    kind = class_block * CLASSES + tl.arange(0, CLASSES)[:, None]
    element = tl.arange(0, SPANS)[None, :]
    span = column_block.to(tl.int64) * (SPANS - 1) + element
    # An element writes the left cell of its span; that of the program's first span belongs to another program.
    owned = (kind < num_classes) & (element > 0) & (span <= column_axis[0])
    kind_there = tl.minimum(kind, num_classes - 1).to(tl.int64)
    span_there = tl.minimum(span, column_axis[0])
    logits += image * logits_strides[0] + kind_there * logits_strides[1]
    out += image * out_strides[0] + kind_there * out_strides[1] + (span - 1) * out_strides[3]

    first_x, end_x = first_pixel(span, column_axis), first_pixel(span + 1, column_axis)
    first_along = weight_of_second(first_x, span, column_axis)
    more_along = tl.where((span > 0) & (span < column_axis[0]), column_axis[2] / column_axis[4], 0.0)
    grad += image * grad_strides[0] + first_x * grad_strides[2]
    target += image * target_strides[0] + first_x * target_strides[2]
    logsumexp += image * logsumexp_strides[0] + first_x * logsumexp_strides[2]

    bottom_left = tl.zeros((CLASSES, SPANS), tl.float32)
    bottom_right = tl.zeros((CLASSES, SPANS), tl.float32)
    for row_span in range(first_row, tl.minimum(first_row + rows, row_axis[0]) + 1):
        offsets = corners(row_span, span_there, row_axis, column_axis, logits_strides)
        z_top_left = load_cells(logits + offsets[0])
        z_top_right = load_cells(logits + offsets[1])
        z_bottom_left = load_cells(logits + offsets[2])
        z_bottom_right = load_cells(logits + offsets[3])
        top_left, top_right = bottom_left, bottom_right  # the bottom of the span above
        bottom_left = tl.zeros((CLASSES, SPANS), tl.float32)
        bottom_right = tl.zeros((CLASSES, SPANS), tl.float32)
        for y in range(first_pixel(row_span, row_axis), first_pixel(row_span + 1, row_axis)):
            down = weight_of_second(y, row_span, row_axis)
            z_left = mix(z_top_left, z_bottom_left, down)
            slope = mix(z_top_right, z_bottom_right, down) - z_left
            left = tl.zeros((CLASSES, SPANS), tl.float32)
            right = tl.zeros((CLASSES, SPANS), tl.float32)
            for i in tl.range(0, most_columns, loop_unroll_factor=2):
                inside = first_x + i < end_x
                label = tl.load(target + y * target_strides[1] + i * target_strides[2], mask=inside, other=0).to(tl.int64)
                total = tl.load(logsumexp + y * logsumexp_strides[1] + i * logsumexp_strides[2], mask=inside, other=0.0)
                g = tl.load(grad + y * grad_strides[1] + i * grad_strides[2], mask=inside, other=0.0).to(tl.float32)
                valid = inside & (label >= 0) & (label < num_classes)
                g = tl.where(valid, g, 0.0)
                along = first_along + i * more_along
                p = tl.exp2((z_left + slope * along - total) * LOG2E)
                p = tl.where(label.to(tl.int32) == kind, p - 1, p)
                p = tl.where(valid, p, 0.0)
                left += p * (g - g * along)
                right += p * (g * along)
            top_left += left * (1 - down)
            top_right += right * (1 - down)
            bottom_left += left * down
            bottom_right += right * down
        neighbour = tl.broadcast_to(tl.maximum(element - 1, 0), (CLASSES, SPANS))
        value = top_left + tl.gather(top_right, neighbour, axis=1)
        tl.store(out + (row_span - 1) * out_strides[2], value.to(out.dtype.element_ty), mask=owned & (row_span > first_row))


def upsample_cross_entropy_forward(logits, target, align_corners):
    """Loss, and log-sum-exp of the upsampled logits at every pixel."""
    loss, logsumexp = (logits.new_empty(target.shape, dtype=torch.float32) for _ in range(2))
    if loss.numel():
        row_axis, column_axis = axes(logits, target.shape[1:], align_corners)
        launch = tile_launch(pixels_of_span(row_axis))
        grid, *tiles = tile_grid(launch, len(logits), row_axis, column_axis)
        _upsample_cross_entropy_forward_kernel[grid](
            logits, target, loss, logsumexp, logits.stride(), target.stride(), logits.shape[1], *tiles,
            *row_axis, *column_axis, **launch._asdict(),
        )  # fmt: skip
    return loss, logsumexp


def upsample_cross_entropy_backward(grad, logits, target, logsumexp, align_corners):
    """Gradient of the logits, in their layout."""
    out = empty_like_layout(logits)
    if target.numel() == 0:
        return out.zero_()
    batch, num_classes, height, width = logits.shape
    row_axis, column_axis = axes(logits, target.shape[1:], align_corners)
    launch = cell_launch(num_classes, width)
    class_blocks, column_blocks = cdiv(num_classes, launch.CLASSES), cdiv(width, launch.SPANS - 1)
    places = RESIDENT_WARPS // launch.num_warps * multiprocessors(logits)
    rows = rows_of_program(batch * class_blocks * column_blocks, height, places)
    row_blocks = cdiv(height, rows)
    _upsample_cross_entropy_backward_kernel[(batch * class_blocks * column_blocks * row_blocks,)](
        grad, logits, target, logsumexp, out,
        grad.stride(), logits.stride(), target.stride(), logsumexp.stride(), out.stride(),
        num_classes, pixels_of_span(column_axis), rows, class_blocks, column_blocks, row_blocks,
        *row_axis, *column_axis, **launch._asdict(),
    )  # fmt: skip
    return out
