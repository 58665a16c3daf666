"""Mean feature of the visible and masked tokens of each class: kernels and launchers. See `reference/class_centroids.py`.

A segment holds the visible or the masked tokens of a class: there are 2 K segments. Their tokens are summed in one of two
ways. Both read the features once, in one launch; a second launch adds up partial sums and divides.

With up to 64 segments, tokens are read in memory order (`one_hot`). The tokens of an image are divided into splits. Each
split multiplies, block by block, a one-hot matrix (segments, tokens) with the features (tokens, channels) on tensor cores.

With more segments, that matrix would be mostly zeros, so tokens are read in the class order of `pack_classes` (`run`). A
program reads at most RUN rows, all of one segment, and the order of each sum is fixed. With RUN = 8 and segments a, b, c:

    packed row       0       8       16      24
    segment          aaaaabbbbbbbbbbbbbbbbbbbbbbbcccc
    first RUN rows   aaaaabbbbbbbb               cccc   programs s = 0 to 2 K - 1, one for each segment s
    the rest                      111222222223333       programs 2 K + r, one for each run r of RUN packed rows

Segments with at most RUN tokens, which are most of them, are then complete; the second launch completes the others.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cmim_kernels.numerics import empty_like_layout, multiprocessors
from cmim_kernels.reference import class_centroids as reference
from cmim_kernels.triton_kernels.common import INTERPRETED, cdiv, power_of_two, registers_for, token_class
from cmim_kernels.triton_kernels.pack_classes import pack_classes_forward

MAX_ONE_HOT = 64
RESIDENT = 2
"""Programs of the one-hot kernel that a multiprocessor holds at a time."""


class OneHotLaunch(NamedTuple):
    SEGMENTS: int
    TOKENS: int
    CHANNELS: int
    num_warps: int
    maxnreg: int


@functools.cache
def one_hot_launch(segments, itemsize):
    """Rows of 128 bytes; float32, which needs three products, gets half the channels and half the tokens. A multiprocessor
    has registers for RESIDENT programs at a time."""
    segments = power_of_two(segments, low=16, high=MAX_ONE_HOT)
    maxnreg = registers_for(RESIDENT, 8)
    return OneHotLaunch(segments, TOKENS=64 // itemsize, CHANNELS=128 // itemsize, num_warps=8, maxnreg=maxnreg)


def one_hot_splits(batch, tokens, channels, segments, launch, like):
    """The number of splits of the tokens of an image: as many programs as the device holds at a time, but at least 16 tokens
    for each segment in a split, so that the partial sums stay small compared with the features."""
    programs = batch * cdiv(channels, launch.CHANNELS)
    wanted = RESIDENT * multiprocessors(like) // programs
    return max(1, min(wanted, tokens // (16 * segments)))


class RunLaunch(NamedTuple):
    RUN: int
    ROWS: int
    CHANNELS: int
    num_warps: int


@functools.cache
def run_launch(channels):
    """A program adds up to RUN rows, ROWS at a time."""
    return RunLaunch(RUN=128, ROWS=16, CHANNELS=power_of_two(channels, low=32, high=128), num_warps=4)


@triton.jit
def _feature_address(features, b, n, channel, strides, width, IS_GRID: tl.constexpr):
    """Addresses (tokens, channels) in (B, C, h, w), from (b, c, h, w) strides; IS_GRID if the tokens do not have one
    constant stride across rows of w tokens."""
    token = n // width * strides[2] + n % width * strides[3] if IS_GRID else n * strides[3]
    return features + b * strides[0] + token[:, None] + channel[None, :] * strides[1]


@triton.jit
def _one_hot_sums(
    features, labels, masked, b, first, stop, channel, num_channels, num_classes, width,
    strides, labels_strides, masked_strides,
    CAREFUL: tl.constexpr, IS_GRID: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr,
    SEGMENTS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums (SEGMENTS, CHANNELS) and counts (SEGMENTS,) of the tokens from `first` to `stop`.

    float32 features are split into three parts of 8 bits, which add up exactly, for the tensor cores; the one-hot matrix is
    exact in any dtype. Tensor cores truncate when they add, which is a bias in sums over thousands of tokens of non-zero
    mean. So they add up one block of tokens only, and ordinary sums, which round, add up the blocks. A product with 0
    spreads inf and NaN over all segments; with CAREFUL they stay in their own segment.
    """
    segment_id = tl.arange(0, SEGMENTS)
    total = tl.zeros((SEGMENTS, CHANNELS), tl.float32)
    count = tl.zeros((SEGMENTS,), tl.int32)
    for start in tl.range(first, stop, TOKENS, num_stages=1 if CAREFUL else 3):
        n = start + tl.arange(0, TOKENS).to(tl.int64)
        label, is_masked = token_class(labels, masked, b, n, labels_strides, masked_strides, num_classes, n < stop)
        segment = tl.where(label < num_classes, 2 * label + is_masked.to(tl.int64), SEGMENTS).to(tl.int32)
        hit = segment_id[:, None] == segment[None, :]
        count += tl.sum(hit.to(tl.int32), axis=1)
        one_hot = hit.to(tl.float32).to(DOT)
        address = _feature_address(features, b, n, channel, strides, width, IS_GRID)
        inside = (n < stop)[:, None] & (channel < num_channels)[None, :]
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        if CAREFUL:
            finite = tl.abs(x) < float("inf")
            for s in range(0, 2 * num_classes):
                own = tl.sum(tl.where((segment == s)[:, None] & ~finite, x, 0.0), axis=0)
                total += tl.where((segment_id == s)[:, None], own[None, :], 0.0)
            x = tl.where(finite, x, 0.0)
        block = tl.zeros((SEGMENTS, CHANNELS), tl.float32)
        for part in tl.static_range(PARTS):
            leading = x
            if part < PARTS - 1:
                # Truncated, not rounded, so that the remainder is exact and nothing overflows.
                leading = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
                x -= leading
            block = tl.dot(one_hot, leading.to(DOT), block)
        # With this selection the compiler cannot let the tensor cores add to `total`.
        total += tl.where((segment_id < 2 * num_classes)[:, None], block, 0.0)
    return total, count


