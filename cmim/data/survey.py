"""The pass before the first step: every image and mask that has to be readable is opened once, and the pixels of each class
are counted.

What was found in a file is kept in the user's cache by its path, size and time of change, so that the next run opens only
what is new. The cache is never needed: a folder that cannot be written costs the time of a pass.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from cmim.data.colours import NO_CLASS, colour_picture, count_colours, disagreeing_palettes
from cmim.data.datasets import IGNORED, ImageSet, Splits
from cmim.data.file_set import FileSet
from cmim.data.files import SIDEWAYS, ColourPicture, image_size, open_colours, orientation, palette
from cmim.distributed import available_cores
from cmim.errors import UserError
from cmim.settings import DataSettings

INSPECTED = 64
"""Masks whose colours a message names."""
FORM = 2
"""Raised when what is kept of a file changes its meaning, or when files are refused that were not before."""


class Counts:
    """Pixels of each class in the masks of an `ImageSet` of files.

    Attributes:
        classes: (K,) int64.
        around: (K,) int64, pixels with any class in the masks in which class k occurs.
        ignored: pixels without a class.
        values: the mask values that occur.
        far: pixels, of those without a class, whose colour is beyond `data.colour_tolerance`.
    """

    def __init__(self, num_classes: int):
        self.classes, self.around = np.zeros((2, num_classes), np.int64)
        self.ignored, self.values, self.far = 0, set(), 0

    def add(self, pixels: np.ndarray) -> None:
        """Count the pixels (K,) of each class in a mask."""
        self.classes += pixels
        self.around += np.where(pixels > 0, pixels.sum(), 0)


def survey(splits: Splits, settings: DataSettings, advance: Callable[[], None] = lambda: None) -> list[str]:
    """Open every labelled and held-out image and mask once.

    Args:
        splits: of `load_splits`; those that are drawn need no pass.
        settings: where they come from.
        advance: called after each image.

    Returns:
        Lines that the user should know: classes without a pixel, palettes that contradict each other.

    Raises:
        UserError: a file that cannot be read or does not fit, or masks whose 255 is meant as a class.
    """
    sets = surveyed(splits)
    try:
        counts = {name: count(image_set, len(splits.class_names), advance) for name, image_set in sets.items()}
    except ColourPicture as error:
        raise masks_in_colours([mask for image_set in sets.values() for mask in image_set.masks]) or error from None
    if not counts:
        return []
    _refuse_nonsense(counts, splits.class_names, settings)
    lines = [*_far_colours(counts, settings), *_absent_classes(counts, splits.class_names)]
    line = None if settings.colours else disagreeing_palettes(_palettes(sets))
    return lines + ([line] if line else [])


def _palettes(sets):
    """The colours of the indices that occur, of palette masks among `INSPECTED` of each set."""
    for image_set in sets.values():
        cache = Cache(image_set)
        for i in np.unique(np.linspace(0, len(image_set) - 1, min(INSPECTED, len(image_set))).astype(int)):
            colours = palette(image_set.masks[i])
            if colours is not None:
                yield {value: colours[value] for value in cache.values(i) if value in colours}


def masks_in_colours(masks: Sequence[Path]) -> UserError | None:
    """What to say of masks in colours where `data.colours` is not given, with the colours of `INSPECTED` of them, evenly
    chosen; None where none of these is a colour picture. Masks that cannot be read are passed over."""
    found, first = Counter(), None
    for i in np.unique(np.linspace(0, len(masks) - 1, min(INSPECTED, len(masks))).astype(int)):
        try:
            pixels = open_colours(masks[i], 1)
        except UserError:
            continue
        found += count_colours(pixels)
        with Image.open(masks[i]) as mask:
            if first is None and mask.mode in ("RGB", "RGBA") and (pixels != pixels[..., :1]).any():
                first = masks[i]
    return None if first is None else UserError(colour_picture(first, found))


def decide_exif(splits: Splits) -> tuple[str | None, str | None]:
    """Whether EXIF orientations are to be applied: what fits the sizes of the labelled and held-out masks.

    Returns:
        "apply" or "ignore", None for images that are drawn; and a line for the user where orientations occur.

    Raises:
        UserError: some masks fit the images as they are stored, others the turned ones.
    """
    sets, fits, turned = surveyed(splits), {"apply": [], "ignore": []}, []
    if not sets:
        return None, None
    for image_set in sets.values():
        with ThreadPoolExecutor(min(8, available_cores())) as pool:
            orientations = list(pool.map(_orientation, image_set.images))
        for image, mask, found in zip(image_set.images, image_set.masks, orientations, strict=True):
            if found == 1:
                continue
            turned.append(image)
            height, width = image_size(image)
            if found in SIDEWAYS and height != width:
                size = image_size(mask)
                for choice, shape in (("ignore", (height, width)), ("apply", (width, height))):
                    if size == shape:
                        fits[choice].append(mask)
    if fits["apply"] and fits["ignore"]:
        raise UserError(
            f"{fits['ignore'][0]} fits its image as it is stored, {fits['apply'][0]} fits it as its EXIF orientation turns "
            "it: save the images anew without EXIF orientation, or give --data.exif apply or ignore"
        )
    if not turned:
        return "ignore", None
    count = f"{len(turned)} labelled, val and test images have an EXIF orientation (such as {turned[0].name})"
    if fits["apply"]:
        return "apply", f"{count}; the masks fit the turned images, so it is applied to all images (data.exif apply)"
    if fits["ignore"]:
        return "ignore", f"{count}; the masks fit the images as they are stored, so it is ignored (data.exif ignore)"
    return "ignore", (
        f"{count}, and the sizes of the masks cannot tell whether they were drawn on the turned images: it is ignored; give "
        "--data.exif apply if they were"
    )


def _orientation(path):
    try:
        return orientation(path)
    except UserError:
        return 1  # the pass over all files says what is wrong


def surveyed(splits: Splits) -> dict[str, FileSet]:
    """The sets that `survey` opens, by name."""
    sets = {"labelled": splits.labelled, "val": splits.val, "test": splits.test}
    return {name: image_set for name, image_set in sets.items() if isinstance(image_set, FileSet)}


def count(image_set: FileSet, num_classes: int, advance: Callable[[], None] = lambda: None) -> Counts:
    """The `Counts` of a set, from the cache where its files did not change.

    Raises:
        UserError: the first image or mask, in order, that cannot be read or does not fit.
    """
    counts, cache = Counts(num_classes), Cache(image_set)
    with ThreadPoolExecutor(min(8, available_cores())) as pool:  # decoders run side by side
        found = pool.map(cache.values, range(len(image_set)))
        try:
            for i, values in enumerate(found):
                table = image_set.encoding(image_set.masks[i]).table
                ids = {v: int(table[v]) if 0 <= v < len(table) else -1 for v in values}
                image_set.refuse_value(i, min((v for v, k in ids.items() if k < 0), default=None))
                own = np.zeros(num_classes, np.int64)
                for value, pixels in values.items():
                    counts.values.add(value)
                    counts.far += pixels * (value == NO_CLASS and image_set.encoding(image_set.masks[i]).colours is not None)
                    if ids[value] == IGNORED:
                        counts.ignored += pixels
                    else:
                        own[ids[value]] += pixels
                counts.add(own)
                advance()
        finally:
            pool.shutdown(cancel_futures=True)
            cache.write()
    return counts


def count_labels(image_set: ImageSet, num_classes: int) -> Counts:
    """The `Counts` of the classes of any set with labels; drawn images are drawn once more."""
    if isinstance(image_set, FileSet):
        return count(image_set, num_classes)
    counts = Counts(num_classes)
    for i in range(len(image_set)):
        counts.add(np.bincount(image_set.label(i).ravel(), minlength=IGNORED + 1)[:num_classes])
    return counts


class Cache:
    """{mask value: pixels} of the masks of a set, each image and mask opened unless neither changed since the last time.
    One file of the user's cache for each folder of images."""

    def __init__(self, image_set: FileSet):
        self.image_set, self.new = image_set, False
        folder = os.path.abspath(image_set.images[0].parent)
        self.path = cache_folder() / f"masks-{hashlib.blake2b(os.fsencode(folder), digest_size=12).hexdigest()}.json"
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            self.kept = kept["files"] if kept["form"] == FORM else {}
        except (OSError, ValueError, KeyError, TypeError):
            self.kept = {}

    def _mark(self, i):
        """By which an image and its mask are found again, and what tells whether they changed."""
        image, mask = self.image_set.images[i], self.image_set.masks[i]
        stamp = [self.image_set.channels, self.image_set.turn, *_stamp(image), *_stamp(mask)]
        stamp += [] if self.image_set.limits is None else list(self.image_set.limits)
        colours = self.image_set.encoding(mask).colours
        stamp += [] if colours is None else [repr(colours)]
        return f"{os.path.abspath(image)}\n{os.path.abspath(mask)}", stamp

    def values(self, i: int) -> dict[int, int]:
        key, stamp = self._mark(i)
        try:
            if self.kept[key][0] == stamp:
                return {int(value): int(pixels) for value, pixels in self.kept[key][1].items()}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            pass  # new, or somebody else wrote the file
        self.image_set.image(i)
        found = count_values(self.image_set.values(i))
        self.kept[key], self.new = [stamp, found], True
        return found

    def remember(self, i: int, values: dict[int, int]) -> None:
        """Keep what was found in the mask of image i elsewhere, by reading the image and the mask as this set does."""
        key, stamp = self._mark(i)
        self.kept[key], self.new = [stamp, values], True

    def write(self) -> None:
        if not self.new:
            return
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"form": FORM, "files": self.kept}), encoding="utf-8")
            os.replace(partial, self.path)
        except OSError:
            partial.unlink(missing_ok=True) if partial.parent.is_dir() else None


