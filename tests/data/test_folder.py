import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmim.data import load_splits
from cmim.data.batches import TrainBatches, evaluation_loader
from cmim.errors import UserError
from cmim.settings import Config
from tests.tiny_runs import write_folder


def load(root, **data):
    return load_splits(Config(data={"format": "folder", "root": str(root), **data}).data)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


def save_pair(folder, stem, label, suffix=".png", seed=None):
    label = np.asarray(label, np.uint8)
    seed = sum(map(ord, f"{folder.name}{stem}")) if seed is None else seed
    pixels = np.random.default_rng(seed).integers(0, 256, (*label.shape, 3))
    save(folder / "images" / (stem + suffix), pixels)
    save(folder / "masks" / (stem + ".png"), label)


@pytest.fixture
def root(tmp_path):
    """Six training images, two of them without a mask; two for val, one for test, one unlabelled; three classes."""
    rng = np.random.default_rng(0)
    for split, stems in (("train", "abcd"), ("val", "xy"), ("test", "z")):
        for stem in stems:
            save_pair(tmp_path / split, stem, rng.integers(0, 3, (6, 8)))
    for i, path in enumerate(("train/images/e.jpg", "train/images/f.PNG", "unlabeled/u.bmp")):
        save(tmp_path / path, rng.integers(0, 256, (6, 8, 3)) + i)
    (tmp_path / "classes.txt").write_text("sky\n\n  tree \nroad\n")
    return tmp_path


def names(image_set):
    return [image_set.name(i) for i in range(len(image_set))]


def test_the_layout(root):
    splits = load(root, labelled=1.0)
    assert splits.class_names == ("sky", "tree", "road") and splits.colours.shape == (3, 3)
    assert names(splits.labelled) == ["a", "b", "c", "d"] and names(splits.unlabelled) == ["e", "f", "u"]
    assert names(splits.val) == ["x", "y"] and names(splits.test) == ["z"]
    assert (splits.val.image(1) == np.asarray(Image.open(root / "val/images/y.png"))).all()
    assert (splits.val.label(1) == np.asarray(Image.open(root / "val/masks/y.png"))).all()
    assert splits.val.label(0).dtype == splits.val.image(0).dtype == np.uint8


def test_unlabelled_masks_are_never_opened(root):
    for mask in (root / "train/masks").iterdir():
        mask.write_bytes(b"not a mask")
    config = Config(
        data={"format": "folder", "root": str(root), "labelled": 1, "crop": 4},
        method={"preset": "fixmatch"},
        train={"unlabelled_batch": 8},
    )
    splits = load_splits(config.data)
    assert len(splits.labelled) == 1 and splits.unlabelled.masks == [None] * 6
    batches = TrainBatches(splits, config)
    assert all(batches._unlabelled(p)["weak_image"].shape == (3, 4, 4) for p in range(6))
    with pytest.raises(UserError, match="masks"):
        batches[0]


def test_both_spellings_and_both_depths_of_unlabelled(root):
    save(root / "unlabelled/images/v.webp", np.zeros((6, 8, 3)))
    assert names(load(root, labelled=1.0).unlabelled) == ["e", "f", "u", "v"]


def test_all_labelled_and_nothing_else_serves_as_unlabelled(root):
    for path in ("train/images/e.jpg", "train/images/f.PNG", "unlabeled/u.bmp"):
        (root / path).unlink()
    splits = load(root, labelled=1.0)
    assert names(splits.unlabelled) == names(splits.labelled) == ["a", "b", "c", "d"]


def test_labelled_samples(root):
    for i in range(16):
        save_pair(root / "train", f"more{i}", np.zeros((6, 8)), seed=i)
    draw = lambda **s: names(load(root, **s).labelled)  # noqa: E731
    assert len(draw(labelled=0.5)) == 10 and len(draw(labelled=7)) == 7 and len(draw(labelled=0.001)) == 1
    assert len(draw(labelled=1.0)) == 20 and len(draw(labelled=1)) == 1
    assert draw(labelled=7) == draw(labelled=7) == sorted(draw(labelled=7)) != draw(labelled=7, split_seed=1)
    assert set(draw(labelled=3)) < set(draw(labelled=9))
    splits = load(root, labelled=9)
    assert sorted(names(splits.labelled) + names(splits.unlabelled)) == sorted([*draw(labelled=1.0), "e", "f", "u"])
    chosen = [name for seed in range(60) for name in draw(labelled=5, split_seed=seed)]
    assert all(4 <= chosen.count(name) <= 28 for name in draw(labelled=1.0))  # 15 expected


def test_every_mask_is_used_unless_one_says_otherwise(root):
    assert names(load(root).labelled) == ["a", "b", "c", "d"]


