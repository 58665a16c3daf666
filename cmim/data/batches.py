"""Training micro-batches and evaluation batches, made by worker processes.

The batch sizes in the settings are those of all ranks together. Sample i of micro-step m on rank r has the global position
m x batch + r x (batch / ranks) + i; everything about it is drawn from generators keyed by the seed, this position and a
purpose. Batches therefore do not depend on the number of workers, on resuming, or on the number of ranks.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmim.data.augmentation import cutmix_box, resize, strong, weak
from cmim.data.datasets import ImageSet, Splits
from cmim.data.loading import make_loader
from cmim.errors import UserError
from cmim.randomness import key, numpy_generator, torch_generator
from cmim.settings import Config, DataSettings
from cmim_kernels import random_mask

IMAGES = ("labelled_image", "weak_image", "strong_image")
"""The entries of a batch that are images, (..., C, S, S)."""
ATTEMPTS = 20
"""Number of images that are tried in place of one that cannot be read."""


class TrainBatches(Dataset):
    """Item m is the part of micro-batch m for one rank, a dict of tensors. L and U are the labelled and the unlabelled batch
    size divided by the number of ranks, C the channels, S the crop, b the mask blocks along a side of the crop, V the number
    of strong views of the preset.

        labelled_image (L, C, S, S) uint8   label (L, S, S) uint8, 255 without a class

    for presets with unlabelled images:

        weak_image (U, C, S, S) uint8       valid (U, S, S) bool, False where padded
        strong_image (V, U, C, S, S) uint8, views of the weak image before CutMix
        box (V, U, 4) int64: top, left, bottom, right; zeros where a view has no CutMix
        channel_key (U,) int64, for the dropped channels

    for presets with masked terms, for each of the views (labelled, weak, strong), with n images:

        *_mask (n, b, b) bool, True where a block is hidden
        *_mask_key (n,) int64, for the masks within each class      *_class_key (n,) int64, for the class that is isolated

    and if unlabelled images could not be read: replaced (n,) int64, their numbers.

    Keys are for `cmim.randomness.uniform`, which draws on the device; each key is for one draw.
    """

    def __init__(self, splits: Splits, config: Config, rank: int = 0, world_size: int = 1):
        self.labelled, self.unlabelled, self.config = splits.labelled, splits.unlabelled, config
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        train = self.config.train
        samples = [self._labelled(p) for p in self._positions(step, train.labelled_batch)]
        batch = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
        if self.config.preset.uses_unlabelled:
            samples = [self._unlabelled(p) for p in self._positions(step, train.unlabelled_batch)]
            replaced = [i for s in samples for i in s.pop("replaced", ())]
            if replaced:
                batch["replaced"] = torch.tensor(replaced)
            for name in samples[0]:
                batch[name] = torch.stack([s[name] for s in samples], dim=1 if name in ("strong_image", "box") else 0)
        return batch

    def _positions(self, step, batch):
        share = batch // self.world_size
        first = step * batch + self.rank * share
        return range(first, first + share)

    def _labelled(self, position):
        i = self._index(position, len(self.labelled), "labelled order")
        label = self.labelled.label(i)
        image, label, _ = self._weak(self.labelled.image(i), label, position, "labelled weak")
        return {"labelled_image": image, "label": label} | self._masks(position, "labelled")

    def _unlabelled(self, position):
        config, seed, colour = self.config, self.config.seed, self.config.data.colour_jitter
        image, replaced = self._readable(position)
        image, _, valid = self._weak(image, None, position, "unlabelled weak")
        views = range(config.preset.strong_views)
        boxes = [
            cutmix_box(numpy_generator(seed, position, f"box {v}"), config.data.crop, config.method.cutmix) for v in views
        ]
        sample = {
            "weak_image": image,
            "valid": valid,
            "channel_key": torch.tensor(key(seed, position, "dropped channels")),
            "strong_image": torch.stack(
                [strong(image, numpy_generator(seed, position, f"strong {v}"), colour) for v in views]
            ),
            "box": torch.tensor(boxes),
        } | ({"replaced": replaced} if replaced else {})
        return sample | self._masks(position, "weak") | self._masks(position, "strong")

    def _readable(self, position):
        """The unlabelled image of a position, and the numbers of the images that could not be read before it. The
        replacement depends on the position only, like everything that is drawn."""
        count, broken, first = len(self.unlabelled), [], None
        i = self._index(position, count, "unlabelled order")
        for attempt in range(ATTEMPTS):
            try:
                return self.unlabelled.image(i), broken
            except UserError as error:
                if self.config.data.strict:
                    raise
                broken.append(i)
                first = first or error
            i = int(numpy_generator(self.config.seed, position, f"instead of an unlabelled image {attempt}").integers(count))
        raise first

    def _index(self, position, count, purpose):
        """The image at a position; every epoch is another permutation of the images."""
        epoch, place = divmod(position, count)
        return int(_epoch_order(self.config.seed, epoch, purpose, count)[place])

    def _weak(self, image, label, position, purpose):
        data = self.config.data
        rng = numpy_generator(self.config.seed, position, purpose)
        return weak(_shown(image, data.size), label, rng, data.crop, data.scale, data.flips, data.rotate90)

    def _masks(self, position, view):
        """The random values of a view of a sample for the masked pass: its mask, and keys for draws on the device."""
        if not self.config.preset.masked:
            return {}
        seed, mask = self.config.seed, self.config.mask
        side = self.config.data.crop // mask.block
        generator = torch_generator(seed, position, f"{view} mask")
        return {
            f"{view}_mask": random_mask(1, side, side, mask.ratio, generator=generator)[0],
            f"{view}_mask_key": torch.tensor(key(seed, position, f"{view} mask inside classes")),
            f"{view}_class_key": torch.tensor(key(seed, position, f"{view} isolated class")),
        }


def train_loader(batches: TrainBatches, start: int, stop: int, workers: int) -> Iterable[dict[str, Tensor]]:
    """The micro-batches `start` to `stop` - 1 in order; in pinned memory if there is a CUDA device."""
    train, data = batches.config.train, batches.config.data
    views = train.labelled_batch + train.unlabelled_batch * (1 + batches.config.preset.strong_views)
    bytes_each = views // batches.world_size * data.crop**2 * (data.channels + 1)
    return make_loader(batches, range(start, stop), workers, bytes_each)


def evaluation_loader(
    image_set: ImageSet, settings: DataSettings, batch: int, workers: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, list[Tensor], list[int]]]:
    """Consecutive images of equal size, at most `batch` at a time; each rank gets different images.

    Args:
        image_set: an `ImageSet` with labels.
        settings: `DataSettings`; images are resized to `settings.size`, labels are not.

    Yields:
        images (n, C, h, w) uint8; labels, a list of n tensors (H, W) uint8 at the original resolution; the n indices.
    """
    group, share = [], range(rank, len(image_set), world_size)
    pixels = image_set.label(0).size if workers and len(image_set) else 0  # others may be several times larger
    loader = make_loader(_Evaluation(image_set, settings.size), share, workers, 4 * pixels * (settings.channels + 1))
    for image, label, index in loader:
        if group and (len(group) == batch or group[0][0].shape != image.shape):
            yield _collate(group)
            group = []
        group.append((image, label, index))
    if group:
        yield _collate(group)


class _Evaluation(Dataset):
    def __init__(self, image_set, size):
        self.image_set, self.size = image_set, size

    def __len__(self):
        return len(self.image_set)

    def __getitem__(self, i):
        label = self.image_set.label(i)
        pixels = np.array(_shown(self.image_set.image(i), self.size))
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(label), i


def _collate(group):
    images, labels, indices = zip(*group, strict=True)
    return torch.stack(images), list(labels), list(indices)


def _shown(image, size):
    """`image` at size (height, width), or unchanged if `size` is None."""
    return resize(image, size) if size else image


@lru_cache(maxsize=4)
def _epoch_order(seed, epoch, purpose, count):
    return numpy_generator(seed, epoch, purpose).permutation(count)
