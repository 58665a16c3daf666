"""Reconstruction loss over masked patches: see csrc/masked_patch_loss.cu."""

import torch

from cmim_kernels.cuda_kernels import constant, launch
from cmim_kernels.numerics import empty_like_layout, multiprocessors
from cmim_kernels.reference import masked_patch_loss as reference


def masked_patch_loss_forward(
    pred, image, masked, labels, num_classes, patch_size, distance, normalize, balance, mean, std
):  # fmt: skip
    options = (num_classes, patch_size, distance, normalize, balance, mean, std)
    if _too_many_channels(mean):
        return reference.masked_patch_loss_forward(pred, image, masked, labels, *options)
    float32 = lambda *shape: pred.new_empty(shape, dtype=torch.float32)  # noqa: E731
    int32 = lambda *shape: pred.new_empty(shape, dtype=torch.int32)  # noqa: E731
    outputs = float32(), float32(num_classes), int32(num_classes)
    if masked.numel() == 0:
        return tuple(out.zero_() for out in outputs)
    blocks = min(-(-masked.numel() // 128), 8 * multiprocessors(pred))  # 128 tokens at a time
    scratch = float32(blocks, num_classes), int32(blocks, num_classes), int32(1)
    launch("patch_loss_forward", pred, image, masked, labels, *_numbers(options), *scratch, *outputs)
    return outputs


def masked_patch_loss_backward(
    grad_loss, grad_class_sum, class_count, pred, image, masked, labels,
    num_classes, patch_size, distance, normalize, balance, mean, std,
):  # fmt: skip
    inputs = (grad_loss, grad_class_sum, class_count, pred, image, masked, labels)
    options = (num_classes, patch_size, distance, normalize, balance, mean, std)
    if _too_many_channels(mean):
        return reference.masked_patch_loss_backward(*inputs, *options)
    grad = empty_like_layout(pred)
    if grad.numel():
        launch("patch_loss_backward", *inputs, *_numbers(options), grad)
    return grad


def _too_many_channels(mean):
    """Whether a uint8 image has too many channels to pass mean and std as arguments of the launch. Such images use
    PyTorch."""
    return mean is not None and len(mean) > constant("LOSS_MAX_CHANNELS")


def _numbers(options):
    """The options in the form of the arguments of the ops."""
    num_classes, patch_size, distance, normalize, balance, mean, std = options
    return num_classes, patch_size, distance, normalize, balance == "class", mean or [], std or []
