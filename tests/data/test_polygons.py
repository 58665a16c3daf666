"""Polygons of COCO, LabelMe and CVAT to masks, compared with squares that are filled by hand."""

import base64
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from cmim.data import load_splits
from cmim.data.polygons import convert
from cmim.errors import UserError
from cmim.settings import DataSettings

SIDE = 40


def silent(total):
    return lambda: None


def image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
    return path


def square(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def filled(*boxes, start=0):
    """Class ids in which each (value, left, top, right, bottom), edges included, is drawn over those before it."""
    ids = np.full((SIDE, SIDE), start, np.uint8)
    for value, left, top, right, bottom in boxes:
        ids[top : bottom + 1, left : right + 1] = value
    return ids


def mask(path):
    return np.array(Image.open(path))


def coco(folder, objects, count=3, categories=("roof", "car"), name="{}.png", file="_annotations.coco.json"):
    """A file of COCO; `objects` are (image, category, segmentation)."""
    images = [{"id": 7 + i, "file_name": name.format(i), "height": SIDE, "width": SIDE} for i in range(count)]
    found = [{"id": i, "image_id": 7 + k, "category_id": 3 + c, "segmentation": s} for i, (k, c, s) in enumerate(objects)]
    listed = [{"id": 3 + i, "name": name} for i, name in enumerate(categories)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps({"images": images, "annotations": found, "categories": listed}))


def test_coco_with_splits_and_small_objects_on_large_ones(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    for k, split in enumerate(("train", "valid")):
        for i in range(3):
            image(root / split / f"{i}.png", 10 * k + i)
        coco(
            root / split,
            [(i, 1, [square(5, 5, 9, 9)]) for i in range(3)] + [(i, 0, [square(2, 2, 20, 20)]) for i in range(3)],
        )
    lines = convert(root, out, silent)
    assert "6 images of JSON annotations, 6 with objects" in lines[0] and "are the class background" in lines[1]
    assert (out / "classes.txt").read_text() == "background\nroof\ncar\n"
    expected = filled((1, 2, 2, 20, 20), (2, 5, 5, 9, 9))
    for split in ("train", "val"):
        for i in range(3):
            assert (mask(out / split / f"masks/{i}.png") == expected).all()
    assert os.path.samefile(out / "train/images/0.png", root / "train/0.png")  # a hard link
    splits = load_splits(DataSettings(root=out))
    assert splits.class_names == ("background", "roof", "car") and len(splits.val) == 3


def test_coco_in_its_own_layout(tmp_path):
    for split in ("train2017", "val2017"):
        for i in range(3):
            image(tmp_path / "in" / split / f"{i}.png", len(split) + i)
        coco(tmp_path / "in/annotations", [(0, 0, [square(1, 1, 8, 8)])], file=f"instances_{split}.json")
    lines = convert(tmp_path / "in", tmp_path / "out", silent)
    assert (mask(tmp_path / "out/train/masks/0.png") == filled((1, 1, 1, 8, 8))).all()
    assert (tmp_path / "out/val/masks/0.png").exists() and not (tmp_path / "out/val/masks/1.png").exists()
    assert any("4 images have no object, and are not annotated yet" in line for line in lines)
    assert len(list((tmp_path / "out/unlabeled").rglob("*.png"))) == 4


def test_run_lengths_of_coco(tmp_path):
    pytest.importorskip("pycocotools", reason="pycocotools, the extra `polygons`, is not installed")
    for i in range(3):
        image(tmp_path / "in" / f"{i}.png", i)
    runs = {"size": [SIDE, SIDE], "counts": [SIDE * 3 + 5, 10, SIDE * SIDE - SIDE * 3 - 15]}  # column by column
    coco(tmp_path / "in", [(i, 0, runs) for i in range(3)], categories=("roof",))
    convert(tmp_path / "in", tmp_path / "out", silent)
    assert (mask(tmp_path / "out/masks/1.png") == filled((1, 3, 5, 3, 14))).all()


def test_labelme(tmp_path):
    root, part = tmp_path / "in", io.BytesIO()
    Image.fromarray(np.ones((3, 4), np.uint8) * 255).save(part, "PNG")
    shapes = [
        {"label": "b", "points": [[2, 2], [20, 2], [20, 20], [2, 20]], "shape_type": "polygon"},
        {"label": "a", "points": [[5, 5], [9, 9]], "shape_type": "rectangle"},
        {
            "label": "a",
            "points": [[30, 30], [33, 32]],
            "shape_type": "mask",
            "mask": base64.b64encode(part.getvalue()).decode(),
        },
        {"label": "a", "points": [[1, 1], [3, 3]], "shape_type": "line"},
        {"label": "__ignore__", "points": [[25, 2], [28, 2], [28, 4], [25, 4]], "shape_type": "polygon"},
    ]
    for i in range(3):
        image(root / f"{i}.png", i)
        about = {"shapes": shapes if i else [], "imagePath": f"{i}.png", "imageHeight": SIDE, "imageWidth": SIDE}
        (root / f"{i}.json").write_text(json.dumps(about))
    image(root / "other.png", 9)
    lines = convert(root, tmp_path / "out", silent)
    expected = filled((2, 2, 2, 20, 20), (1, 5, 5, 9, 9), (1, 30, 30, 33, 32), (255, 25, 2, 28, 4))
    assert (tmp_path / "out/classes.txt").read_text() == "background\na\nb\n"
    assert (mask(tmp_path / "out/masks/1.png") == expected).all()
    assert "2 shapes (line) have no area, and are left out" in lines
    assert any("1 images are in no file of annotations" in line for line in lines)
    assert (tmp_path / "out/unlabeled/other.png").exists()


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><meta><job><labels><label><name>boat</name></label><label><name>sea</name></label></labels></job></meta>
{}</annotations>"""


def cvat(root, inside, count=3):
    for i in range(count):
        image(root / f"images/{i}.png", i)
    images = "".join(f'<image id="{i}" name="{i}.png" width="{SIDE}" height="{SIDE}">{inside}</image>' for i in range(count))
    (root / "annotations.xml").write_text(CVAT.format(images))


def test_cvat_whose_objects_cover_nearly_everything(tmp_path):
    cvat(
        tmp_path / "in",
        '<polygon label="boat" points="5,5;9,5;9,9;5,9" z_order="1"/>'
        f'<box label="sea" xtl="0" ytl="0" xbr="{SIDE - 1}" ybr="{SIDE - 3}" z_order="0"/>'
        '<mask label="boat" rle="1,2,1,4" left="20" top="20" width="4" height="2" z_order="2"/>'
        '<points label="boat" points="1,1"/>',
    )
    lines = convert(tmp_path / "in", tmp_path / "out", silent)
    expected = filled((1, 0, 0, SIDE - 1, SIDE - 3), (0, 5, 5, 9, 9), (0, 21, 20, 22, 20), (0, 20, 21, 23, 21), start=255)
    assert (tmp_path / "out/classes.txt").read_text() == "boat\nsea\n" and "have no class (255)" in lines[1]
    assert (mask(tmp_path / "out/masks/2.png") == expected).all()


@pytest.mark.parametrize("head", ['<!DOCTYPE a [<!ENTITY x "yy">]>', '<!DOCTYPE a SYSTEM "file:///etc/passwd">'])
def test_xml_that_declares_entities_is_refused(head, tmp_path):
    image(tmp_path / "in/0.png")
    (tmp_path / "in/a.xml").write_text(f'<?xml version="1.0"?>{head}<annotations><image name="0.png"/></annotations>')
    with pytest.raises(UserError, match="declares entities or a document type"):
        convert(tmp_path / "in", tmp_path / "out", silent)


def test_what_cannot_be_converted(tmp_path):
    root = tmp_path / "in"
    image(root / "0.png")
    with pytest.raises(UserError, match="holds no annotations"):
        convert(root, tmp_path / "out", silent)
    coco(root, [(0, 0, [square(1, 1, 5, 5)])], name="x{}.png")
    with pytest.raises(UserError, match="none of the 3 images is below"):
        convert(root, tmp_path / "out", silent)
    coco(root, [(4, 0, [square(1, 1, 5, 5)])])
    with pytest.raises(UserError, match=r"_annotations.coco.json is damaged .*export it again"):
        convert(root, tmp_path / "out", silent)
    coco(root, [(0, 0, [square(1, 1, 5, 5)])], count=1)
    Image.new("RGB", (9, 9)).save(root / "0.png")
    with pytest.raises(UserError, match=r"says that 0.png is 40 x 40 pixels"):
        convert(root, tmp_path / "out", silent)
    (root / "_annotations.coco.json").write_text("{")
    with pytest.raises(UserError, match="repair it or take it away"):
        convert(root, tmp_path / "out", silent)
    with pytest.raises(UserError, match="it is not empty"):
        convert(root, root, silent)