@triton.jit(do_not_specialize=["num_tokens", "num_classes", "width", "splits", "tokens_of_split"])
def _class_centroids_one_hot_kernel(
    features,  # (B, C, h, w), any strides
    labels, masked,  # (B, N), masked as uint8
    sums,  # (B, splits, 2K, C) float32
    counts,  # (B, splits, 2K) int32
    num_channels, num_tokens, num_classes, width, splits, tokens_of_split,
    strides, labels_strides, masked_strides,
    IS_GRID: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr,
    SEGMENTS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): the features. In addition, labels and masks are read once for each block of channels, and
    the sums of each split are written. If a sum is not finite, the features are read again to find its segment."""
    program = tl.program_id(0).to(tl.int64)
    b, split = program // splits, program % splits
    first = (split * tokens_of_split).to(tl.int32)
    stop = tl.minimum(first + tokens_of_split, num_tokens)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    total, count = _one_hot_sums(
        features, labels, masked, b, first, stop, channel, num_channels, num_classes, width,
        strides, labels_strides, masked_strides, False, IS_GRID, PARTS, DOT, SEGMENTS, TOKENS, CHANNELS,
    )  # fmt: skip
    if tl.min((tl.abs(total) < float("inf")).to(tl.int32)) == 0:
        total, _ = _one_hot_sums(
            features, labels, masked, b, first, stop, channel, num_channels, num_classes, width,
            strides, labels_strides, masked_strides, True, IS_GRID, PARTS, DOT, SEGMENTS, TOKENS, CHANNELS,
        )  # fmt: skip
    segment = tl.arange(0, SEGMENTS)
    row = program * 2 * num_classes + segment
    inside = (segment < 2 * num_classes)[:, None] & (channel < num_channels)[None, :]
    tl.store(sums + row[:, None] * num_channels + channel[None, :], total, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(counts + row, count, mask=segment < 2 * num_classes)


@triton.jit(do_not_specialize=["segments", "splits"])
def _class_centroids_mean_kernel(
    sums,  # (B, splits, 2K, C) float32
    counts,  # (B, splits, 2K) int32
    mean,  # (B, 2K, C) float32
    count,  # (B, 2K) int32
    num_channels, segments, splits,
    SEGMENTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): sums, counts, and the outputs."""
    b = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1) * SEGMENTS + tl.arange(0, SEGMENTS)
    channel = tl.program_id(2).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    there = segment < segments
    inside = there[:, None] & (channel < num_channels)[None, :]
    total = tl.zeros((SEGMENTS, CHANNELS), tl.float32)
    tokens = tl.zeros((SEGMENTS,), tl.int32)
    for split in range(0, splits):
        row = (b * splits + split) * segments + segment
        total += tl.load(sums + row[:, None] * num_channels + channel[None, :], mask=inside, other=0.0)
        tokens += tl.load(counts + row, mask=there, other=0)
    row = b * segments + segment
    result = total / tl.maximum(tokens, 1).to(tl.float32)[:, None]
    tl.store(mean + row[:, None] * num_channels + channel[None, :], result, mask=inside)
    if tl.program_id(2) == 0:
        tl.store(count + row, tokens, mask=there)


