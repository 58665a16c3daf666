"""What a source of images offers, and the splits of a run."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

IGNORED = 255
"""The label of a pixel without a class."""


class ImageSet(Protocol):
    """Images in a fixed order, with labels where there are any."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """A name for people and for files."""

    def image(self, i: int) -> np.ndarray:
        """Image i at its original resolution: (H, W, channels) uint8."""

    def label(self, i: int) -> np.ndarray:
        """(H, W) uint8 at the image's original resolution: class ids in [0, K) or IGNORED."""


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
    notes: tuple[str, ...] = ()
    """What the user should know of how the files were read, a line each."""
