"""The interface of a set of images, and the splits of a run."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

IGNORED = 255
"""The label of a pixel without a class."""


class ImageSet(Protocol):
    """Images in a fixed order, with labels if there are any."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The name of image i, for messages and files."""

    def image(self, i: int) -> np.ndarray:
        """Image i at its original resolution: (H, W, channels) uint8."""

    def label(self, i: int) -> np.ndarray:
        """(H, W) uint8 at the image's original resolution: class ids in [0, K) or IGNORED."""


@dataclass(frozen=True)
class Splits:
    labelled: ImageSet
    unlabelled: ImageSet
    """The labels of these images are never read."""
    val: ImageSet
    test: ImageSet | None
    class_names: tuple[str, ...]
    colours: np.ndarray
    """(K, 3) uint8: the colour of each class in pictures."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the files were read, a line each."""
