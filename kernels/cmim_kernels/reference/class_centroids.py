"""Mean feature of the visible and of the masked tokens of each class in each image.

    mean[b, k, m] = sum over tokens n of image b with label k and masked = m of features[b, n] / count[b, k, m]

and zero where the count is zero. Tokens are selected and not multiplied by a one-hot matrix, so that an inf or NaN of one
class cannot reach the centroid of another.
"""

import torch

from cmim_kernels.numerics import accumulation_dtype, as_layout, class_ids, segment_count, segment_sum


def class_centroids(features, labels, masked, num_classes):
    """The definition, differentiable by autograd: a loop over the classes. `labels` and `masked` are (B, N)."""
    tokens = _tokens(features).to(accumulation_dtype(features))
    ids = class_ids(labels, num_classes)
    mean, count = [], []
    for k in range(num_classes):
        for kind in (~masked, masked):
            chosen = (ids == k) & kind
            count.append(chosen.sum(dim=1, dtype=torch.int32))
            total = torch.where(chosen[..., None], tokens, 0).sum(dim=1)
            mean.append(total / count[-1].clamp(min=1)[:, None])
    return torch.stack(mean, dim=1).unflatten(1, (num_classes, 2)), torch.stack(count, dim=1).unflatten(1, (num_classes, 2))


def class_centroids_forward(features, labels, masked, num_classes, order, offsets):
    """One pass over the tokens for any number of classes. It needs no packing: `order` and `offsets` are unused."""
    tokens = _tokens(features)
    batch, length, channels = tokens.shape
    segment = _segments(labels, masked, num_classes)
    rows = tokens.reshape(batch * length, channels).to(accumulation_dtype(features))
    shape = (batch, 2 * num_classes + 1)
    total = segment_sum(rows, segment, shape[0] * shape[1]).view(*shape, channels)[:, :-1]
    count = segment_count(segment, shape[0] * shape[1]).view(shape)[:, :-1]
    mean = total / count.clamp(min=1)[..., None]
    return mean.reshape(batch, num_classes, 2, channels), count.reshape(batch, num_classes, 2).clone()


def class_centroids_backward(grad_mean, count, features, labels, masked, num_classes):
    """Gradient of the features: for each token, the gradient of its centroid divided by the count of the centroid."""
    tokens = _tokens(features)
    batch, length, channels = tokens.shape
    share = grad_mean / count.clamp(min=1)[..., None]
    table = torch.zeros(batch, 2 * num_classes + 1, channels, dtype=features.dtype, device=features.device)
    table[:, :-1] = share.reshape(batch, 2 * num_classes, channels)
    grad = table.flatten(0, 1).index_select(0, _segments(labels, masked, num_classes)).view(batch, length, channels)
    if features.dim() == 4:
        grad = grad.transpose(1, 2).unflatten(2, features.shape[2:])
    return as_layout(grad, features)


def _tokens(features):
    """Features (B, N, C) or (B, C, h, w) as (B, N, C)."""
    return features if features.dim() == 3 else features.flatten(2).transpose(1, 2)


def _segments(labels, masked, num_classes):
    """(B N,) int64 segments: b (2K + 1) + 2k + m for image b, class k, masked m; b (2K + 1) + 2K for ignored tokens of b."""
    ids = class_ids(labels, num_classes)
    segment = torch.where(ids < num_classes, 2 * ids + masked, 2 * num_classes)
    image = torch.arange(len(segment), device=segment.device)[:, None]
    return (image * (2 * num_classes + 1) + segment).flatten()
