"""Reconstruction losses, convolution, upsampled cross-entropy and labels, as a user would write them without
`cmim_kernels`."""

import torch
import torch.nn.functional as F

from bench.comparison import Comparison, compiled, ours, size_of
from bench.inputs import DEVICE, class_map, generator, normal, token_mask
from cmim_kernels import (
    masked_patch_loss,
    patch_labels,
    same_class_conv2d,
    upsample_cross_entropy,
    upsample_pseudo_labels,
)
from cmim_kernels.reference import masked_patch_loss as loss_reference
from cmim_kernels.reference import same_class_conv2d as convolution_reference

BLIND_CONVOLUTION = "depthwise, without classes"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _image(shape):
    side = shape.side * shape.patch
    return torch.randint(256, (shape.batch, 3, side, side), generator=generator(3), device=DEVICE, dtype=torch.uint8)


def _moved_by_loss(pred, image, masked):
    """Of prediction and image only the masked rows count."""
    share = masked.sum().item() / masked.numel()
    forward = int(share * size_of(pred, image)) + size_of(masked) + 4 * masked.numel()
    return forward, forward + int(share * size_of(pred, image)) + size_of(pred)


def _patches(image, grid):
    """(B, c, H, W) to (B, N, p p c), entries in the order of row, column and channel."""
    return image.unflatten(3, grid).unflatten(2, grid).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def mae_loss(shape):
    """Mean squared error of normalised patches (MAE, arXiv 2111.06377)."""
    size = shape.patch
    image = normal(*_image(shape).shape, seed=3)
    masked = token_mask(shape.batch, shape.side, ratio=0.75).flatten(1)
    pred = normal(shape.batch, shape.side**2, 3 * size * size, seed=4)

    def fused(pred, image, masked):
        return masked_patch_loss(pred, image, masked, patch_size=size, distance="mse", normalize=True).loss

    def patches(pred, image, masked):
        target = _patches(image.float(), (shape.side, size))
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        error = (pred.float() - target).square().mean(-1)
        return (error * masked).sum() / masked.sum()

    return Comparison(
        [pred], ours(fused, csrc=True) | {"patchify": patches, "patchify, compiled": compiled(patches)},
        constants=[image, masked], moved=_moved_by_loss(pred, image, masked), launches=(2, 3),
    )  # fmt: skip


def simmim_loss(shape):
    """L1 of a prediction in the shape of the image (SimMIM, arXiv 2111.09886), channels-last."""
    size = shape.patch
    image = normal(*_image(shape).shape, seed=3).to(memory_format=torch.channels_last)
    masked = token_mask(shape.batch, shape.side, ratio=0.6)
    pred = normal(*image.shape, seed=4).to(memory_format=torch.channels_last)

    def fused(pred, image, masked):
        return masked_patch_loss(pred, image, masked.flatten(1), patch_size=size, distance="l1").loss

    def pixels(pred, image, masked):
        mask = masked.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, None].float()
        error = F.l1_loss(image.float(), pred.float(), reduction="none")
        return (error * mask).sum() / mask.sum() / 3

    return Comparison(
        [pred], ours(fused, csrc=True) | {"mask of pixels": pixels, "mask of pixels, compiled": compiled(pixels)},
        constants=[image, masked], moved=_moved_by_loss(pred, image, masked), launches=(2, 3),
    )  # fmt: skip


def class_loss(shape):
    """L1, the mean over classes of their means, images as bytes: what the trainer computes."""
    size, classes = shape.patch, shape.classes
    image = _image(shape).to(memory_format=torch.channels_last)
    masked = token_mask(shape.batch, shape.side).flatten(1)
    labels = class_map(shape.batch, shape.side, classes).flatten(1)
    pred = normal(shape.batch, shape.side**2, 3 * size * size, seed=4)
    options = dict(patch_size=size, balance="class", mean=MEAN, std=STD)
    mean, std = (torch.tensor(x, device=DEVICE).view(3, 1, 1) for x in (MEAN, STD))

    def fused(pred, image, masked, labels):
        return masked_patch_loss(pred, image, masked, labels, classes, **options).loss

    def definition(pred, image, masked, labels):
        return loss_reference.masked_patch_loss(pred, image, masked, labels, classes, **options)[0]

    def one_hot_means(pred, image, masked, labels):
        one_hot = F.one_hot(torch.where(masked & (labels >= 0), labels, classes).long(), classes + 1)[..., :-1].float()
        target = _patches((image / 255 - mean) / std, (shape.side, size))
        error = (pred.float() - target).abs().mean(-1)
        total, count = torch.einsum("bn,bnk->k", error, one_hot), one_hot.sum((0, 1))
        return (total / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)

    share = (masked & (labels >= 0)).sum().item() / masked.numel()  # only these move
    forward = int(share * size_of(pred, image)) + size_of(masked, labels) + 4 * masked.numel()
    backward = int(share * size_of(pred, image)) + size_of(pred, masked, labels)
    baselines = ours(fused, csrc=True) | {"one-hot": one_hot_means, "one-hot, compiled": compiled(one_hot_means)}
    baselines |= {"index_add, compiled": compiled(definition)}
    return Comparison(
        [pred], baselines, constants=[image, masked, labels], moved=(forward, forward + backward), launches=(2, 3)
    )


