"""Class-gated depthwise convolution: kernels and launchers. See `reference/same_class_conv2d.py`.

A first kernel copies the labels into a frame of -1, which also replaces every label that is not a class. Whether a neighbour
counts is then one comparison, at the border too. It is the mask of the load, so that values of other classes are never read.
Each
value of x is read once from memory, and once for each tap from the cache: the op is bound by multiply-adds, not by memory.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cmim_kernels.numerics import empty_like_layout, multiprocessors
from cmim_kernels.reference import same_class_conv2d as reference
from cmim_kernels.triton_kernels.common import cdiv, power_of_two, strides_of, sum_taps

MAX_SIZE = 31
"""For larger kernels, the taps of a row do not fit in the registers of a program, and PyTorch is used."""


class ConvolveLaunch(NamedTuple):
    ROWS: int
    COLUMNS: int
    CHANNELS: int
    num_warps: int
    maxnreg: int


@functools.cache
def convolve_launch(channels, channels_last):
    """A tile of ROWS x COLUMNS pixels and CHANNELS channels, longest along the dimension that is contiguous in memory. There
    are more threads than pixels or channels; otherwise the compiler passes labels and weights through shared memory, with a
    barrier at every tap."""
    if channels_last:
        wide = power_of_two(channels, low=32, high=128)
        return ConvolveLaunch(8, 8, wide, num_warps=8 if wide == 128 else 4, maxnreg=168)
    return ConvolveLaunch(4, 32, 32, num_warps=8, maxnreg=168)


RESIDENT = {128: 4, 64: 2, 32: 2, 16: 3}
"""Programs of the weight's gradient that a multiprocessor holds at a time, by their CHANNELS, for a size of 7: fewer for
narrow ones, which have more pixels and with them addresses."""


class WeightLaunch(NamedTuple):
    TAPS: int
    PIXELS: int
    CHANNELS: int
    num_warps: int


@functools.cache
def weight_launch(size, channels, channels_last):
    """A tile of TAPS taps (one row of the kernel), PIXELS neighbouring pixels and CHANNELS channels."""
    taps = power_of_two(size, low=1, high=32)
    elements, wide = (8192, power_of_two(channels, low=32, high=128)) if channels_last else (4096, 16)
    return WeightLaunch(taps, power_of_two(elements // (taps * wide), low=1, high=32), wide, num_warps=4)


def lines_of_chunk(launch, lines, programs, like):
    """The number of lines of a chunk, on which so many `programs` work: the device holds all chunks at a time, so that they
    end together and their sums stay few."""
    return cdiv(lines, max(1, RESIDENT[launch.CHANNELS] * multiprocessors(like) // programs))


@triton.jit(do_not_specialize=["batch", "height", "width", "rows", "columns", "reach", "num_classes"])
def _same_class_conv2d_frame_kernel(
    labels,  # (B, h, w)
    framed,  # (B, rows, columns) int32
    labels_strides, batch, height, width, rows, columns, reach, num_classes,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): the labels and their copy."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image, y, x = place // (rows * columns), place // columns % rows - reach, place % columns - reach
    inside = (image < batch) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    address = labels + image * labels_strides[0] + y * labels_strides[1] + x * labels_strides[2]
    label = tl.load(address, mask=inside, other=0).to(tl.int64)
    label = tl.where(inside & (label >= 0) & (label < num_classes), label, -1)
    tl.store(framed + place, label.to(tl.int32), mask=image < batch)


@triton.jit(do_not_specialize=["height", "width", "rows", "columns", "next_tap"])
def _same_class_conv2d_convolve_kernel(
    x,  # (B, C, h, w)
    framed,  # (B, rows, columns) int32
    weight,  # (k, k, C), contiguous; the first tap
    bias,  # (C,) or None
    out,  # (B, C, h, w)
    x_strides, out_strides, bias_strides, num_channels, height, width, rows, columns, next_tap,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): x, the labels and the output. x is read once, and up to
    three times at the edges between programs (for k = 7, a tile of 8 x 8 pixels reads 14 x 14)."""
    image, row, column = _tile(height, width, ROWS, COLUMNS)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    frame = framed + (image * rows + row) * columns + column
    centre = _centre(frame, columns, SIZE, True)
    corner = image * x_strides[0] + (row - SIZE // 2) * x_strides[2] + (column - SIZE // 2) * x_strides[3]
    x += corner[:, None] + channel[None, :] * x_strides[1]
    total = tl.zeros((ROWS * COLUMNS, CHANNELS), tl.float32)
    for i in range(SIZE):
        for j in range(SIZE):
            same = tl.load(frame + (i * columns + j)) == centre
            factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x + (i * x_strides[2] + j * x_strides[3]), mask=same[:, None] & inside[None, :], other=0.0)
            total += value.to(tl.float32) * factor[None, :]
            weight += next_tap * num_channels
    if bias is not None:
        total += tl.load(bias + channel * bias_strides[0], mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.where((centre >= 0)[:, None], total, 0.0)
    place = image * out_strides[0] + row * out_strides[2] + column * out_strides[3]
    write = ((row < height) & (column < width))[:, None] & inside[None, :]
    tl.store(out + place[:, None] + channel[None, :] * out_strides[1], total.to(out.dtype.element_ty), mask=write)


@triton.jit(do_not_specialize=["num_rows", "rows_of_chunk", "height", "width", "rows", "columns"])
def _same_class_conv2d_weight_kernel(
    grad, x,  # (B, C, h, w)
    framed,  # (B, rows, columns) int32
    weight_sums,  # (chunks, k, k, C) float32: partial gradient of the weight from each chunk of rows of pixels
    bias_sums,  # (chunks, C) float32; or None
    grad_strides, x_strides, num_rows, rows_of_chunk, num_channels, height, width, rows, columns,
    SIZE: tl.constexpr, TAPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): the gradient of the output, x and the labels. The k programs of a chunk, one for each row of
    taps, run at the same time and read the same data: once from memory, then from the cache."""
    chunk, i = (tl.program_id(0) // SIZE).to(tl.int64), tl.program_id(0) % SIZE
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    j = tl.arange(0, TAPS)
    weight_sum = tl.zeros((TAPS, PIXELS, CHANNELS), tl.float32)
    bias_sum = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for line in range(chunk * rows_of_chunk, tl.minimum((chunk + 1) * rows_of_chunk, num_rows)):
        image, row = line // height, line % height
        frame = framed + (image * rows + row) * columns
        grad_row = grad + image * grad_strides[0] + row * grad_strides[2]
        x_row = x + image * x_strides[0] + (row + i - SIZE // 2) * x_strides[2] - SIZE // 2 * x_strides[3]
        for first in range(0, width, PIXELS):
            column = first + tl.arange(0, PIXELS).to(tl.int64)
            centre = _centre(frame + column, columns, SIZE, column < width)
            place = (column * grad_strides[3])[:, None] + (channel * grad_strides[1])[None, :]
            g = tl.load(grad_row + place, mask=(centre >= 0)[:, None] & inside[None, :], other=0.0).to(tl.float32)
            column = j[:, None] + column[None, :]
            same = tl.load(frame + i * columns + column, mask=column < columns, other=-1) == centre[None, :]
            same = (same & (j < SIZE)[:, None])[:, :, None] & inside[None, None, :]
            place = (column * x_strides[3])[:, :, None] + (channel * x_strides[1])[None, None, :]
            weight_sum += tl.load(x_row + place, mask=same, other=0.0).to(tl.float32) * g[None, :, :]
            if bias_sums is not None:
                bias_sum += g
    tap = (chunk * SIZE + i) * SIZE + j
    write = (j < SIZE)[:, None] & inside[None, :]
    tl.store(weight_sums + tap[:, None] * num_channels + channel[None, :], tl.sum(weight_sum, axis=1), mask=write)
    if bias_sums is not None and i == 0:
        tl.store(bias_sums + chunk * num_channels + channel, tl.sum(bias_sum, axis=0), mask=inside)


@triton.jit
def _tile(height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int64 image of this program, and int64 row and column of each of its pixels."""
    down, across = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0).to(tl.int64)
    pixel = tl.arange(0, ROWS * COLUMNS)
    row = tile // across % down * ROWS + pixel // COLUMNS
    return tile // across // down, row, tile % across * COLUMNS + pixel % COLUMNS


