"""`shapes`: a synthetic data set that needs no download, and on which unlabelled images clearly help.

Each class has its own outline and texture: square with stripes, triangle with checks, ring with dots, cross with rings. Hues
are random, so that colour gives no information; lighting, background and pixels are noisy; objects are rotated and may
overlap."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from cmim.data.datasets import Splits
from cmim.randomness import numpy_generator
from cmim.settings import DataSettings

SIZE = 64
CLASS_NAMES = ("ground", "square", "triangle", "ring", "cross")
COLOURS = np.array([[47, 52, 66], [239, 131, 84], [79, 176, 198], [242, 201, 76], [190, 111, 196]], np.uint8)
# The first image number of each split, so far apart that splits do not overlap.
TRAIN, VAL, TEST = 0, 1 << 32, 2 << 32


def load_shapes(settings: DataSettings) -> Splits:
    """The splits of `settings.shapes`, drawn from `settings.split_seed`; labelled and unlabelled images together are
    the first labelled + unlabelled ones of the family."""
    counts, seed = settings.shapes, settings.split_seed
    return Splits(
        labelled=ShapesSet(range(TRAIN, TRAIN + counts.labelled), seed),
        unlabelled=ShapesSet(range(TRAIN + counts.labelled, TRAIN + counts.labelled + counts.unlabelled), seed),
        val=ShapesSet(range(VAL, VAL + counts.val), seed),
        test=ShapesSet(range(TEST, TEST + counts.test), seed),
        class_names=CLASS_NAMES,
        colours=COLOURS,
    )


class ShapesSet:
    """An `ImageSet` of the images `numbers` (a sequence of ints) of the family `seed`; each is drawn when first used."""

    def __init__(self, numbers: Sequence[int], seed: int):
        self.numbers, self.seed, self._drawn = numbers, seed, {}

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, i: int) -> str:
        return f"shapes_{self.numbers[i]}"

    def image(self, i: int) -> np.ndarray:
        return self._draw(i)[0]

    def label(self, i: int) -> np.ndarray:
        return self._draw(i)[1]

    def _draw(self, i):
        number = self.numbers[i]
        if number not in self._drawn:
            self._drawn[number] = draw(numpy_generator(self.seed, number, "shapes"))
        return self._drawn[number]


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image, (SIZE, SIZE, 3) uint8, and its label, (SIZE, SIZE) uint8 in [0, 5)."""
    image = _colour(rng, saturation=(0.1, 0.5), value=(0.3, 0.7)) + _ground_noise(rng)
    label = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(rng.integers(2, 5)):
        label_id = int(rng.integers(1, 5))
        inside, light = _object(rng, label_id)
        # Two shades of one hue in random order: light on dark and dark on light are equally frequent.
        light = light[inside] ^ (rng.random() < 0.5)
        shade = np.where(light, rng.uniform(0.9, 1.1), rng.uniform(0.4, 0.6))
        image[inside] = _colour(rng, saturation=(0.3, 0.8), value=(0.6, 0.9)) * shade[:, None]
        label[inside] = label_id
    image *= _lighting(rng)[..., None]
    image += rng.normal(0, 0.03, image.shape)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8), label


def _object(rng, label_id):
    """The pixels of an object and the light pixels of its texture: two (SIZE, SIZE) bool arrays."""
    radius, angle = rng.uniform(12, 24), rng.uniform(0, 2 * np.pi)
    y, x = (_PIXELS - rng.uniform(8, SIZE - 8) for _ in "yx")
    u = x[None, :] * np.cos(angle) + y[:, None] * np.sin(angle)
    v = y[:, None] * np.cos(angle) - x[None, :] * np.sin(angle)
    period, phase = rng.uniform(5.5, 7), rng.uniform(0, 2 * np.pi, 2)
    wave_u, wave_v = 2 * np.pi / period * u + phase[0], 2 * np.pi / period * v + phase[1]
    if label_id == 1:  # square of half side 0.8 r, stripes
        return np.maximum(np.abs(u), np.abs(v)) < 0.8 * radius, np.sin(wave_u) > 0
    if label_id == 2:  # equilateral triangle of circumradius 1.4 r, checks
        sides = np.maximum(-v, np.sqrt(0.75) * np.abs(u) + 0.5 * v)
        return sides < 0.7 * radius, np.sin(wave_u) * np.sin(wave_v) > 0
    distance = np.hypot(u, v)
    if label_id == 3:  # ring from 0.45 r to r, dots
        return np.abs(distance - 0.725 * radius) < 0.275 * radius, np.cos(wave_u) + np.cos(wave_v) > 0.5
    arms = np.minimum(np.abs(u), np.abs(v)) < 0.35 * radius  # cross of span r, concentric rings
    return arms & (np.maximum(np.abs(u), np.abs(v)) < radius), np.sin(2 * np.pi / period * distance + phase[0]) > 0


def _colour(rng, saturation, value):
    """(3,) RGB in [0, 1] of a random hue."""
    hue, saturation, value = rng.uniform(0, 6), rng.uniform(*saturation), rng.uniform(*value)
    ramp = np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1
    return value * (1 - saturation + saturation * ramp.clip(0, 1))


def _ground_noise(rng):
    """(SIZE, SIZE, 3) noise that is correlated over about a third and an eighth of the image."""
    noise = sum(
        amplitude * _upsample(points) @ rng.normal(size=(3, points, points)) @ _upsample(points).T
        for points, amplitude in ((4, 0.08), (9, 0.08), (22, 0.08))
    )
    return noise.transpose(1, 2, 0)


def _lighting(rng):
    """(SIZE, SIZE) factors: a gradient of 0.6 to 1.4 at most, in a random direction."""
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.4)
    across = (_PIXELS - SIZE / 2) / (SIZE / 2)
    return 1 + strength * (across[None, :] * np.cos(angle) + across[:, None] * np.sin(angle)) / np.sqrt(2)


@cache
def _upsample(points):
    """(SIZE, points) matrix of linear interpolation."""
    places = np.linspace(0, points - 1, SIZE)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(points)))


_PIXELS = np.arange(SIZE) + 0.5
