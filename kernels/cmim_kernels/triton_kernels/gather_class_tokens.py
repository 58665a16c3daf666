"""Tokens to packed order, with mask token and positions: kernels and launchers. See `reference/gather_class_tokens.py`."""

import torch
import triton
import triton.language as tl

from cmim_kernels.triton_kernels.common import strides_of, sum_rows
from cmim_kernels.triton_kernels.rows import (
    backward_grid,
    backward_launch,
    forward_grid,
    forward_launch,
    load_positions,
    load_rows,
    store_positions,
    store_rows,
    tile_of,
)


@triton.jit(do_not_specialize=["batch", "num_tokens", "length"])
def _gather_forward_kernel(
    tokens,  # (B, N, C)
    inverse, segment,  # (B, N) int32, contiguous
    mask_token,  # (C,) or None
    position,  # (N, C) or None
    out,  # (B, L, C), contiguous
    tokens_strides, mask_token_strides, position_strides, batch, num_tokens, length, num_channels,
    IMAGES: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): the tokens that are kept and not replaced, the output, `inverse`, `segment` where there is a
    mask token, and the positions (once for each IMAGES images)."""
    image, place = tile_of(tl.program_id(0), num_tokens, IMAGES, PLACES)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    valid = (image < batch) & (place < num_tokens)
    packed = tl.load(inverse + image * num_tokens + place, mask=valid, other=length)
    kept = packed < length
    write = kept[:, :, None] & inside[None, None, :]
    if mask_token is None:
        out_rows = load_rows(tokens, image, place, channel, tokens_strides, write)
    else:
        replaced = tl.load(segment + image * num_tokens + packed, mask=kept, other=0) % 2 == 1
        x = load_rows(tokens, image, place, channel, tokens_strides, write & ~replaced[:, :, None])
        fill = tl.load(mask_token + channel * mask_token_strides[0], mask=inside, other=0.0).to(tl.float32)
        out_rows = tl.where(replaced[:, :, None], fill[None, None, :], x)
    if position is not None:
        out_rows += load_positions(position, place, channel, position_strides, num_tokens, num_channels)
    store_rows(out, image, packed, channel, length, num_channels, out_rows, write)


@triton.jit(do_not_specialize=["batch", "num_tokens", "length", "blocks_in_group"])
def _gather_backward_kernel(
    grad,  # (B, L, C)
    inverse, segment,  # (B, N) int32, contiguous
    grad_tokens,  # (B, N, C), contiguous
    grad_mask_token,  # (groups, C) float32, the sum of each group; or None
    grad_position,  # (N, C), contiguous; or None
    grad_strides, batch, num_tokens, length, num_channels, blocks_in_group,
    IMAGES: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): the gradient of the output and of each input once, `inverse`, and `segment` where there is
    a mask token; a (C,) row of partial sums for each group besides."""
    group = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < num_channels
    replaced_sum = tl.zeros((PLACES, CHANNELS), tl.float32)
    for block in range(0, blocks_in_group):
        place = ((group * blocks_in_group + block) * PLACES + tl.arange(0, PLACES))[None, :]
        position_sum = tl.zeros((PLACES, CHANNELS), tl.float32)
        for first in range(0, batch, IMAGES):
            image = (first + tl.arange(0, IMAGES)).to(tl.int64)[:, None]
            valid = (image < batch) & (place < num_tokens)
            packed = tl.load(inverse + image * num_tokens + place, mask=valid, other=length)
            kept = packed < length
            rows = load_rows(grad, image, packed, channel, grad_strides, kept[:, :, None] & inside[None, None, :])
            if grad_position is not None:
                position_sum += tl.sum(rows, axis=0)
            if grad_mask_token is not None:
                replaced = (tl.load(segment + image * num_tokens + packed, mask=kept, other=0) % 2 == 1)[:, :, None]
                replaced_sum += tl.sum(tl.where(replaced, rows, 0.0), axis=0)
                rows = tl.where(replaced, 0.0, rows)
            write = valid[:, :, None] & inside[None, None, :]
            store_rows(grad_tokens, image, place, channel, num_tokens, num_channels, rows, write)
        if grad_position is not None:
            store_positions(grad_position, place, channel, num_tokens, num_channels, position_sum)
    if grad_mask_token is not None:
        tl.store(grad_mask_token + group * num_channels + channel, tl.sum(replaced_sum, axis=0), mask=inside)


def gather_class_tokens_forward(tokens, order, inverse, segment, mask_token, position, length):
    batch, num_tokens, channels = tokens.shape
    out = tokens.new_empty((batch, length, channels))
    if out.numel():
        launch = forward_launch(batch, channels)
        _gather_forward_kernel[forward_grid(launch, batch, num_tokens, channels)](
            tokens, inverse.contiguous(), segment.contiguous(), mask_token, position, out,
            tokens.stride(), strides_of(mask_token, 1), strides_of(position, 2), batch, num_tokens, length, channels,
            **launch._asdict(),
        )  # fmt: skip
    return out


def gather_class_tokens_backward(grad, inverse, segment, mask_token, position):
    batch, length, channels = grad.shape
    num_tokens = inverse.shape[1]
    grad_tokens, grad_mask_token = grad.new_empty((batch, num_tokens, channels)), grad.new_empty(0)
    grad_position = None if position is None else position.new_empty(position.shape)
    launch = backward_launch(batch, channels)
    grid, blocks_in_group = backward_grid(launch, num_tokens, channels, grad)
    partial = None if mask_token is None else grad.new_empty((grid[0], channels), dtype=torch.float32)
    if num_tokens and channels:
        _gather_backward_kernel[grid](
            grad, inverse.contiguous(), segment.contiguous(), grad_tokens, partial, grad_position,
            grad.stride(), batch, num_tokens, length, channels, blocks_in_group, **launch._asdict(),
        )  # fmt: skip
    if mask_token is not None:
        grad_mask_token = sum_rows(partial, mask_token.dtype)
    return grad_tokens, grad_mask_token, grad.new_empty(0) if position is None else grad_position
