"""A trained network that predicts images of any kind and size."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cmim.data.augmentation import resize
from cmim.data.files import open_image
from cmim.engine.device import autocast, choose_device, choose_precision
from cmim.engine.inference import NOT_FINITE, probabilities
from cmim.engine.trained import Trained
from cmim.errors import UserError
from cmim.settings import Config

T = TypeVar("T")

MOST_PIXELS = 1 << 22
"""An image with more pixels is cut into tiles, so that the memory that a network needs has a bound."""
MOST_VALUES = 1 << 27
"""Likewise one with more probabilities, pixels times classes."""
TILE, MARGIN = 1024, 192
"""Side of a tile in pixels, and what the network sees around it."""


class Prediction(NamedTuple):
    """The most probable class of each pixel of an image."""

    classes: np.ndarray
    """(H, W) uint8."""
    confidence: np.ndarray
    """(H, W) float32: the probability of this class, from 0 to 1."""


class TrainedSegmenter:
    """The network of a run with what is needed to use it; `cmim.load` makes one."""

    def __init__(self, trained: Trained):
        self.config: Config = trained.config
        """All settings of the run, with those that were overridden."""
        self.classes: list[str] = list(trained.class_names)
        """The names of the classes; their order is that of the ids."""
        self.colours = np.asarray(trained.colours, np.uint8)
        """(K, 3) uint8: red, green and blue of each class."""
        self.device = choose_device(self.config.train.device)
        self.dtype = choose_precision(self.config.train.precision, self.device)
        self.net = trained.net.to(self.device).eval()
        self.step: int = trained.step
        """The step of the training that the weights are from."""

    def predict(self, images: Any) -> Prediction | list[Prediction]:
        """The class of every pixel, and its confidence, at the resolution of each image.

        Images of equal size share passes of the network, `evaluation.batch` at a time; give many at once for speed. Images
        of more than 4 million pixels are cut into overlapping tiles.

        Args:
            images: one image or several. One image: the path of a file; a PIL image; a NumPy array (H, W, C) or (H, W); a
                tensor (C, H, W) or (H, W). Several: a list or tuple of these, which may differ in size; an array (B, H, W,
                C); a tensor (B, C, H, W). Arrays and tensors are uint8 with the channels of `config.data.channels`.

        Returns:
            a `Prediction`, or a list of them.

        Raises:
            TypeError, ValueError: an image has a wrong type, dtype or shape (the message says which).
            UserError: a file cannot be read, or the outputs of the network are not finite.
        """
        if isinstance(images, list | tuple):
            return self._predict([self._pixels(image) for image in images])
        if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
            return self._predict([self._pixels(image) for image in images])
        return self._predict([self._pixels(images)])[0]

    def groups(self, items: Iterable[T], pixels: Callable[[T], np.ndarray] = lambda image: image) -> Iterator[list[T]]:
        """Images, or what `pixels` gives the image of, that follow one another and can share a pass of the network."""
        group = []
        for item in items:
            image = pixels(item)
            full = len(group) == self.config.evaluation.batch
            if group and (full or image.shape != pixels(group[0]).shape or self._is_large(image)):
                yield group
                group = []
            group.append(item)
        if group:
            yield group

    def _is_large(self, image):
        pixels = image.shape[0] * image.shape[1]
        return pixels > MOST_PIXELS or pixels * len(self.classes) > MOST_VALUES

    def _pixels(self, image):
        """An image of any kind as (H, W, C) uint8."""
        data = self.config.data
        if isinstance(image, str | Path):
            return open_image(image, data.channels, data.exif == "apply", data.range)
        if isinstance(image, Image.Image):
            image = np.array(image.convert({1: "L", 3: "RGB"}.get(data.channels, image.mode)))
        elif isinstance(image, Tensor):
            image = (image.permute(1, 2, 0) if image.ndim == 3 else image).cpu().numpy()
        if not isinstance(image, np.ndarray):
            raise TypeError(
                f"predict: an image is a {type(image).__name__}, expected a path, a PIL image, an array or a tensor"
            )
        if image.dtype != np.uint8:
            raise TypeError(f"predict: an image has dtype {image.dtype}, expected uint8, values from 0 to 255")
        image = image[..., None] if image.ndim == 2 else image
        if image.ndim != 3 or image.shape[2] != data.channels or 0 in image.shape:
            raise ValueError(
                f"predict: an image has shape {image.shape} as (H, W, C), expected {data.channels} channels and pixels"
            )
        return image

    @torch.inference_mode()
    def _predict(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        torch.backends.cudnn.benchmark = False  # it would search for the fastest algorithms again for every image size
        found = []
        with autocast(self.device, self.dtype):
            for group in self.groups(images):
                found += [self._in_tiles(group[0])] if self._is_large(group[0]) else self._whole(group)
        return found

    def _whole(self, images):
        shown = self._shown(images)
        return [_best(p) for p in probabilities(self.net, shown, [image.shape[:2] for image in images], self.config)]

    def _shown(self, images):
        """What the network gets: (B, C, h, w) uint8."""
        size = self.config.data.size
        images = [np.array(resize(image, size)) if size else np.array(image) for image in images]
        return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images]).to(self.device)

    def _in_tiles(self, image):
        height, width = image.shape[:2]
        if self.config.data.size:  # the network gets a small image, and only the result is large
            return self._large_result(image)
        classes, confidence = np.empty((height, width), np.uint8), np.empty((height, width), np.float32)
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                seen = [slice(max(0, start - MARGIN), start + TILE + MARGIN) for start in (top, left)]
                part = self._whole([image[seen[0], seen[1]]])[0]
                inside = tuple(slice(a - s.start, a - s.start + TILE) for a, s in zip((top, left), seen, strict=True))
                place = slice(top, top + TILE), slice(left, left + TILE)
                classes[place], confidence[place] = part.classes[inside], part.confidence[inside]
        return Prediction(classes, confidence)

    def _large_result(self, image):
        """From probabilities at the size that the network gets, enlarged class by class."""
        shown = self._shown([image])
        (small,) = probabilities(self.net, shown, [tuple(shown.shape[-2:])], self.config)
        if small.isnan().any():
            raise UserError(NOT_FINITE)
        confidence = torch.full(image.shape[:2], -1.0, device=self.device)
        classes = torch.zeros(image.shape[:2], dtype=torch.uint8, device=self.device)
        for k, of_class in enumerate(small):
            large = F.interpolate(
                of_class[None, None], image.shape[:2], mode="bilinear", align_corners=self.net.align_corners
            )[0, 0]
            higher = large > confidence
            confidence[higher], classes[higher] = large[higher], k
        return Prediction(classes.cpu().numpy(), confidence.cpu().numpy())


def _best(probability: Tensor) -> Prediction:
    confidence, classes = probability.max(0)
    if confidence.isnan().any():
        raise UserError(NOT_FINITE)
    return Prediction(classes.to(torch.uint8).cpu().numpy(), confidence.float().cpu().numpy())
