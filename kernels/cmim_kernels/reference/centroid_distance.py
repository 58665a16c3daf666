"""Distance between the masked and the visible centroid of each (image, class) that has enough tokens of both kinds.

    cosine: 1 - v.m / (max(|v|, 1e-8) max(|m|, 1e-8))          l2: mean over the C entries of (v - m)^2

Other pairs are excluded by selection and not by multiplication with zero, so that their inf or NaN has no effect.
"""

import torch

from cmim_kernels.numerics import accumulation_dtype

_SMALLEST_NORM = 1e-8


def centroid_distance(mean, count, *, distance="cosine", detach="visible", min_tokens=1):
    """The definition, differentiable by autograd: loss, pair_sum, pair_count."""
    pair, visible, masked = _pairs(mean, count, min_tokens)
    visible = visible.detach() if detach == "visible" else visible
    masked = masked.detach() if detach == "masked" else masked
    if distance == "cosine":
        each = 1 - (_unit(visible) * _unit(masked)).sum(dim=-1)
    else:
        each = (visible - masked).square().mean(dim=-1)
    pair_sum = torch.where(pair, each, 0).sum()
    pair_count = pair.sum(dtype=torch.int32)
    return pair_sum / pair_count.clamp(min=1), pair_sum, pair_count


def centroid_distance_forward(mean, count, distance, min_tokens):
    return centroid_distance(mean, count, distance=distance, min_tokens=min_tokens)


def centroid_distance_backward(grad_loss, grad_pair_sum, pair_count, mean, count, distance, detach, min_tokens):
    """Gradient of the mean; zero on the detached side."""
    pair, visible, masked = _pairs(mean, count, min_tokens)
    scale = (grad_pair_sum + grad_loss / pair_count.clamp(min=1)).to(visible.dtype)

    def gradient(of, other):
        if distance == "l2":
            return (of - other) * (2 / mean.shape[-1])
        norm = torch.linalg.vector_norm(of, dim=-1, keepdim=True)
        direction, target = of / norm.clamp(min=_SMALLEST_NORM), _unit(other)
        # A clamped norm is constant: then the radial part of the gradient is not removed.
        radial = torch.where(norm >= _SMALLEST_NORM, (direction * target).sum(dim=-1, keepdim=True) * direction, 0)
        return (radial - target) / norm.clamp(min=_SMALLEST_NORM)

    sides = [("visible", visible, masked), ("masked", masked, visible)]
    select = pair[..., None]
    grads = [
        torch.zeros_like(of) if detach == name else torch.where(select, scale * gradient(of, other), 0)
        for name, of, other in sides
    ]
    return torch.stack(grads, dim=2).to(mean.dtype)


def _pairs(mean, count, min_tokens):
    """Whether each (image, class) is a pair, (B, K), and the visible and masked centroids of pairs, (B, K, C), else zero."""
    pair = (count >= min_tokens).all(dim=2)
    visible, masked = torch.where(pair[..., None, None], mean.to(accumulation_dtype(mean)), 0).unbind(dim=2)
    return pair, visible, masked


def _unit(x):
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=_SMALLEST_NORM)
