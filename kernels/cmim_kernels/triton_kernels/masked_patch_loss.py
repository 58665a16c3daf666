"""Reconstruction loss over masked patches: kernels and launchers. See `reference/masked_patch_loss.py`.

Forward: the kernel `error` writes the mean distance of each token that counts (masked, with a valid label); `class_sum` adds
up these errors by class and computes the loss. Backward: `gradient` recomputes target and difference, and writes the
derivative of the distance times the weight.

`error` and `gradient` read patches in the same way. A program has TOKENS patches and loops over their p p c entries in
blocks of ENTRIES, usually one block. The offset of an entry is the start of its token (`_token_offset`) plus its offset in
the token (`_entry_offset`), so predictions may be images or tokens with any strides. `_target` loads pixels and normalises
uint8 values, `_statistics` computes mean and standard deviation of a target patch, and `_difference` computes prediction
minus target. The many arguments are strides, sizes and compile-time options of these five functions.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cmim_kernels.numerics import empty_like_layout
from cmim_kernels.triton_kernels.common import cdiv, power_of_two, token_class


class PatchLaunch(NamedTuple):
    TOKENS: int
    ENTRIES: int
    num_warps: int
    maxnreg: int


@functools.cache
def patch_launch(entries):
    """One warp, so that no sum waits at a barrier: for one patch, or for as many small ones as have 256 entries. Patches of
    more than 1024 entries, which are read in several blocks, take more registers than one warp has."""
    block = power_of_two(entries, low=16, high=1024)
    return PatchLaunch(max(1, 256 // block), block, num_warps=1 if entries <= block else 4, maxnreg=168)


class SumLaunch(NamedTuple):
    TOKENS: int
    CLASSES: int
    PROGRAMS: int
    num_warps: int


@functools.cache
def sum_launch(num_classes):
    """PROGRAMS limits the number of programs that share the tokens, so that one program can add up their partial sums."""
    return SumLaunch(TOKENS=128, CLASSES=16 if num_classes <= 16 else 64, PROGRAMS=128, num_warps=4)


@triton.jit(do_not_specialize=["batch", "num_tokens", "columns", "num_classes", "num_counters"])
def _masked_patch_loss_error_kernel(
    pred,  # (B, N, p p c) or (B, c, H, W)
    image,  # (B, c, H, W), float or uint8
    masked,  # (B, N) uint8
    labels,  # (B, N) or None
    error,  # (B, N) float32; written where a token counts
    finished,  # (num_counters,) int32; set to 0 for the next kernel
    pred_strides, image_strides, masked_strides, labels_strides,
    batch, num_tokens, columns, num_classes, num_counters,
    PATCH: tl.constexpr, CHANNELS: tl.constexpr, AS_IMAGE: tl.constexpr, CHANNEL_FIRST: tl.constexpr,
    MEAN: tl.constexpr, STD: tl.constexpr, DISTANCE: tl.constexpr, NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): prediction and image of the tokens that count, all masks and labels, the errors. With
    NORMALIZE the image is read twice, the second time from the cache."""
    if tl.program_id(0) == 0:
        for first in range(0, num_counters, 32):
            counter = first + tl.arange(0, 32)
            tl.store(finished + counter, 0, mask=counter < num_counters)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    counts, b, n, _ = _tokens(token, masked, labels, masked_strides, labels_strides, batch, num_tokens, num_classes)
    pred_token = _token_offset(b, n, columns, pred_strides, PATCH, AS_IMAGE)
    image_token = _token_offset(b, n, columns, image_strides, PATCH, True)
    SIZE: tl.constexpr = PATCH * PATCH * CHANNELS
    centre, scale = _statistics(
        image, image_token, image_strides, counts, PATCH, CHANNELS, CHANNEL_FIRST, MEAN, STD, NORMALIZE, TOKENS, ENTRIES
    )
    total = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, SIZE, ENTRIES):
        difference = _difference(
            pred, image, pred_token, image_token, pred_strides, image_strides, start, counts, centre, scale,
            PATCH, CHANNELS, AS_IMAGE, CHANNEL_FIRST, MEAN, STD, NORMALIZE, ENTRIES,
        )  # fmt: skip
        size = tl.abs(difference)
        if DISTANCE == "mse":
            size = difference * difference
        if DISTANCE == "smooth_l1":
            size = tl.where(size < 1, 0.5 * difference * difference, size - 0.5)
        total += tl.sum(size, axis=1)
    tl.store(error + token, total / SIZE, mask=counts)


