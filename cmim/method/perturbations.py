"""Perturbations of views on the device: CutMix of strong views, and channel dropout of features."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cmim.randomness import uniform


def cutmix(box: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Paste a box from the partner of each sample, number i XOR 1 in the batch, into the sample.

    Args:
        box: (B, 4) int64 top, left, bottom, right, exclusive ends; an empty box pastes nothing. B even.
        tensors: (B, H, W) or (B, C, H, W); all get the same box.
    """
    height, width = tensors[0].shape[-2:]
    row = torch.arange(height, device=box.device)[None, :, None]
    column = torch.arange(width, device=box.device)[None, None, :]
    top, left, bottom, right = box[:, :, None, None].unbind(1)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    partner = torch.arange(len(box), device=box.device) ^ 1
    return [torch.where(inside if t.dim() == 3 else inside[:, None], t[partner], t) for t in tensors]


def drop_complementary(maps: Sequence[Tensor], keys: Tensor) -> list[Tensor]:
    """Complementary channel dropout of two strong views (UniMatch V2, Yang et al. 2024, arXiv 2410.10777).

    With probability 1/2 for each image, a random half of the channels is dropped from view 1 and the other half from view 2,
    and the remaining channels are doubled; other images are not changed. Maps of equal width lose the same channels.

    Args:
        maps: encoder maps (2 B, C, h, w), the first views of all images before the second ones.
        keys: (B,) int64, one random key per image.
    """
    draws = uniform(keys, 1 + max(m.shape[1] for m in maps))
    first = (draws[:, 1:] < 0.5) * 2.0
    factors = torch.cat([first, 2 - first])
    factors = torch.where((draws[:, :1] < 0.5).repeat(2, 1), factors, 1.0)
    return [m * factors[:, : m.shape[1], None, None].to(m.dtype) for m in maps]


def drop_channels(maps: Sequence[Tensor], keys: Tensor, probability: float) -> list[Tensor]:
    """Channel dropout (Dropout2d) of encoder maps, each (B, C, h, w): channels are set to zero, the others are scaled up.

    The dropped channels depend only on the keys (B,) of the samples, and not on the number of processes.
    """
    draws = uniform(keys, sum(m.shape[1] for m in maps)).split([m.shape[1] for m in maps], dim=1)
    keep = [(d >= probability)[:, :, None, None].to(m.dtype) / (1 - probability) for d, m in zip(draws, maps, strict=True)]
    return [m * k for m, k in zip(maps, keep, strict=True)]
