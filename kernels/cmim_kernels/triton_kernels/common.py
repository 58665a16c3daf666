"""Shared code of the kernels and launchers."""

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret


def cdiv(n, size):
    """n / size, rounded up. `triton.cdiv` takes 5 us on the host, and a launcher calls it up to 8 times."""
    return -(-n // size)


def next_power_of_two(n):
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def power_of_two(n, *, low, high):
    """The smallest power of two that is at least n, clamped to [low, high], which are powers of two."""
    return min(high, max(low, next_power_of_two(n)))


def strides_of(x, dimensions):
    """The strides of x; zeros if x is None."""
    return (0,) * dimensions if x is None else x.stride()


@triton.jit
def token_class(labels, masked, image, token, labels_strides, masked_strides, num_classes, valid):
    """int64 class of each token (`num_classes` where the label is out of range or `valid` is false), and whether it is
    masked.

    `image` and `token` are int64 and broadcast. If `labels` is None, there is one class.
    """
    is_masked = tl.load(masked + image * masked_strides[0] + token * masked_strides[1], mask=valid, other=0) != 0
    if labels is None:
        label = tl.where(valid, 0, num_classes).to(tl.int64)
    else:
        label = tl.load(labels + image * labels_strides[0] + token * labels_strides[1], mask=valid, other=0).to(tl.int64)
        label = tl.where(valid & (label >= 0) & (label < num_classes), label, num_classes)
    return label, is_masked


def registers_for(programs, num_warps):
    """The most registers a thread with which a multiprocessor holds so many programs at a time."""
    return 65536 // (programs * num_warps * 32) // 8 * 8  # given out in portions of 8


@triton.jit(do_not_specialize=["num_rows"])
def _sum_rows_kernel(
    rows,  # (R, C) float32, contiguous, like all others
    out,  # (C,)
    other_rows,  # (R, D) float32; or None
    other_out,  # (D,); or None
    num_rows, num_columns, other_columns, taps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): the R C + R D values and their sums."""
    block, blocks = tl.program_id(0), tl.cdiv(num_columns, COLUMNS)
    if other_rows is None:  # noqa: SIM114 - with `or`, the last branch would be compiled for None
        _sum_columns(rows, out, block, num_rows, num_columns, taps, ROWS, COLUMNS)
    elif block < blocks:
        _sum_columns(rows, out, block, num_rows, num_columns, taps, ROWS, COLUMNS)
    else:
        _sum_columns(other_rows, other_out, block - blocks, num_rows, other_columns, 1, ROWS, COLUMNS)


@triton.jit
def _sum_columns(rows, out, block, num_rows, num_columns, taps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of a block of columns. They are in the order (taps, channels) in `rows`, and (channels, taps) in `out`."""
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        total += tl.load(rows + row.to(tl.int64)[:, None] * num_columns + column[None, :], mask=inside, other=0.0)
    channels = num_columns // taps
    place = column % channels * taps + column // channels
    tl.store(out + place, tl.sum(total, axis=0), mask=column < num_columns)


def sum_rows(rows, dtype):
    """The sum over the first dimension of a contiguous float32 (R, C), always in the same order: (C,) of `dtype`."""
    out = rows.new_empty(rows.shape[1], dtype=dtype)
    if out.numel():
        _launch_sum_rows(rows, out, None, None, 1)
    return out


def sum_taps(weight_sums, bias_sums, weight, bias):
    """The gradients of a depthwise convolution's weight (C, k, k) and bias (C,), or None for the bias, in one launch.

    weight_sums (R, k, k, C) and bias_sums (R, C), or None, hold their summands, contiguous float32.
    """
    grad_weight = weight.new_empty(weight.shape)
    grad_bias = None if bias is None else bias.new_empty(bias.shape)
    _launch_sum_rows(weight_sums.flatten(1), grad_weight, bias_sums, grad_bias, weight.shape[-1] ** 2)
    return grad_weight, grad_bias


def _launch_sum_rows(rows, out, other_rows, other_out, taps):
    other_columns = 0 if other_rows is None else other_rows.shape[1]
    _sum_rows_kernel[(cdiv(rows.shape[1], 32) + cdiv(other_columns, 32),)](
        rows, out, other_rows, other_out, *rows.shape, other_columns, taps, ROWS=128, COLUMNS=32, num_warps=4
    )
