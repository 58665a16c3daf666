"""Polygons to masks, once, before training: COCO JSON, LabelMe JSON and CVAT XML become images, masks of class ids and
classes.txt, which the trainer reads.

Where two objects overlap, that which is drawn later counts: for COCO the smaller one, for LabelMe and CVAT the one that
comes later in the file (CVAT: by its z_order). Pixels in no object are the class `background`, unless objects cover nearly
every pixel; then they have no class. Images without any object are all background where they are few; where they are many,
they seem not to be annotated yet, and become unlabelled images, as do images that no file names.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cmim.data.annotations import read_annotations
from cmim.data.datasets import IGNORED
from cmim.data.files import IMAGE_SUFFIXES, image_size
from cmim.data.folder import walk
from cmim.data.labels import colour_map
from cmim.data.layout import place_of, splits_in
from cmim.errors import UserError

BACKGROUND = "background"
NAMES_OF_BACKGROUND = ("background", "_background_", "__background__")
NAMES_OF_NONE = ("__ignore__", "ignore", "unlabeled", "unlabelled", "void")
NEARLY_ALL = 0.9
"""Share of the pixels that objects cover from which on the others have no class."""
MANY = 1 / 3
"""Share of the images without any object from which on these seem not to be annotated."""
LOOKED_AT = 200
"""Images in which that share is measured."""
MOST_CLASSES = 254


def convert(root: Path, out: Path, progress: Callable[[int], Callable[[], None]]) -> list[str]:
    """Write `out`/[split/]images, masks and classes.txt; images are hard links where the system allows them, else copies.

    Args:
        root: a folder with files of annotations, or such a file; images lie beside or below.
        out: a folder that does not exist, or is empty.
        progress: given the number of images, returns the function that is called after each.

    Returns:
        Lines that say what was decided.

    Raises:
        UserError: nothing to convert, a damaged file, an image that is missing, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--convert {out}: it is not empty; give a folder that is not there")
    if not root.exists():
        raise UserError(f"there is no folder or file {root}; give the folder of the images and annotations")
    folder = root if root.is_dir() else root.parent
    files = [path for path in (walk(root) if root.is_dir() else [root]) if path.suffix.lower() in (".json", ".xml")]
    annotated, listed = [], []
    for path in files:
        found = read_annotations(path)
        if found is not None:
            annotated += found[0]
            listed += [name for name in found[1] if name not in listed]
    if not annotated:
        raise UserError(f"{root} holds no annotations: expected COCO JSON, LabelMe JSON or CVAT XML (for images)")
    images = _by_name(folder)
    items = [(item, _find(item, images, folder)) for item in annotated]
    items = [(item, path) for item, path in items if path is not None]
    if not items:
        raise UserError(
            f"none of the {len(annotated)} images is below {folder}, such as {annotated[0].name}: put them there"
        )
    names, ids = _classes(annotated, listed)
    if len(names) >= MOST_CLASSES:
        raise UserError(f"{len(names)} classes are named, {MOST_CLASSES} with the background are possible: merge some")
    with_objects = [pair for pair in items if any(shape.drawn for shape in pair[0].shapes)]
    covered = _coverage(with_objects, ids)
    dense = covered >= NEARLY_ALL and BACKGROUND not in names
    table = np.arange(256, dtype=np.uint8)
    if not dense and BACKGROUND not in names:
        table[: len(names)] += 1
        names = [BACKGROUND, *names]
    table[_NOTHING] = IGNORED if dense else names.index(BACKGROUND)
    empty = len(items) - len(with_objects)
    open_yet = dense or empty >= MANY * len(items)  # whether images without objects are still to be annotated
    advance = progress(len(items))
    for (item, path), (split, name) in zip(items, _targets(items), strict=True):
        mask = _draw(item, path, ids)
        if open_yet and not any(shape.drawn for shape in item.shapes):
            _link(path, out / "unlabeled" / path.relative_to(folder))
        else:
            _write(out / split if split else out, name, path, table[mask])
        advance()
    named = {path for _, path in items}
    others = [path for paths in images.values() for path in paths if path not in named]
    for path in others:
        _link(path, out / "unlabeled" / path.relative_to(folder))
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    kinds = Counter({"json": "JSON", "xml": "CVAT XML"}[item.source.suffix.lower()[1:]] for item, _ in items)
    lines = [f"{len(items)} images of {' and '.join(kinds)} annotations, {len(with_objects)} with objects: {out}"]
    rest = f"have no class ({IGNORED})" if dense else f"are the class {BACKGROUND}"
    lines.append(f"objects cover {covered:.0%} of the pixels of their images; the other pixels {rest}")
    if empty:
        what = "are not annotated yet, it seems: they become unlabelled images" if open_yet else f"are all {BACKGROUND}"
        lines.append(f"{empty} images have no object, and {what}")
    if others:
        lines.append(f"{len(others)} images are in no file of annotations: they become unlabelled images")
    if len(items) < len(annotated):
        lines.append(f"{len(annotated) - len(items)} images are named, but not there")
    skipped = Counter(shape.label[1:] for item, _ in items for shape in item.shapes if not shape.drawn)
    return lines + [f"{count} shapes ({kind}) have no area, and are left out" for kind, count in skipped.items()]


