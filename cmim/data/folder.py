"""`folder`: ROOT/{train,val,test}/{images,masks}/NAME.*, optionally ROOT/unlabeled/NAME.* and ROOT/classes.txt. Where there
is no train/, ROOT/{images,masks} are the training images. `data.image_folder` and `data.mask_folder` name other folders.

A mask has the name of its image with another suffix, or the one that `data.masks` makes of it, in the same folder below
masks/ as the image below images/. In train/ an image without a mask is unlabelled. What lies there and is not used is
counted, and the user told.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from cmim.data.colours import class_colours
from cmim.data.files import IMAGE_SUFFIXES, LOSSY_MASK_SUFFIXES, MASK_SUFFIXES
from cmim.data.labels import Encoding, class_names, colour_map, encoding_of
from cmim.data.lists import Listing
from cmim.data.survey import masks_in_colours
from cmim.errors import UserError
from cmim.settings import DataSettings

UNLABELLED = ("unlabeled", "unlabelled")
LEFT_BEHIND = ("Thumbs.db", "desktop.ini")
FEW = 5
"""Folders that are not used are named up to here."""
MANY = 1000
"""Images of a folder that is not used are counted up to here, and masks looked at for a name in common."""


class Folder:
    """A `Source`. The unlabelled images are the rest of train/ and those of unlabeled/ or unlabelled/ (small or capital
    letters, each with or without images/ inside); its held-out images lie in the folder of that name."""

    layout = "data.split names paths under data.root"
    mask_remedy = "add it, or take its line away"
    held_out_remedy = (
        "a folder of data.root holds images/ and masks/, a text file lines `IMAGE MASK`, two paths under data.root"
    )
    known = None
    more_unlabelled = "more images go into unlabeled/"
    split_example = "data.split is a folder of labeled.txt and unlabeled.txt, lines `IMAGE MASK`, two paths under data.root"

    def __init__(self, settings: DataSettings):
        self.root = settings.root
        if not self.root.is_dir():
            raise UserError(f"data.root: there is no folder {self.root}")
        self.notes: list[str] = []
        self._places = settings.image_folder, settings.mask_folder
        defaults = tuple(DataSettings.model_fields[key].default for key in ("image_folder", "mask_folder"))
        flat = self._places == defaults and not (self.root / settings.train).is_dir() and (self.root / "images").is_dir()
        self.train_places = (self.root / "images", self.root / "masks") if flat else self.places(settings.train)
        self._splits = "{split}" in settings.image_folder
        self._asked = settings.val, settings.test
        # Who leaves out val/ or test/ knows it.
        held_out = [name for name in (settings.val, settings.test, "val", "test") if isinstance(name, str)]
        self._used = {*self.train_places, *(place for name in held_out if self._splits for place in self.places(name))}
        self._mask_name, self._mask_suffixes = mask_names(settings)
        self.class_names = self._name_classes(settings)
        colours = class_colours(settings, self.class_names)
        self.colours = colour_map(len(self.class_names)) if colours is None else colours.shown()
        self._encoding = encoding_of(settings, colours, len(self.class_names))

    def _name_classes(self, settings):
        """Whose masks are in colours has to give these first; the names of the classes come with them."""
        try:
            return class_names(settings, self.root)
        except UserError:
            masks = self.train_places[1]
            unknown = settings.classes is None and settings.colours is None and not (self.root / "classes.txt").is_file()
            suffixes = (*MASK_SUFFIXES, *LOSSY_MASK_SUFFIXES)
            found = [path for path in walk(masks) if _suffix(path) in suffixes] if unknown and masks.is_dir() else []
            error = masks_in_colours(found)
            if error is not None:
                raise error from None
            raise

    def places(self, split: str) -> tuple[Path, Path]:
        """The folders of the images and of the masks of a split."""
        images, masks = (self.root / place.replace("{split}", split) for place in self._places)
        return images, masks

    def training(self) -> list[tuple[Path, Path | None]]:
        return self.pairs(*self.train_places)

    def unlabelled(self) -> list[Path]:
        found, folders = [], {path for path in self.root.iterdir() if path.name.lower() in UNLABELLED and path.is_dir()}
        folders |= {place for name in UNLABELLED if self._splits and (place := self.places(name)[0]).is_dir()}
        for folder in sorted(f for f in folders if not folders & set(f.parents)):
            inner = folder / "images"
            images, others = _files(inner if inner.is_dir() else folder, IMAGE_SUFFIXES, without=("masks",))
            if inner.is_dir():
                beside = [path for path in walk(folder, without=("images", "masks")) if _suffix(path) in IMAGE_SUFFIXES]
                self._note(beside, f"images of {folder}, beside images/, are not used")
            self._note(others, f"files of {folder} are not used: no images that can be read")
            if not images:
                self.notes.append(f"{folder} holds no image; expected {', '.join(IMAGE_SUFFIXES)}")
            found += images.values()
        others = {f: sum(1 for _ in islice(_images_of(f), MANY)) for f in self._others(self.root, {*self._used, *folders})}
        others = {folder: images for folder, images in others.items() if images}
        for folder, images in islice(others.items(), FEW):
            self.notes.append(f"{images}{' or more' * (images == MANY)} images of {folder} are not used")
        if len(others) > FEW:
            self.notes.append(f"nor are those of {len(others) - FEW} more folders of {self.root}")
        return found

    def _others(self, folder, used):
        """Folders below `folder` that are neither used nor hold folders that are."""
        if folder in used:
            return
        for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            if any(place.is_relative_to(inner) for place in used):
                yield from self._others(inner, used)
            else:
                yield inner

    def held_out(self, name: str) -> list[tuple[Path, Path]] | None:
        images, masks = self.places(name)
        # Of one folder of two that are missing, `pairs` says which; without {split} a folder holds training images alone.
        if not self._splits or (not (self.root / name).is_dir() and not images.is_dir()):
            return None
        pairs = self.pairs(images, masks)
        if name not in self._asked and not any(mask for _, mask in pairs):
            return None  # images alone, where val is drawn
        for image, mask in pairs:
            if mask is None:
                name = self._mask_name.replace("{stem}", image.stem) + self._mask_suffixes[0]
                raise UserError(f"{image} has no mask: put {name} into {masks}, or take the image away")
        return pairs

    def find_mask(self, mask: Path, listing: Listing) -> Path:
        return mask

    def encoding(self, mask: Path) -> Encoding:
        return self._encoding

    def inspect_masks(self, masks: dict[str, list[Path]]) -> list[str]:
        """What was found and is not used."""
        return self.notes

    def pairs(self, folder: Path, mask_folder: Path) -> list[tuple[Path, Path | None]]:
        """The images of a folder, sorted by name, and the mask of each (None without one)."""
        beside = folder.parent == mask_folder.parent and folder != mask_folder
        if beside and not folder.parent.is_dir():
            raise UserError(f"there is no folder {folder.parent}; it holds {folder.name}/ and {mask_folder.name}/")
        if not folder.is_dir():
            masks = f"{mask_folder.name}/" if beside else str(mask_folder)
            name = folder.parent.name if beside else folder.name
            raise UserError(f"there is no folder {folder}: put the images of {name} there, their masks in {masks}")
        together = self._named_as_mask if folder == mask_folder else None
        inside = mask_folder.relative_to(folder).parts[:1] if mask_folder.is_relative_to(folder) else ()
        if folder == self.root:
            inside = (*inside, *(path.name for path in folder.iterdir() if path.name.lower() in UNLABELLED))
        images, others = _files(folder, IMAGE_SUFFIXES, without=inside, leave=together)
        if not images:
            raise UserError(f"{folder} holds no image; expected {', '.join(IMAGE_SUFFIXES)}")
        if folder != self.root:  # beside images there, classes.txt and the like may lie
            self._note(others, f"files of {folder} are not used: no images that can be read")
        inside = folder.relative_to(mask_folder).parts[:1] if folder.is_relative_to(mask_folder) else ()
        leave = (lambda path: not self._named_as_mask(path)) if together else None
        masks, others = _files(mask_folder, self._mask_suffixes, inside, leave) if mask_folder.is_dir() else ({}, [])
        if mask_folder != folder:
            self._note(others, f"files of {mask_folder} are not used: masks are {', '.join(self._mask_suffixes)}")
        names = {key: self._mask_of(key) for key in images}
        expected = set(names.values())
        alone = [path for key, path in masks.items() if key not in expected]
        if len(alone) == len(masks):
            self._refuse_other_names(mask_folder, images, masks, others)
        self._note(alone, f"masks of {mask_folder} are not used: no image has their name")
        pairs = [(path, masks.get(names[key])) for key, path in images.items()]
        without = [image for image, mask in pairs if mask is None]
        if folder == self.train_places[0] and len(without) < len(pairs):
            self._note(without, f"of {len(pairs)} images of {folder} have no mask and are unlabelled")
        return pairs

    def _named_as_mask(self, path):
        """Whether a file of a folder of images and masks is a mask by its name."""
        before, after = self._mask_name.split("{stem}")
        fits = path.stem.startswith(before) and path.stem.endswith(after) and len(path.stem) > len(before + after)
        return fits and _suffix(path) in self._mask_suffixes

    def _mask_of(self, key):
        """The path below masks/, without suffix, of the mask of the image `key`."""
        place, _, stem = key.rpartition("/")
        return f"{place}/{self._mask_name}".lstrip("/").replace("{stem}", stem)

    def _refuse_other_names(self, folder, images, masks, others):
        """Where no mask has the name that it should have, say which one most have, if there is one."""
        lossless = [path for path in others if _suffix(path) in MASK_SUFFIXES]
        template = common_name(images, [path.relative_to(folder) for path in [*masks.values(), *lossless]])
        if template is not None:
            shown = f"{self._mask_name}{'' if len(self._mask_suffixes) > 1 else self._mask_suffixes[0]}"
            raise UserError(
                f"no mask of {folder} has the name {shown} of its image, but most have another one: give --data.masks "
                f"'{template}'"
            )
        lossy = [path for path in others if _suffix(path) in LOSSY_MASK_SUFFIXES]
        if lossy and not masks:
            raise masks_in_colours(lossy) or UserError(
                f"{lossy[0]} is a JPEG, which changes class ids: save it as an indexed or grey PNG"
            )

    def _note(self, paths: Sequence[Path], what: str) -> None:
        if paths:
            self.notes.append(f"{len(paths)} {what} (such as {paths[0].name})")


def mask_names(settings: DataSettings) -> tuple[str, tuple[str, ...]]:
    """`data.masks` without its suffix, and the suffixes that a mask may have."""
    suffixes = MASK_SUFFIXES + (LOSSY_MASK_SUFFIXES if settings.colours else ())
    name, given = os.path.splitext(settings.masks)
    if given.lower() in suffixes:
        return name, (given.lower(),)
    if given.lower() in IMAGE_SUFFIXES:
        jpeg = "; JPEG needs data.colours" if given.lower() in LOSSY_MASK_SUFFIXES else ""
        raise UserError(f"data.masks: {given} is no suffix of masks, which are {', '.join(suffixes)}{jpeg}")
    return settings.masks, suffixes


def common_name(images: Iterable[str], masks: Sequence[Path]) -> str | None:
    """The value of `data.masks` that most of the masks follow.

    Args:
        images: their paths without suffix, below images/.
        masks: paths below masks/.
    """
    images, uses, suffixes = set(images), Counter(), {}
    for path in masks[:MANY]:
        place, name = path.parent, path.stem
        parts = ((i, j) for length in range(len(name), 0, -1) for i in range(len(name) - length + 1) for j in [i + length])
        found = next(((i, j) for i, j in parts if (place / name[i:j]).as_posix() in images), None)
        if found is not None:
            template = f"{name[: found[0]]}{{stem}}{name[found[1] :]}"
            uses[template] += 1
            suffixes.setdefault(template, set()).add(path.suffix)
    (template, count), *_ = uses.most_common(1) or [(None, 0)]
    if 2 * count <= len(masks[:MANY]):
        return None
    return template + suffixes[template].pop() if len(suffixes[template]) == 1 else template


def _files(folder, suffixes, without=(), leave=None):
    """Paths of a folder, at any depth, by their path in it without suffix, sorted; and those of other suffixes. Hidden files
    and what an operating system leaves behind count for nothing, nor do folders `without` at its top and files that the
    function `leave` names."""
    files, others = {}, []
    for path in walk(folder, without=without):
        if leave is not None and leave(path):
            continue
        if _suffix(path) not in suffixes:
            others.append(path)
            continue
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key in files:
            raise UserError(
                f"{path.parent} holds {files[key].name} and {path.name}: rename one, files are known by their stem"
            )
        files[key] = path
    return files, others


def _images_of(folder):
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names if _suffix(Path(name)) in IMAGE_SUFFIXES)


def walk(folder: Path, without: Sequence[str | None] = ()) -> Iterator[Path]:
    """The files below a folder, sorted by path, through links to folders too; folders `without` at its top are left out."""
    seen, found = set(), []
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [n for n in folders if not n.startswith(".") and (place != str(folder) or n not in without)]
        found += [Path(place, n) for n in names if not n.startswith(".") and n not in LEFT_BEHIND]
    yield from sorted(found)


def _raise(error):
    raise error


def _suffix(path):
    return path.suffix.lower()
