"""Packed tokens to the original order: see csrc/cpu/rows.cpp."""

import torch

from cmim_kernels.reference import scatter_class_tokens as reference


def scatter_class_tokens_forward(packed, inverse, mask_token, position):
    out = packed.new_empty((packed.shape[0], inverse.shape[1], packed.shape[2]))
    if out.numel():
        torch.ops.cmim_cpu.scatter_forward.default(packed, inverse.contiguous(), mask_token, position, out)
    return out


def scatter_class_tokens_backward(grad, order, inverse, mask_token, position, length):
    if grad.numel() == 0:
        return reference.scatter_class_tokens_backward(grad, order, inverse, mask_token, position, length)
    grad_packed = grad.new_empty((grad.shape[0], length, grad.shape[2]))
    of_parameters = [None if p is None else p.new_empty(p.shape) for p in (mask_token, position)]
    torch.ops.cmim_cpu.scatter_backward.default(grad, inverse.contiguous(), grad_packed, *of_parameters)
    return grad_packed, *(grad.new_empty(0) if p is None else p for p in of_parameters)
