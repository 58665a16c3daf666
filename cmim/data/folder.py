"""`folder`: ROOT/{train,val,test}/{images,masks}/NAME.*, optionally ROOT/unlabeled/NAME.* and ROOT/classes.txt.

A mask has the name of its image with another suffix. In train/ an image without a mask is unlabelled. Images are taken as
they are stored (an EXIF orientation is not applied), because masks are drawn over stored pixels.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from cmim.data.datasets import IGNORED, Splits
from cmim.data.splits import class_names, divide, refuse_shared_images
from cmim.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")
# What Pillow raises for files that are truncated, damaged, too large or no images at all.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def load_folder(settings):
    """The splits of `settings.root`. The unlabelled images are the rest of train/ and those of unlabeled/ (or unlabelled/,
    each with or without images/ inside); where there are none at all, the labelled images serve, without their masks."""
    root = settings.root
    if not root.is_dir():
        raise UserError(f"data.root: there is no folder {root}")
    names = class_names(settings, root)
    table = label_table(settings, len(names))

    images, masks = _pairs(root / "train")
    labelled, rest = divide(images, masks, settings)
    extra = [path for folder in ("unlabeled", "unlabelled") if (root / folder).is_dir() for path in _images(root / folder)]
    unlabelled = [images[i] for i in rest] + extra or images
    held_out = {"val": _held_out(root, settings.val, "data.val")}
    if settings.test is not None and (settings.test != "test" or (root / "test").is_dir()):
        held_out["test"] = _held_out(root, settings.test, "data.test")
    for split, (others, _) in held_out.items():
        refuse_shared_images([images[i] for i in labelled], others, split)

    make = lambda images, masks: FolderSet(images, masks, table)  # noqa: E731
    return Splits(
        labelled=make([images[i] for i in labelled], [masks[i] for i in labelled]),
        unlabelled=make(unlabelled, [None] * len(unlabelled)),
        val=make(*held_out["val"]),
        test=make(*held_out["test"]) if "test" in held_out else None,
        class_names=names,
        colours=colour_map(len(names)),
    )


class FolderSet:
    """Image files and their masks (None where there is none); an `ImageSet`. `table` comes from `label_table`."""

    def __init__(self, images, masks, table):
        self.images, self.masks, self.table = images, masks, table

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return self.images[i].stem

    def image(self, i):
        return open_image(self.images[i])

    def label(self, i):
        mask = self.masks[i]
        values = open_mask(mask)
        with _open(self.images[i]) as image:
            size = image.size
        if values.shape != size[::-1]:
            raise UserError(
                f"{mask} is {values.shape[1]} x {values.shape[0]} pixels, its image {self.images[i].name} is "
                f"{size[0]} x {size[1]}: export the mask at the size of the image"
            )
        inside = (values >= 0) & (values < len(self.table))
        ids = self.table[values if inside.all() else np.where(inside, values, -1)]
        if ids.min() < 0:
            wrong = int(values[ids < 0].min())
            raise UserError(
                f"{mask} holds the value {wrong}, which is no class: map it with data.label_map, leave it out with "
                "data.ignore, or name more classes in data.classes (or classes.txt)"
            )
        return ids.astype(np.uint8)

    def subset(self, indices):
        return FolderSet([self.images[i] for i in indices], [self.masks[i] for i in indices], self.table)


def open_image(path):
    """An image file as PIL RGB."""
    try:
        return _open(path).convert("RGB")
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def open_mask(path):
    """The stored numbers of a mask, (H, W) integers: palette indices, never the palette's colours."""
    mask = _open(path)
    try:
        mask.load()
        if mask.mode in ("RGB", "RGBA", "LA"):
            channels = np.asarray(mask)
            grey = channels[..., :1]
            if mask.mode != "LA" and (channels[..., :3] != grey).any():
                raise UserError(
                    f"{path} is a colour picture: a mask holds one number per pixel, the class; save it as an indexed or "
                    "grey PNG of class ids"
                )
            return grey[..., 0]
        if mask.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            raise UserError(f"{path} has pixels of type {mask.mode}: save it as an indexed or grey PNG of class ids")
        values = np.asarray(mask)
        return values.astype(np.uint8) if values.dtype == bool else values
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def label_table(settings, num_classes):
    """(65536 + 1,) int16: for each mask value its class id, IGNORED, or -1 where it is no class; the last entry is -1.

    `label_map` speaks first, then `ignore`, of the mapped value; IGNORED as a target always means no class.
    """
    targets = np.arange(1 << 16)
    for value, target in settings.label_map.items():
        if not 0 <= value < len(targets):
            raise UserError(f"data.label_map: {value} cannot be a mask value; it must lie from 0 to {len(targets) - 1}")
        if target not in (settings.ignore, IGNORED) and not 0 <= target < num_classes:
            raise UserError(
                f"data.label_map maps {value} to {target}, but the classes are 0 to {num_classes - 1}; "
                f"{IGNORED} stands for no class"
            )
        if target == settings.ignore < num_classes:
            raise UserError(
                f"data.label_map maps {value} to {target}, which data.ignore then leaves out; map values without a class to "
                f"{IGNORED} and leave data.ignore away"
            )
        targets[value] = target
    table = np.where(targets < num_classes, targets, -1)
    table[targets == settings.ignore] = IGNORED
    table[[value for value, target in settings.label_map.items() if target == IGNORED]] = IGNORED
    return np.append(table, -1).astype(np.int16)


def colour_map(count):
    """(count, 3) uint8, the colours of PASCAL VOC: the bits of a class id, three at a time, from the highest bit down."""
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((np.arange(count) >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def _held_out(root, name, key):
    folder = root / name
    if not folder.is_dir():
        raise UserError(f"{key}: there is no folder {folder}; it holds images/ and masks/")
    images, masks = _pairs(folder)
    for image, mask in zip(images, masks, strict=True):
        if mask is None:
            raise UserError(f"{image} has no mask: put {image.stem}.png into {folder / 'masks'}, or take the image away")
    return images, masks


def _pairs(folder):
    """The images of a split, sorted by name, and the mask of each (None without one)."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; it holds images/ and masks/")
    if not (folder / "images").is_dir():
        raise UserError(
            f"there is no folder {folder / 'images'}: put the images of {folder.name} there, their masks in masks/"
        )
    images = _files(folder / "images", IMAGE_SUFFIXES)
    masks = _files(folder / "masks", MASK_SUFFIXES) if (folder / "masks").is_dir() else {}
    if not images:
        raise UserError(f"{folder / 'images'} holds no image; expected {', '.join(IMAGE_SUFFIXES)}")
    return list(images.values()), [masks.get(stem) for stem in images]


def _images(folder):
    return _files(folder / "images" if (folder / "images").is_dir() else folder, IMAGE_SUFFIXES).values()


def _files(folder, suffixes):
    """Paths of a folder by stem, sorted; hidden files are left out."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in files:
            raise UserError(
                f"{folder} holds {files[path.stem].name} and {path.name}: rename one, files are known by their stem"
            )
        files[path.stem] = path
    return files


def _open(path):
    try:
        return Image.open(path)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def _unreadable(path, error):
    reason = getattr(error, "strerror", None) or ("no image, or damaged" if str(path) in str(error) else str(error))
    return UserError(f"cannot read {Path(path)}: {reason}; replace the file or take it away")
