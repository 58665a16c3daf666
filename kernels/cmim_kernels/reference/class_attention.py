"""Softmax attention of each token over the tokens of its own (image, class), visible and masked.

    out[i] = sum_j p[i, j] v[j],   p[i, j] = exp(s[i, j] - logsumexp_j s[i, j]),   s[i, j] = q[i] . k[j] / sqrt(d)

over the tokens j of the class of i; zero for ignored i. In packed order the tokens of class k are those from offsets[2k] to
offsets[2k + 2]. On the CPU, one (image, class) is computed at a time. On a GPU, reading the offsets would synchronise with
the device, so all pairs of tokens of an image are computed, and only pairs of the same class are selected.
"""

import itertools
import math

import torch

from cmim_kernels.numerics import accumulation_dtype, full_float32


def class_attention(q, k, v, offsets):
    """The definition, differentiable by autograd. Shapes as in `cmim_kernels.class_attention`."""
    dtype = accumulation_dtype(q, k, v)
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    for part in _segments(offsets):
        scores = q[part].to(dtype) @ k[part].to(dtype).mT / math.sqrt(q.shape[-1])
        out[part] = scores.softmax(dim=-1) @ v[part].to(dtype)
    return out


def class_attention_forward(q, k, v, segment, offsets):
    """Output, and (B, heads, N) logsumexp of the scaled scores (-inf, an empty sum, at ignored tokens)."""
    dtype = accumulation_dtype(q, k, v)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.full(q.shape[:-1], -math.inf, dtype=dtype, device=q.device)
    with full_float32(q.device):
        for part, same in _parts(q, segment, offsets):
            scores = _scores(q[part].to(dtype), k[part].to(dtype), same)
            logsumexp[part] = scores.logsumexp(dim=-1)
            out[part] = _matmul(_probabilities(scores, logsumexp[part], same), v[part].to(dtype), same)
    return out, logsumexp


def class_attention_backward(grad, q, k, v, out, logsumexp, segment, offsets):
    """Gradients of q, k and v.

    With g the gradient of the output: dv = p^T g, ds = p * (g v^T - rowsum(g * out)), dq = ds k / sqrt(d),
    dk = ds^T q / sqrt(d).
    """
    dtype, scale = logsumexp.dtype, 1 / math.sqrt(q.shape[-1])
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    with full_float32(q.device):
        for part, same in _parts(q, segment, offsets):
            g, wide_q, wide_k, wide_v, wide_out = (x[part].to(dtype) for x in (grad, q, k, v, out))
            p = _probabilities(_scores(wide_q, wide_k, same), logsumexp[part], same)
            grad_v[part] = _matmul(p.mT, g, same)
            delta = (g * wide_out).sum(dim=-1, keepdim=True)
            grad_scores = _select(p * (g @ wide_v.mT - delta), same, 0) * scale
            grad_q[part] = _matmul(grad_scores, wide_k, same)
            grad_k[part] = _matmul(grad_scores.mT, wide_q, same)
    return grad_q, grad_k, grad_v


def _parts(q, segment, offsets):
    """The parts to compute: an index into (B, heads, N, ...), and the pairs to select in that part (None: all)."""
    if q.device.type == "cpu":
        return [(part, None) for part in _segments(offsets)]
    return [(..., same_class(segment, offsets))]


def _segments(offsets):
    """The index of each (image, class) that has tokens."""
    for image, starts in enumerate(offsets[:, ::2].tolist()):
        # The last start, offsets[2K], is that of the ignored tokens, where the last class ends.
        for start, stop in itertools.pairwise(starts):
            if start < stop:
                yield image, slice(None), slice(start, stop)


def same_class(segment, offsets):
    """(B, 1, N, N) bool: whether two packed tokens have the same, valid class."""
    num_classes = (offsets.shape[1] - 2) // 2
    classes = segment // 2
    return ((classes[:, :, None] == classes[:, None, :]) & (classes < num_classes)[:, None, :])[:, None]


def _scores(q, k, same):
    return _select(q @ k.mT / math.sqrt(q.shape[-1]), same, -math.inf)


def _probabilities(scores, logsumexp, same):
    return _select((scores - logsumexp[..., None]).exp(), same, 0)


def _select(pairs, same, other):
    return pairs if same is None else torch.where(same, pairs, other)


def _matmul(pairs, x, same):
    """pairs @ x, for `pairs` (..., N, N) that is zero between classes.

    Because zero times NaN is NaN, values that are not finite are kept out of the product; they turn only the sums of their
    own class to NaN.
    """
    if same is None:
        return pairs @ x
    finite = x.isfinite()
    spoilt = same.to(x.dtype) @ (~finite).to(x.dtype) > 0
    return torch.where(spoilt, math.nan, pairs @ torch.where(finite, x, 0))
