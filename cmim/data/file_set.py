"""Image files and their masks as an `ImageSet`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cmim.data.files import image_size, open_colours, open_image, open_mask
from cmim.data.labels import Encoding, class_ids
from cmim.errors import UserError


class FileSet:
    """Image files and their masks; an `ImageSet`.

    Args:
        images: paths.
        masks: the path of the mask of each image, None if it has none.
        encoding: function that returns the `cmim.data.labels.Encoding` of the values of a mask, given its path.
        channels: number of channels of the images.
        names: names of the images; by default their file names without suffix.
        turn: whether EXIF orientations of the images are applied.
        limits: the values of images with more than 8 bits that become 0 and 255.
    """

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path | None],
        encoding: Callable[[Path], Encoding],
        channels: int,
        names: Sequence[str] | None = None,
        turn: bool = False,
        limits: tuple[float, float] | None = None,
    ):
        self.images, self.masks, self.encoding, self.channels = images, masks, encoding, channels
        self.names, self.turn, self.limits = names, turn, limits

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return self.names[i] if self.names else self.images[i].stem

    def image(self, i: int) -> np.ndarray:
        return open_image(self.images[i], self.channels, self.turn, self.limits)

    def label(self, i: int) -> np.ndarray:
        ids, wrong = class_ids(self.values(i), self.encoding(self.masks[i]).table)
        self.refuse_value(i, wrong)
        return ids

    def values(self, i: int) -> np.ndarray:
        """The stored values of the mask of image i, (H, W) integers; for a mask in colours, `Colours.values`."""
        mask = self.masks[i]
        colours = self.encoding(mask).colours
        values = open_mask(mask) if colours is None else colours.values(open_colours(mask, colours.tolerance))
        height, width = image_size(self.images[i], self.turn)
        if values.shape != (height, width):
            other = values.shape == image_size(self.images[i], not self.turn)
            remedy = (
                f"give --data.exif {'ignore' if self.turn else 'apply'}"
                if other
                else "export the mask at the size of the image"
            )
            raise UserError(
                f"{mask} is {values.shape[1]} x {values.shape[0]} pixels, its image {self.images[i].name} is "
                f"{width} x {height}{' by its EXIF orientation' * (other and self.turn)}: {remedy}"
            )
        return values

    def refuse_value(self, i: int, wrong: int | None) -> None:
        """Raise a UserError for a mask value that is not a class; None means that there is no such value."""
        if wrong is not None:
            mask, colours = self.masks[i], self.encoding(self.masks[i]).colours
            if colours is not None:
                raise colours.complaint(mask, open_colours(mask, colours.tolerance))
            raise UserError(f"{mask} holds the value {wrong}, which is no class: {self.encoding(mask).remedy}")
