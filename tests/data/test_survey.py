"""The pass over every file before the first step: what it refuses, what it warns of, and that it opens a file once."""

import json
import os

import numpy as np
import pytest
from PIL import Image, ImageOps

from cmim.data import load_splits
from cmim.data import survey as survey_module
from cmim.data.survey import FORM, Cache, count, decide_exif, survey
from cmim.errors import UserError
from cmim.settings import DataSettings


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CMIM_CACHE", str(tmp_path / "cache"))


def write(root, train, val=None, names=("ground", "object")):
    """A data folder whose masks are flat lists of values, one row each."""
    (root / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(names))
    for split, masks in (("train", train), ("val", val if val is not None else train)):
        for i, values in enumerate(masks):
            mask = np.array([values, values], np.uint8)
            pixels = np.full((*mask.shape, 3), 10 * i + 100 * (split == "val"), np.uint8)
            for kind, array in (("masks", mask), ("images", pixels)):
                path = root / split / kind / f"{split}{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root


def lines(root, **settings):
    settings = DataSettings(format="folder", root=root, labelled=1.0, **settings)
    return survey(load_splits(settings), settings)


def refused(root, **settings):
    with pytest.raises(UserError) as caught:
        lines(root, **settings)
    return str(caught.value)


@pytest.mark.parametrize("masks", [[[0, 0, 255]], [[255, 255, 255]], [[0, 0, 0], [0, 255, 255]]])
def test_masks_whose_object_is_255_are_refused(masks, tmp_path):
    root = write(tmp_path / "data", masks)
    said = refused(root)
    assert "no pixel of class 1 (object)" in said and "--data.label_map '{255: 1}'" in said
    if any(0 in mask for mask in masks):
        assert lines(root, label_map={255: 1}) == []
        assert lines(root, label_map={255: 255})[0].startswith("1 of 2 classes have no labelled pixel")


def test_palettes_that_contradict_each_other_are_reported(tmp_path):
    root = write(tmp_path / "data", [[0, 0, 1], [0, 1, 1]])
    for path in root.glob("*/masks/*.png"):
        mask = Image.open(path)
        mask.putpalette([0, 0, 0, 255, 0, 0, *(9, 9, 9)])
        mask.save(path)
    assert lines(root) == []
    mask.putpalette([255, 0, 0, 0, 0, 0])
    mask.save(path)
    (said,) = lines(root)
    assert "the palettes differ between masks: index 0 is #000000 or #ff0000" in said
    assert lines(root, colours={"ground": "#000000", "object": "#ff0000"}) == []


def test_masks_without_any_class_are_refused(tmp_path):
    said = refused(write(tmp_path / "data", [[255, 255]], [[0, 1, 2]], "abc"))
    assert said.startswith("not one pixel of the labelled masks has a class: they hold 255 only")
    said = refused(write(tmp_path / "val", [[0, 1, 2]], [[255, 255]], "abc"))
    assert said.startswith("not one pixel of the val masks has a class: they hold 255 only; ")


def test_absent_classes_are_named(tmp_path):
    root = write(tmp_path / "data", [[0, 0, 2]], [[0, 1, 255]], ("sky", "road", "tree", "car"))
    labelled, val = lines(root)
    assert labelled.startswith("2 of 4 classes have no labelled pixel, so that nothing teaches them: road, car; ")
    assert val == "2 of 4 classes have no pixel in val: tree, car"
    assert lines(write(tmp_path / "one", [[0, 0]], [[0, 1]]))[0].endswith(
        "object; raise data.labelled, or change data.classes and data.label_map"
    )
    many = [f"class {k}" for k in range(40)]
    assert " and 27 more" in lines(write(tmp_path / "many", [[0, 0]], [list(range(40))], many))[0]
    assert lines(write(tmp_path / "all", [[0, 1, 255]])) == []


def test_counts_are_those_of_the_masks(tmp_path):
    root = write(tmp_path / "data", [[0, 0, 2, 255], [2, 2, 2, 1]], names="abc")
    image_set = load_splits(DataSettings(format="folder", root=root, labelled=1.0)).labelled
    for _ in range(2):  # the second time from the cache
        counts = count(image_set, 3)
        assert counts.classes.tolist() == [4, 2, 8] and counts.ignored == 2 and counts.values == {0, 1, 2, 255}


