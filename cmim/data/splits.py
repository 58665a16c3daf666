"""From a data set on disk to the splits of a run: which images are labelled, and that none of them is held out too."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from cmim.data.datasets import Splits
from cmim.data.file_set import FileSet
from cmim.data.labels import Encoding
from cmim.data.lists import (
    Listing,
    find_name,
    index_names,
    read_images,
    read_lines,
    read_pairs,
    require,
    short_names,
    with_masks,
)
from cmim.errors import UserError
from cmim.randomness import numpy_generator
from cmim.settings import DataSettings


class Source(Protocol):
    """A data set on disk. A pair is the path of an image and that of its mask, or None."""

    class_names: tuple[str, ...]
    colours: np.ndarray
    layout: str
    """Where its files belong."""
    mask_remedy: str
    """Where missing masks come from."""
    split_example: str
    """What `data.split` should be."""
    held_out_remedy: str
    """What `data.val` and `data.test` should be."""
    more_unlabelled: str | None
    """Where a user may put more unlabelled images; None for a data set that is complete."""
    known: Callable[[], list[tuple[Path, Path]]] | None
    """The pairs that a list may name by their ids; None where it has to give paths."""

    def training(self) -> list[tuple[Path, Path | None]]:
        """The images that `data.labelled` divides."""

    def unlabelled(self) -> list[Path]:
        """More images, always unlabelled."""

    def held_out(self, name: str) -> list[tuple[Path, Path]] | None:
        """Its own images of this name, such as "val"; None where it has none."""

    def find_mask(self, mask: Path, listing: Listing) -> Path:
        """The file to read for `mask`: itself or, where the `Listing` has only that, another one that stands for it."""

    def encoding(self, mask: Path) -> Encoding:
        """What the values of a mask stand for."""

    def inspect_masks(self, masks: dict[str, list[Path]]) -> list[str]:
        """Open or count the masks {split: paths} before `encoding` is asked for; notes for the user on them, and on files
        that were found and are not used."""


def load_files(settings: DataSettings, source: Source, listed: Path | None = None, listed_val: Path | None = None) -> Splits:
    """The splits of a source. Where no image is unlabelled, the labelled ones serve, without their masks.

    Of a continued run, `listed` is the file that names its labelled images, `listed_val` that of its val images where
    `data.val` is a share or a number.

    `data.labelled` divides the training images unless there is a `data.split`. For val (test likewise): `val` is val.txt of
    the split if there is one, else the source's own; another name is the source's own of that name, else a list file.
    """
    if settings.split is not None:
        labelled, unlabelled = _read_split(settings, source)
        training, drawn = labelled, False
    else:
        training = rest = source.training()
        drawn = not isinstance(settings.val, str)
        if drawn:
            _refuse_own_val(settings, source)
            val, rest = draw_val(training, settings, listed_val)
        if settings.labelled is None:
            settings = settings.model_copy(update={"labelled": 1.0 if source.more_unlabelled else 0.125})
        labelled, rest = divide(rest, settings) if listed is None else _divide_again(rest, settings, listed)
        unlabelled = rest + source.unlabelled()
    sets = {"labelled": labelled, "val": val if drawn else _held_out(settings, source, "val")}
    sets["test"] = _held_out(settings, source, "test")
    sets = {name: pairs for name, pairs in sets.items() if pairs is not None}
    images = {name: [image for image, _ in pairs] for name, pairs in sets.items()}
    images["unlabelled"] = unlabelled or images["labelled"]

    listing = Listing()
    require([image for paths in images.values() for image in paths], listing, "image", source.layout)
    masks = {}
    for name, pairs in sets.items():
        masks[name] = [source.find_mask(mask, listing) for _, mask in pairs]
        require(masks[name], listing, "mask", source.mask_remedy)
        if name != "labelled":
            refuse_shared_images(images["labelled"], images[name], name)
    notes = list(source.inspect_masks(masks))
    if not unlabelled and source.more_unlabelled:
        notes.append(
            "no unlabelled image was found: the labelled ones serve as unlabelled, without their masks, if the preset uses "
            "any; " + source.more_unlabelled
        )
    notes += _repeated(images)
    masks["unlabelled"] = [None] * len(images["unlabelled"])
    how = {"turn": settings.exif == "apply", "limits": settings.range}
    made = {name: FileSet(images[name], masks[name], source.encoding, settings.channels, **how) for name in images}
    known = [image for image, _ in training]
    by_path = dict(zip(known, short_names(known), strict=True))
    for name in ("labelled", "val") if drawn else ("labelled",):
        made[name].names = [by_path[image] for image in images[name]]
        _refuse_names(made[name].names, name)
    if drawn:
        count = sum(mask is not None for _, mask in training)
        notes.append(f"data.val {settings.val} takes {len(val)} of the {count} training images that have a mask")
    about = {"class_names": source.class_names, "colours": source.colours, "notes": tuple(dict.fromkeys(notes))}
    return Splits(**{"test": None} | made | about)


def _repeated(images):
    """Notes on unlabelled images that a list names twice, or that are held out too."""
    unlabelled = set(images["unlabelled"])
    more = len(images["unlabelled"]) - len(unlabelled)
    if more:
        yield f"the unlabelled images are {len(unlabelled)} files; {more} more lines name them again, and count"
    for name in ("val", "test"):
        shared = unlabelled & set(images.get(name, ()))
        if shared:
            yield f"{len(shared)} images of {name} are unlabelled images of training too, such as {min(shared)}"


def _refuse_names(names, split):
    """A list holds one name a line, without the spaces around it: that of a run must give the images again."""
    wrong = next((name for name in names if name != name.strip() or len(name.splitlines()) > 1), None)
    if wrong is not None:
        raise UserError(f"the {split} image {wrong!r} has a line break or a space at the end of its name: rename it")


def held_out_set(settings: DataSettings, source: Source, name: str, listed_val: Path | None = None) -> FileSet | None:
    """The images of a held-out split alone, as `load_files` makes them."""
    if name == "val" and not isinstance(settings.val, str):
        pairs, _ = draw_val(source.training(), settings, listed_val)
    else:
        pairs = _held_out(settings, source, name)
    if pairs is None:
        return None
    listing, images = Listing(), [image for image, _ in pairs]
    require(images, listing, "image", source.layout)
    masks = [source.find_mask(mask, listing) for _, mask in pairs]
    require(masks, listing, "mask", source.mask_remedy)
    source.inspect_masks({name: masks})
    how = {"turn": settings.exif == "apply", "limits": settings.range}
    return FileSet(images, masks, source.encoding, settings.channels, **how)


def _refuse_own_val(settings, source):
    folder = settings.root / str(settings.val)
    if folder.is_dir():
        raise UserError(
            f"data.val {settings.val} is a number, but {folder} is a folder: give --data.val \"'{settings.val}'\""
        )
    if settings.test != "val" and source.held_out("val") is not None:
        raise UserError(
            f"data.val is {settings.val}, but this data set has val images of its own: leave data.val away to take them, or "
            "report on them with --data.test val"
        )


def draw_val(
    pairs: list[tuple[Path, Path | None]], settings: DataSettings, listed: Path | None = None
) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path | None]]]:
    """The val pairs that `data.val`, a share or a number, takes of the training images, and the others; both in order.

    They are a plain random sample of the images that have a mask and that no file `data.labelled` names. It depends on
    `split_seed` and the number of these images only. `listed` is an earlier run's list of them.
    """
    if listed is not None:
        try:
            val = _named(listed, pairs, "data.val")
        except UserError as error:
            raise UserError(
                f"the val images are not those of {listed}: {error}; restore the data, or give another --output"
            ) from None
    else:
        taken = set(_named(settings.labelled, pairs)) if isinstance(settings.labelled, Path) else set()
        free = [i for i, (_, mask) in enumerate(pairs) if mask is not None and i not in taken]
        count = settings.val if isinstance(settings.val, int) else max(1, round(settings.val * len(free)))
        most = len(free) - (not taken)  # one image at least is labelled
        if count > most and (free or taken):
            what = "are not in data.labelled" if taken else "are there, and one must be labelled"
            raise UserError(f"data.val is {settings.val}, but {len(free)} training images with a mask {what}; lower it")
        order = numpy_generator(settings.split_seed, 0, "val images").permutation(len(free))
        val = sorted(free[i] for i in order[:count])
    chosen = set(val)
    return [pairs[i] for i in val], [pair for i, pair in enumerate(pairs) if i not in chosen]


def divide(
    pairs: list[tuple[Path, Path | None]], settings: DataSettings
) -> tuple[list[tuple[Path, Path | None]], list[Path]]:
    """The labelled pairs, and the images of all others, both in order.

    A share or a number of images is a plain random sample of the images that have a mask, not stratified by class. It
    depends on `split_seed` and the number of images only, and a smaller sample is part of a larger one.
    """
    candidates = [i for i, (_, mask) in enumerate(pairs) if mask is not None]
    if not candidates:
        folder = pairs[0][0].parent.parent / "masks"
        raise UserError(
            f"no labelled image found: {folder} holds no mask (.png, .bmp, .gif, .tif) with the name of an image"
        )
    if isinstance(settings.labelled, Path):
        labelled = _named(settings.labelled, pairs)
    else:
        count = settings.labelled
        if isinstance(count, float):
            count = max(1, round(count * len(candidates)))
        if count > len(candidates):
            raise UserError(f"data.labelled is {count}, but only {len(candidates)} training images have a mask; lower it")
        order = numpy_generator(settings.split_seed, 0, "labelled images").permutation(len(candidates))
        labelled = sorted(candidates[i] for i in order[:count])
    chosen = set(labelled)
    return [pairs[i] for i in labelled], [image for i, (image, _) in enumerate(pairs) if i not in chosen]


def _divide_again(pairs, settings, listed):
    try:
        return divide(pairs, settings.model_copy(update={"labelled": listed}))
    except UserError as error:
        raise UserError(
            f"the labelled images are not those of {listed}: {error}; restore the data, or give another --output"
        ) from None


def _named(path, pairs, key="data.labelled"):
    """Indices of the images that a text file names, one a line, with or without folder and suffix."""
    index, found = index_names([image for image, _ in pairs]), set()
    for line in read_lines(path, key, f"the {key.removeprefix('data.')} images, one name a line"):
        i = find_name(line, index, path)
        if pairs[i][1] is None:
            raise UserError(f"{path} names {line}, which has no mask; add the mask or take the line away")
        found.add(i)
    if not found:
        raise UserError(f"{path} names no image: write the {key.removeprefix('data.')} images there, one name a line")
    return sorted(found)


def _read_split(settings, source):
    folder = settings.split
    labelled = folder / "labeled.txt"
    if not labelled.is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/labeled.txt"))
        remedy = f"give one of its folders ({', '.join(inside)})" if inside else source.split_example
        raise UserError(f"data.split: there is no file {labelled}; {remedy}")
    unlabelled = read_images(folder / "unlabeled.txt", "data.split", settings.root)
    return with_masks(read_pairs(labelled, "data.split", settings.root), labelled), unlabelled


def _held_out(settings, source, key):
    name = getattr(settings, key)
    if name is None:
        return None
    for folder in (settings.split, settings.split.parent) if settings.split is not None else ():
        path = folder / f"{name}.txt"
        if name in ("val", "test") and path.is_file():
            return with_masks(read_pairs(path, "data.split", settings.root), path)
    pairs = source.held_out(name)
    if pairs is not None:
        return pairs
    if name == key == "test":
        return None
    path = Path(name)
    if path.is_file():
        return with_masks(read_pairs(path, f"data.{key}", settings.root, source.known), path)
    draw = ""
    if name == key == "val" and settings.split is None:
        draw = "give --data.val 0.1 to take a tenth of the training images, or make one: "
    raise UserError(f"data.{key}: there is no folder or text file {name}: {draw}{source.held_out_remedy}")


def refuse_shared_images(labelled: Sequence[Path], held_out: Sequence[Path], split: str) -> None:
    """Raise if a labelled image is also in a held-out split: the same file, or another one of the same bytes."""
    sizes = {}
    for path in held_out:
        sizes.setdefault(_bytes(path), []).append(path)
    digests = {}  # a file is read only if one of the same size is on the other side
    for path in labelled:
        same_size = sizes.get(_bytes(path), ())
        for other in same_size:
            if other not in digests:
                digests[other] = _digest(other)
        digest = _digest(path) if same_size else None
        for other in same_size:
            if digests[other] == digest:
                raise UserError(f"{path} is a labelled image and also in {split} ({other}): take it out of one of them")


def _bytes(path):
    try:
        return path.stat().st_size
    except OSError as error:
        what = "a link to a file that is not there" if path.is_symlink() else error.strerror
        raise UserError(f"cannot read {path}: {what}; replace it or take it away") from None


def _digest(path):
    try:
        return hashlib.blake2b(path.read_bytes()).digest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; replace it or take it away") from None
