"""Mean feature of the visible and masked tokens of each class: see csrc/cpu/class_centroids.cpp."""

import torch

from cmim_kernels.numerics import empty_like_layout
from cmim_kernels.reference import class_centroids as reference


def class_centroids_forward(features, labels, masked, num_classes, order, offsets):
    """Needs no packing: `order` and `offsets` are unused."""
    if features.numel() == 0:
        return reference.class_centroids_forward(features, labels, masked, num_classes, order, offsets)
    batch, channels = features.shape[0], features.shape[1 if features.dim() == 4 else 2]
    mean = features.new_empty((batch, num_classes, 2, channels), dtype=torch.float32)
    count = features.new_empty((batch, num_classes, 2), dtype=torch.int32)
    torch.ops.cmim_cpu.centroids_forward.default(features, labels, masked, mean, count)
    return mean, count


def class_centroids_backward(grad_mean, count, features, labels, masked, num_classes):
    grad = empty_like_layout(features)
    if grad.numel():
        torch.ops.cmim_cpu.centroids_backward.default(grad_mean, count.contiguous(), labels, masked, grad)
    return grad
