"""How a folder of images and masks is laid out: which folders hold images, which masks, which split each belongs to, and how
masks are named. What is found are values of `DataSettings`, so that no file has to be moved.

A folder counts by its name (`images`, `photos`, `labels`, `train`, `testannot`, ...); the folders and the name of the masks
that join most images with a mask are taken.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cmim.data.files import IMAGE_SUFFIXES, LOSSY_MASK_SUFFIXES, MASK_SUFFIXES
from cmim.data.folder import UNLABELLED, common_name, walk
from cmim.errors import UserError
from cmim.settings import DataSettings

IMAGES = "images image imgs img photos photo pictures jpegimages rgb inputs input frames scans"
MASKS = (
    "masks mask labels label gts gt groundtruth groundtruths annotations annotation annots annot segmentationclassaug "
    "segmentationclass segmentations segmentation segmaps segs seg targets target"
)
SPLITS = {"train": "training train trn", "val": "validation valid val dev", "test": "testing test tst"}
_SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names.split()}
_SPLIT_OF |= dict.fromkeys(UNLABELLED, "unlabelled")
_KIND_OF = dict.fromkeys(IMAGES.split(), "images") | dict.fromkeys(MASKS.split(), "masks")
_any = lambda names: "|".join(sorted(map(re.escape, names), key=len, reverse=True))  # noqa: E731
_ROLE = re.compile(
    rf"(?P<before>{_any(_SPLIT_OF)})?[-_. ]*(?P<kind>{_any([*_KIND_OF, 'ground_truth', 'ground-truth'])})?[-_. ]*"
    rf"(?P<after>{_any(_SPLIT_OF)})?(?P<year>20\d\d)?",
    re.IGNORECASE,
)
LEAST_SHARE = 0.4
"""Of the files of a folder with images and masks side by side, masks of a common name at least."""
MOST_PLACES = 30
"""Folders that are compared, the largest ones."""
PLACES_OF_THEIR_OWN = 10
"""Folders of images from which on every image seems to have its own."""


@dataclass(frozen=True)
class Place:
    """A folder whose name says what it holds."""

    template: str
    """Its path below the root, with {split} in place of the split; "." is the root."""
    kind: str | None
    """`images`, `masks` or None."""
    split: str | None
    """`train`, `val`, `test` or `unlabelled`, or None."""
    name: str | None
    """The split as it is written in the path."""


@dataclass
class Layout:
    """What was found below a folder."""

    data: dict[str, object]
    """Values of `DataSettings`; `val` only where there is a folder of val images and masks."""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What hinders training, each with its remedy."""


def place_of(parts: Sequence[str]) -> Place:
    """The `Place` of a folder, given the parts of its path below the root."""
    kind = split = name = None
    shown, end = list(parts), 0
    for i, part in enumerate(parts):
        found = _ROLE.fullmatch(part)
        if not part or found is None or not (found["before"] or found["kind"] or found["after"]):
            continue
        its_kind = found["kind"] and _KIND_OF.get(re.sub("[-_. ]", "", found["kind"].lower()), "masks")
        which = "before" if found["before"] else "after" if found["after"] else None
        if which and split is None:
            split, name = _SPLIT_OF[found[which].lower()], found[which]
            shown[i] = part[: found.start(which)] + "{split}" + part[found.end(which) :]
            end = i + 1
        if its_kind and its_kind != kind:
            kind, end = its_kind, i + 1
    return Place("/".join(shown[:end]) or ".", kind, split, name)


def benchmark_of(root: Path) -> tuple[str, Path] | None:
    """The `data.format` of a benchmark whose folders lie in `root`, or in the only folder that it holds, and where."""
    signs = {
        "voc": ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"),
        "cityscapes": ("leftImg8bit", "gtFine"),
        "coco": ("train2017", "val2017", "masks"),
        "ade20k": ("images/training", "images/validation", "annotations/training"),
    }
    for folder in (root, *(path for path in sorted(root.glob("*")) + sorted(root.glob("*/*")) if path.is_dir())):
        for name, needed in signs.items():
            if all((folder / place).is_dir() for place in needed):
                return name, folder
    return None


