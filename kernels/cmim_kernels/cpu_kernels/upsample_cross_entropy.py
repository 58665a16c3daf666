"""Cross-entropy of bilinearly upsampled logits: see csrc/cpu/upsample_cross_entropy.cpp."""

import torch

from cmim_kernels.numerics import empty_contiguous, empty_like_layout


def upsample_cross_entropy_forward(logits, target, align_corners):
    loss, logsumexp = empty_contiguous(target, torch.float32), empty_contiguous(target, torch.float32)
    if loss.numel():
        torch.ops.cmim_cpu.upsample_cross_entropy_forward.default(logits, target, align_corners, loss, logsumexp)
    return loss, logsumexp


def upsample_cross_entropy_backward(grad, logits, target, logsumexp, align_corners):
    grad_logits = empty_like_layout(logits)
    if target.numel() == 0:
        return grad_logits.zero_()
    arguments = grad, logits, target, logsumexp.contiguous(), align_corners
    torch.ops.cmim_cpu.upsample_cross_entropy_backward.default(*arguments, grad_logits)
    return grad_logits
