"""Depthwise convolution in which a neighbour counts only if it has the label of the centre.

    out[b, c, p] = bias[c] + sum_{o in window} weight[c, o] x[b, c, p + o] [label[b, p + o] = label[b, p]]

for centres p with a label in [0, num_classes), else 0. Neighbours are selected and not multiplied by 0 or 1: an inf
or NaN of another class has no effect.
"""

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

from cmim_kernels.numerics import accumulation_dtype, as_layout, class_ids, full_float32


def same_class_conv2d(x, labels, weight, bias=None, *, num_classes):
    """The definition, differentiable by autograd. Shapes as in `cmim_kernels.same_class_conv2d`."""
    dtype = accumulation_dtype(x, weight, bias)
    x, weight = x.to(dtype), weight.to(dtype)
    out = torch.zeros_like(x)
    for (i, j), neighbour, same in _window(x, labels, weight.shape[-1], num_classes):
        out = out + torch.where(same, neighbour, 0) * weight[:, i, j, None, None]
    if bias is not None:
        out = torch.where(_valid(labels, num_classes), out + bias.to(dtype)[:, None, None], 0)
    return out


def same_class_conv2d_forward(x, labels, weight, bias, num_classes):
    if _class_by_class(x):
        with full_float32(x.device):
            return as_layout(_convolve_each_class(x, labels, weight, bias, num_classes), x)
    return as_layout(same_class_conv2d(x, labels, weight, bias, num_classes=num_classes), x)


def same_class_conv2d_backward(grad, x, labels, weight, bias, num_classes):
    """Gradients of x, weight and bias (the last is empty without a bias).

    The condition "p + o has the label of p" is symmetric, so the gradient of x is the same op with flipped weights.
    """
    dtype = accumulation_dtype(x, weight, bias)
    wide = torch.where(_valid(labels, num_classes), grad.to(dtype), 0)
    grad_x = same_class_conv2d_forward(wide, labels, weight.flip(-1, -2), None, num_classes)
    grad_weight = weight.new_zeros(weight.shape, dtype=dtype)
    if _class_by_class(x):
        padding = weight.shape[-1] // 2
        for images, own in _images_of_each_class(labels, num_classes):
            inputs, outputs = (torch.where(own, t[images].to(dtype), 0) for t in (x, wide))
            shape = (len(weight), 1, *weight.shape[1:])
            with full_float32(x.device):
                grad_weight += conv2d_weight(inputs, shape, outputs, padding=padding, groups=len(weight))[:, 0]
    else:
        for (i, j), neighbour, same in _window(x.to(dtype), labels, weight.shape[-1], num_classes):
            grad_weight[:, i, j] = (torch.where(same, neighbour, 0) * wide).sum(dim=(0, 2, 3))
    grad_bias = weight.new_empty(0) if bias is None else wide.sum(dim=(0, 2, 3)).to(bias.dtype)
    return as_layout(grad_x, x), grad_weight.to(weight.dtype), grad_bias


def _class_by_class(x):
    """Whether to compute with ordinary convolutions, which do not support zero channels, or tap by tap."""
    return x.device.type == "cpu" and x.shape[1] > 0


def _convolve_each_class(x, labels, weight, bias, num_classes):
    """For every class, an ordinary depthwise convolution on the images that contain it. This is much faster on the CPU,
    where the classes that occur can be read without synchronisation."""
    dtype = accumulation_dtype(x, weight, bias)
    out = torch.zeros_like(x, dtype=dtype)
    kernel, shift = weight.to(dtype)[:, None], None if bias is None else bias.to(dtype)
    for images, own in _images_of_each_class(labels, num_classes):
        inputs = torch.where(own, x[images].to(dtype), 0)
        result = F.conv2d(inputs, kernel, shift, padding=weight.shape[-1] // 2, groups=len(weight))
        out[images] = torch.where(own, result, out[images])
    return out


def _images_of_each_class(labels, num_classes):
    """For each class that occurs: the indices of the images that contain it, and its mask in them, (n, 1, h, w) bool."""
    for k in labels.unique().tolist():
        if not 0 <= k < num_classes:
            continue
        own = labels == k
        images = own.flatten(1).any(1).nonzero()[:, 0]
        yield images, own[images][:, None]


def _valid(labels, num_classes):
    return (class_ids(labels, num_classes) < num_classes)[:, None]


def _window(x, labels, size, num_classes):
    """For each offset of the window: its index, x shifted by it, and where the shifted label equals that of the centre."""
    height, width = x.shape[-2:]
    reach = size // 2
    labels = class_ids(labels, num_classes)
    padded = F.pad(x, (reach,) * 4)
    padded_labels = F.pad(labels, (reach,) * 4, value=num_classes)
    for i in range(size):
        for j in range(size):
            neighbour = padded[:, :, i : i + height, j : j + width]
            same = (padded_labels[:, i : i + height, j : j + width] == labels) & (labels < num_classes)
            yield (i, j), neighbour, same[:, None]
