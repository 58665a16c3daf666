import pickle
import re
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from cmim.data import FORMATS
from cmim.data.benchmark_classes import ADE20K_NAMES, CITYSCAPES_NAMES, COCO_NAMES, VOC_NAMES
from cmim.data.benchmarks import INSPECTED, Benchmark
from cmim.settings import DataSettings
from tests.data.small_benchmarks import (
    HEIGHT,
    WIDTH,
    WRITERS,
    load,
    mistake,
    names,
    save_image,
    save_mask,
    start,
    write_ade20k,
    write_cityscapes,
    write_coco,
    write_split,
    write_voc,
)


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path)


@pytest.fixture
def cityscapes(tmp_path):
    return write_cityscapes(tmp_path)


def test_every_format_of_the_settings_has_its_loader():
    said = "DataSettings.format in cmim/settings/data.py and FORMATS in cmim/data/__init__.py: the same formats in one order"
    assert tuple(FORMATS) == get_args(DataSettings.model_fields["format"].annotation), said


@pytest.mark.parametrize("name", [n for n, source in FORMATS.items() if source and issubclass(source, Benchmark)])
def test_every_benchmark_is_read_and_says_what_is_missing(name, tmp_path):
    assert name in WRITERS, f"tests/data/small_benchmarks.py: WRITERS has no function that writes a few images of {name}"
    root, source = WRITERS[name](tmp_path / name), FORMATS[name]
    splits = load(root, name, labelled=1.0)
    assert len(splits.labelled) > 0 and len(splits.val) > 0 and len(splits.colours) == len(splits.class_names)
    values = {int(v) for part in (splits.labelled, splits.val) for i in range(len(part)) for v in part.label(i).ravel()}
    assert values <= {*range(len(splits.class_names)), 255}
    assert source.split_example in mistake(load, root, name, split=str(tmp_path))
    splits.val.masks[0].unlink()
    assert source.mask_remedy in mistake(load, root, name)
    for image in splits.val.images:
        image.unlink()
    assert source.layout in mistake(load, root, name)


def test_classes():
    assert [len(n) for n in (VOC_NAMES, CITYSCAPES_NAMES, COCO_NAMES, ADE20K_NAMES)] == [21, 19, 81, 150]
    assert all(len(set(n)) == len(n) for n in (VOC_NAMES, CITYSCAPES_NAMES, COCO_NAMES, ADE20K_NAMES))
    assert [VOC_NAMES[i] for i in (0, 15, 20)] == ["background", "person", "tvmonitor"]
    assert [CITYSCAPES_NAMES[i] for i in (0, 11, 18)] == ["road", "person", "bicycle"]
    assert [COCO_NAMES[i] for i in (0, 1, 13, 57, 80)] == ["background", "person", "parking meter", "chair", "toothbrush"]
    official = {
        13: "person",
        21: "car",
        60: "stairway",
        75: "computer",
        90: "television",
        100: "buffet",
        116: "bag",
        127: "animal",
        139: "ashcan",
        150: "flag",
    }  # fmt: skip - numbers of objectInfo150.txt
    assert all(ADE20K_NAMES[number - 1] == name for number, name in official.items())


def test_voc_as_distributed(voc):
    splits = load(voc, "voc", labelled=1)
    assert len(splits.labelled) == len(splits.unlabelled) == 1 and splits.test is None and splits.notes == ()
    assert names(splits.val) == ["2008_8", "2008_9"] and splits.class_names == VOC_NAMES
    assert start(splits.val, 1, 5) == [0, 20, 255, 9, 9]  # palette indices
    assert splits.colours[[1, 15]].tolist() == [[128, 0, 0], [192, 128, 128]]
    stored = np.asarray(Image.open(voc / "JPEGImages/2008_8.jpg"))
    assert splits.val.image(0).shape == (HEIGHT, WIDTH, 3) and (splits.val.image(0) == stored).all()
    assert load(voc, "voc", channels=1).val.image(0).shape == (HEIGHT, WIDTH, 1)


@pytest.mark.parametrize("name", ["trainaug.txt", "train_aug.txt"])
def test_voc_with_sbd(voc, name):
    """DeepLab's lists name files, others ids."""
    lines = ["2007_1", "2007_2", "2007_3", "2007_4"]
    lines = lines if name == "trainaug.txt" else [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" for n in lines]
    (voc / "ImageSets/Segmentation" / name).write_text("\n".join(lines) + "\n")
    splits = load(voc, "voc", labelled=1.0)
    assert names(splits.labelled) == ["2007_1", "2007_2", "2007_3", "2007_4"] == names(splits.unlabelled)
    assert [start(splits.labelled, i, 4)[3] for i in range(4)] == [1, 2, 3, 4]
    assert splits.notes == ("2 labelled masks are from SegmentationClassAug/",)
    (voc / "ids.txt").write_text("2007_4\nJPEGImages/2007_1.jpg\n")
    splits = load(voc, "voc", labelled=str(voc / "ids.txt"))
    assert names(splits.labelled) == ["2007_1", "2007_4"] and names(splits.unlabelled) == ["2007_2", "2007_3"]


def test_cityscapes_label_ids(cityscapes):
    splits = load(cityscapes, "cityscapes", labelled=1.0)
    assert names(splits.labelled)[0] == "bochum_000000_000003_leftImg8bit" and len(splits.labelled) == 3
    official = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255,
                            16, 17, 18]  # fmt: skip
    assert start(splits.labelled, 2, 34) == start(splits.val, 0, 34) == official
    assert splits.notes == ("4 masks hold label ids, which are mapped to train ids",)
    assert splits.colours[[0, 18]].tolist() == [[128, 64, 128], [119, 11, 32]] and splits.class_names == CITYSCAPES_NAMES


