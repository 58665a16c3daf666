"""Everything that can be said of a data set before it is trained on: what was found, how it would be read, what is wrong."""

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cmim.data import load_splits
from cmim.data.class_files import read_class_file
from cmim.data.colours import class_colours, disagreeing_palettes
from cmim.data.datasets import IGNORED, Splits
from cmim.data.file_set import FileSet
from cmim.data.files import LOSSY_MASK_SUFFIXES, MASK_SUFFIXES, SIDEWAYS
from cmim.data.folder import Folder, walk
from cmim.data.inspection import ImageFacts, MaskFacts, Pair, look, same_pixels, wrong_sizes
from cmim.data.labels import Encoding, colour_map, encoding_of
from cmim.data.layout import Layout, find_layout
from cmim.data.reading import Reading, class_pixels, decide, stored
from cmim.data.survey import Cache, decide_exif, enumerate_names, survey
from cmim.errors import UserError
from cmim.settings import DataSettings

HELD_OUT = ("val", "test")
FEW = 10
"""Problems of one kind that are listed one by one."""
COMPARED = 100
"""Masks without an image whose names are compared with those of images without a mask."""


@dataclass
class Examination:
    layout: Layout
    sets: dict[str, list[Pair]] = field(default_factory=dict)
    """Pairs by split: train, val, test, unlabelled."""
    images: dict[Path, ImageFacts] = field(default_factory=dict)
    masks: dict[Path, MaskFacts] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)
    settings: DataSettings | None = None
    """How the trainer would read the data; None where that cannot be said."""
    names: tuple[str, ...] = ()
    colours: np.ndarray | None = None
    """(K, 3) uint8, of pictures."""
    counts: dict[str, "ClassCounts"] = field(default_factory=dict)
    splits: Splits | None = None
    """Of the trainer, with `settings`; None where it refuses the data."""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What would end a training or make its result wrong, each with its remedy."""

    def labelled(self, split: str) -> list[Pair]:
        return [pair for pair in self.sets.get(split, ()) if pair[1] is not None]


@dataclass
class ClassCounts:
    pixels: np.ndarray
    """(K,) int64."""
    images: np.ndarray
    """(K,) int64, masks that hold the class."""
    ignored: int
    unknown: int
    """Pixels of values that are no class."""
    present: dict[Path, frozenset[int]]
    """The classes of each mask."""


def examine(root: Path, progress: Callable[[int], Callable[[], None]], settings: DataSettings | None = None) -> Examination:
    """Open every file of a folder.

    Args:
        root: folder of the data.
        progress: given the number of images, returns the function that is called after each.
        settings: how the data are read, if a config says so; else it is found out.

    Raises:
        UserError: there is nothing to examine.
    """
    found = Examination(find_layout(root) if settings is None else Layout({}))
    found.notes += found.layout.notes
    found.problems += found.layout.problems
    if settings is None and found.problems:
        return found
    given = settings
    if settings is None and found.layout.data["format"] != "folder":
        settings = DataSettings(**found.layout.data, labelled=1.0)
    if settings is None:
        _pair_up(found)
    else:
        found.settings = settings
        _take_splits(found, settings)
    pairs = [pair for pairs in found.sets.values() for pair in pairs]
    found.images, found.masks = look(pairs, progress(len(set(pairs))))
    _file_problems(found)
    if settings is None:
        _decide(found)
    elif found.splits is not None:
        _read_as_set(found)
    _count(found)
    _try_to_load(found, given)
    found.problems = list(dict.fromkeys(found.problems))
    found.notes = list(dict.fromkeys(note for note in found.notes if note not in found.problems))
    return found


def _pair_up(found):
    """The pairs of every split of a folder, with what is left over."""
    data = {key: value for key, value in found.layout.data.items() if key != "val"}
    jpeg = {"colours": {"a": "#000000", "b": "#ffffff"}}  # so that JPEG masks count; how they are read is decided later
    val = found.layout.data.get("val")
    settings = DataSettings(**data, **jpeg, val=val or "val", classes=["a", "b"])
    source = Folder(settings)
    places = {"train": source.train_places} | {
        split: source.places(name) for split, name in (("val", val), ("test", settings.test)) if name
    }
    for split, (images, masks) in places.items():
        if split != "train" and ("{split}" not in settings.image_folder or not images.is_dir()):
            continue
        try:
            found.sets[split] = source.pairs(images, masks)
        except UserError as error:
            found.problems.append(str(error))
            continue
        _left_over(found, split, images, masks)
    try:
        more = [(image, None) for image in source.unlabelled()]
    except UserError as error:
        found.problems.append(str(error))
        more = []
    train = found.sets.get("train", [])
    alone = [pair for pair in train if pair[1] is None]
    found.sets = {"train": [pair for pair in train if pair[1] is not None]} | {
        k: v for k, v in found.sets.items() if k != "train"
    }
    if alone or more:
        found.sets["unlabelled"] = alone + more
    found.notes += [note for note in source.notes if "no image has their name" not in note and "are unlabelled" not in note]
    if not found.sets["train"]:
        found.problems.append(
            f"no training image has a mask: put masks with the names of the images into {places['train'][1]}"
        )


def _left_over(found, split, images, mask_folder):
    """Images without a mask and masks without an image, with the names that may be meant."""
    used = {mask for _, mask in found.sets[split]}
    suffixes = (*MASK_SUFFIXES, *LOSSY_MASK_SUFFIXES)
    masks = walk(mask_folder) if mask_folder.is_dir() and mask_folder != images else ()
    orphans = [p for p in masks if p.suffix.lower() in suffixes and p not in used and not p.is_relative_to(images)]
    alone = {image.stem: image for image, mask in found.sets[split] if mask is None}
    meant = {}
    stems = list(alone)[:COMPARED]
    for mask in orphans[:COMPARED]:
        near = difflib.get_close_matches(mask.stem, stems, 1, 0.6)
        if near:
            meant[near[0]] = mask
            found.notes.append(f"the mask {mask} belongs to no image: rename it, if it is that of {alone[near[0]].name}")
    unclear = [mask for mask in orphans if mask not in meant.values()]
    if unclear:
        found.notes.append(
            f"{len(unclear)} masks of {mask_folder} belong to no image, such as {unclear[0].name}: they are not used"
        )
    alone, count = list(alone.values()), len(found.sets[split])
    if not alone:
        return
    if split == "train":
        if any(mask is not None for _, mask in found.sets[split]):
            found.notes.append(
                f"{len(alone)} of {count} training images have no mask and serve as unlabelled ones, such as {alone[0].name}"
            )
        return
    remedy = "rename the mask above, or " if meant else ""
    found.problems += _listed(
        [f"{image} has no mask: {remedy}put one into {mask_folder}, or take the image away" for image in alone],
        f"more {split} images have no mask",
    )


def _listed(lines: Sequence[str], more: str) -> list[str]:
    return [*lines[:FEW], *([f"{len(lines) - FEW} {more}"] if len(lines) > FEW else [])]


def _take_splits(found, settings):
    try:
        found.splits = load_splits(settings)
    except UserError as error:
        found.problems.append(str(error))
        return
    found.notes += found.splits.notes
    for name, split in (("labelled", "train"), ("val", "val"), ("test", "test"), ("unlabelled", "unlabelled")):
        image_set = getattr(found.splits, name)
        if isinstance(image_set, FileSet):
            masks = image_set.masks if name != "unlabelled" else [None] * len(image_set)
            found.sets[split] = list(zip(image_set.images, masks, strict=True))
    labelled = {image for image, _ in found.sets.get("train", ())}
    if {image for image, _ in found.sets.get("unlabelled", ())} <= labelled:
        found.sets.pop("unlabelled", None)


def _file_problems(found):
    needed = {image for split, pairs in found.sets.items() if split != "unlabelled" for image, _ in pairs}
    broken = [(image, facts.error) for image, facts in found.images.items() if facts.error]
    found.problems += _listed([error for image, error in broken if image in needed], "more images cannot be used")
    others = [error for image, error in broken if image not in needed]
    found.notes += _listed([f"{error} (unlabelled; training takes another one)" for error in others], "more cannot be used")
    found.problems += _listed([facts.error for facts in found.masks.values() if facts.error], "more masks cannot be used")
    pairs = [pair for pairs in found.sets.values() for pair in pairs]
    found.problems += _listed(wrong_sizes(pairs, found.images, found.masks), "more masks have another size than their image")
    for (a, b), same in same_pixels(found.sets, found.images).items():
        first, second = same[0]
        count = f"{len(same)} image{'s' * (len(same) > 1)}"
        if a == b:
            found.notes.append(
                f"{count} of {a} {'are' if len(same) > 1 else 'is'} there twice, such as {first.name} and {second.name}"
            )
        elif {a, b} & set(HELD_OUT) and {a, b} & {"train"}:
            for first, second in same[:FEW]:
                found.problems.append(
                    f"{first} ({a}) and {second} ({b}) are the same picture, which makes the score too good: take it out "
                    "of one of them"
                )
        else:
            found.notes.append(f"{count} of {a} {'are' if len(same) > 1 else 'is'} in {b} too, such as {first.name}")


def _decide(found):
    """How the images and the masks of a folder are read."""
    named = read_class_file(found.layout.data["root"])
    found.reading = reading = decide(found.masks, named)
    found.problems += reading.problems
    found.notes += reading.notes
    data = {**found.layout.data, **reading.data}
    kinds = Counter(facts.channels for facts in found.images.values() if not facts.error)
    if kinds and set(kinds) != {3}:
        wide = {c for c in kinds if c not in (1, 3, 4)}
        data["channels"] = kinds.most_common(1)[0][0] if wide or len(kinds) == 1 else 3
        if data["channels"] == 4 and not wide:
            found.notes.append("the images have an alpha channel, which is left aside (data.channels 3)")
            data["channels"] = 3
        if wide and len(kinds) > 1:
            found.problems.append(
                f"images have {' or '.join(map(str, sorted(kinds)))} channels: save all with the same number"
            )
    deep = [facts for facts in found.images.values() if facts.deep and not facts.error]
    if deep:
        shallow = next((path for path, facts in found.images.items() if not facts.deep and not facts.error), None)
        if shallow is not None:
            found.problems.append(
                f"{shallow} has 8 bits where {len(deep)} images have more: save all with the same number of bits"
            )
        data["range"] = spread(np.concatenate([facts.sample for facts in deep]))
    val = found.layout.data.get("val")
    count = len(found.sets.get("train", ()))
    if val is None:
        data["val"] = max(1, round(count / 5)) if count < 50 else 0.1
        if count == 1:
            found.problems.append("one image has a mask, and two are needed: one to train on and one for val; label another")
    if "classes" in data:
        found.settings = DataSettings(**data)
        found.names = tuple(data["classes"])
        colours = class_colours(found.settings, found.names)
        found.colours = colour_map(len(found.names)) if colours is None else colours.shown()


def spread(values: np.ndarray) -> tuple[float, float]:
    """Limits that leave half a per cent of the values beyond on either side, rounded to two digits."""
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [0.5, 99.5]) if values.size else (0, 1)
    unit = 10.0 ** (np.floor(np.log10(max(high - low, 1e-6))) - 1)
    low, high = float(np.floor(low / unit) * unit), float(np.ceil(high / unit) * unit)
    low, high = (int(v) if v == int(v) else float(f"{v:.6g}") for v in (low, high if high > low else low + 1))
    return low, high


def _read_as_set(found):
    """Where a config or a benchmark says how masks are read."""
    found.names, found.colours = found.splits.class_names, found.splits.colours
    found.reading = Reading({"classes": list(found.names)}, "masks as the settings say")


def encoding_at(found: Examination) -> Callable[[Path], Encoding] | None:
    """What the values of a mask stand for, by its path."""
    if found.splits is not None:
        return found.splits.labelled.encoding
    if found.settings is None or found.settings.format != "folder":
        return None
    encoding = encoding_of(found.settings, class_colours(found.settings, found.names), len(found.names))
    return lambda mask: encoding


def _count(found):
    try:
        encode = encoding_at(found)
    except UserError as error:
        found.problems.append(str(error))
        return
    if encode is None:
        return
    for split in ("train", *HELD_OUT):
        pairs = [(image, mask) for image, mask in found.labelled(split) if not found.masks[mask].error]
        if not pairs:
            continue
        counts = ClassCounts(np.zeros(len(found.names), np.int64), np.zeros(len(found.names), np.int64), 0, 0, {})
        for _, mask in pairs:
            pixels = class_pixels(found.masks[mask], encode(mask))
            counts.ignored += pixels.pop(IGNORED, 0)
            counts.unknown += pixels.pop(-1, 0)
            counts.present[mask] = frozenset(pixels)
            for k, n in pixels.items():
                counts.pixels[k] += n
                counts.images[k] += 1
        found.counts[split] = counts
        if counts.unknown and found.reading.kind == "masks as the settings say":
            where = next(m for _, m in pairs if -1 in class_pixels(found.masks[m], encode(m)))
            remedy = encode(where).remedy or "add the colour to data.colours"
            found.problems.append(f"{split} masks hold values that are no class, such as {where}: {remedy}")
    _note_absent(found)
    if not found.settings.colours:
        line = disagreeing_palettes(facts.palette for facts in found.masks.values() if facts.palette)
        found.notes += [line] if line else []


def _note_absent(found):
    for split, counts in found.counts.items():
        absent = [found.names[k] for k in np.flatnonzero(counts.pixels == 0)]
        if absent and split == "train":
            found.notes.append(
                f"{len(absent)} of {len(found.names)} classes have no training pixel, so that nothing teaches them: "
                f"{enumerate_names(absent)}"
            )
        elif absent:
            found.notes.append(
                f"{len(absent)} of {len(found.names)} classes have no pixel in {split}: {enumerate_names(absent)}"
            )


def _try_to_load(found, given):
    """Read the data as the trainer does; what was found out of its files is kept for it, so that it need not open them."""
    if found.settings is None or (given is None and found.problems and found.splits is None and not found.sets.get("train")):
        return
    try:
        if found.splits is None:
            found.splits = load_splits(found.settings)
        if found.settings.exif is None:
            exif, note = decide_exif(found.splits)
            found.notes += [note] if note else []
            if any(facts.orientation != 1 for facts in found.images.values()):
                found.settings = found.settings.model_copy(update={"exif": exif})
                found.splits = load_splits(found.settings)
        found.names, found.colours = found.splits.class_names, found.splits.colours
        if not found.problems:
            _remember(found)
            seen = "no labelled pixel", "no pixel in val"
            found.notes += [line for line in survey(found.splits, found.settings) if not any(word in line for word in seen)]
    except UserError as error:
        if not found.problems:  # else it is one of them, in the words of the trainer
            found.problems.append(str(error))


def _remember(found):
    for image_set in (found.splits.labelled, found.splits.val, found.splits.test):
        if not isinstance(image_set, FileSet):
            continue
        cache = Cache(image_set)
        for i, (image, mask) in enumerate(zip(image_set.images, image_set.masks, strict=True)):
            of_image, of_mask = found.images[image], found.masks[mask]
            if _opens_alike(image, of_image, of_mask, image_set) and not of_mask.rounded:
                cache.remember(i, stored(of_mask, image_set.encoding(mask).colours))
        cache.write()


def _opens_alike(path, image, mask, image_set):
    """Whether the trainer opens an image and its mask too; where that is not sure, it does so itself."""
    turned = image_set.turn and image.orientation in SIDEWAYS
    channels = image.channels == image_set.channels or (path.suffix.lower() != ".npy" and image_set.channels in (1, 3))
    same_size = mask.size == (image.size[::-1] if turned else image.size)
    return not (image.error or mask.error) and same_size and channels and image.deep == (image_set.limits is not None)


def numbers_of_images(found: Examination) -> tuple[int, int]:
    """The numbers of labelled and of unlabelled images of a run."""
    if found.splits is not None:
        own = {image for image, _ in found.sets.get("unlabelled", ())}
        return len(found.splits.labelled), len(found.splits.unlabelled) if own else 0
    return len(found.labelled("train")), len(found.sets.get("unlabelled", ()))
