"""Attention within each (image, class): see csrc/cpu/class_attention.cpp."""

import torch

from cmim_kernels.numerics import empty_contiguous


def class_attention_forward(q, k, v, segment, offsets):
    size = (*q.shape[:-1],)  # new_empty takes longer for a torch.Size
    out, logsumexp = empty_contiguous(q), q.new_empty(size, dtype=torch.float32)
    if out.numel():
        torch.ops.cmim_cpu.attention_forward.default(q, k, v, offsets.contiguous(), out, logsumexp)
    return out, logsumexp


def class_attention_backward(grad, q, k, v, out, logsumexp, segment, offsets):
    grads = [empty_contiguous(x) for x in (q, k, v)]
    if out.numel():
        arguments = grad, q, k, v, out, logsumexp.contiguous(), offsets.contiguous()
        torch.ops.cmim_cpu.attention_backward.default(*arguments, *grads)
    return tuple(grads)
