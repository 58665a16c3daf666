"""What a source of images offers, and the splits of a run."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

IGNORED = 255
"""The label of a pixel without a class."""
MEAN = (0.485, 0.456, 0.406)
"""Mean colour of ImageNet, of values in [0, 1]."""
STD = (0.229, 0.224, 0.225)


class ImageSet(Protocol):
    """Images in a fixed order, with labels where there are any."""

    def __len__(self) -> int: ...

    def name(self, i) -> str:
        """A name for people and for files."""

    def image(self, i) -> Image.Image:
        """Image i, RGB, at its original resolution."""

    def label(self, i) -> np.ndarray:
        """(H, W) uint8 at the image's original resolution: class ids in [0, K) or IGNORED."""

    def subset(self, indices) -> "ImageSet":
        """The images of these indices, in this order."""


@dataclass(frozen=True)
class Splits:
    labelled: ImageSet
    unlabelled: ImageSet
    """Labels of these images are never read."""
    val: ImageSet
    test: ImageSet | None
    class_names: tuple[str, ...]
    colours: np.ndarray
    """(K, 3) uint8: the colour of each class in pictures."""