def test_a_list_of_labelled_images(root):
    (root / "list.txt").write_text("c.png\n\ntrain/images/a.png\nc\n")
    splits = load(root, labelled=str(root / "list.txt"))
    assert names(splits.labelled) == ["a", "c"] and names(splits.unlabelled) == ["b", "d", "e", "f", "u"]


def test_split_files(root):
    (root / "s").mkdir()
    (root / "s/labeled.txt").write_text("train/images/b.png train/masks/b.png\nval/images/x.png val/masks/x.png")
    (root / "s/unlabeled.txt").write_text("unlabeled/u.bmp\ntrain/images/a.png train/masks/nothing.png\n")
    (root / "v.txt").write_text("val/images/y.png val/masks/y.png")
    splits = load(root, split=str(root / "s"), val=str(root / "v.txt"), label_map={1: 2})
    assert names(splits.labelled) == ["b", "x"] and names(splits.unlabelled) == ["u", "a"]
    assert names(splits.val) == ["y"] and names(splits.test) == ["z"]
    stored = np.asarray(Image.open(root / "train/masks/b.png"))
    assert (splits.labelled.label(0) == np.where(stored == 1, 2, stored)).all()
    assert "images/x.png is a labelled image and also in val" in mistake(root, split=str(root / "s"))  # ROOT/val serves
    (root / "v.txt").write_text("val/images/y.png")
    assert "v.txt names y.png without a mask" in mistake(root, split=str(root / "s"), val=str(root / "v.txt"))
    (root / "s/labeled.txt").write_text("train/images/b.png train/masks/q.png")
    assert re.search("mask .*masks/q.png is missing: add it", mistake(root, split=str(root / "s")))
    assert re.search("no file nowhere/labeled.txt; data.split is a folder of labeled.txt", mistake(root, split="nowhere"))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels(tmp_path, channels):
    splits = load(write_folder(tmp_path / "data", channels=channels), channels=channels, labelled=2)
    assert splits.labelled.image(0).shape == (40, 48, channels) and splits.val.label(1).shape == (40, 48)
    assert len(np.unique(splits.labelled.image(0))) > 40


def test_test_is_optional_and_can_be_left_out(root):
    assert load(root, test=None).test is None
    assert names(load(root, test="val").test) == ["x", "y"]
    for path in (root / "test").rglob("*.png"):
        path.unlink()
    (root / "test/images").rmdir(), (root / "test/masks").rmdir(), (root / "test").rmdir()
    assert load(root).test is None


def test_label_map_then_ignore(root):
    save_pair(root / "val", "x", [[0, 255, 7, 9], [1, 2, 200, 254]])
    label = load(root, label_map={255: 1, 7: 255, 200: 254}, ignore=254, classes=10).val.label(0)
    assert label.tolist() == [[0, 1, 255, 9], [1, 2, 255, 255]]
    label = load(root, label_map={255: 0, 0: 255, 7: 2, 9: 2, 200: 2, 254: 2}).val.label(0)
    assert label.tolist() == [[255, 0, 2, 2], [1, 2, 2, 2]]


def mistake(root, **data):
    """The one line that a user gets."""
    with pytest.raises(UserError) as caught:
        splits = load(root, **data)
        for image_set in (splits.labelled, splits.val):
            for i in range(len(image_set)):
                image_set.image(i), image_set.label(i)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def replace_mask(root, pixels):
    (root / "val/masks/x.png").unlink()
    Image.fromarray(pixels).save(root / "val/masks/x.tif")


