"""Class-gated depthwise convolution: see csrc/same_class_conv2d.cu."""

import torch

from cmim_kernels.cuda_kernels import launch
from cmim_kernels.numerics import empty_like_layout, multiprocessors
from cmim_kernels.reference import same_class_conv2d as reference

SIZES = (3, 5, 7)
"""Kernel sizes k that are compiled. Others use PyTorch."""


def same_class_conv2d_forward(x, labels, weight, bias, num_classes):
    if weight.shape[1] not in SIZES:
        return reference.same_class_conv2d_forward(x, labels, weight, bias, num_classes)
    out = empty_like_layout(x)
    if out.numel():
        launch("same_class_conv2d", x, labels, weight, False, bias, num_classes, out)
    return out


def same_class_conv2d_backward(grad, x, labels, weight, bias, num_classes):
    if weight.shape[1] not in SIZES or x.numel() == 0:
        return reference.same_class_conv2d_backward(grad, x, labels, weight, bias, num_classes)
    grad_x, grad_weight = empty_like_layout(x), weight.new_empty(weight.shape)
    grad_bias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    launch("same_class_conv2d", grad, labels, weight, True, None, num_classes, grad_x)
    # The number of blocks that share the pixels: enough to fill the GPU, few enough that their partial sums are small
    # compared with x.
    blocks = max(1, min(-(-x[:, 0].numel() // 512), 4 * multiprocessors(x) * 32 // x.shape[1]))
    partial = lambda *shape: x.new_empty((blocks, *shape), dtype=torch.float32)  # noqa: E731
    of_weight, of_bias = partial(*weight.shape), None if bias is None else partial(*bias.shape)
    launch("same_class_conv2d_weight", x, grad, labels, num_classes, of_weight, of_bias)
    launch("sum_rows", of_weight.flatten(1), grad_weight.view(-1))
    if bias is not None:
        launch("sum_rows", of_bias, grad_bias)
    return grad_x, grad_weight, grad_bias