@triton.jit
def _centre(frame, columns, SIZE: tl.constexpr, valid):
    """The label at the centre of the window whose first corner is at `frame`; -2, which no neighbour has, if it is no
    class."""
    label = tl.load(frame + (SIZE // 2 * columns + SIZE // 2), mask=valid, other=-1)
    return tl.where(label < 0, -2, label)


def _frame(labels, size, rows, columns, num_classes):
    """Labels in a frame of -1, wide enough for windows of `size` around all pixels of tiles of rows x columns."""
    batch, height, width = labels.shape
    shape = [cdiv(n, step) * step + size - 1 for n, step in ((height, rows), (width, columns))]
    framed = labels.new_empty((batch, *shape), dtype=torch.int32)
    _same_class_conv2d_frame_kernel[(cdiv(framed.numel(), 1024),)](
        labels, framed, labels.stride(), batch, height, width, *shape, size // 2, num_classes, BLOCK=1024, num_warps=4
    )
    return framed


def _convolve(x, framed, taps, bias, out, launch, *, flipped=False):
    """`taps`: the weight as (k, k, C), contiguous."""
    (batch, channels, height, width), size = x.shape, len(taps)
    first_tap, next_tap = (taps[-1, -1], -1) if flipped else (taps, 1)
    tiles = batch * cdiv(height, launch.ROWS) * cdiv(width, launch.COLUMNS)
    _same_class_conv2d_convolve_kernel[(tiles, cdiv(channels, launch.CHANNELS))](
        x, framed, first_tap, bias, out, x.stride(), out.stride(), strides_of(bias, 1), channels, height, width,
        *framed.shape[1:], next_tap, SIZE=size, **launch._asdict(),
    )  # fmt: skip


def same_class_conv2d_forward(x, labels, weight, bias, num_classes):
    if weight.shape[-1] > MAX_SIZE:
        return reference.same_class_conv2d_forward(x, labels, weight, bias, num_classes)
    out = empty_like_layout(x)
    if out.numel():
        launch = convolve_launch(x.shape[1], x.stride(1) == 1)
        framed = _frame(labels, weight.shape[-1], launch.ROWS, launch.COLUMNS, num_classes)
        _convolve(x, framed, weight.permute(1, 2, 0).contiguous(), bias, out, launch)
    return out


def same_class_conv2d_backward(grad, x, labels, weight, bias, num_classes):
    (batch, channels, height, width), size = x.shape, weight.shape[-1]
    if size > MAX_SIZE or x.numel() == 0:
        return reference.same_class_conv2d_backward(grad, x, labels, weight, bias, num_classes)
    grad_x = empty_like_layout(x)
    launch = convolve_launch(channels, grad.stride(1) == 1)
    framed = _frame(labels, size, launch.ROWS, launch.COLUMNS, num_classes)
    _convolve(grad, framed, weight.permute(1, 2, 0).contiguous(), None, grad_x, launch, flipped=True)

    launch = weight_launch(size, channels, x.stride(1) == 1)
    blocks, lines = cdiv(channels, launch.CHANNELS), batch * height
    of_chunk = lines_of_chunk(launch, lines, size * blocks, x)
    chunks = cdiv(lines, of_chunk)
    weight_sums = x.new_empty((chunks, size, size, channels), dtype=torch.float32)
    bias_sums = None if bias is None else x.new_empty((chunks, channels), dtype=torch.float32)
    _same_class_conv2d_weight_kernel[(chunks * size, blocks)](
        grad, x, framed, weight_sums, bias_sums, grad.stride(), x.stride(), lines, of_chunk, channels, height, width,
        *framed.shape[1:], SIZE=size, **launch._asdict(),
    )  # fmt: skip
    grad_weight, grad_bias = sum_taps(weight_sums, bias_sums, weight, bias)
    return grad_x, grad_weight, weight.new_empty(0) if bias is None else grad_bias