nothing = lambda r: None  # noqa: E731
MISTAKES = {
    "no root": (remove, {}, "data.root: there is no folder"),
    "no train": (lambda r: remove(r / "train"), {}, "there is no folder .*train;"),
    "no images folder": (lambda r: remove(r / "train/images"), {}, "there is no folder .*train/images: put"),
    "no image": (
        lambda r: [p.unlink() for p in (r / "train/images").iterdir()], {}, "train/images holds no image; expected .jpg",
    ),
    "no masks": (lambda r: remove(r / "train/masks"), {}, "no labelled image found: .*train/masks holds no mask"),
    "no val": (lambda r: remove(r / "val"), {}, "data.val: there is no folder or text file val: .*masks/"),
    "wrong val": (nothing, {"val": "vla"}, "data.val: there is no folder or text file vla"),
    "wrong test": (nothing, {"test": "tset"}, "data.test: there is no folder or text file tset"),
    "val without a mask": (lambda r: (r / "val/masks/x.png").unlink(), {}, "images/x.png has no mask: put x.png into"),
    "no classes": (lambda r: (r / "classes.txt").unlink(), {}, "classes are unknown: write .*classes.txt, .*--data.classes"),
    "empty classes": (lambda r: (r / "classes.txt").write_text("\n"), {}, "classes.txt gives 0 classes"),
    "binary classes": (lambda r: (r / "classes.txt").write_bytes(b"\xff\xfe\x80"), {}, "cannot read .*classes.txt"),
    "one class": (nothing, {"classes": 1}, "data.classes gives 1 classes; there must be 2 to 255"),
    "too many classes": (nothing, {"classes": 256}, "data.classes gives 256"),
    "same class twice": (nothing, {"classes": ["a", "b", " a"]}, "data.classes holds the name 'a' twice"),
    "class without a name": (nothing, {"classes": ["a", " "]}, "data.classes holds an empty name"),
    "out of range": (
        nothing, {"classes": 2}, "masks/.*png holds the value 2, .*data.label_map.*data.ignore.*data.classes",
    ),
    "ignore is not 255": (
        lambda r: save_pair(r / "val", "x", np.full((6, 8), 255)), {"ignore": 9}, "val/masks/x.png holds the value 255",
    ),
    "above 16 bits": (lambda r: replace_mask(r, np.full((6, 8), 70000, np.int32)), {}, "x.tif holds the value 70000"),
    "negative": (lambda r: replace_mask(r, np.full((6, 8), -1, np.int32)), {}, "x.tif holds the value -1"),
    "label map beyond the classes": (nothing, {"label_map": {7: 3}}, "data.label_map maps 7 to 3, .* 0 to 2"),
    "label map of no mask value": (nothing, {"label_map": {-1: 2}}, "data.label_map: -1 cannot be a mask value"),
    "label map into ignore": (
        nothing, {"label_map": {1: 0}, "ignore": 0}, "maps 1 to 0, which data.ignore .* to 255",
    ),
    "other size": (
        lambda r: save(r / "val/masks/x.png", np.zeros((8, 6))), {}, "x.png is 6 x 8 pixels, its image x.png is 8 x 6",
    ),
    "colour mask": (
        lambda r: save(r / "val/masks/x.png", np.eye(6, 8)[..., None] * [1, 0, 0]), {}, "masks/x.png is a colour",
    ),
    "float mask": (lambda r: replace_mask(r, np.zeros((6, 8), np.float32)), {}, "x.tif has pixels of type F"),
    "image is text": (lambda r: (r / "val/images/x.png").write_text("hello"), {}, "cannot read .*images/x.png: no image"),
    "empty mask": (lambda r: (r / "val/masks/x.png").write_bytes(b""), {}, "cannot read .*val/masks/x.png: no image"),
    "twin images": (lambda r: save(r / "train/images/a.jpg", np.zeros((6, 8, 3))), {}, "a.jpg and a.png: rename one"),
    "twin masks": (lambda r: save(r / "train/masks/a.bmp", np.zeros((6, 8))), {}, "masks holds a.bmp and a.png: rename"),
    "too few": (nothing, {"labelled": 5}, "data.labelled is 5, but only 4 training images have a mask"),
    "no list": (nothing, {"labelled": "nowhere.txt"}, "data.labelled: cannot read nowhere.txt"),
    "copy in val": (
        lambda r: (r / "val/images/x.png").write_bytes((r / "train/images/b.png").read_bytes()), {"labelled": 1.0},
        "train/images/b.png is a labelled image and also in val",
    ),
    "link in test": (
        lambda r: (r / "test/images/z.png").unlink() or (r / "test/images/z.png").symlink_to(r / "train/images/c.png"),
        {"labelled": 1.0}, "train/images/c.png is a labelled image and also in test",
    ),
    "train as val": (
        lambda r: [(r / f"train/images/{n}").unlink() for n in ("e.jpg", "f.PNG")], {"val": "train"}, "also in val",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(root, case):
    change, data, message = MISTAKES[case]
    change(root)
    assert re.search(message, mistake(root, **data))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb.pgn\n", r"names b.pgn, which is no image of this data set; did you mean b.png\?"),
        ("a\ne\n", "names e, which has no mask"),
        ("\n", "names no image"),
    ],
)
def test_mistakes_in_a_list(root, text, message):
    (root / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        load(root, labelled=str(root / "list.txt"))


@pytest.mark.parametrize("name", ["a\nb", "a ", " a", "a\x85b"])
def test_a_name_that_no_line_can_hold(root, name):
    """A continued run finds its labelled images by the lines of labelled.txt."""
    for path in (root / "train/images/a.png", root / "train/masks/a.png"):
        path.rename(path.with_name(f"{name}.png"))
    assert f"the labelled image {name!r} has a line break or a space" in mistake(root, labelled=1.0)


def test_an_unlabelled_image_may_be_in_val(root):
    (root / "val/images/x.png").write_bytes((root / "train/images/f.PNG").read_bytes())
    assert len(load(root, labelled=1.0).val) == 2


def test_stray_files_are_no_images(root):
    save(root / "train/masks/nobody.png", np.zeros((6, 8)))
    (root / "train/images/._a.png").write_bytes(b"")
    (root / "train/images/Thumbs.db").write_bytes(b"")
    splits = load(root, labelled=1.0)
    assert names(splits.labelled) == ["a", "b", "c", "d"] and names(splits.unlabelled) == ["e", "f", "u"]


@pytest.mark.parametrize("place", ["unlabeled/a/b/{}.png", "Unlabeled/{}.png", "UNLABELLED/images/x/{}.jpg"])
def test_unlabelled_images_are_found_wherever_they_lie(root, place):
    (root / "unlabeled/u.bmp").unlink(), (root / "unlabeled").rmdir()
    for name in "pq":
        save(root / place.format(name), np.zeros((6, 8, 3)))
    save(root / place.split("/")[0] / "masks/p.png", np.zeros((6, 8)))
    splits = load(root, labelled=1.0)
    assert names(splits.unlabelled) == ["e", "f", "p", "q"] and "serve as unlabelled" not in " ".join(splits.notes)


@pytest.mark.parametrize("suffix", [".gif", ".ppm", ".jfif", ".pgm"])
def test_more_formats_of_images(root, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(pixels).convert({".gif": "P", ".pgm": "L"}.get(suffix, "RGB"))
    image.save(root / f"unlabeled/v{suffix}")
    splits = load(root, labelled=1.0)
    assert names(splits.unlabelled) == ["e", "f", "u", "v"] and splits.unlabelled.image(3).shape == (6, 8, 3)


def test_nested_folders_are_searched_and_names_stay_apart(root):
    for i, place in enumerate(("day", "night")):
        for kind, shape in (("images", (6, 8, 3)), ("masks", (6, 8))):
            save(root / f"train/{kind}/{place}/a.png", np.full(shape, i + (kind == "images") * 50))
    splits = load(root, labelled=1.0)
    assert names(splits.labelled) == ["images/a", "b", "c", "d", "day/a", "night/a"]
    assert splits.labelled.label(5).max() == 1 and splits.labelled.image(5).max() == 51
    (root / "list.txt").write_text("\n".join(names(splits.labelled)))
    assert names(load(root, labelled=str(root / "list.txt")).labelled) == names(splits.labelled)
    (root / "list.txt").write_text("a\n")
    assert "names a, which 3 images are called" in mistake(root, labelled=str(root / "list.txt"))


def test_what_is_found_and_not_used_is_said(root):
    said = lambda: "\n".join(load(root, labelled=1.0).notes)  # noqa: E731
    assert said() == "2 of 6 images of " + f"{root / 'train/images'} have no mask and are unlabelled (such as e.jpg)"
    for name in "ab":
        (root / f"train/masks/{name}.png").rename(root / f"train/masks/{name}_mask.png")
    for path in ("unlabeled/p.heic", "train/masks/c.xml", "val/images/notes.md", "extra/one.jpg", "extra/two.jpg"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(b"x")
    text = said()
    for line in (
        "4 of 6 images of .*train/images have no mask and are unlabelled", r"2 masks of .*no image .*such as a_mask\.png",
        r"1 files of .*unlabeled are not used.*p\.heic", r"1 files of .*train/masks are not used.*c\.xml",
        r"1 files of .*val/images are not used.*notes\.md", "2 images of .*extra are not used",
    ):  # fmt: skip
        assert re.search(line, text), line


def test_an_empty_folder_of_unlabelled_images_is_said(root):
    for path in ("train/images/e.jpg", "train/images/f.PNG", "unlabeled/u.bmp"):
        (root / path).unlink()
    notes = load(root, labelled=1.0).notes
    assert "unlabeled holds no image" in notes[0] and "the labelled ones serve as unlabelled" in notes[1]


CAMVID = os.environ.get("CMIM_TEST_CAMVID")


@pytest.mark.skipif(not CAMVID, reason="CMIM_TEST_CAMVID names no CamVid folder")
def test_camvid():
    root = Path(CAMVID)
    config = Config(data={"root": CAMVID, "labelled": 0.125, "size": (180, 240), "crop": 160}, mask={"block": 16})
    splits = load_splits(config.data)
    assert len(splits.class_names) == 11
    total = len(list((root / "train/images").iterdir()))
    assert len(splits.labelled) == round(total / 8) and len(splits.labelled) + len(splits.unlabelled) == total
    batch = TrainBatches(splits, config)[0]
    assert batch["strong_image"].shape == (1, 8, 3, 160, 160)
    images, labels, indices = next(evaluation_loader(splits.val, config.data, 3, 0))
    assert images.shape == (3, 3, 180, 240) and labels[0].shape == (360, 480) and indices == [0, 1, 2]
    stored = np.asarray(Image.open(sorted((root / "val/masks").iterdir())[0]))
    assert (labels[0].numpy() == stored).all()