def convolution(shape):
    """k = 7, channels-last."""
    width, size = min(shape.channels, 256), 7
    x = normal(shape.batch, width, shape.side, shape.side).to(memory_format=torch.channels_last)
    weight, bias = normal(width, size, size, seed=1, dtype=torch.float32), normal(width, seed=2, dtype=torch.float32)
    labels, classes = class_map(shape.batch, shape.side, shape.classes), shape.classes

    def gated(x, weight, bias, labels):
        return same_class_conv2d(x, labels, weight, bias, num_classes=classes)

    def depthwise(x, weight, bias, labels=None):
        return F.conv2d(x, weight[:, None].to(x.dtype), bias.to(x.dtype), padding=size // 2, groups=width)

    def unfold(x, weight, bias, labels):
        columns = F.unfold(x.float(), size, padding=size // 2).unflatten(1, (width, size * size))
        near = F.unfold(F.pad(labels + 1, (size // 2,) * 4)[:, None].float(), size)
        same = (near == (labels + 1).flatten(1)[:, None]) & (labels >= 0).flatten(1)[:, None]
        out = torch.einsum("bcon,co->bcn", columns * same[:, None], weight.flatten(1)) + bias[:, None]
        return torch.where((labels >= 0).flatten(1)[:, None], out, 0).view_as(x).to(x.dtype)

    def definition(x, weight, bias, labels):
        return convolution_reference.same_class_conv2d(x, labels, weight, bias, num_classes=classes).to(x.dtype)

    def class_by_class(x, weight, bias, labels):
        """An ordinary convolution for every class there is in the data set."""
        out = torch.zeros_like(x)
        for k in range(classes):
            own = (labels == k)[:, None]
            out = torch.where(own, depthwise(torch.where(own, x, 0), weight, bias), out)
        return out

    baselines = ours(gated, csrc=True) | {"class by class": class_by_class, BLIND_CONVOLUTION: depthwise}
    if shape.side <= 100:  # its columns are 49 times as large as x
        baselines["unfold and mask"] = unfold
    if DEVICE.type == "cuda":  # takes the CPU's compiler minutes
        baselines["tap by tap, compiled"] = compiled(definition)
    moved = 2 * size_of(x) + size_of(labels)
    return Comparison(
        [x, weight, bias], baselines, constants=[labels], moved=(moved, moved + 3 * size_of(x) + size_of(labels)),
        tolerance=0.02, unchecked={BLIND_CONVOLUTION},
    )  # fmt: skip


def _logits(shape):
    side = shape.side * shape.patch
    target = class_map(shape.batch, shape.side, shape.classes).repeat_interleave(shape.patch, 1)
    target = target.repeat_interleave(shape.patch, 2).contiguous()
    return normal(shape.batch, shape.classes, shape.side, shape.side).to(memory_format=torch.channels_last), target, side


def cross_entropy(shape):
    logits, target, side = _logits(shape)

    def fused(logits, target):
        return upsample_cross_entropy(logits, target)

    def interpolate(logits, target):
        large = F.interpolate(logits.float(), (side, side), mode="bilinear")
        return F.cross_entropy(large, target.long(), ignore_index=-1, reduction="none")

    forward, exponentials = size_of(logits, target) + 4 * target.numel(), target.numel() * shape.classes
    return Comparison(
        [logits], ours(fused) | {"interpolate": interpolate, "interpolate, compiled": compiled(interpolate)},
        constants=[target], moved=(forward, 2 * forward + size_of(logits)), exponentials=(exponentials, 2 * exponentials),
    )  # fmt: skip


def pseudo_labels(shape):
    logits, target, side = _logits(shape)

    def fused(logits):
        return upsample_pseudo_labels(logits, (side, side)).confidence

    def interpolate(logits):
        large = F.interpolate(logits.float(), (side, side), mode="bilinear")
        return large.softmax(1).amax(1), large.argmax(1)

    def confidence(function):
        return lambda logits: function(logits)[0]

    baselines = ours(fused) | {"interpolate": confidence(interpolate)}
    baselines |= {"interpolate, compiled": confidence(compiled(interpolate))}
    moved, exponentials = size_of(logits) + 8 * target.numel(), target.numel() * shape.classes
    return Comparison([logits], baselines, moved=(moved, moved), exponentials=(exponentials, exponentials))


def majority(shape):
    _, labels, _ = _logits(shape)
    size, classes = shape.patch, shape.classes

    def fused(labels):
        return patch_labels(labels, size, classes)

    def one_hot(labels):
        votes = F.one_hot(torch.where(labels >= 0, labels, classes).long(), classes + 1)[..., :-1]
        votes = F.avg_pool2d(votes.permute(0, 3, 1, 2).float(), size)
        most, winner = votes.max(1)
        return torch.where(most > 0, winner, -1)

    moved = size_of(labels) + 4 * labels.numel() // size**2
    baselines = ours(fused) | {"one-hot pooling": one_hot, "one-hot pooling, compiled": compiled(one_hot)}
    return Comparison([labels], baselines, moved=(moved, moved), launches=(1, 1))