@triton.jit(do_not_specialize=["batch", "num_tokens", "num_classes", "tokens_of_program"])
def _masked_patch_loss_class_sum_kernel(
    error,  # (B, N) float32
    masked,  # (B, N) uint8
    labels,  # (B, N) or None
    sums, counts,  # (programs, K) float32 and int32: partial sums of each program
    class_sum, class_count,  # (K,) float32 and int32
    loss,  # () float32
    finished,  # (class blocks + 1,) int32, zeros: counters of finished programs for each block of classes, and of blocks
    masked_strides, labels_strides, batch, num_tokens, num_classes, tokens_of_program,
    PER_CLASS: tl.constexpr, TOKENS: tl.constexpr, CLASSES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): errors, masks and labels. They are read again for each block of CLASSES classes.

    A deterministic sum in one launch:
    1. each program sums the errors of its tokens by class, and stores a row of `sums` and `counts`;
    2. a counter tells the program that finishes last within a block of classes; it adds up the rows of all programs, in
       the order of the programs;
    3. a second counter tells the block of classes that finishes last; it computes the loss.
    Which program finishes last varies; the result does not.
    """
    program, programs = tl.program_id(1), tl.num_programs(1)
    k = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    found_sum = tl.zeros((CLASSES,), tl.float32)
    found_count = tl.zeros((CLASSES,), tl.int32)
    for first in range(0, tokens_of_program, TOKENS):
        token = program.to(tl.int64) * tokens_of_program + first + tl.arange(0, TOKENS)
        valid, _, _, label = _tokens(token, masked, labels, masked_strides, labels_strides, batch, num_tokens, num_classes)
        e = tl.load(error + token, mask=valid, other=0.0)
        hit = (label[:, None] == k[None, :]) & valid[:, None]
        found_sum += tl.sum(tl.where(hit, e[:, None], 0.0), axis=0)
        found_count += tl.sum(hit.to(tl.int32), axis=0)
    tl.store(sums + program * num_classes + k, found_sum, mask=k < num_classes)
    tl.store(counts + program * num_classes + k, found_count, mask=k < num_classes)
    tl.debug_barrier()  # every thread's stores come before the counter
    if tl.atomic_add(finished + tl.program_id(0), 1, sem="acq_rel") == programs - 1:
        row = tl.arange(0, PROGRAMS)
        inside = (row < programs)[:, None] & (k < num_classes)[None, :]
        cell = row[:, None] * num_classes + k[None, :]
        tl.store(class_sum + k, tl.sum(tl.load(sums + cell, mask=inside, other=0.0), axis=0), mask=k < num_classes)
        tl.store(class_count + k, tl.sum(tl.load(counts + cell, mask=inside, other=0), axis=0), mask=k < num_classes)
        tl.debug_barrier()
        if tl.atomic_add(finished + tl.num_programs(0), 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tokens, present = _totals(class_count, num_classes, CLASSES)
            result = tl.zeros((CLASSES,), tl.float32)
            for first in range(0, num_classes, CLASSES):
                k = first + tl.arange(0, CLASSES)
                s = tl.load(class_sum + k, mask=k < num_classes, other=0.0)
                if PER_CLASS:
                    s = s / tl.maximum(tl.load(class_count + k, mask=k < num_classes, other=1), 1).to(tl.float32)
                result += s
            tl.store(loss, tl.sum(result, axis=0) / tl.maximum(present if PER_CLASS else tokens, 1.0))


@triton.jit(do_not_specialize=["batch", "num_tokens", "columns", "num_classes"])
def _masked_patch_loss_gradient_kernel(
    grad_loss,  # () float32
    grad_class_sum,  # (K,) float32
    class_count,  # (K,) int32
    pred, image, masked, labels,  # as above
    grad,  # like pred
    grad_class_sum_strides, pred_strides, image_strides, masked_strides, labels_strides, grad_strides,
    batch, num_tokens, columns, num_classes,
    PER_CLASS: tl.constexpr,
    PATCH: tl.constexpr, CHANNELS: tl.constexpr, AS_IMAGE: tl.constexpr, CHANNEL_FIRST: tl.constexpr,
    MEAN: tl.constexpr, STD: tl.constexpr, DISTANCE: tl.constexpr, NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Memory traffic (minimum): what the forward pass reads, and the whole gradient; in addition, the counts for each
    program."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    counts, b, n, label = _tokens(token, masked, labels, masked_strides, labels_strides, batch, num_tokens, num_classes)
    SIZE: tl.constexpr = PATCH * PATCH * CHANNELS
    tokens, present = _totals(class_count, num_classes, 32)
    denominator = tl.maximum(tokens, 1.0)
    if PER_CLASS:
        denominator = tl.maximum(present, 1.0) * tl.load(class_count + label, mask=counts, other=1).to(tl.float32)
    by_class = tl.load(grad_class_sum + label * grad_class_sum_strides[0], mask=counts, other=0.0)
    weight = (by_class + tl.load(grad_loss) / denominator) / SIZE

    pred_token = _token_offset(b, n, columns, pred_strides, PATCH, AS_IMAGE)
    grad_token = _token_offset(b, n, columns, grad_strides, PATCH, AS_IMAGE)
    image_token = _token_offset(b, n, columns, image_strides, PATCH, True)
    centre, scale = _statistics(
        image, image_token, image_strides, counts, PATCH, CHANNELS, CHANNEL_FIRST, MEAN, STD, NORMALIZE, TOKENS, ENTRIES
    )
    for start in range(0, SIZE, ENTRIES):
        difference = _difference(
            pred, image, pred_token, image_token, pred_strides, image_strides, start, counts, centre, scale,
            PATCH, CHANNELS, AS_IMAGE, CHANNEL_FIRST, MEAN, STD, NORMALIZE, ENTRIES,
        )  # fmt: skip
        if DISTANCE == "l1":
            slope = (difference > 0).to(tl.float32) - (difference < 0).to(tl.float32)
        elif DISTANCE == "mse":
            slope = 2 * difference
        else:
            slope = tl.clamp(difference, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(counts[:, None], slope * weight[:, None], 0.0)
        entry = start + tl.arange(0, ENTRIES)
        offset, _ = _entry_offset(entry, grad_strides, PATCH, CHANNELS, AS_IMAGE, CHANNEL_FIRST)
        inside = (token < batch * num_tokens)[:, None] & (entry < SIZE)[None, :]
        tl.store(grad + grad_token[:, None] + offset[None, :], slope.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _tokens(token, masked, labels, masked_strides, labels_strides, batch, num_tokens, num_classes):
    """For each token of a flat index: whether it counts, its image and place (int64), and its class."""
    b, n = token // num_tokens, token % num_tokens
    label, is_masked = token_class(labels, masked, b, n, labels_strides, masked_strides, num_classes, b < batch)
    return is_masked & (label < num_classes), b, n, label


@triton.jit
def _totals(class_count, num_classes, CLASSES: tl.constexpr):
    """The number of tokens that count and the number of classes that have such tokens, as float32."""
    tokens = tl.zeros((CLASSES,), tl.int64)
    present = tl.zeros((CLASSES,), tl.int32)
    for first in range(0, num_classes, CLASSES):
        k = first + tl.arange(0, CLASSES)
        count = tl.load(class_count + k, mask=k < num_classes, other=0)
        tokens += count
        present += (count > 0).to(tl.int32)
    return tl.sum(tokens, axis=0).to(tl.float32), tl.sum(present, axis=0).to(tl.float32)


@triton.jit
def _token_offset(b, n, columns, strides, PATCH: tl.constexpr, AS_IMAGE: tl.constexpr):
    """The offset of each token in images (B, c, H, W) or in tokens (B, N, p p c)."""
    offset = n // columns * PATCH * strides[2] + n % columns * PATCH * strides[3] if AS_IMAGE else n * strides[1]
    return b * strides[0] + offset


@triton.jit
def _entry_offset(entry, strides, PATCH: tl.constexpr, CHANNELS: tl.constexpr,
                  AS_IMAGE: tl.constexpr, CHANNEL_FIRST: tl.constexpr):  # fmt: skip
    """The offset of each entry from the start of its token, and its channel.

    The order of entries, which is that of the lanes, is (row, column, channel), or (channel, row, column) for contiguous
    images on both sides.
    """
    if CHANNEL_FIRST:
        channel, row, column = entry // (PATCH * PATCH), entry // PATCH % PATCH, entry % PATCH
    else:
        row, column, channel = entry // (PATCH * CHANNELS), entry // CHANNELS % PATCH, entry % CHANNELS
    if AS_IMAGE:
        offset = channel.to(tl.int64) * strides[1] + row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3]
    else:
        offset = entry.to(tl.int64) * strides[2]
    return offset, channel


@triton.jit
def _target(image, token, strides, start, counts, PATCH: tl.constexpr, CHANNELS: tl.constexpr, CHANNEL_FIRST: tl.constexpr,
            MEAN: tl.constexpr, STD: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """The pixels from entry `start` on, float32 (TOKENS, ENTRIES), normalised if they are uint8, and which entries exist."""
    entry = start + tl.arange(0, ENTRIES)
    offset, channel = _entry_offset(entry, strides, PATCH, CHANNELS, True, CHANNEL_FIRST)
    inside = counts[:, None] & (entry < PATCH * PATCH * CHANNELS)[None, :]
    target = tl.load(image + token[:, None] + offset[None, :], mask=inside, other=0).to(tl.float32)
    if MEAN is not None:
        scale = tl.full((ENTRIES,), 1.0, tl.float32)
        shift = tl.zeros((ENTRIES,), tl.float32)
        for c in tl.static_range(CHANNELS):
            scale = tl.where(channel == c, 1.0 / (255.0 * STD[c]), scale)
            shift = tl.where(channel == c, MEAN[c] / STD[c], shift)
        target = target * scale[None, :] - shift[None, :]
    return target, inside


@triton.jit
def _statistics(image, token, strides, counts, PATCH: tl.constexpr, CHANNELS: tl.constexpr, CHANNEL_FIRST: tl.constexpr,
                MEAN: tl.constexpr, STD: tl.constexpr, NORMALIZE: tl.constexpr,
                TOKENS: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """Mean of each target patch and 1 / sqrt(unbiased variance + 1e-6).

    Blocks of entries are merged by the update of Chan, Golub and LeVeque (1979), because sums of squares would cancel.
    """
    centre = tl.zeros((TOKENS,), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    SIZE: tl.constexpr = PATCH * PATCH * CHANNELS
    if NORMALIZE:
        for start in range(0, SIZE, ENTRIES):
            target, inside = _target(
                image, token, strides, start, counts, PATCH, CHANNELS, CHANNEL_FIRST, MEAN, STD, ENTRIES
            )
            n = tl.minimum(SIZE - start, ENTRIES).to(tl.float32)
            mean = tl.sum(tl.where(inside, target, 0.0), axis=1) / n
            deviation = tl.where(inside, target - mean[:, None], 0.0)
            shift = mean - centre
            share = n / (start + n)
            centre += shift * share
            squares += tl.sum(deviation * deviation, axis=1) + shift * shift * (start * share)
    return centre, 1.0 / tl.sqrt(squares / max(SIZE - 1, 1) + 1e-6)


@triton.jit
def _difference(pred, image, pred_token, image_token, pred_strides, image_strides, start, counts, centre, scale,
                PATCH: tl.constexpr, CHANNELS: tl.constexpr, AS_IMAGE: tl.constexpr, CHANNEL_FIRST: tl.constexpr,
                MEAN: tl.constexpr, STD: tl.constexpr, NORMALIZE: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """float32 (TOKENS, ENTRIES): prediction minus target from entry `start` on, zero where a token does not count."""
    target, inside = _target(
        image, image_token, image_strides, start, counts, PATCH, CHANNELS, CHANNEL_FIRST, MEAN, STD, ENTRIES
    )
    if NORMALIZE:
        target = (target - centre[:, None]) * scale[:, None]
    entry = start + tl.arange(0, ENTRIES)
    offset, _ = _entry_offset(entry, pred_strides, PATCH, CHANNELS, AS_IMAGE, CHANNEL_FIRST)
    value = tl.load(pred + pred_token[:, None] + offset[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, value - target, 0.0)


def masked_patch_loss_forward(
    pred, image, masked, labels, num_classes, patch_size, distance, normalize, balance, mean, std
):  # fmt: skip
    batch, tokens = masked.shape
    float32 = lambda *shape: pred.new_empty(shape, dtype=torch.float32)  # noqa: E731
    int32 = lambda *shape: pred.new_empty(shape, dtype=torch.int32)  # noqa: E731
    loss, class_sum, class_count = float32(), float32(num_classes), int32(num_classes)
    if masked.numel() == 0:
        return loss.zero_(), class_sum.zero_(), class_count.zero_()
    launch = sum_launch(num_classes)
    class_blocks = cdiv(num_classes, launch.CLASSES)
    tokens_of_program = launch.TOKENS * cdiv(batch * tokens, launch.TOKENS * launch.PROGRAMS)
    programs = cdiv(batch * tokens, tokens_of_program)
    error, finished = float32(batch, tokens), int32(class_blocks + 1)
    sums, counts = float32(programs, num_classes), int32(programs, num_classes)

    masked = masked.view(torch.uint8)
    labels_strides = (0, 0) if labels is None else labels.stride()
    grid, sizes, options = _patch_grid(pred, image, masked, patch_size, distance, normalize, mean, std)
    _masked_patch_loss_error_kernel[grid](
        pred, image, masked, labels, error, finished, pred.stride(), image.stride(), masked.stride(), labels_strides,
        *sizes, num_classes, class_blocks + 1, **options,
    )  # fmt: skip
    _masked_patch_loss_class_sum_kernel[(class_blocks, programs)](
        error, masked, labels, sums, counts, class_sum, class_count, loss, finished, masked.stride(), labels_strides,
        batch, tokens, num_classes, tokens_of_program, PER_CLASS=balance == "class", **launch._asdict(),
    )  # fmt: skip
    return loss, class_sum, class_count


def masked_patch_loss_backward(
    grad_loss, grad_class_sum, class_count, pred, image, masked, labels,
    num_classes, patch_size, distance, normalize, balance, mean, std,
):  # fmt: skip
    grad = empty_like_layout(pred)
    if grad.numel():
        masked = masked.view(torch.uint8)
        labels_strides = (0, 0) if labels is None else labels.stride()
        grid, sizes, options = _patch_grid(pred, image, masked, patch_size, distance, normalize, mean, std)
        _masked_patch_loss_gradient_kernel[grid](
            grad_loss, grad_class_sum, class_count, pred, image, masked, labels, grad,
            grad_class_sum.stride(), pred.stride(), image.stride(), masked.stride(), labels_strides, grad.stride(),
            *sizes, num_classes, PER_CLASS=balance == "class", **options,
        )  # fmt: skip
    return grad


def _patch_grid(pred, image, masked, patch_size, distance, normalize, mean, std):
    """Shared arguments of the two kernels over patches: grid, sizes, compile-time arguments."""
    (batch, tokens), channels, as_image = masked.shape, image.shape[1], pred.dim() == 4
    launch = patch_launch(patch_size * patch_size * channels)
    options = dict(
        PATCH=patch_size, CHANNELS=channels, AS_IMAGE=as_image, CHANNEL_FIRST=as_image and pred.stride(3) == 1,
        MEAN=None if mean is None else tuple(mean), STD=None if std is None else tuple(std),
        DISTANCE=distance, NORMALIZE=normalize, **launch._asdict(),
    )  # fmt: skip
    return (cdiv(batch * tokens, launch.TOKENS),), (batch, tokens, image.shape[3] // patch_size), options
