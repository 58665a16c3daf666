"""Tokens to packed order: see csrc/cpu/rows.cpp."""

import torch

from cmim_kernels.reference import gather_class_tokens as reference


def gather_class_tokens_forward(tokens, order, inverse, segment, mask_token, position, length):
    batch, _, channels = tokens.shape
    out = tokens.new_empty((batch, length, channels))
    if out.numel():
        arguments = tokens, inverse.contiguous(), segment.contiguous(), mask_token, position, out
        torch.ops.cmim_cpu.gather_forward.default(*arguments)
    return out


def gather_class_tokens_backward(grad, inverse, segment, mask_token, position):
    if grad.numel() == 0:
        return reference.gather_class_tokens_backward(grad, inverse, segment, mask_token, position)
    grad_tokens = grad.new_empty((grad.shape[0], inverse.shape[1], grad.shape[2]))
    of_parameters = [None if p is None else p.new_empty(p.shape) for p in (mask_token, position)]
    arguments = grad, inverse.contiguous(), segment.contiguous(), grad_tokens
    torch.ops.cmim_cpu.gather_backward.default(*arguments, *of_parameters)
    return grad_tokens, *(grad.new_empty(0) if p is None else p for p in of_parameters)
