"""The class of each patch by majority vote, in one launch. The time hardly depends on the number of classes, the memory not
at all.

Small patches: a program takes many patches and counts, in each of them, the smallest label, then the next smallest one, and
so on; labels that do not occur cost nothing. Larger patches: a program takes one patch and counts BINS classes at a time
with a histogram; ranges of BINS classes without a label cost nothing.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cmim_kernels.reference import patch_labels as reference
from cmim_kernels.triton_kernels.common import cdiv, next_power_of_two, power_of_two

MAX_PATCH_SIZE = 64
"""The pixels of a larger patch do not fit in the registers of a program, and PyTorch sorts instead."""

NO_LABEL = tl.constexpr(2**31 - 1)


class FewPixelsLaunch(NamedTuple):
    SIDE: int
    PATCHES: int
    num_warps: int


class ManyPixelsLaunch(NamedTuple):
    SIDE: int
    BINS: int
    num_warps: int


@functools.cache
def patch_labels_launch(patch_size, num_classes):
    """SIDE: padded side of a patch. PATCHES: number of neighbouring patches of a row in a program."""
    side = next_power_of_two(patch_size)
    if side <= 4:
        return FewPixelsLaunch(side, 256 // side**2, 1)
    return ManyPixelsLaunch(side, power_of_two(num_classes, low=32, high=256), 1 if side <= 16 else 4)


@triton.jit(do_not_specialize=["rows", "columns", "blocks", "num_classes", "votes_needed"])
def _patch_labels_few_pixels_kernel(
    labels,  # (B, H, W)
    out,  # (B, H / p, W / p) int32, contiguous
    labels_strides, rows, columns, blocks, patch_size, num_classes, votes_needed,
    SIDE: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): the labels and the output."""
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block * PATCHES + tl.arange(0, PATCHES)
    pixel = tl.arange(0, SIDE * SIDE)
    inside = _inside_patch(pixel, patch_size, SIDE)[:, None] & (column < columns)[None, :]
    label = _load_labels(labels, row, column[None, :], pixel[:, None], inside,
                         labels_strides, rows, patch_size, num_classes, SIDE)  # fmt: skip
    winner = tl.full((PATCHES,), -1, tl.int32)
    most = tl.zeros((PATCHES,), tl.float32)
    candidate = tl.min(label, axis=0)
    while tl.min(candidate, axis=0) < NO_LABEL:
        # Counted in float32, which is exact here; for integers, compilers may use shared memory.
        votes = tl.sum(tl.where(label == candidate[None, :], 1.0, 0.0), axis=0)
        wins = (candidate < NO_LABEL) & (votes > most)  # from small to large ids: of equal counts the smaller id is kept
        winner = tl.where(wins, candidate, winner)
        most = tl.where(wins, votes, most)
        candidate = tl.min(tl.where(label > candidate[None, :], label, NO_LABEL), axis=0)
    tl.store(out + row.to(tl.int64) * columns + column, tl.where(most >= votes_needed, winner, -1), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "columns", "num_classes", "votes_needed"])
def _patch_labels_many_pixels_kernel(
    labels, out,  # as above
    labels_strides, rows, columns, patch_size, num_classes, votes_needed,
    SIDE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): the labels and the output."""
    row, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    pixel = tl.arange(0, SIDE * SIDE)
    label = _load_labels(labels, row, column, pixel, _inside_patch(pixel, patch_size, SIDE),
                         labels_strides, rows, patch_size, num_classes, SIDE)  # fmt: skip
    winner = tl.full((), -1, tl.int32)
    most = tl.zeros((), tl.int32)
    smallest = tl.min(label, axis=0)
    while smallest < NO_LABEL:
        first = smallest // BINS * BINS
        here = (label >= first) & (label - first < BINS)
        votes = tl.histogram(tl.where(here, label - first, 0), BINS, mask=here)
        best = tl.max(votes * BINS + (BINS - 1 - tl.arange(0, BINS)), axis=0)  # most votes; among equals the smallest bin
        wins = best // BINS > most
        winner = tl.where(wins, first + (BINS - 1 - best % BINS), winner)
        most = tl.where(wins, best // BINS, most)
        smallest = tl.min(tl.where(label - first < BINS, NO_LABEL, label), axis=0)
    tl.store(out + row.to(tl.int64) * columns + column, tl.where(most >= votes_needed, winner, -1))


@triton.jit
def _inside_patch(pixel, patch_size, SIDE: tl.constexpr):
    return (pixel // SIDE < patch_size) & (pixel % SIDE < patch_size)


@triton.jit
def _load_labels(labels, row, column, pixel, inside, strides, rows, patch_size, num_classes, SIDE: tl.constexpr):
    """int32 labels of the pixels of patches in a `row` over all images; NO_LABEL where ignored or not `inside`."""
    image = (row // rows).to(tl.int64)
    y = (row % rows).to(tl.int64) * patch_size + pixel // SIDE
    x = column.to(tl.int64) * patch_size + pixel % SIDE
    label = tl.load(labels + image * strides[0] + y * strides[1] + x * strides[2], mask=inside, other=0).to(tl.int64)
    return tl.where(inside & (label >= 0) & (label < num_classes), label, NO_LABEL).to(tl.int32)


def patch_labels_forward(labels, patch_size, num_classes, min_share):
    if patch_size > MAX_PATCH_SIZE:
        return reference.patch_labels_forward(labels, patch_size, num_classes, min_share)
    batch, height, width = labels.shape
    rows, columns = height // patch_size, width // patch_size
    out = labels.new_empty((batch, rows, columns), dtype=torch.int32)
    if out.numel():
        launch = patch_labels_launch(patch_size, num_classes)
        needed = votes_needed(patch_size**2, min_share)
        if isinstance(launch, FewPixelsLaunch):
            blocks = cdiv(columns, launch.PATCHES)
            _patch_labels_few_pixels_kernel[(batch * rows * blocks,)](
                labels, out, labels.stride(), rows, columns, blocks, patch_size, num_classes, needed, **launch._asdict()
            )
        else:
            _patch_labels_many_pixels_kernel[(out.numel(),)](
                labels, out, labels.stride(), rows, columns, patch_size, num_classes, needed, **launch._asdict()
            )
    return out


@functools.cache
def votes_needed(area, min_share):
    """The smallest number of pixels whose share of `area`, a float64 quotient, is at least `min_share`."""
    return next((votes for votes in range(area + 1) if votes / area >= min_share), area + 1)
