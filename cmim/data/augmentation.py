"""Weak and strong views and CutMix boxes, with the constants of UniMatch (Yang et al. 2023); all randomness from `rng`.

Images may have any number of channels. Three channels are red, green and blue; for other numbers, the steps of the strong
view that need colours (saturation, hue, grey) are left out.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from cmim.data.datasets import IGNORED


def weak(
    image: np.ndarray,
    label: np.ndarray | None,
    rng: np.random.Generator,
    crop: int,
    scale: tuple[float, float],
    flips: Sequence[Literal["horizontal", "vertical"]] = ("horizontal",),
    rotate90: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random resize, crop, flips and turns. If the resized image is smaller than the crop, it is padded on the right and at
    the bottom (before the flips).

    Args:
        image: (H, W, C) uint8.
        label: (H, W) uint8 of the same scene at any resolution; or None.
        rng: `np.random.Generator`.
        crop: side S of the result in pixels.
        scale: range of the resize factor of the longer side; the aspect ratio is kept.
        flips: directions of the flips, each with probability 1/2.
        rotate90: whether the crop is then turned by 0, 90, 180 or 270 degrees, with equal probability.

    Returns:
        image (C, S, S) uint8, black where padded; label (S, S) uint8, IGNORED where padded (all IGNORED without a label);
        valid (S, S) bool, False where padded.
    """
    sides = image.shape[1::-1]  # width, height
    longest = max(sides)
    target = int(rng.integers(int(longest * scale[0]), int(longest * scale[1]) + 1))
    width, height = (max(1, round(side * target / longest)) for side in sides)
    left, top = (int(rng.integers(max(side - crop, 0) + 1)) for side in (width, height))
    columns, rows = min(width, crop), min(height, crop)
    mirrored = rng.random() < 0.5 and "horizontal" in flips
    upside_down = "vertical" in flips and rng.random() < 0.5
    turns = int(rng.integers(4)) if rotate90 else 0

    pixels = np.zeros((crop, crop, image.shape[2]), np.uint8)
    classes, valid = np.full((crop, crop), IGNORED, np.uint8), np.zeros((crop, crop), bool)
    # Resize only the part that the crop keeps, which gives the same pixels as resizing the whole image and then cropping.
    x, y = sides[0] / width, sides[1] / height
    box = (left * x, top * y, min((left + columns) * x, sides[0]), min((top + rows) * y, sides[1]))
    pixels[:rows, :columns] = resize(image, (rows, columns), box)
    valid[:rows, :columns] = True
    if label is not None:
        nearest = _nearest(top, rows, height, label.shape[0])[:, None], _nearest(left, columns, width, label.shape[1])
        classes[:rows, :columns] = label[nearest]
    view = (slice(None, None, -1 if upside_down else 1), slice(None, None, -1 if mirrored else 1))
    pixels, classes, valid = (np.rot90(array[view], turns) for array in (pixels, classes, valid))
    return _to_tensor(pixels), torch.from_numpy(classes.copy()), torch.from_numpy(valid.copy())


def strong(image: Tensor, rng: np.random.Generator, colour: float = 1.0) -> Tensor:
    """Colour jitter (brightness, contrast and saturation 0.5, hue 0.25; probability 0.8) in random order, grey (0.2) and
    Gaussian blur of radius 0.1 to 2 (0.5). For other than three channels: brightness, contrast and blur, the same for all.

    Args:
        image: (C, H, W) uint8, a weak view.
        rng: draws.
        colour: factor of the ranges of the jitter and of the probability of grey, from 0 to 1.

    Returns:
        (C, H, W) uint8.
    """
    if len(image) != 3:
        return _strong_of_any(image.numpy(), rng, colour)
    view = Image.fromarray(image.permute(1, 2, 0).numpy())
    if rng.random() < 0.8 and colour:  # even a hue that is not turned is rounded
        brightness, contrast, saturation = rng.uniform(1 - 0.5 * colour, 1 + 0.5 * colour, 3)
        hue = rng.uniform(-0.25 * colour, 0.25 * colour)
        jitter = [
            lambda x: ImageEnhance.Brightness(x).enhance(brightness),
            lambda x: ImageEnhance.Contrast(x).enhance(contrast),
            lambda x: ImageEnhance.Color(x).enhance(saturation),
            lambda x: _turn_hue(x, hue),
        ]
        for i in rng.permutation(4):
            view = jitter[i](view)
    if rng.random() < 0.2 * colour:
        view = view.convert("L").convert("RGB")
    if rng.random() < 0.5:
        view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    return _to_tensor(np.asarray(view))


def resize(image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """Bilinear resize, antialiased when the image becomes smaller.

    Args:
        image: (H, W, C) uint8.
        size: (height, width) of the result.
        box: (left, top, right, bottom) in pixels, the part to resize; by default the whole image.

    Returns:
        (height, width, C) uint8.
    """
    to = lambda pixels: np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR, box))  # noqa: E731
    if image.shape[2] == 3:
        return to(image)
    return np.stack([to(np.ascontiguousarray(channel)) for channel in image.transpose(2, 0, 1)], axis=2)


def cutmix_box(rng: np.random.Generator, size: int, p: float) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a CutMix box in a size x size crop, zeros with probability 1 - p.

    Its area is 2 to 40 % of the crop, its height 0.3 to 1 / 0.3 times its width; it is drawn until it lies inside.
    """
    if rng.random() >= p:
        return 0, 0, 0, 0
    area = rng.uniform(0.02, 0.4) * size * size
    while True:
        ratio = rng.uniform(0.3, 1 / 0.3)
        height, width = max(1, int(np.sqrt(area * ratio))), max(1, int(np.sqrt(area / ratio)))
        top, left = (int(start) for start in rng.integers(size, size=2))
        if top + height <= size and left + width <= size:
            return top, left, top + height, left + width


def _strong_of_any(image, rng, colour):
    """The channels (C, H, W) as one grey image, one below another, for brightness and contrast."""
    view = Image.fromarray(image.reshape(-1, image.shape[2]))
    if rng.random() < 0.8 and colour:
        factors = rng.uniform(1 - 0.5 * colour, 1 + 0.5 * colour, 2)
        for i in rng.permutation(2):
            view = (ImageEnhance.Brightness, ImageEnhance.Contrast)[i](view).enhance(factors[i])
    pixels = np.asarray(view).reshape(image.shape)
    if rng.random() < 0.5:
        blur = ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0))
        pixels = np.stack([np.asarray(Image.fromarray(channel).filter(blur)) for channel in pixels])
    return torch.from_numpy(pixels.copy())


def _nearest(start, count, resized, original):
    """For the pixels [start, start + count) of an axis that is resized from `original` to `resized`: their original
    indices."""
    return (2 * np.arange(start, start + count) + 1) * original // (2 * resized)


def _turn_hue(image, turn):
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(i + round(turn * 256)) % 256 for i in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _to_tensor(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