def test_a_file_is_opened_again_only_if_it_changed(tmp_path, monkeypatch):
    root, opened = write(tmp_path / "data", [[0, 1]] * 3), []
    count_values = survey_module.count_values
    monkeypatch.setattr(survey_module, "count_values", lambda values: opened.append(1) or count_values(values))
    assert lines(root) == lines(root) == [] and len(opened) == 6
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(root / "val/masks/val1.png")
    lines(root)
    assert len(opened) == 7
    (root / "train/images/train2.png").write_bytes(b"no image any more")
    assert refused(root).startswith(f"cannot read {root / 'train/images/train2.png'}")
    for path in (tmp_path / "cache").iterdir():  # a cache that somebody else wrote, and one that cannot be written
        path.write_text(json.dumps({"form": FORM, "files": {key: "x" for key in json.loads(path.read_text())["files"]}}))
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(root / "train/images/train2.png")
    assert lines(root) == []
    monkeypatch.setenv("CMIM_CACHE", os.devnull)
    assert lines(root) == [] and Cache(load_splits(DataSettings(root=root)).val).kept == {}


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_file_is_opened_before_the_first_step(split, tmp_path):
    root = write(tmp_path / "data", [[0, 1]] * 2)
    whole = (root / f"{split}/images/{split}1.png").read_bytes()
    (root / f"{split}/images/{split}1.png").write_bytes(whole[:48])
    assert refused(root).startswith(f"cannot read {root / split}")
    (root / f"{split}/images/{split}1.png").write_bytes(whole)
    Image.fromarray(np.full((2, 2), 7, np.uint8)).save(root / f"{split}/masks/{split}1.png")
    assert "holds the value 7, which is no class" in refused(root)


def test_drawn_images_need_no_pass():
    settings = DataSettings(format="shapes")
    assert survey(load_splits(settings), settings) == []


def write_turned(root, orientations, drawn_on_turned, square=False):
    """Photographs with an EXIF orientation whose masks are drawn on the stored or on the turned pixels; a class is where the
    picture is bright."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    (root / "classes.txt").write_text("dark\nbright\n")
    for split, number in (("train", orientations), ("val", orientations[:1])):
        for i, orientation in enumerate(number):
            classes = rng.integers(0, 2, (6, 6 if square else 9), np.uint8)
            image = Image.fromarray(classes * np.uint8(200)).convert("RGB")
            exif = image.getexif()
            exif[0x0112] = orientation
            for kind in ("images", "masks"):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
            path = root / split / "images" / f"{split}{i}.{'webp' if i % 2 else 'png'}"
            image.save(path, exif=exif, **({"lossless": True} if i % 2 else {}))
            shown = ImageOps.exif_transpose(Image.open(path)) if drawn_on_turned else image
            Image.fromarray((np.asarray(shown)[..., 0] > 100).astype(np.uint8)).save(
                root / split / "masks" / f"{split}{i}.png"
            )
    return root


def load_exif(root, exif=None):
    return load_splits(DataSettings(format="folder", root=root, labelled=1.0, exif=exif))


@pytest.mark.parametrize("drawn_on_turned, decision", [(True, "apply"), (False, "ignore")])
@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_masks_lie_over_their_images_whatever_the_orientation(orientation, drawn_on_turned, decision, tmp_path):
    root = write_turned(tmp_path / "data", [6, orientation, 1], drawn_on_turned)
    exif, note = decide_exif(load_exif(root))
    assert exif == decision and f"data.exif {decision}" in note
    labelled = load_exif(root, exif).labelled
    for i in range(3):
        np.testing.assert_array_equal(labelled.image(i)[..., 0] > 100, labelled.label(i))
    other = load_exif(root, {"apply": "ignore", "ignore": "apply"}[exif])
    with pytest.raises(UserError, match=f"--data.exif {exif}"):
        other.labelled.label(0)


def test_orientations_that_sizes_cannot_tell_are_said(tmp_path):
    for name, numbers, square in (("upside down", [3, 1, 3], False), ("square", [6, 8, 1], True)):
        exif, note = decide_exif(load_exif(write_turned(tmp_path / name, numbers, True, square)))
        assert exif == "ignore" and note.startswith("3 labelled, val and test images have an EXIF orientation")
        assert "--data.exif apply if they were" in note
    upright = write_turned(tmp_path / "upright", [1, 1], True)
    assert decide_exif(load_exif(upright)) == ("ignore", None)
    assert decide_exif(load_splits(DataSettings(format="shapes"))) == (None, None)


def test_masks_of_both_kinds_are_refused(tmp_path):
    root, other = write_turned(tmp_path / "a", [6], True), write_turned(tmp_path / "b", [6], False)
    (root / "val").rename(root / "old")
    (other / "val").rename(root / "val")
    with pytest.raises(UserError, match="save the images anew without EXIF orientation"):
        decide_exif(load_exif(root))
