"""Class-gated depthwise convolution: see csrc/same_class_conv2d.cu."""

import torch

from cmim_kernels.cuda_kernels import constant, launch
from cmim_kernels.numerics import empty_like_layout, multiprocessors
from cmim_kernels.reference import same_class_conv2d as reference

SIZES = (3, 5, 7)
"""Kernel sizes k that are compiled. Others use PyTorch."""


def is_compiled(x, weight):
    """Whether there is a kernel for this: of a size above, and of images whose columns are less than 2^31 elements apart."""
    return weight.shape[1] in SIZES and x.shape[3] * x.stride(3) < 2**31


def same_class_conv2d_forward(x, labels, weight, bias, num_classes):
    if not is_compiled(x, weight):
        return reference.same_class_conv2d_forward(x, labels, weight, bias, num_classes)
    out = empty_like_layout(x)
    if out.numel():
        launch("same_class_conv2d", x, labels, weight, False, bias, num_classes, out)
    return out


def same_class_conv2d_backward(grad, x, labels, weight, bias, num_classes):
    if x.numel() == 0 or not (is_compiled(x, weight) and is_compiled(grad, weight)):
        return reference.same_class_conv2d_backward(grad, x, labels, weight, bias, num_classes)
    grad_x, grad_weight = empty_like_layout(x), weight.new_empty(weight.shape)
    grad_bias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    launch("same_class_conv2d", grad, labels, weight, True, None, num_classes, grad_x)
    # The number of blocks that share the pixels: as many as run at a time, and few enough that their partial sums are small
    # compared with x.
    at_a_time = constant("CONVOLUTION_PROGRAMS") * multiprocessors(x) // -(-x.shape[1] // constant("CONVOLUTION_CHANNELS"))
    blocks = max(1, min(-(-x[:, 0].numel() // 512), at_a_time))
    partial = lambda *shape: x.new_empty((blocks, *shape), dtype=torch.float32)  # noqa: E731
    of_weight, of_bias = partial(*weight.shape), None if bias is None else partial(*bias.shape)
    launch("same_class_conv2d_weight", x, grad, labels, num_classes, of_weight, of_bias)
    launch("sum_rows", of_weight.flatten(1), grad_weight.view(-1), of_bias, None if bias is None else grad_bias)
    return grad_x, grad_weight, grad_bias
