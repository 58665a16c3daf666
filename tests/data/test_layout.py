"""Folders of images and masks as people have them: which settings read them without a file being moved."""

import numpy as np
import pytest
from PIL import Image

from cmim.data import load_splits
from cmim.data.class_files import read_class_file
from cmim.data.layout import benchmark_of, find_layout, place_of
from cmim.errors import UserError
from cmim.settings import DataSettings
from tests.data.small_benchmarks import WRITERS


def write(root, *files):
    """Images, and masks for names that contain `mask`, `label`, `gt` or `annot` or lie in such a folder."""
    for i, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = any(word in name.lower() for word in ("mask", "label", "gt", "annot")) or (root.name == "twins" and i % 2)
        pixels = np.full((8, 8), i % 3, np.uint8) if mask else np.full((8, 8, 3), 20 + i, np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def pairs(folder, image, mask):
    return [name for stem in "abcd" for name in (image.format(f"{folder}{stem}"), mask.format(f"{folder}{stem}"))]


LAYOUTS = {
    "usual": ({}, [*pairs("", "train/images/{}.png", "train/masks/{}.png"), "val/images/x.png", "val/masks/x.png"]),
    "plain": ({}, pairs("", "images/{}.jpg", "masks/{}.png")),
    "photos": ({"image_folder": "photos", "mask_folder": "labels"}, pairs("", "photos/{}.jpg", "labels/{}.png")),
    "img_gt": ({"image_folder": "img", "mask_folder": "gt"}, pairs("deep/", "img/{}.JPG", "gt/{}.PNG")),
    "suffix": ({"masks": "{stem}_mask.png"}, pairs("", "images/{}.jpg", "masks/{}_mask.png")),
    "twins": ({"image_folder": ".", "mask_folder": ".", "masks": "{stem}.png"}, pairs("", "{}.jpg", "{}.png")),
    "beside": ({"image_folder": ".", "mask_folder": ".", "masks": "{stem}_mask.png"}, pairs("", "{}.png", "{}_mask.png")),
    "inverse": (
        {"image_folder": "images/{split}", "mask_folder": "annotations/{split}", "val": "validation"},
        [
            *pairs("", "images/train/{}.jpg", "annotations/train/{}.png"),
            "images/validation/x.jpg",
            "annotations/validation/x.png",
        ],
    ),
    "segnet": (
        {"image_folder": "{split}", "mask_folder": "{split}annot"},
        [*pairs("", "train/{}.png", "trainannot/{}.png"), "val/x.png", "valannot/x.png"],
    ),
    "joined": (
        {"image_folder": "{split}_images", "mask_folder": "{split}_masks", "val": "valid"},
        [*pairs("", "train_images/{}.png", "train_masks/{}.png"), "valid_images/x.png", "valid_masks/x.png"],
    ),
    "inner": ({}, pairs("", "my data/images/{}.jpg", "my data/masks/{}.png")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_trainer_reads_what_was_found(name, tmp_path):
    expected, files = LAYOUTS[name]
    layout = find_layout(write(tmp_path / name, *files))
    assert not layout.problems
    data = {key: value for key, value in layout.data.items() if key not in ("format", "root")}
    if "val" in data and "val" not in expected:
        assert data.pop("val") == "val"
    assert data == expected
    splits = load_splits(DataSettings(**{"val": 1} | layout.data, classes=3))
    drawn = "val" not in layout.data
    assert len(splits.labelled) == 4 - drawn and len(splits.val) == 1
    for image_set in (splits.labelled, splits.val):
        for i in range(len(image_set)):
            number = files.index(image_set.images[i].relative_to(tmp_path / name).as_posix())
            assert image_set.label(i).max() == (number + 1) % 3  # its mask is the next file


@pytest.mark.parametrize(
    "path, expected",
    [
        ("train/images/day", ("{split}/images", "images", "train")),
        ("Images", ("Images", "images", None)),
        ("set/Testing_Labels", ("set/{split}_Labels", "masks", "test")),
        ("trainannot", ("{split}annot", "masks", "train")),
        ("SegmentationClass", ("SegmentationClass", "masks", None)),
        ("ground_truth/dev", ("ground_truth/{split}", "masks", "val")),
        ("images/a/images", ("images", "images", None)),
        ("images/a/masks", ("images/a/masks", "masks", None)),
        ("trainings plan/x", (".", None, None)),
        ("", (".", None, None)),
    ],
)
def test_what_the_name_of_a_folder_says(path, expected):
    place = place_of(tuple(path.split("/")))
    assert (place.template, place.kind, place.split) == expected


@pytest.mark.parametrize("name", WRITERS)
def test_benchmarks_are_known_by_their_folders(name, tmp_path):
    WRITERS[name](tmp_path / "deep/there")
    assert benchmark_of(tmp_path) == (name, tmp_path / "deep/there")
    assert find_layout(tmp_path / "deep").data["format"] == name


def test_what_cannot_be_paired(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        find_layout(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no image .*: it is empty"):
        find_layout(tmp_path)
    (problem,) = find_layout(write(tmp_path / "a", "images/a.png", "images/b.png")).problems
    assert "2 images, but no mask" in problem and "--convert" in problem
    (problem,) = find_layout(write(tmp_path / "b", "images/a.png", "masks/z.png")).problems
    assert "no mask has the name of its image" in problem
    (problem,) = find_layout(write(tmp_path / "c", *(f"s{i}/images/{i}.png" for i in range(12)))).problems
    assert "12 folders hold images" in problem


def test_a_test_folder_without_masks_is_no_test_set(tmp_path):
    files = [*LAYOUTS["usual"][1], "test/images/t.png"]
    layout = find_layout(write(tmp_path / "data", *files))
    assert layout.data["test"] is None and "have no masks" in layout.notes[0]
    assert load_splits(DataSettings(**layout.data, classes=3)).test is None


@pytest.mark.parametrize(
    "name, text, names, colours, values",
    [
        ("classes.txt", "a\n\nb c\n", ("a", "b c"), None, None),
        ("class_dict.csv", "name,r,g,b\nsky,128,128,128\nroad,0,0,255\n", ("sky", "road"), ("#808080", "#0000ff"), None),
        ("_classes.csv", "Pixel Value, Class\n0, background\n1, nucleus\n", ("background", "nucleus"), None, (0, 1)),
        ("labelmap.txt", "# label:color_rgb:parts:actions\ncar:255,0,0::\nsky:0,0,255::\n", ("car", "sky"),
         ("#ff0000", "#0000ff"), None),
        ("label_colors.txt", "64 128 64\tAnimal\n192 0 128\tArch\n", ("Animal", "Arch"), ("#408040", "#c00080"), None),
        ("classes.json", '{"classes": [{"title": "A", "color": "#FF0000"}, {"title": "B", "color": "#00ff00"}]}', ("A", "B"),
         ("#ff0000", "#00ff00"), None),
        ("labels.txt", "0: sky\n7: road\n", ("sky", "road"), None, (0, 7)),
        ("classes.json", "{broken", None, None, None),
    ],
)  # fmt: skip
def test_files_that_name_classes(name, text, names, colours, values, tmp_path):
    (tmp_path / name).write_text(text)
    found = read_class_file(tmp_path)
    assert (found and (found.names, found.colours, found.values)) == (names and (names, colours, values))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"image_folder": "../x"}, "below data.root: give another data.root"),
        ({"image_folder": "{split}/{split}"}, "once or not at all"),
        ({"mask_folder": "masks/{stem}"}, "once or not at all"),
        ({"image_folder": "x"}, "give both, or neither"),
        ({"image_folder": ".", "mask_folder": "."}, "data.masks must tell masks from images"),
        ({"range": (5, 5)}, "is not below the upper bound"),
    ],
)
def test_settings_that_cannot_be_meant(settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        DataSettings(root=tmp_path, **settings).check()
