"""Split folders, lists of images, and what is said when files are not where they should be."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmim.data import load_splits
from cmim.data.batches import TrainBatches
from cmim.data.lists import read_images, read_pairs, with_masks
from cmim.settings import Config
from tests.data.small_benchmarks import (
    load,
    mistake,
    names,
    save_mask,
    start,
    voc_line,
    write_ade20k,
    write_cityscapes,
    write_coco,
    write_split,
    write_voc,
)


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path)


def test_a_split_folder(voc):
    unlabelled = ["JPEGImages/2007_2.jpg None", "JPEGImages/2007_3.jpg", "JPEGImages/2007_4.jpg nowhere/2007_4.png"]
    split = write_split(voc / "splits/92", [voc_line("2007_1")], unlabelled)
    assert names(load(voc, "voc", split=split).val) == ["2008_8", "2008_9"]  # the official ones
    (voc / "splits/val.txt").write_text(voc_line("2008_9"))
    splits = load(voc, "voc", split=split)
    assert names(splits.labelled) == ["2007_1"] and names(splits.unlabelled) == ["2007_2", "2007_3", "2007_4"]
    assert splits.unlabelled.masks == [None] * 3 and names(splits.val) == ["2008_9"] and splits.test is None
    (voc / "splits/92/val.txt").write_text(f"\ufeff{voc_line('2008_8')}\r\n\r\n")
    (voc / "splits/92/test.txt").write_text(voc_line("2008_9"))
    splits = load(voc, "voc", split=split)
    assert names(splits.val) == ["2008_8"] and names(splits.test) == ["2008_9"]
    assert load(voc, "voc", split=split, test=None).test is None
    (voc / "splits/92/unlabeled.txt").write_text("\n")
    assert names(load(voc, "voc", split=split).unlabelled) == ["2007_1"]


def test_unlabelled_images_that_are_named_twice_or_held_out_are_said(voc):
    split = write_split(voc / "s", [voc_line("2007_1")], [voc_line(n) for n in ("2007_2", "2007_3", "2007_2", "2008_9")])
    first, second = load(voc, "voc", split=split).notes
    assert first == "the unlabelled images are 3 files; 1 more lines name them again, and count"
    assert second.startswith("1 images of val are unlabelled images of training too, such as ") and "2008_9" in second


def test_masks_of_unlabelled_images_are_never_opened(voc):
    for name in ("2007_2", "2007_3"):
        for mask in voc.glob(f"*/{name}.png"):
            mask.write_bytes(b"not a mask")
    split = write_split(voc / "s", [voc_line(n) for n in ("2007_1", "2007_4")], [voc_line(n) for n in ("2007_2", "2007_3")])
    data = {"format": "voc", "root": str(voc), "split": split, "crop": 4}
    config = Config(data=data, method={"preset": "fixmatch"}, train={"labelled_batch": 2, "unlabelled_batch": 2})
    batch = TrainBatches(load_splits(config.data), config)[0]
    assert batch["weak_image"].shape == (2, 3, 4, 4) and len(batch["label"]) == 2


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_list_of_held_out_images(voc, name):
    (voc / "list.txt").write_text(f"2008_9\n{voc_line('2007_2')}\nJPEGImages/2008_8.jpg")
    splits = load(voc, "voc", split=write_split(voc / "s", [voc_line("2007_1")], []), **{name: str(voc / "list.txt")})
    chosen = splits.val if name == "val" else splits.test
    assert names(chosen) == ["2008_9", "2007_2", "2008_8"] and start(chosen, 1, 4)[3] == 2
    assert names(load(voc, "voc", test="val").test) == ["2008_8", "2008_9"]


MISTAKES = {
    "no root": ("voc", lambda r: None, {"root": "nowhere"}, "data.root: there is no folder nowhere"),
    "parent as root": (
        "voc", lambda r: (r / "ImageSets").rename(r / "Sets"), {},
        "no list .*Segmentation/train.txt: data.root is the folder VOC",
    ),
    "classes": ("voc", lambda r: None, {"classes": 3}, "data.classes: voc has its own classes; .*data.format folder"),
    "ignore": ("voc", lambda r: None, {"ignore": 0}, "data.ignore: voc has"),
    "label map": ("voc", lambda r: None, {"label_map": {1: 2}}, "data.label_map: voc has"),
    "no split": (
        "voc", lambda r: None, {"split": "UniMatch/x"},
        r"data.split: .*labeled.txt; git clone \S*/UniMatch, .*pascal/92",
    ),
    "parent as split": (
        "voc", lambda r: write_split(r / "s/1_8", [], []), {"split": "s"},
        r"s/labeled.txt; give one of its folders \(1_8\)",
    ),
    "no unlabeled.txt": (
        "voc", lambda r: (write_split(r / "s", [voc_line("2007_1")], []), (r / "s/unlabeled.txt").unlink()), {"split": "s"},
        "cannot read .*unlabeled.txt",
    ),
    "joined lines": (
        "voc", lambda r: write_split(r / "s", [voc_line("2007_1") + voc_line("2007_2")], []), {"split": "s"},
        "labeled.txt: expected `IMAGE MASK`, two paths without spaces, got 'JPEGImages/2007_1.jpg Seg",
    ),
    "labelled without a mask": (
        "voc", lambda r: write_split(r / "s", ["JPEGImages/2007_1.jpg None"], []), {"split": "s"},
        "labeled.txt names 2007_1.jpg without a mask",
    ),
    "empty list": ("voc", lambda r: write_split(r / "s", [], []), {"split": "s"}, "labeled.txt names no image"),
    "missing images": (
        "voc", lambda r: write_split(r / "s", [voc_line("2007_1")], [voc_line("x"), voc_line("y")]), {"split": "s"},
        "the image .*JPEGImages/x.jpg is missing, and 1 more of 5 images: data.root is",
    ),
    "missing masks": (
        "voc", lambda r: [p.unlink() for p in (r / "SegmentationClass").glob("2007*")], {"labelled": 1.0},
        r"the mask .*SegmentationClass/2007_1.png is missing, and 1 more of 2 masks: .*semivl\S*ground_truth_voc.zip",
    ),
    "missing masks of val": (
        "voc", lambda r: (r / "SegmentationClass/2008_9.png").unlink(), {},
        "SegmentationClass/2008_9.png is missing: masks merged",
    ),
    "wrong id": (
        "voc", lambda r: (r / "v.txt").write_text("2008_7"), {"val": "v.txt"},
        r"v.txt names 2008_7, .*did you mean 2008_\d\?",
    ),
    "no list for val": (
        "voc", lambda r: None, {"val": "v.txt"},
        "data.val: there is no folder or text file v.txt: it is `val`, or",
    ),
    "no list for test": (
        "voc", lambda r: None, {"test": "t.txt"},
        "data.test: there is no folder or text file t.txt",
    ),
    "train as val": (
        "voc", lambda r: (r / "v.txt").write_text("2007_1\n2007_2"), {"val": "v.txt"},
        "is a labelled image and also in val",
    ),
    "a labelled image twice": (
        "voc", lambda r: (r / "two.txt").write_text("JPEGImages/2007_1.jpg SegmentationClass/2007_1.png\n" * 2),
        {"val": "two.txt"},
        "two.txt names 2007_1.jpg twice",
    ),
    "another value": (
        "voc", lambda r: save_mask(r / "SegmentationClass/2008_8.png", [21]), {},
        "2008_8.png holds the value 21, which is no class: ",
    ),
    "no leftImg8bit": (
        "cityscapes", lambda r: (r / "leftImg8bit").rename(r / "l"), {},
        "no image .*leftImg8bit/train.*gtFine_",
    ),
    "no gtFine": (
        "cityscapes", lambda r: (r / "gtFine").rename(r / "g"), {"labelled": 1.0},
        "mask .* missing, and 2 more of 3 masks",
    ),
    "another train id": (
        "cityscapes", lambda r: save_mask(r / "gtFine/val/munster/munster_000000_000004_gtFine_labelTrainIds.png", [19]), {},
        "munster_000000_000004_gtFine_labelTrainIds.png holds the value 19, .*train ids are 0 to 18",
    ),
    "another label id": (
        "cityscapes", lambda r: save_mask(r / "gtFine/val/munster/munster_000000_000004_gtFine_labelIds.png", [34]), {},
        "labelIds.png holds the value 34, .*label ids are 0 to 33",
    ),
    "no masks of COCO": (
        "coco", lambda r: (r / "masks").rename(r / "m"), {},
        r"masks/\d+.png is missing.*ground_truth_coco.zip",
    ),
    "another class of COCO": (
        "coco", lambda r: save_mask(r / "masks/000000000139.png", [90]), {},
        "139.png holds the value 90",
    ),
    "prepared among original ones": (
        "ade20k", lambda r: save_mask(r / "annotations/validation/ADE_val_00000002.png", [255]), {},
        "_00000002.png holds 255.*holds 150",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(tmp_path, monkeypatch, case):
    name, change, data, message = MISTAKES[case]
    {"voc": write_voc, "cityscapes": write_cityscapes, "coco": write_coco, "ade20k": write_ade20k}[name](tmp_path)
    change(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert re.search(message, mistake(load, **{"root": ".", "name": name} | data))


REAL_VOC, REAL_SPLITS = os.environ.get("CMIM_TEST_VOC"), os.environ.get("CMIM_TEST_SPLITS")
needs_voc = pytest.mark.skipif(not REAL_VOC, reason="CMIM_TEST_VOC names no folder of VOC")
needs_splits = pytest.mark.skipif(not REAL_SPLITS, reason="CMIM_TEST_SPLITS names no folder of UniMatch's splits")


@needs_voc
def test_real_voc(tmp_path):
    splits = load(REAL_VOC, "voc", labelled=4)
    assert len(splits.labelled) == 4 and len(splits.val) == 10
    for image_set in (splits.labelled, splits.val):
        for i in range(len(image_set)):
            label = image_set.label(i)
            assert (label == np.asarray(Image.open(f"{REAL_VOC}/SegmentationClass/{image_set.name(i)}.png"))).all()
            assert label.shape == image_set.image(i).shape[:2] and set(np.unique(label)) <= {*range(21), 255}
    if REAL_SPLITS:  # the published split, as far as its images are here
        there = {path.stem for path in Path(REAL_VOC, "JPEGImages").iterdir()}
        here = lambda name: [line for line in read(f"pascal/{name}.txt") if Path(line.split()[0]).stem in there]  # noqa: E731
        split = write_split(tmp_path / "s", here("1464/labeled"), here("1464/unlabeled"), val=here("val"))
        splits = load(REAL_VOC, "voc", split=split)
        assert [len(s) for s in (splits.labelled, splits.unlabelled, splits.val)] == [3, 7, 10]


def read(name):
    return Path(REAL_SPLITS, name).read_text().splitlines()


PUBLISHED = {
    "pascal": {
        "92": (92, 10490), "183": (183, 10399), "366": (366, 10216), "732": (732, 9850), "1464": (1464, 9118),
        "1_16": (662, 9920), "1_8": (1323, 9259), "1_4": (2646, 7936), "u2pl_1_16": (662, 9920), "u2pl_1_8": (1323, 9259),
        "u2pl_1_4": (2646, 7936),
    },
    "cityscapes": {"1_30": (100, 2875), "1_16": (186, 2789), "1_8": (372, 2603), "1_4": (744, 2231), "1_2": (1488, 1487)},
}  # fmt: skip


@needs_splits
@pytest.mark.parametrize(("family", "validation"), [("pascal", 1449), ("cityscapes", 500)])
def test_published_splits(family, validation):
    folder, root = Path(REAL_SPLITS, family), Path("root")
    val = with_masks(read_pairs(folder / "val.txt", "", root), folder / "val.txt")
    assert len(val) == validation
    for name, counts in PUBLISHED[family].items():
        path = folder / name / "labeled.txt"
        labelled = with_masks(read_pairs(path, "", root), path)
        unlabelled = read_images(folder / name / "unlabeled.txt", "", root)
        assert (len(labelled), len(unlabelled)) == counts
        everything = {*unlabelled, *(image for image, _ in labelled + val)}
        assert len(everything) == sum(counts) + validation
        assert all(path.suffix == {"pascal": ".jpg", "cityscapes": ".png"}[family] for path in everything)
        key = lambda path: path.name.removesuffix("_leftImg8bit.png").split(".")[0]  # noqa: E731
        assert all(mask.name.startswith(key(image)) and mask.suffix == ".png" for image, mask in labelled + val)


@needs_splits
@pytest.mark.parametrize(
    ("format", "split", "counts"),
    [("voc", "pascal/1464", (1464, 9118, 1449)), ("cityscapes", "cityscapes/1_16", (186, 2789, 500))],
)
def test_a_published_split_over_empty_files(tmp_path, format, split, counts):
    folder = Path(REAL_SPLITS, split)
    read = lambda path: [line.split() for line in path.read_text().splitlines()]  # noqa: E731
    with_mask = read(folder.parent / "val.txt") + read(folder / "labeled.txt")
    lines = with_mask + read(folder / "unlabeled.txt")
    for parent in {os.path.dirname(path) for line in lines for path in line}:
        os.makedirs(tmp_path / parent)
    for size, (image, _) in enumerate(lines):
        with open(tmp_path / image, "wb") as file:
            file.truncate(size)  # images of one size would be compared
    for _, mask in with_mask:
        (tmp_path / mask).touch()
    splits = load(tmp_path, format, split=str(folder))
    assert (len(splits.labelled), len(splits.unlabelled), len(splits.val)) == counts
    assert splits.test is None and splits.notes == () and not any(splits.unlabelled.masks)
