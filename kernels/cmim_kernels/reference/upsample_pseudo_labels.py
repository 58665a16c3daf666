"""Most likely class and its probability at every pixel of bilinearly upsampled logits."""

import torch
import torch.nn.functional as F

from cmim_kernels.numerics import accumulation_dtype


def upsample_pseudo_labels(logits, size, *, align_corners=False):
    """The definition. Shapes as in `cmim_kernels.upsample_pseudo_labels`, but not empty."""
    logits = logits.to(accumulation_dtype(logits))
    logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)
    return logits.argmax(dim=1).to(torch.int32), logits.softmax(dim=1).amax(dim=1)


def upsample_pseudo_labels_forward(logits, size, align_corners):
    """Computed image by image.

    Each difference, product and sum is rounded separately, so that classes with equal logits stay equal and the first one is
    chosen. `F.interpolate` on a CPU rounds some classes differently from others.
    """
    dtype, (height, width) = accumulation_dtype(logits), size
    label = torch.empty(len(logits), height, width, dtype=torch.int32, device=logits.device)
    confidence = torch.empty_like(label, dtype=dtype)
    if label.numel() == 0:
        return label, confidence
    rows = _taps(logits.shape[2], height, align_corners, dtype, logits.device)
    columns = _taps(logits.shape[3], width, align_corners, dtype, logits.device)
    for i, image in enumerate(logits.to(dtype)):
        # Interpolate along the rows last: at full resolution, this copies whole rows of all classes.
        z = _interpolate(_interpolate(image.transpose(0, 1), 2, columns), 0, rows)
        largest, label[i] = z.max(dim=1)
        confidence[i] = 1 / z.sub_(largest[:, None]).exp_().sum(dim=1)
    return label, confidence


def _interpolate(x, dim, taps):
    low, high, weight = taps
    low = x.index_select(dim, low)
    return x.index_select(dim, high).sub_(low).mul_(weight.view(-1, *[1] * (x.dim() - 1 - dim))).add_(low)


def _taps(source, size, align_corners, dtype, device):
    """For each of `size` positions along an axis: the source positions before and after, and the weight of the latter.

    Positions are exact fractions of integers; with rounded positions, a weight of zero could become 1e-16.
    """
    position = torch.arange(size, device=device)
    if align_corners:
        numerator, denominator = position * (source - 1), max(1, size - 1)
    else:
        numerator, denominator = ((2 * position + 1) * source - size).clamp(min=0), 2 * size
    low = numerator // denominator
    # Rounded once, from float64: in float32 some devices multiply by the rounded reciprocal.
    weight = ((numerator - low * denominator).double() / denominator).to(dtype)
    return low, (low + 1).clamp(max=source - 1), weight
