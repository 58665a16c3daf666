"""Shapes and random inputs."""

import os
from typing import NamedTuple

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DRY_RUN = bool(os.environ.get("CMIM_BENCH_DRY_RUN"))
"""On a CPU, whether everything runs: the smallest shapes."""
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
"""Of tokens, features, images and logits: what the trainer uses on each device, or `--dtype`."""


class Shape(NamedTuple):
    name: str
    batch: int
    side: int  # tokens per side of the grid
    channels: int
    classes: int
    patch: int  # pixels per side of a token


LARGE = (
    Shape("VOC 320", 8, 80, 256, 21, 4),
    Shape("Cityscapes 800", 8, 200, 256, 19, 4),
    Shape("ADE 504", 8, 36, 768, 150, 14),
    Shape("MAE-B", 256, 14, 768, 1, 16),
)
TWO_IMAGES = tuple(s._replace(name=f"{s.name}, 2 images", batch=2) for s in LARGE if s.name in ("VOC 320", "ADE 504"))
SMALL = (Shape("20x20, K 21", 2, 20, 64, 21, 4), Shape("12x12, K 150", 2, 12, 96, 150, 14))
TINY = Shape("tiny", 1, 4, 8, 3, 4)
"""So small that the time of a call on the CPU is what it costs before and after the work."""
SHAPES = LARGE if ON_GPU else SMALL if DRY_RUN else (*TWO_IMAGES, TINY)


def generator(seed=0):
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(*shape, seed=0, dtype=None):
    return torch.randn(shape, generator=generator(seed), device=DEVICE).to(dtype or DTYPE)


def class_map(batch, side, classes, *, ignored=0.05, seed=0):
    """(B, side, side) int32: blobs of some ten classes an image, as in label maps; a share of them ignored (-1)."""
    g = generator(seed)
    cells = -(-side // 5)
    palette = torch.randint(classes, (batch, 10), generator=g, device=DEVICE)
    coarse = palette.gather(1, torch.randint(10, (batch, cells * cells), generator=g, device=DEVICE))
    coarse[torch.rand(coarse.shape, generator=g, device=DEVICE) < ignored] = -1
    fine = coarse.view(batch, cells, cells).repeat_interleave(5, 1).repeat_interleave(5, 2)
    return fine[:, :side, :side].int().contiguous()


def token_mask(batch, side, *, ratio=0.5, seed=1):
    """(B, side, side) bool, exactly `ratio` of each image's tokens."""
    score = torch.rand(batch, side * side, generator=generator(seed), device=DEVICE)
    masked = torch.zeros_like(score, dtype=torch.bool)
    hidden = score.argsort(1)[:, : round(ratio * side * side)]
    return masked.scatter_(1, hidden, True).view(batch, side, side)
