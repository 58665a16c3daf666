"""data.masks: which mask belongs to which image, and which value a message names."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmim.config import config_from, load_config
from cmim.data import load_splits
from cmim.data.folder import common_name
from cmim.errors import UserError
from tests.tiny_runs import write_folder


def load(folder, **data):
    return load_splits(config_from({"data": {"format": "folder", "root": str(folder)} | data}, "test").data)


def renamed(root, template, stem=lambda path: path.stem):
    """A data folder whose masks have other names."""
    write_folder(root)
    for path in sorted(root.glob("*/masks/*")):
        path.rename(path.with_name(template.replace("{stem}", stem(path))))
    return root


@pytest.mark.parametrize(
    "template, given",
    [
        ("{stem}_mask.png", "{stem}_mask.png"),
        ("{stem}_mask.png", "{stem}_mask"),
        ("{stem}_L.PNG", "{stem}_L.png"),
        ("gt-{stem}.v2.png", "gt-{stem}.v2"),
        ("{stem}.png", "{stem}.png"),
    ],
)
def test_the_mask_of_an_image(template, given, tmp_path):
    plain, other = write_folder(tmp_path / "plain"), renamed(tmp_path / "other", template)
    expected, found = load(plain), load(other, masks=given)
    for name in ("labelled", "val", "test"):
        a, b = getattr(expected, name), getattr(found, name)
        assert [a.name(i) for i in range(len(a))] == [b.name(i) for i in range(len(b))] and len(a) > 1
        for i in range(len(a)):
            np.testing.assert_array_equal(a.label(i), b.label(i))
    assert not [note for note in found.notes if "not used" in note]


def test_nested_folders_and_what_is_not_used(tmp_path):
    root = renamed(tmp_path / "data", "{stem}_mask.png")
    for i, place in enumerate(("day", "night")):  # the same name in two folders
        for kind, name in (("images", "a.png"), ("masks", "a_mask.png")):
            (root / "train" / kind / place).mkdir()
            shape = (40, 48, 3) if kind == "images" else (40, 48)
            Image.fromarray(np.full(shape, i, np.uint8)).save(root / "train" / kind / place / name)
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(root / "train/masks/train0.png")  # a mask of another name
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(root / "train/masks/train0_mask.tif")
    splits = load(root, masks="{stem}_mask.png")
    assert len(splits.labelled) == 6 and [splits.labelled.label(i).max() for i in (0, 1)] == [0, 1]
    assert splits.labelled.label(2).max() > 0
    notes = "\n".join(splits.notes)
    assert re.search("1 masks of .*train/masks are not used: no image has their name .such as train0.png", notes)
    assert re.search("1 files of .*train/masks are not used: masks are .png .such as train0_mask.tif", notes)
    with pytest.raises(UserError, match=r"holds train0_mask.png and train0_mask.tif: rename one"):
        load(root, masks="{stem}_mask")


@pytest.mark.parametrize("template", ["{stem}_mask.png", "{stem}_L.png", "mask-{stem}.png", "{stem}.class.png"])
def test_the_value_that_fits_is_named(template, tmp_path):
    root = renamed(tmp_path / "data", template)
    for path in sorted((root / "train/images").iterdir())[1:]:  # what is left over has masks, but few images
        path.rename(path.with_name(f"{path.stem}-other.png"))
    for path in sorted((root / "train/masks").iterdir())[1:]:
        path.unlink()
    (root / "val/masks" / template.replace("{stem}", "val0")).rename(root / "val/masks/val0.png")
    with pytest.raises(UserError, match=r"no mask of .*train/masks has the name {stem} of its image") as caught:
        load(root)
    (given,) = re.findall("--data.masks '(.*)'", str(caught.value))
    assert given == template
    with pytest.raises(UserError, match=f"val0.png has no mask: put {template.replace('{stem}', 'val0')} into"):
        load(root, masks=given)
    with pytest.raises(UserError, match=f"has the name {{stem}}_x.png of its image.*--data.masks '{template}'"):
        load(root, masks="{stem}_x.png")


def test_names_in_common():
    names = lambda *texts: [Path(text) for text in texts]  # noqa: E731
    assert common_name(["1", "11", "21"], names("1_m.png", "11_m.png", "21_m.tif")) == "{stem}_m"
    assert common_name(["a/x", "b/x"], names("a/x_L.png", "b/x_L.png")) == "{stem}_L.png"
    assert common_name(["a/x", "b/y"], names("a/y_L.png", "b/x_L.png")) is None
    assert common_name(["x", "y"], names("x_1.png", "y_2.png")) is None  # no name that most share
    assert common_name(["x"], []) is None


MISTAKES = {
    "no stem": ({"masks": "mask.png"}, r"data.masks is 'mask.png', expected a file name with \{stem\} once"),
    "twice": ({"masks": "{stem}_{stem}"}, r"with \{stem\} once"),
    "another field": ({"masks": "{stem}_{kind}.png"}, r"with \{stem\} once"),
    "a folder": ({"masks": "labels/{stem}.png"}, "expected a file name"),
    "no suffix of masks": ({"masks": "{stem}.webp"}, "data.masks: .webp is no suffix of masks, which are .png, "),
    "jpeg": ({"masks": "{stem}.jpg"}, "data.masks: .jpg is no suffix of masks, .*; JPEG needs data.colours"),
    "drawn": ({"format": "shapes", "root": None, "masks": "{stem}_m"}, "data.masks is given, but data.format shapes"),
    "benchmark": ({"format": "coco", "masks": "{stem}_m"}, "data.masks: coco has its own names"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, tmp_path):
    settings, message = MISTAKES[case]
    with pytest.raises(UserError, match=message):
        load(write_folder(tmp_path / "data"), **settings)


def test_masks_that_are_jpegs_are_named(tmp_path):
    root = write_folder(tmp_path / "data")
    for path in (root / "train/masks").iterdir():
        Image.open(path).save(path.with_suffix(".jpg")), path.unlink()
    with pytest.raises(UserError, match=r"train0.jpg is a JPEG, which changes class ids"):
        load(root)
    for path in (root / "train/masks").iterdir():
        Image.new("RGB", (48, 40), (200, 10, 10)).save(path)
    with pytest.raises(UserError, match=r"train0.jpg is a colour picture: .*--data.colours"):
        load(root)


def test_the_command_line_takes_it_as_it_stands(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {root: x}")
    assert load_config(tmp_path / "c.yaml", ["--data.masks", "{stem}_mask.png"]).data.masks == "{stem}_mask.png"
