"""Benchmarks of a few images, written in their official layouts."""

import numpy as np
import pytest
from PIL import Image

from cmim.data import load_splits
from cmim.errors import UserError
from cmim.settings import Config

HEIGHT, WIDTH = 6, 8


def load(root, name, **data):
    return load_splits(Config(data={"format": name, "root": str(root), **data}).data)


def names(image_set):
    return [image_set.name(i) for i in range(len(image_set))]


def save_image(path, seed=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, path.name)) if seed is None else seed
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(path)


def save_mask(path, values, mode="L"):
    """A mask whose first pixels are `values`, the rest the last of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(HEIGHT * WIDTH, values[-1], np.uint8)
    pixels[: len(values)] = values
    image = Image.fromarray(pixels.reshape(HEIGHT, WIDTH))
    if mode == "P":
        image = Image.fromarray(pixels.reshape(HEIGHT, WIDTH), mode="P")
        image.putpalette([(41 * i + c * 91) % 256 for i in range(256) for c in range(3)])
    image.save(path)


def start(image_set, i, count):
    return image_set.label(i).ravel()[:count].tolist()


def write_voc(root):
    """Five official images, a of which only SBD's masks are known, two for validation."""
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n2007_2\n")
    (lists / "val.txt").write_text("2008_8\r\n2008_9")
    for name in ("2007_1", "2007_2", "2007_3", "2007_4", "2008_8", "2008_9"):
        save_image(root / f"JPEGImages/{name}.jpg")
        folder = "SegmentationClassAug" if name in ("2007_3", "2007_4") else "SegmentationClass"
        save_mask(root / f"{folder}/{name}.png", [0, 20, 255, int(name[-1])], "L" if folder.endswith("Aug") else "P")
    return root


def write_cityscapes(root):
    """Three training images in two cities, one for validation; label ids only."""
    for split, city, number in (("train", "ulm", 1), ("train", "ulm", 2), ("train", "bochum", 3), ("val", "munster", 4)):
        stem = f"{city}_000000_{number:06d}"
        save_image(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
        save_mask(root / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", range(34))
        for other in ("color.png", "instanceIds.png", "polygons.json"):
            (root / f"gtFine/{split}/{city}/{stem}_gtFine_{other}").touch()
    return root


def write_coco(root):
    for folder, numbers in (("train2017", (9, 25, 30)), ("val2017", (139,))):
        for number in numbers:
            save_image(root / f"{folder}/{number:012d}.jpg")
            save_mask(root / f"masks/{number:012d}.png", [0, 80, 255, 1])
    return root


def write_ade20k(root, train=(0, 1, 2, 150), val=(0, 1, 149), count=3):
    for half, name, values in (("training", "train", train), ("validation", "val", val)):
        for i in range(1, count + 1):
            save_image(root / f"images/{half}/ADE_{name}_{i:08d}.jpg")
            save_mask(root / f"annotations/{half}/ADE_{name}_{i:08d}.png", values)
    return root


WRITERS = {"voc": write_voc, "cityscapes": write_cityscapes, "coco": write_coco, "ade20k": write_ade20k}


def write_split(folder, labelled, unlabelled, **others):
    folder.mkdir(parents=True)
    for name, lines in {"labeled": labelled, "unlabeled": unlabelled, **others}.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return str(folder)


def voc_line(name, folder="SegmentationClass"):
    return f"JPEGImages/{name}.jpg {folder}/{name}.png"


def mistake(function, *arguments, **options):
    """The one line that a user gets."""
    with pytest.raises(UserError) as caught:
        splits = function(*arguments, **options)
        for image_set in (splits.labelled, splits.val):
            for i in range(len(image_set)):
                image_set.image(i), image_set.label(i)
    message = str(caught.value)
    own = message.replace(str(arguments[0]), "ROOT") if arguments else message  # the folder may have a name of any length
    assert "\n" not in message and len(own) < 400
    return message