@triton.jit(do_not_specialize=["num_tokens", "num_classes", "width", "runs"])
def _class_centroids_run_kernel(
    features,  # (B, C, h, w), any strides
    labels, masked,  # (B, N), masked as uint8
    order, offsets,  # (B, N), (B, 2K + 2) int32, contiguous
    mean,  # (B, 2K, C) float32
    count,  # (B, 2K) int32
    rest,  # (B, runs, C) float32
    num_channels, num_tokens, num_classes, width, runs,
    strides, labels_strides, masked_strides,
    IS_GRID: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): the features, `order`, and the outputs. In addition, one row of `rest` for each RUN tokens.

    An image has 2K + runs programs. Program s < 2K adds up the first RUN rows of segment s, which gives the mean if there
    are no more. Program 2K + r adds up the remaining rows among the packed rows r RUN to (r + 1) RUN: they all belong to the
    segment of row r RUN, because any other segment there begins later, so that these are among its first RUN rows.
    """
    segments = 2 * num_classes
    b = (tl.program_id(0) // (segments + runs)).to(tl.int64)
    item = tl.program_id(0) % (segments + runs)
    run = item - segments
    low = tl.maximum(run, 0) * RUN
    n = tl.load(order + b * num_tokens + low).to(tl.int64)
    label, is_masked = token_class(labels, masked, b, n, labels_strides, masked_strides, num_classes, n < num_tokens)
    segment_of_run = tl.where(label < num_classes, 2 * label + is_masked.to(tl.int64), segments).to(tl.int32)
    segment = tl.where(run < 0, item, segment_of_run)
    begin = tl.load(offsets + b * (segments + 2) + segment)
    end = tl.load(offsets + b * (segments + 2) + segment + 1)
    start = tl.where(run < 0, begin, tl.maximum(begin + RUN, low))
    stop = tl.minimum(tl.where(run < 0, begin, low) + RUN, end)
    stop = tl.where(segment < segments, stop, start)  # ignored tokens
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        token = tl.load(order + b * num_tokens + row, mask=row < stop, other=0).to(tl.int64)
        address = _feature_address(features, b, token, channel, strides, width, IS_GRID)
        total += tl.load(address, mask=(row < stop)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    result = tl.sum(total, axis=0)
    if run < 0:
        if end - begin <= RUN:
            result = result / tl.maximum(end - begin, 1).to(tl.float32)
        tl.store(mean + (b * segments + segment) * num_channels + channel, result, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(count + b * segments + segment, end - begin)
    elif start < stop:
        tl.store(rest + (b * runs + run) * num_channels + channel, result, mask=inside)


@triton.jit(do_not_specialize=["segments", "runs"])
def _class_centroids_run_mean_kernel(
    offsets,  # (B, 2K + 2) int32, contiguous
    mean,  # (B, 2K, C) float32; for longer segments; in: the sum of the first RUN rows, out: the mean
    rest,  # (B, runs, C) float32
    num_channels, segments, runs,
    RUN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): the rows of `rest`, and of the means that it completes."""
    b = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    begin = tl.load(offsets + b * (segments + 2) + segment)
    end = tl.load(offsets + b * (segments + 2) + segment + 1)
    if end - begin > RUN:
        channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
        inside = channel < num_channels
        address = mean + (b * segments + segment) * num_channels + channel
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        last = (end - 1) // RUN
        for first in range(begin // RUN + 1, last + 1, ROWS):
            run = first + tl.arange(0, ROWS)
            there = (run <= last)[:, None] & inside[None, :]
            total += tl.load(rest + (b * runs + run)[:, None] * num_channels + channel[None, :], mask=there, other=0.0)
        result = tl.load(address, mask=inside, other=0.0) + tl.sum(total, axis=0)
        tl.store(address, result / (end - begin).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_classes", "width"])
def _class_centroids_spread_kernel(
    grad_mean,  # (B, K, 2, C) float32, any strides
    count,  # (B, K, 2) int32, contiguous
    labels, masked,  # (B, N), masked as uint8
    grad,  # (B, C, h, w)
    num_channels, num_tokens, num_classes, width,
    grad_mean_strides, strides, labels_strides, masked_strides,
    IS_GRID: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): the gradient of the features. In addition, labels and masks are read once for each block
    of channels, and a row of grad_mean for each token, from the cache."""
    blocks = tl.cdiv(num_tokens, TOKENS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    label, is_masked = token_class(labels, masked, b, n, labels_strides, masked_strides, num_classes, n < num_tokens)
    kind = is_masked.to(tl.int64)
    valid = label < num_classes
    tokens = tl.load(count + (b * num_classes + label) * 2 + kind, mask=valid, other=1).to(tl.float32)
    row = b * grad_mean_strides[0] + label * grad_mean_strides[1] + kind * grad_mean_strides[2]
    address = grad_mean + row[:, None] + channel[None, :] * grad_mean_strides[3]
    inside = (channel < num_channels)[None, :]
    share = tl.load(address, mask=valid[:, None] & inside, other=0.0) / tokens[:, None]
    address = _feature_address(grad, b, n, channel, strides, width, IS_GRID)
    tl.store(address, share.to(grad.dtype.element_ty), mask=(n < num_tokens)[:, None] & inside)


def class_centroids_forward(features, labels, masked, num_classes, order, offsets):
    batch, tokens = labels.shape
    channels, segments = features.shape[1 if features.dim() == 4 else 2], 2 * num_classes
    if features.numel() == 0:
        return reference.class_centroids_forward(features, labels, masked, num_classes, order, offsets)
    mean = features.new_empty((batch, num_classes, 2, channels), dtype=torch.float32)
    count = features.new_empty((batch, num_classes, 2), dtype=torch.int32)
    strides, width, is_grid = _token_grid(features)
    sizes = (channels, tokens, num_classes, width)
    all_strides = (strides, labels.stride(), masked.stride())
    if segments <= MAX_ONE_HOT:
        launch = one_hot_launch(segments, features.itemsize)
        splits = one_hot_splits(batch, tokens, channels, segments, launch, features)
        tokens_of_split = launch.TOKENS * cdiv(cdiv(tokens, splits), launch.TOKENS)
        splits = cdiv(tokens, tokens_of_split)
        sums = features.new_empty((batch, splits, segments, channels), dtype=torch.float32)
        counts = features.new_empty((batch, splits, segments), dtype=torch.int32)
        half = features.dtype != torch.float32
        dot = {torch.float16: tl.float16}.get(features.dtype, tl.bfloat16)
        _class_centroids_one_hot_kernel[(batch * splits, cdiv(channels, launch.CHANNELS))](
            features, labels, masked.view(torch.uint8), sums, counts, *sizes, splits, tokens_of_split, *all_strides,
            IS_GRID=is_grid, PARTS=1 if half else 3, DOT=tl.float32 if INTERPRETED else dot, **launch._asdict(),
        )  # fmt: skip
        _class_centroids_mean_kernel[(batch, cdiv(segments, 16), cdiv(channels, 128))](
            sums, counts, mean, count, channels, segments, splits, SEGMENTS=16, CHANNELS=128, num_warps=4
        )
        return mean, count
    if order is None:
        order, _, _, offsets, _ = pack_classes_forward(labels, masked, num_classes)
    launch = run_launch(channels)
    runs, columns = cdiv(tokens, launch.RUN), cdiv(channels, launch.CHANNELS)
    rest = features.new_empty((batch, runs, channels), dtype=torch.float32)
    order, offsets = order.contiguous(), offsets.contiguous()
    _class_centroids_run_kernel[(batch * (segments + runs), columns)](
        features, labels, masked.view(torch.uint8), order, offsets, mean, count, rest, *sizes, runs, *all_strides,
        IS_GRID=is_grid, **launch._asdict(),
    )  # fmt: skip
    _class_centroids_run_mean_kernel[(batch * segments, columns)](
        offsets, mean, rest, channels, segments, runs, **launch._asdict()
    )
    return mean, count


def class_centroids_backward(grad_mean, count, features, labels, masked, num_classes):
    grad = empty_like_layout(features)
    if grad.numel():
        batch, tokens = labels.shape
        strides, width, is_grid = _token_grid(grad)
        channels = grad_mean.shape[3]
        _class_centroids_spread_kernel[(batch * cdiv(tokens, 64), cdiv(channels, 64))](
            grad_mean, count.contiguous(), labels, masked.view(torch.uint8), grad, channels, tokens, num_classes, width,
            grad_mean.stride(), strides, labels.stride(), masked.stride(),
            IS_GRID=is_grid, TOKENS=64, CHANNELS=64, num_warps=8,
        )  # fmt: skip
    return grad


def _token_grid(features):
    """(B, C, h, w) or (B, N, C) in the form for the kernels: (b, c, h, w) strides, w, and IS_GRID."""
    if features.dim() == 3:
        b, n, c = features.stride()
        return (b, c, 0, n), features.shape[1], False
    width = features.shape[3]
    return features.stride(), width, features.stride(2) != width * features.stride(3)
