"""Shared code of gathering and scattering: moving rows of tokens between packed and original order.

A program handles a tile of IMAGES x PLACES x CHANNELS: the same original places of several images, so that a position
is read once for all of them and its gradient is summed over them in one program. The packed rows are found through the
inverse permutation; rows are contiguous, so that any order of rows is equally fast.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from cmim_kernels.numerics import multiprocessors
from cmim_kernels.triton_kernels.common import cdiv, power_of_two, registers_for


class RowLaunch(NamedTuple):
    IMAGES: int
    PLACES: int
    CHANNELS: int
    num_warps: int
    maxnreg: int


RESIDENT = {256: 5, 128: 4, 64: 4, 32: 4}
"""Programs of the backward pass that a multiprocessor holds at a time, by their CHANNELS: fewer for narrow rows, which need
more registers for addresses."""


@functools.cache
def forward_launch(batch, channels):
    """One warp, whose threads need no barrier to tell each other which rows to move."""
    wide, images = _widths(batch, channels, elements=1024)
    return RowLaunch(images, 1024 // (wide * images), wide, num_warps=1, maxnreg=200 if wide == 32 else 168)


@functools.cache
def backward_launch(batch, channels):
    """More elements, so that there are few groups, each with a row of partial sums, but not more than 16 places or 32 rows,
    whose addresses would need more registers."""
    wide, images = _widths(batch, channels, elements=2048)
    places = min(16, 32 // images, 2048 // (wide * images))
    return RowLaunch(images, places, wide, num_warps=4, maxnreg=registers_for(RESIDENT[wide], 4))


def _widths(batch, channels, elements):
    """Channels and images of a tile of so many elements: first as many channels as possible, then images, then places."""
    wide = power_of_two(channels, low=32, high=256)
    return wide, power_of_two(batch, low=1, high=min(8, elements // wide))


def forward_grid(launch, batch, tokens, channels):
    return (cdiv(batch, launch.IMAGES) * cdiv(tokens, launch.PLACES), cdiv(channels, launch.CHANNELS))


def backward_grid(launch, tokens, channels, like):
    """The grid, and the number of blocks of places in a group. There are at most as many groups as the device holds at a
    time, so that all end together and their partial sums stay few."""
    blocks, columns = cdiv(tokens, launch.PLACES), max(1, cdiv(channels, launch.CHANNELS))
    in_group = max(1, cdiv(blocks, max(1, RESIDENT[launch.CHANNELS] * multiprocessors(like) // columns)))
    return (cdiv(blocks, in_group), columns), in_group


@triton.jit
def tile_of(program, num_tokens, IMAGES: tl.constexpr, PLACES: tl.constexpr):
    """int64 images (IMAGES, 1) and places (1, PLACES) of a program of `forward_grid`."""
    blocks = tl.cdiv(num_tokens, PLACES)
    image = (program // blocks).to(tl.int64) * IMAGES + tl.arange(0, IMAGES)
    place = (program % blocks).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    return image[:, None], place[None, :]


@triton.jit
def load_positions(position, place, channel, strides, num_tokens, num_channels):
    """float32 (1, P, C) of position (N, C); place (1, P)."""
    address = place[:, :, None] * strides[0] + channel[None, None, :] * strides[1]
    inside = (place < num_tokens)[:, :, None] & (channel < num_channels)[None, None, :]
    return tl.load(position + address, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_positions(position, place, channel, num_tokens, num_channels, value):
    """Write (P, C) into the contiguous position (N, C); place (1, P)."""
    address = place[:, :, None] * num_channels + channel[None, None, :]
    inside = (place < num_tokens)[:, :, None] & (channel < num_channels)[None, None, :]
    tl.store(position + address, value[None, :, :].to(position.dtype.element_ty), mask=inside)


@triton.jit
def load_rows(x, image, row, channel, strides, mask):
    """float32 (I, P, C) of x (B, rows, C), zero outside the mask; image (I, 1), row (I, P) or (1, P), channel (C,)."""
    address = (image * strides[0] + row.to(tl.int64) * strides[1])[:, :, None] + channel[None, None, :] * strides[2]
    return tl.load(x + address, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, image, row, channel, num_rows, num_channels, value, mask):
    """Write (I, P, C) into the contiguous x (B, num_rows, C)."""
    address = (image * num_rows + row)[:, :, None] * num_channels + channel[None, None, :]
    tl.store(x + address, value.to(x.dtype.element_ty), mask=mask)
