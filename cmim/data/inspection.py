"""What the files of images and masks hold: every file is opened once, and nothing is assumed of how masks are to be read.

`cmim.data.reading` decides from these facts how the masks of a data set are read.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from cmim.data.colours import count_colours
from cmim.data.files import (
    ColourPicture,
    is_deep,
    lossy,
    map_array,
    open_colours,
    open_header,
    open_image,
    open_mask,
    orientation,
    palette,
)
from cmim.data.survey import count_values
from cmim.distributed import available_cores
from cmim.errors import UserError

MOST_COLOURS = 4096
"""Colours of a mask that are kept, the most frequent ones: a JPEG has tens of thousands."""
SAMPLE = 2000
"""Values of an image with more than 8 bits that are kept."""

Pair = tuple[Path, Path | None]


@dataclass
class ImageFacts:
    size: tuple[int, int] = (0, 0)
    """(height, width) as stored."""
    kind: str = ""
    """Such as `RGB`, `L`, `I;16` or `uint16, 5 channels`."""
    channels: int = 3
    deep: bool = False
    """Whether it has more than 8 bits for each channel."""
    orientation: int = 1
    digest: bytes = b""
    """Of the pixels, whatever the file format."""
    sample: np.ndarray | None = None
    """Some values, where there are more than 8 bits."""
    error: str | None = None


@dataclass
class MaskFacts:
    size: tuple[int, int] = (0, 0)
    kind: str = ""
    """How Pillow calls the pixels: `P`, `L`, `RGB`, ..."""
    values: dict[int, int] | None = None
    """{stored value: pixels}; None for colours."""
    colours: Counter[str] = field(default_factory=Counter)
    """{`#rrggbb`: pixels} of masks in colours; of palettes too."""
    palette: dict[int, str] | None = None
    """The colours of the indices that occur in a palette mask."""
    lossy: bool = False
    rounded: bool = False
    """Whether the rarest of its colours are left out."""
    error: str | None = None


def look(
    pairs: Iterable[Pair], advance: Callable[[], None] = lambda: None
) -> tuple[dict[Path, ImageFacts], dict[Path, MaskFacts]]:
    """Open every image and every mask once, several side by side.

    Args:
        pairs: images, each with its mask or None.
        advance: called after each pair.
    """
    images, masks = {}, {}
    pairs = list(dict.fromkeys(pairs))
    with ThreadPoolExecutor(min(8, available_cores())) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on damaged files
        try:
            for (image, mask), (of_image, of_mask) in zip(pairs, pool.map(_look_at_pair, pairs), strict=True):
                images[image] = of_image
                if mask is not None:
                    masks[mask] = of_mask
                advance()
        finally:
            pool.shutdown(cancel_futures=True)
    return images, masks


def _look_at_pair(pair):
    return look_at_image(pair[0]), None if pair[1] is None else look_at_mask(pair[1])


def look_at_image(path: Path) -> ImageFacts:
    try:
        facts, pixels = _array_facts(path) if path.suffix.lower() == ".npy" else _picture_facts(path)
    except UserError as error:
        return ImageFacts(error=str(error))
    facts.digest = hashlib.blake2b(np.ascontiguousarray(pixels).tobytes() + repr(pixels.shape).encode()).digest()
    if facts.deep:
        flat = pixels.reshape(-1)
        facts.sample = flat[:: max(1, flat.size // SAMPLE)].astype(np.float64)
    return facts


def _array_facts(path):
    array = map_array(path)
    if array.ndim != 3 or array.dtype.kind not in "uif":
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}, expected (H, W, channels): save it so")
    kind = f"{array.dtype}, {array.shape[2]} channels"
    return ImageFacts(array.shape[:2], kind, array.shape[2], array.dtype != np.uint8), array


def _picture_facts(path):
    with open_header(path) as image:
        bands, deep, size = len(image.getbands()), is_deep(image), image.size[::-1]
        channels = bands if bands in (1, 4) and image.mode != "P" else 3
        facts = ImageFacts(size, image.mode, channels, deep, orientation(image))
        if deep and bands == 1:
            try:
                return facts, np.asarray(image)
            except (OSError, ValueError, SyntaxError) as error:
                raise UserError(f"cannot read {path}: {error}; replace the file or take it away") from None
    return facts, open_image(path, 1 if channels == 1 else 3)  # of several deep channels this says what to do


def look_at_mask(path: Path) -> MaskFacts:
    facts = MaskFacts()
    try:
        with open_header(path) as mask:
            facts.size, facts.kind, facts.lossy = mask.size[::-1], mask.mode, lossy(mask) is not None
        if facts.lossy:
            _count_colours(facts, open_colours(path, 1))
            return facts
        try:
            values = open_mask(path)
        except ColourPicture:
            _count_colours(facts, open_colours(path, 0))
            return facts
        facts.values = count_values(values)
        if facts.kind in ("RGBA", "LA") and len(facts.values) == 1:
            _refuse_alpha(path)
        colours = palette(path)
        if colours is not None:
            facts.palette = {v: colours[v] for v in facts.values if v in colours}
            for value, colour in facts.palette.items():
                facts.colours[colour] += facts.values[value]
        elif max(facts.values) < 256:
            facts.colours = Counter({f"#{v:02x}{v:02x}{v:02x}": n for v, n in facts.values.items()})
    except UserError as error:
        facts.error = str(error)
    return facts


def _count_colours(facts, pixels):
    found = count_colours(pixels)
    facts.rounded = len(found) > MOST_COLOURS
    if facts.rounded:
        found = Counter(dict(found.most_common(MOST_COLOURS)))
    facts.colours = found


def _refuse_alpha(path):
    with Image.open(path) as mask:
        alpha = np.asarray(mask.getchannel("A"))
    if alpha.min() < alpha.max():
        raise UserError(
            f"{path} has one colour, and its mask in the alpha channel: save that channel as a grey PNG "
            "(Image.open(path).getchannel('A').save(path))"
        )


def wrong_sizes(pairs: Sequence[Pair], images: dict[Path, ImageFacts], masks: dict[Path, MaskFacts]) -> list[str]:
    """What to say of each mask that has neither the size of its image nor that of the image turned."""
    said = []
    for image, mask in pairs:
        if mask is None or images[image].error or masks[mask].error:
            continue
        size, (height, width) = masks[mask].size, images[image].size
        turned = (width, height) if images[image].orientation > 4 else (height, width)
        if size not in ((height, width), turned):
            said.append(
                f"{mask} is {size[1]} x {size[0]} pixels, its image {image.name} is {width} x {height}: export the mask at "
                "the size of the image, or take the pair away"
            )
    return said


def same_pixels(sets: dict[str, Sequence[Pair]], images: dict[Path, ImageFacts]) -> dict[tuple[str, str], list[Pair]]:
    """Images of the same pixels, by the two splits in which they are; twice in one split too."""
    places = {}
    for split, pairs in sets.items():
        for image, _ in pairs:
            if images[image].digest:
                places.setdefault(images[image].digest, []).append((split, image))
    found = {}
    for where in places.values():
        for split, image in where[1:]:
            if image != where[0][1]:
                found.setdefault((where[0][0], split), []).append((where[0][1], image))
    return found
