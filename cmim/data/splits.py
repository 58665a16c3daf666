"""Which images of a folder are labelled, what the classes are called, and that no image is on both sides."""

import difflib
import hashlib
from pathlib import Path, PurePath

from cmim.errors import UserError
from cmim.randomness import numpy_generator


def class_names(settings, root):
    """The names from `data.classes`, or ROOT/classes.txt: one a line, blank lines skipped."""
    names, source = settings.classes, "data.classes"
    if isinstance(names, int):
        names = [f"class {k}" for k in range(names)]
    elif names is None:
        source = root / "classes.txt"
        if not source.is_file():
            raise UserError(
                f"the classes are unknown: write {source}, one name a line, or give their number as --data.classes"
            )
        try:
            names = [line for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError):
            raise UserError(f"cannot read {source}: save it as UTF-8 text, one class name a line") from None
    names = tuple(name.strip() for name in names)
    repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if repeated is not None or "" in names:
        what = "an empty name" if "" in names else f"the name {repeated!r} twice"
        raise UserError(f"{source} holds {what}: every class needs a name of its own")
    if not 2 <= len(names) <= 255:
        raise UserError(f"{source} gives {len(names)} classes; there must be 2 to 255, the background counts as one")
    return names


def divide(images, masks, settings):
    """Indices of the labelled images and of all others, both in order.

    A share or a number of images is a plain random sample of the images that have a mask, not stratified by class. It
    depends on `split_seed` and the number of images only, and a smaller sample is part of a larger one.
    """
    candidates = [i for i, mask in enumerate(masks) if mask is not None]
    if not candidates:
        folder = images[0].parent.parent / "masks"
        raise UserError(
            f"no labelled image found: {folder} holds no mask (.png, .bmp, .gif, .tif) with the name of an image"
        )
    if isinstance(settings.labelled, Path):
        labelled = _listed(settings.labelled, images, masks)
    else:
        count = settings.labelled
        if isinstance(count, float):
            count = max(1, round(count * len(candidates)))
        if count > len(candidates):
            raise UserError(f"data.labelled is {count}, but only {len(candidates)} images of train/ have a mask; lower it")
        order = numpy_generator(settings.split_seed, 0, "labelled images").permutation(len(candidates))
        labelled = sorted(candidates[i] for i in order[:count])
    chosen = set(labelled)
    return labelled, [i for i in range(len(images)) if i not in chosen]


def _listed(path, images, masks):
    """Indices of the images that a text file names, one a line, with or without folder and suffix."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"data.labelled: cannot read {path} ({reason}); it lists the labelled images, one name a line"
        ) from None
    index = {key: i for i, image in enumerate(images) for key in (image.name, image.stem)}
    found = set()
    for line in filter(None, lines):
        name = PurePath(line).name
        if name not in index:
            nearest = difflib.get_close_matches(name, index, 1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise UserError(f"{path} names {line}, which is not in {images[0].parent}{hint}")
        if masks[index[name]] is None:
            raise UserError(f"{path} names {line}, which has no mask; add the mask or take the line away")
        found.add(index[name])
    if not found:
        raise UserError(f"{path} names no image: write the labelled images there, one name a line")
    return sorted(found)


def refuse_shared_images(labelled, held_out, split):
    """Raise if a labelled image is also in a held-out split: the same file, or another one of the same bytes."""
    sizes = {}
    for path in held_out:
        sizes.setdefault(path.stat().st_size, []).append(path)
    digests = {}  # only files of a size that occurs on both sides are read
    for path in labelled:
        same_size = sizes.get(path.stat().st_size, ())
        for other in same_size:
            if other not in digests:
                digests[other] = _digest(other)
        digest = _digest(path) if same_size else None
        for other in same_size:
            if digests[other] == digest:
                raise UserError(f"{path} is a labelled image and also in {split} ({other}): take it out of one of them")


def _digest(path):
    return hashlib.blake2b(path.read_bytes()).digest()
