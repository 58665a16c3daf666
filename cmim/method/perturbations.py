"""Perturbations of views on the device: CutMix of strong views, and channel dropout of features."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cmim.randomness import uniform


def cutmix(box: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Paste the box of each sample's partner, number i XOR 1 of the batch, into the sample.

    Args:
        box: (B, 4) int64 top, left, bottom, right, exclusive ends; an empty box pastes nothing. B even.
        tensors: (B, H, W) or (B, C, H, W); all are cut alike.
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

    For half of the images, drawn from their keys, view 1 loses a random half of the channels and view 2 the other half,
    and what remains is doubled; the other images stay as they are. Maps of equal width lose the same channels.

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
    """Channel dropout (Dropout2d) of encoder maps, each (B, C, h, w): whole channels become zero, the rest grow.

    Which channels depends on the samples' keys (B,) alone, so that any number of processes drops the same ones.
    """
    draws = uniform(keys, sum(m.shape[1] for m in maps)).split([m.shape[1] for m in maps], dim=1)
    keep = [(d >= probability)[:, :, None, None].to(m.dtype) / (1 - probability) for d, m in zip(draws, maps, strict=True)]
    return [m * k for m, k in zip(maps, keep, strict=True)]