def _coverage(items, ids):
    """The share of the pixels that objects cover, in some of the images."""
    chosen = [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(LOOKED_AT, len(items))).astype(int))]
    masks = [_draw(item, path, ids) for item, path in chosen]
    return sum(int((mask != _NOTHING).sum()) for mask in masks) / max(1, sum(mask.size for mask in masks))


_NOTHING = 254
"""Stands for the pixels of no object until it is known what they are."""


def _by_name(folder):
    found = {}
    for path in walk(folder):
        masks = place_of(path.relative_to(folder).parts[:-1]).kind == "masks"
        if path.suffix.lower() in IMAGE_SUFFIXES and not masks:
            found.setdefault(path.name, []).append(path)
    return found


def _find(item, images, folder):
    """The file of an image: beside the annotations, else the one below `folder` whose path ends as its name says."""
    name = item.name.split("?")[0].replace("\\", "/")
    if ".." in Path(name).parts or Path(name).is_absolute():  # as LabelMe writes; nothing outside the folder is taken
        name = Path(name).name
    beside = item.source.parent / name
    candidates = images.get(Path(name).name, [])
    if beside.is_file():
        return beside
    if len(candidates) > 1:
        split = splits_in([*reversed(item.source.relative_to(folder).parent.parts), item.source.stem])
        ends = [path for path in candidates if path.as_posix().endswith(f"/{name}")]
        same = [path for path in ends if splits_in(path.relative_to(folder).parts) == split]
        candidates = same or ends or candidates
    if len(candidates) > 1:
        raise UserError(
            f"{item.source} names {name}, which {len(candidates)} files are called, such as {candidates[0]}: rename one"
        )
    return candidates[0] if candidates else None


def _classes(annotated, listed):
    """The names of the classes, and the id of each label before a background is added."""
    labels = list(listed)
    seen = sorted({shape.label for item in annotated for shape in item.shapes if shape.drawn})
    labels += [label for label in seen if label not in labels]
    none = [label for label in labels if label.lower() in NAMES_OF_NONE]
    background = [label for label in labels if label.lower() in NAMES_OF_BACKGROUND]
    names = [BACKGROUND] * bool(background) + [label for label in labels if label not in (*none, *background)]
    ids = {label: names.index(label) for label in labels if label in names}
    return names, ids | dict.fromkeys(background, 0) | dict.fromkeys(none, IGNORED)


def _draw(item, path, ids):
    """(H, W) uint8 of class ids and `_NOTHING`."""
    height, width = image_size(path)
    if item.size is not None and tuple(item.size) not in ((height, width), (width, height)):
        raise UserError(
            f"{item.source} says that {item.name} is {item.size[1]} x {item.size[0]} pixels, {path} is {width} x {height}: "
            "take the image that was annotated"
        )
    size = (height, width) if item.size is None else tuple(item.size)
    canvas = Image.new("L", size[::-1], _NOTHING)
    draw = ImageDraw.Draw(canvas)
    for shape in sorted((shape for shape in item.shapes if shape.drawn), key=lambda shape: shape.order):
        value = ids[shape.label]
        for polygon in shape.polygons:
            if len(polygon) > 2:
                draw.polygon(polygon, fill=value)
        if shape.ellipse is not None:
            draw.ellipse(shape.ellipse, fill=value)
        if shape.part is not None:
            left, top, part = shape.part
            canvas.paste(value, (left, top), Image.fromarray(part.astype(np.uint8) * 255))
    return np.asarray(canvas)


def _write(place, name, source, ids):
    _link(source, place / "images" / name)
    written = Image.fromarray(ids, mode="P")
    written.putpalette(colour_map(256).flatten().tolist())
    file = place / "masks" / Path(name).with_suffix(".png")
    file.parent.mkdir(parents=True, exist_ok=True)
    written.save(file)


def _targets(items) -> Iterator[tuple[str | None, str]]:
    """The split and the file name of each image; images of the same name in two folders get the name of the folder too."""
    splits = [
        splits_in([*reversed(path.parent.parts[-3:]), item.source.stem, *reversed(item.source.parent.parts[-2:])])
        for item, path in items
    ]
    if len(set(splits)) == 1 or "train" not in splits:
        splits = [None] * len(items)
    splits = [split or "train" for split in splits] if any(splits) else splits
    stems = Counter((split, path.stem) for split, (_, path) in zip(splits, items, strict=True))
    taken = set()
    for split, (_, path) in zip(splits, items, strict=True):
        name = path.name if stems[split, path.stem] == 1 else f"{path.parent.name}_{path.stem}{path.suffix}"
        while (split, name) in taken:
            name = f"{Path(name).stem}_{path.suffix[1:]}{path.suffix}"
        taken.add((split, name))
        yield split, name


def _link(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another disk, or a system without hard links
        shutil.copyfile(source, target)
