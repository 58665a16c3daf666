"""Cross-entropy of bilinearly upsampled logits at every pixel, computed in bands of rows.

Bilinear interpolation is a product with one matrix for each axis, z_k = Y x_k X^T, where Y and X have two entries in each
row. The logits of a band of rows, and their gradient Y^T g_k X, are therefore dense products, without atomics, for bands of
any height.
"""

import torch
import torch.nn.functional as F

from cmim_kernels.numerics import accumulation_dtype, as_layout, class_ids, full_float32

_BAND = 2**20  # number of upsampled logits in memory at a time


def upsample_cross_entropy(logits, target, *, align_corners=False):
    """The definition, differentiable by autograd. Shapes as in `cmim_kernels.upsample_cross_entropy`, but not empty."""
    logits = logits.to(accumulation_dtype(logits))
    ids = class_ids(target, logits.shape[1])
    logits = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(logits, ids, ignore_index=logits.shape[1], reduction="none")


def upsample_cross_entropy_forward(logits, target, align_corners):
    """Loss, and log-sum-exp of the upsampled logits at every pixel."""
    num_classes = logits.shape[1]
    loss = torch.empty(target.shape, dtype=accumulation_dtype(logits), device=logits.device)
    logsumexp = torch.empty_like(loss)
    ids = class_ids(target, num_classes)
    with full_float32(logits.device):
        for images, rows, z, *_ in _bands(logits, target, align_corners):
            band = ids[images, rows]
            each = F.cross_entropy(z, band.flatten(0, 1), ignore_index=num_classes, reduction="none")
            loss[images, rows] = each.view(band.shape)
            logsumexp[images, rows] = z.logsumexp(dim=1).view(band.shape)
    return loss, logsumexp


def upsample_cross_entropy_backward(grad, logits, target, logsumexp, align_corners):
    """Gradient of the logits; the upsampled logits are recomputed."""
    batch, num_classes, height, width = logits.shape
    ids = class_ids(target, num_classes)
    total = torch.zeros(batch, height, num_classes * width, dtype=accumulation_dtype(logits), device=logits.device)
    with full_float32(logits.device):
        for images, rows, z, y, x in _bands(logits, target, align_corners):
            band = ids[images, rows].flatten(0, 1)[:, None]
            valid = band < num_classes
            index = torch.where(valid, band, 0)
            z.sub_(logsumexp[images, rows].flatten(0, 1)[:, None]).exp_()
            z.scatter_(1, index, z.gather(1, index) - 1)
            z.mul_(grad[images, rows].flatten(0, 1)[:, None]).masked_fill_(~valid, 0)
            narrow = (z @ x).view(len(y), -1, num_classes * width)
            total[images].baddbmm_(y.transpose(1, 2), narrow)
    return as_layout(total.view(batch, height, num_classes, width).transpose(1, 2), logits)


def _bands(logits, target, align_corners):
    """Split the batch into bands: several small images, or some rows of a large one. For each band: the slice of n images,
    the slice of r rows, the upsampled logits (n r, K, W), and the matrices Y of these rows (n, r, h) and X (W, w)."""
    if target.numel() == 0:
        return
    height, width = target.shape[1:]
    batch, num_classes = logits.shape[:2]
    all_y, x = _interpolation(logits, target, align_corners)
    row = num_classes * width
    at_once = max(1, _BAND // (row * height))
    step = max(1, _BAND // row)
    for image in range(0, batch, at_once):
        images = slice(image, min(image + at_once, batch))
        wide = (logits[images].to(x.dtype).transpose(1, 2) @ x.T).flatten(2)
        for first in range(0, height, step):
            rows = slice(first, min(first + step, height))
            y = all_y[rows].expand(len(wide), -1, -1)
            yield images, rows, torch.bmm(y, wide).view(-1, num_classes, width), y, x


def _interpolation(logits, target, align_corners):
    """The matrices Y (H, h) and X (W, w) of linear interpolation along one axis: the interpolated identity matrix.

    Weights are computed in float64 and then rounded, because float32 has too few digits for the positions.
    """
    matrices = []
    for source, size in zip(logits.shape[2:], target.shape[1:], strict=True):
        identity = torch.eye(source, dtype=torch.float64, device=logits.device)[None]
        matrix = F.interpolate(identity, size=size, mode="linear", align_corners=align_corners)[0].T
        matrices.append(matrix.to(accumulation_dtype(logits)))
    return matrices