def test_cityscapes_train_ids_where_they_are(cityscapes):
    ulm = cityscapes / "gtFine/train/ulm"
    save_mask(ulm / "ulm_000000_000002_gtFine_labelTrainIds.png", [255, 18, 0])
    splits = load(cityscapes, "cityscapes", labelled=1.0)
    assert start(splits.labelled, 2, 4) == [255, 18, 0, 0] and start(splits.labelled, 1, 8) == [255] * 7 + [0]
    assert splits.notes[0].startswith("3 masks")
    stems = [f"train/ulm/ulm_000000_00000{i}" for i in (1, 2)]
    lines = [f"leftImg8bit/{stem}_leftImg8bit.png gtFine/{stem}_gtFine_labelTrainIds.png" for stem in stems]
    unlabelled = ["leftImg8bit/train/bochum/bochum_000000_000003_leftImg8bit.png None"]
    split = write_split(cityscapes / "s", lines, unlabelled)
    splits = load(cityscapes, "cityscapes", split=split)
    assert start(splits.labelled, 0, 8) == [255] * 7 + [0] and start(splits.labelled, 1, 2) == [255, 18]
    (ulm / "ulm_000000_000001_gtFine_labelIds.png").unlink()
    message = mistake(load, cityscapes, "cityscapes", split=split)
    assert re.search("mask .*_000001_gtFine_labelTrainIds.png is missing: gtFine_trainvaltest.zip", message)


def test_cityscapes_extra_images_are_unlabelled(cityscapes):
    save_image(cityscapes / "leftImg8bit/train_extra/aachen/aachen_000000_000009_leftImg8bit.png")
    splits = load(cityscapes, "cityscapes", labelled=1)
    assert len(splits.unlabelled) == 3 and names(splits.unlabelled)[2] == "aachen_000000_000009_leftImg8bit"


def test_coco(tmp_path):
    coco = write_coco(tmp_path)
    splits = load(coco, "coco", labelled=2)
    assert len(splits.labelled) == 2 and names(splits.val) == ["000000000139"] and splits.class_names == COCO_NAMES
    assert start(splits.val, 0, 4) == [0, 80, 255, 1]
    lines = [f"train2017/{i:012d}.jpg masks/{i:012d}.png" for i in (9, 25, 30)]
    splits = load(coco, "coco", split=write_split(coco / "s", lines[:1], lines[1:]))
    assert names(splits.labelled) == ["000000000009"] and len(splits.unlabelled) == 2


@pytest.mark.parametrize(
    ("train", "val", "labels", "note"),
    [
        ([0, 1, 150], [0, 1, 2], [255, 0, 149], "classes from 1 .* ADE_train_00000001.png holds 150"),
        ([0, 1, 149], [0, 1, 2], [255, 0, 148], "classes from 1 .* none of those that were opened holds 255"),
        ([0, 255, 149], [0, 1, 2], [0, 255, 149], "classes from 0, .* ADE_train_00000001.png holds 255"),
        ([0, 1, 149], [255, 1, 2], [0, 1, 149], "classes from 0, .* ADE_val_00000001.png holds 255"),
    ],
)
def test_ade20k(tmp_path, train, val, labels, note):
    splits = load(write_ade20k(tmp_path, train, val), "ade20k", labelled=1.0)
    assert start(splits.labelled, 2, 3) == labels and len(splits.val) == 3 and splits.class_names == ADE20K_NAMES
    assert len(splits.notes) == 1 and re.search(note, splits.notes[0])


def test_ade20k_of_two_kinds(tmp_path):
    write_ade20k(tmp_path / "both", [0, 255], [150])
    message = mistake(load, tmp_path / "both", "ade20k")
    assert re.search(r"training/ADE_train_0000000.\.png holds 255.*validation/ADE_val_00000001\.png holds 150", message)
    write_ade20k(tmp_path / "half", [0, 255], [0, 1, 2], count=INSPECTED)  # validation was not prepared
    assert re.search(
        f"validation.*and {INSPECTED - 1} others of val hold no 255", mistake(load, tmp_path / "half", "ade20k")
    )
    write_ade20k(tmp_path / "few", [0, 255], [0, 1, 2], count=INSPECTED - 1)
    assert load(tmp_path / "few", "ade20k").val.label(0)[0, 0] == 0


def test_ade20k_looks_at_all_of_a_split_evenly(tmp_path):
    write_ade20k(tmp_path, [0, 1], [0, 1], count=3 * INSPECTED)
    for i in (1, 3 * INSPECTED):
        save_mask(tmp_path / f"annotations/validation/ADE_val_{i:08d}.png", [255])
    assert "ADE_val_00000001.png" in mistake(load, tmp_path, "ade20k", labelled=1.0)
    save_mask(tmp_path / "annotations/validation/ADE_val_00000001.png", [0])
    assert f"ADE_val_{3 * INSPECTED:08d}.png holds 255" in mistake(load, tmp_path, "ade20k", labelled=1.0)


def test_a_set_travels_to_worker_processes(cityscapes):
    splits = pickle.loads(pickle.dumps(load(cityscapes, "cityscapes")))
    assert start(splits.val, 0, 8) == [255] * 7 + [0]
