"""A sheet of images with their masks drawn over them, to look at before training."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cmim.data.datasets import IGNORED
from cmim.engine.pictures import colourise, overlay, rgb

SIDE = 240
"""Longer side of a picture in pixels."""
ACROSS = 3
"""Images beside each other, each with its overlay."""
GAP, HEAD, LINE = 6, 30, 22


def choose(present: Sequence[frozenset[int]], most: int) -> list[int]:
    """Numbers of images that show as many classes as possible: the next one has most classes that were shown least."""
    shown, chosen, left = {}, [], list(range(len(present)))
    while left and len(chosen) < most:
        worth = lambda i: sum(4.0 ** -shown.get(k, 0) for k in present[i])  # noqa: E731
        i = max(left, key=worth)
        left.remove(i)
        chosen.append(i)
        for k in present[i]:
            shown[k] = shown.get(k, 0) + 1
    return sorted(chosen)


def sheet(
    parts: Mapping[str, Sequence[tuple[str, np.ndarray, np.ndarray]]],
    names: Sequence[str],
    colours: np.ndarray,
    shares: Sequence[float],
) -> Image.Image:
    """Images and overlays by split, and a legend.

    Args:
        parts: {title: [(name, image (H, W, C) uint8, class ids (H, W) uint8)]}.
        names, colours: of the classes.
        shares: of each class in the labelled pixels, from 0 to 1.
    """
    font, small = ImageFont.load_default(16), ImageFont.load_default(12)
    cell = 2 * SIDE + GAP
    width = ACROSS * (cell + 2 * GAP) + GAP
    rows = {title: [images[i : i + ACROSS] for i in range(0, len(images), ACROSS)] for title, images in parts.items()}
    high = lambda row: max(_size(classes.shape)[1] for _, _, classes in row)  # noqa: E731
    per_line = max(1, width // 230)
    legend = -(-(len(names) + 1) // per_line) * LINE + 2 * GAP
    picture = Image.new(
        "RGB", (width, sum(HEAD + sum(high(row) + LINE for row in part) for part in rows.values()) + legend), "white"
    )
    draw, top = ImageDraw.Draw(picture), 0
    for title, part in rows.items():
        draw.text((GAP, top + 7), title, fill="black", font=font)
        top += HEAD
        for row in part:
            for i, (name, image, classes) in enumerate(row):
                x = GAP + i * (cell + 2 * GAP)
                for k, shown in enumerate(_pair(image, classes, colours)):
                    picture.paste(shown, (x + k * (SIDE + GAP), top))
                draw.text((x, top + high(row) + 2), name[-60:], fill="black", font=small)
            top += high(row) + LINE
    entries = [(f"{name[:18]} {share:.1%}", colour) for name, share, colour in zip(names, shares, colours, strict=True)]
    for k, (text, colour) in enumerate([*entries, ("no class", None)]):
        x, y = GAP + k % per_line * 230, top + GAP + k // per_line * LINE
        if colour is None:
            picture.paste(Image.fromarray(colourise(np.full((16, 16), IGNORED), colours)), (x, y))
        else:
            draw.rectangle((x, y, x + 16, y + 16), fill=tuple(int(c) for c in colour), outline="black")
        draw.text((x + 22, y), text, fill="black", font=font)
    return picture


def _pair(image, classes, colours):
    """An image and its overlay, made smaller first: a class is drawn where its pixels are the nearest ones."""
    size = _size(classes.shape)
    small = np.asarray(Image.fromarray(rgb(image)).resize(size))
    nearest = np.array(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))
    return Image.fromarray(small), overlay(small, nearest, colours)


def _size(shape):
    """(width, height) on the sheet."""
    height, width = shape
    factor = SIDE / max(height, width)
    return max(1, round(width * factor)), max(1, round(height * factor))
