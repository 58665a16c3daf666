"""Stable counting sort of the tokens of each image by (class, visible before masked), in three launches.

The tokens of an image are divided into tiles. Count: the number of tokens of each segment in each tile. Scan: the number of
them in all earlier tiles. Place: the packed position of a token is the start of its segment, plus the number of tokens of
the segment in earlier tiles, plus the number of those before it in its own tile.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cmim_kernels.reference import pack_classes as reference
from cmim_kernels.triton_kernels.common import cdiv, power_of_two, token_class

MAX_CLASSES = 2047
"""With more segments, the counters of a program do not fit in registers, and PyTorch sorts instead."""


class PackLaunch(NamedTuple):
    TILE: int
    SEGMENTS: int
    num_warps: int


@functools.cache
def pack_launch(num_classes):
    """SEGMENTS: the 2K + 1 segments and one for the places past the last token."""
    return PackLaunch(TILE=128, SEGMENTS=power_of_two(2 * num_classes + 2, low=32, high=4096), num_warps=4)


@triton.jit(do_not_specialize=["num_tokens", "num_classes", "num_tiles"])
def _pack_classes_count_kernel(
    labels,  # (B, N)
    masked,  # (B, N) uint8
    counts,  # (B, tiles, SEGMENTS) int32
    labels_strides, masked_strides, num_tokens, num_classes, num_tiles,
    TILE: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): labels and masks. In addition, a row of counts is written for each tile."""
    program = tl.program_id(0).to(tl.int64)
    token = program % num_tiles * TILE + tl.arange(0, TILE)
    segment = _segments(labels, masked, program // num_tiles, token, labels_strides, masked_strides, num_tokens, num_classes)
    tl.store(counts + program * SEGMENTS + tl.arange(0, SEGMENTS), tl.histogram(segment, SEGMENTS))


@triton.jit(do_not_specialize=["num_tiles"])
def _pack_classes_scan_kernel(
    counts,  # (B, tiles, SEGMENTS) int32; in: of each tile, out: of all earlier tiles
    totals,  # (B, SEGMENTS) int32
    num_tiles,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Reads and writes the counts once."""
    image = tl.program_id(0).to(tl.int64)
    bins = tl.program_id(1) * BINS + tl.arange(0, BINS)
    carry = tl.zeros((BINS,), tl.int32)
    for first in range(0, num_tiles, ROWS):
        tile = first + tl.arange(0, ROWS)
        inside = (tile < num_tiles)[:, None] & (bins < SEGMENTS)[None, :]
        address = counts + (image * num_tiles + tile)[:, None] * SEGMENTS + bins[None, :]
        block = tl.load(address, mask=inside, other=0)
        tl.store(address, carry[None, :] + tl.cumsum(block, axis=0) - block, mask=inside)
        carry += tl.sum(block, axis=0)
    tl.store(totals + image * SEGMENTS + bins, carry)


@triton.jit(do_not_specialize=["num_tokens", "num_classes", "num_tiles"])
def _pack_classes_place_kernel(
    labels,  # (B, N)
    masked,  # (B, N) uint8
    earlier,  # (B, tiles, SEGMENTS) int32
    totals,  # (B, SEGMENTS) int32
    order, inverse, out_segment,  # (B, N) int32
    offsets,  # (B, 2K + 2) int32
    cu_seqlens,  # (B (K + 1) + 1,) int32
    labels_strides, masked_strides, num_tokens, num_classes, num_tiles,
    TILE: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): labels, masks and the three (B, N) int32 outputs. In addition, the totals of the image are
    read for each tile, and one count for each token."""
    program = tl.program_id(0).to(tl.int64)
    image, tile = program // num_tiles, program % num_tiles
    i = tl.arange(0, TILE)
    token = tile * TILE + i
    inside = token < num_tokens
    segment = _segments(labels, masked, image, token, labels_strides, masked_strides, num_tokens, num_classes)
    # Load the tile again, as columns: this is cheaper than a layout conversion.
    other = _segments(labels, masked, image, tile * TILE + i, labels_strides, masked_strides, num_tokens, num_classes)
    before = tl.sum(((segment[:, None] == other[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), axis=1)

    bins = tl.arange(0, SEGMENTS)
    total = tl.load(totals + image * SEGMENTS + bins)
    start = tl.cumsum(total, axis=0) - total
    before += tl.load(earlier + program * SEGMENTS + segment)
    packed = tl.gather(start, segment, axis=0) + before
    first_token = image * num_tokens
    tl.store(order + first_token + packed, token.to(tl.int32), mask=inside)
    tl.store(out_segment + first_token + packed, segment, mask=inside)
    tl.store(inverse + first_token + token, packed, mask=inside)

    if tile == 0:
        # The bin of the places past the last token starts at N, as `offsets` ends.
        tl.store(offsets + image * (2 * num_classes + 2) + bins, start, mask=bins < 2 * num_classes + 2)
        sequence = cu_seqlens + image * (num_classes + 1) + bins // 2
        starts_sequence = (bins % 2 == 0) & (bins <= 2 * num_classes)
        tl.store(sequence, (first_token + start).to(tl.int32), mask=starts_sequence)
        # The start of the next image; the program of that image writes the same number.
        tl.store(cu_seqlens + (image + 1) * (num_classes + 1), (first_token + num_tokens).to(tl.int32))


@triton.jit
def _segments(labels, masked, image, token, labels_strides, masked_strides, num_tokens, num_classes):
    """int32: 2k visible, 2k + 1 masked, 2K ignored, 2K + 1 past the last token."""
    inside = token < num_tokens
    label, is_masked = token_class(labels, masked, image, token, labels_strides, masked_strides, num_classes, inside)
    segment = 2 * label + tl.where(label < num_classes, is_masked.to(tl.int64), 0)
    return tl.where(inside, segment, 2 * num_classes + 1).to(tl.int32)


def pack_classes_forward(labels, masked, num_classes):
    if num_classes > MAX_CLASSES:
        return reference.pack_classes_forward(labels, masked, num_classes)
    batch, tokens = labels.shape
    new = lambda *shape: labels.new_empty(shape, dtype=torch.int32)  # noqa: E731
    outputs = reference.empty_layout(labels, masked, num_classes)
    if labels.numel() == 0:
        return tuple(out.zero_() for out in outputs)
    launch = pack_launch(num_classes)
    masked, tiles = masked.view(torch.uint8), cdiv(tokens, launch.TILE)
    counts, totals = new(batch, tiles, launch.SEGMENTS), new(batch, launch.SEGMENTS)
    sizes = (labels.stride(), masked.stride(), tokens, num_classes, tiles)
    _pack_classes_count_kernel[(batch * tiles,)](labels, masked, counts, *sizes, **launch._asdict())
    _pack_classes_scan_kernel[(batch, launch.SEGMENTS // 32)](
        counts, totals, tiles, launch.SEGMENTS, ROWS=128, BINS=32, num_warps=4
    )
    _pack_classes_place_kernel[(batch * tiles,)](labels, masked, counts, totals, *outputs, *sizes, **launch._asdict())
    return outputs