def cache_folder() -> Path:
    """CMIM_CACHE, or the folder `cmim` of the user's cache."""
    given = os.environ.get("CMIM_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "cmim"


def _stamp(path):
    try:
        status = path.stat()
    except OSError:
        return [0, 0]  # reading it says what is wrong
    return [status.st_size, status.st_mtime_ns]


def count_values(values: np.ndarray) -> dict[int, int]:
    """{value: pixels} of the integers of a mask."""
    if values.dtype == np.uint8:
        pixels = np.bincount(values.ravel(), minlength=256)
        return {int(v): int(pixels[v]) for v in np.flatnonzero(pixels)}
    found, pixels = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), pixels.tolist(), strict=True))


def _refuse_nonsense(counts, names, settings):
    """Masks in which 255, which stands for no class, is meant as one; and masks without any class."""
    every = set().union(*(c.values for c in counts.values()))
    meant = (
        IGNORED in every and settings.colours is None and settings.ignore == IGNORED and IGNORED not in settings.label_map
    )
    pixels = sum(c.classes for c in counts.values())
    if meant and len(names) == 2 and pixels[1] == 0:
        raise UserError(
            f"the masks hold 255, which stands for no class, and no pixel of class 1 ({names[1]}): if 255 is {names[1]}, "
            "give --data.label_map '{255: 1}'; if it is no class, label an image with class 1, or say so: "
            "--data.label_map '{255: 255}'"
        )
    for name, c in counts.items():  # labelled first
        if c.classes.sum() == 0 and settings.colours is not None:
            raise UserError(f"not one pixel of the {name} masks has the colour of a class: change data.colours")
        if c.classes.sum() == 0:
            values = ", ".join(map(str, sorted(c.values)[:10]))
            raise UserError(
                f"not one pixel of the {name} masks has a class: they hold {values} only; map values to classes with "
                f"data.label_map, or {'label' if name == 'labelled' else 'give'} other images"
            )


def _far_colours(counts, settings):
    far = sum(c.far for c in counts.values())
    share = far / max(1, sum(c.classes.sum() + c.ignored for c in counts.values()))
    return [
        f"{100 * share:.3g}% of the pixels of the masks have a colour farther than data.colour_tolerance "
        f"{settings.colour_tolerance:g} from every one of data.colours, and are ignored"
    ] * (far > 0)


def _absent_classes(counts, names):
    lines = []
    for name, c in counts.items():
        absent = [names[k] for k in np.flatnonzero(c.classes == 0)]
        if not absent:
            continue
        shown = enumerate_names(absent)
        if name == "labelled":
            lines.append(
                f"{len(absent)} of {len(names)} classes have no labelled pixel, so that nothing teaches them: {shown}; "
                "raise data.labelled, or change data.classes and data.label_map"
            )
        elif name == "val":
            lines.append(f"{len(absent)} of {len(names)} classes have no pixel in val: {shown}")
    return lines


def enumerate_names(names: Sequence[str] | Iterable[str], most: int = 12) -> str:
    """Names with commas, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
