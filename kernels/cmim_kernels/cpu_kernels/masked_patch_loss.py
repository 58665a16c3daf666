"""Reconstruction loss over masked patches: see csrc/cpu/masked_patch_loss.cpp."""

import torch

from cmim_kernels.numerics import empty_like_layout

DISTANCES = {"l1": 0, "mse": 1, "smooth_l1": 2}
"""The numbers of the distances in csrc/arithmetic.h."""


def masked_patch_loss_forward(
    pred, image, masked, labels, num_classes, patch_size, distance, normalize, balance, mean, std
):  # fmt: skip
    loss, class_sum = pred.new_empty((), dtype=torch.float32), pred.new_empty(num_classes, dtype=torch.float32)
    outputs = loss, class_sum, pred.new_empty(num_classes, dtype=torch.int32)
    if masked.numel() == 0:
        return tuple(out.zero_() for out in outputs)
    options = num_classes, patch_size, DISTANCES[distance], normalize, balance == "class", mean or [], std or []
    torch.ops.cmim_cpu.patch_loss_forward.default(pred, image, masked, labels, *options, *outputs)
    return outputs


def masked_patch_loss_backward(
    grad_loss, grad_class_sum, class_count, pred, image, masked, labels,
    num_classes, patch_size, distance, normalize, balance, mean, std,
):  # fmt: skip
    grad = empty_like_layout(pred)
    if grad.numel():
        inputs = grad_loss, grad_class_sum, class_count.contiguous(), pred, image, masked, labels
        options = num_classes, patch_size, DISTANCES[distance], normalize, balance == "class", mean or [], std or []
        torch.ops.cmim_cpu.patch_loss_backward.default(*inputs, *options, grad)
    return grad