def find_layout(root: Path) -> Layout:
    """The layout of a folder.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give the folder of the images and masks, or a config file")
    known = benchmark_of(root)
    root = root if known is not None else _down(root)
    if known is not None:
        return Layout({"format": known[0], "root": known[1]}, [f"the layout is that of {known[0]} (data.format {known[0]})"])
    groups = _group(root)
    files = sum(len(paths) for splits in groups.values() for paths in splits.values())
    if not files:
        found = Counter(path.suffix.lower() or path.name for path in walk(root))
        said = ", ".join(f"{count} {suffix}" for suffix, count in found.most_common(5))
        said = f"but files such as {said}" if said else "it is empty"
        raise UserError(f"{root} holds no image ({', '.join(IMAGE_SUFFIXES)}): {said}; give the folder of the images")
    return _choose(root, groups)


def _down(root):
    """The folder below which the data begin: `root`, unless it holds nothing but one folder, whose name says nothing."""
    inside = [path for path in root.iterdir() if not path.name.startswith(".")]
    if len(inside) == 1 and inside[0].is_dir() and place_of((inside[0].name,)).template == ".":
        return _down(inside[0])
    return root


def _group(root):
    """{(template, kind): {(split, its name): [path below the template]}}."""
    groups = defaultdict(lambda: defaultdict(list))
    for path in walk(root):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        parts = path.relative_to(root).parts[:-1]
        place = place_of(parts)
        depth = 0 if place.template == "." else place.template.count("/") + 1
        key = (place.split, place.name)
        groups[place.template, place.kind][key].append(PurePosixPath(*path.relative_to(root).parts[depth:]))
    return groups


def _choose(root, groups):
    """The folders of images and masks that join most images with a mask."""
    best = (0, 0, None)
    size = lambda key: sum(map(len, groups[key].values()))  # noqa: E731
    largest = sorted(groups, key=size, reverse=True)[:MOST_PLACES]
    for images in largest:
        for masks in largest:
            apart = images != masks and (masks[1] == "images" or ("{split}" in masks[0] and "{split}" not in images[0]))
            if images[1] == "masks" or apart:
                continue
            found = _beside(groups[images]) if images == masks else _join(groups[images], groups[masks])
            if found is None:
                continue
            template, count = found
            rank = (count, (images[1] == "images") + (masks[1] == "masks"))
            if rank > best[:2]:
                best = (*rank, (images, masks, template))
    if best[2] is None:
        return _without_masks(root, groups)
    images, masks, template = best[2]
    own = [key for key in groups if key[1] == "images"]
    if len(own) > PLACES_OF_THEIR_OWN and best[0] < sum(map(size, own)) / 2:
        return _without_masks(root, {key: groups[key] for key in own})
    data = {"format": "folder", "root": root, "image_folder": images[0], "mask_folder": masks[0], "masks": template}
    layout = Layout(data)
    _name_splits(layout, groups[images], groups[masks], images == masks)
    # The trainer finds ROOT/images where there is no train/; its own defaults need not be written.
    if data["image_folder"] == "images" and data["mask_folder"] == "masks":
        del data["image_folder"], data["mask_folder"]
    defaults = DataSettings.model_fields
    layout.data = {k: v for k, v in data.items() if k in ("format", "root", "val") or v != defaults[k].default}
    return layout


def _join(images, masks):
    """The most frequent name of a mask, and how many images have one; None if none has."""
    names, joined = Counter(), 0
    for split, paths in images.items():
        others = masks.get(split) or ([] if split[0] else masks.get((None, None), []))
        keys = [path.with_suffix("").as_posix() for path in paths]
        template = common_name(keys, [Path(path) for path in others if path.suffix.lower() in _MASKS]) if others else None
        if template is not None:
            count = min(len(keys), len(others))
            names[template] += count
            joined += count
    if not names:
        return None
    whole = {template for template in names if names[template]}
    stems = {_stem(template) for template in whole}
    if len(stems) == 1 and len(whole) > 1:  # they differ in their suffix only
        return stems.pop(), joined
    (template, count), *_ = names.most_common()
    return _plain(template), count


_MASKS = (*MASK_SUFFIXES, *LOSSY_MASK_SUFFIXES)


def _stem(template):
    path = PurePosixPath(template)
    return path.stem if path.suffix.lower() in _MASKS else template


def _plain(template):
    """A mask that has the name of its image needs no suffix; lower case, as suffixes are compared so."""
    stem = _stem(template)
    return stem if stem == "{stem}" else stem + template[len(stem) :].lower()


def _beside(splits):
    """As `_join`, of images and masks in one folder: a.jpg and a.png, or a.png and a_mask.png."""
    names, total = Counter(), 0
    for paths in splits.values():
        total += len(paths)
        by_key = defaultdict(set)
        for path in paths:
            by_key[path.with_suffix("").as_posix()].add(path.suffix.lower())
        for suffixes in by_key.values():
            mask = sorted(suffixes & set(MASK_SUFFIXES))
            if len(suffixes) == 2 and mask:
                lossless = next((s for s in (".png", *mask) if s in mask), None)
                names[f"{{stem}}{lossless}"] += 1
        for path in paths:
            found = path.suffix.lower() in _MASKS and _longer(path, by_key)
            if found:
                names[found + path.suffix.lower()] += 1
    (template, count), *_ = names.most_common(1) or [(None, 0)]
    return None if template is None or count < LEAST_SHARE * total / 2 or count < 1 else (template, count)


def _longer(path, keys):
    """{stem} with what a name has beyond that of another file in its folder; a letter at least, as in `a` and `a_mask`."""
    for length in range(len(path.stem) - 1, 0, -1):
        for start in (0, len(path.stem) - length):
            stem = path.stem[start : start + length]
            rest = path.stem[:start] + path.stem[start + length :]
            if re.search("[A-Za-z]", rest) and (path.parent / stem).as_posix() in keys:
                return f"{path.stem[:start]}{{stem}}{path.stem[start + length :]}"
    return None


def _name_splits(layout, images, masks, together):
    """The names of train, val and test; and what is said of splits without masks."""
    data = layout.data
    with_masks = lambda key: together or bool(masks.get(key))  # noqa: E731
    for split in ("train", "val", "test"):
        names = sorted(((len(paths), key) for key, paths in images.items() if key[0] == split), key=lambda n: -n[0])
        if not names:
            continue
        for count, key in names[1:]:
            layout.notes.append(f"{count} images of {key[1]} are not used: {names[0][1][1]} is taken for {split}")
        count, key = names[0]
        if split == "train" or with_masks(key):
            data[split] = key[1]
            continue
        where = data["image_folder"].replace("{split}", key[1])
        layout.notes.append(
            f"{count} images of {where} have no masks, so that it is no {split} set; to train on them as unlabelled images, "
            f"put them, or a link to the folder, into {data['root']}/unlabeled"
        )
        if split == "test":
            data["test"] = None
    if not any(key[0] in ("train", "val", "test") for key in images) and "{split}" in data["image_folder"]:
        data["image_folder"] = data["image_folder"].replace("{split}", next(key[1] for key in images))


def _without_masks(root, groups):
    images = {key: splits for key, splits in groups.items() if key[1] != "masks"}
    masks = {key: splits for key, splits in groups.items() if key[1] == "masks"}
    count = lambda some: sum(len(paths) for splits in some.values() for paths in splits.values())  # noqa: E731
    layout = Layout({"format": "folder", "root": root})
    first = lambda some: next(f"{t}/{p}" for (t, _), splits in some.items() for s in splits.values() for p in s)  # noqa: E731
    if len(images) > PLACES_OF_THEIR_OWN:
        layout.problems.append(
            f"{len(images)} folders hold images, such as {next(iter(images))[0]}: put all images into one folder, their "
            "masks with the same names into another"
        )
    elif images and masks:
        few = f"no mask has the name of its image: {first(images)} and {first(masks)}, for example"
        layout.problems.append(
            f"{count(images)} images and {count(masks)} masks, but {few}; give a mask the name of its image, or that name "
            "with the same letters before or after it"
        )
    elif images:
        layout.problems.append(
            f"{count(images)} images, but no mask ({', '.join(MASK_SUFFIXES)}): put masks with the names of the images into "
            f"{root}/masks, or convert polygons with --convert OUT"
        )
    else:
        layout.problems.append(f"{count(masks)} masks, but no image beside them: put the images into {root}/images")
    return layout


def splits_in(words: Iterable[str]) -> str | None:
    """The split that the first of some names, such as those of folders, gives: `train`, `val` or `test`."""
    for word in words:
        for part in re.split("[^a-z]+", word.lower()):
            if _SPLIT_OF.get(part) in SPLITS:
                return _SPLIT_OF[part]
    return None
