"""Masks in colours: which pixels have which class, what is refused, and what is said of it."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cmim import evaluate, predict
from cmim.config import config_from, dump_config, load_config
from cmim.data import load_held_out, load_splits
from cmim.data.colours import NO_CLASS, Colours, class_colours, colour_picture, count_colours
from cmim.data.datasets import IGNORED
from cmim.data.files import open_colours
from cmim.data.survey import survey
from cmim.errors import UserError
from cmim.settings import DataSettings
from tests.tiny_runs import FOLDER, run_tiny

RGB = {"sky": (0, 128, 255), "road": (90, 90, 90), "tree": (20, 160, 40)}
NONE, NONE_TEXT = (255, 255, 255), "#FFFFFF"
GIVEN = {**{name: list(colour) for name, colour in RGB.items()}, "ignore": NONE_TEXT}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CMIM_CACHE", str(tmp_path / "cache"))


def paint(ids):
    """Ids (H, W) as RGB."""
    table = np.zeros((256, 3), np.uint8)
    table[:3], table[IGNORED] = list(RGB.values()), NONE
    return table[ids]


def indexed(rgb):
    """An image with a palette in whose order no class lies."""
    colours, index = np.unique(rgb.reshape(-1, 3), axis=0, return_inverse=True)
    image = Image.fromarray(index.reshape(rgb.shape[:2]).astype(np.uint8), mode="P")
    image.putpalette(colours.flatten().tolist())
    return image


WRITERS = {
    "png": lambda rgb, path: Image.fromarray(rgb).save(f"{path}.png"),
    "bmp": lambda rgb, path: Image.fromarray(rgb).save(f"{path}.bmp"),
    "tiff": lambda rgb, path: Image.fromarray(rgb).save(f"{path}.tif", compression="tiff_lzw"),
    "rgba": lambda rgb, path: Image.fromarray(np.dstack([rgb, np.arange(rgb[..., 0].size).reshape(rgb.shape[:2]) % 256])
                                              .astype(np.uint8)).save(f"{path}.png"),
    "palette": lambda rgb, path: indexed(rgb).save(f"{path}.png"),
    "jpeg": lambda rgb, path: Image.fromarray(rgb).save(f"{path}.jpg", quality=90),
}  # fmt: skip


def write(root, kind="png", flat=False, stray=None):
    """A folder of masks in colours; the ids of the masks by the names of the images. `stray` is a colour of four pixels of
    train0."""
    rng, ids = np.random.default_rng(0), {}
    for split, count in (("train", 4), ("val", 2)):
        folder = root if flat and split == "train" else root / split
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True)
        for i in range(count):
            name = f"{split}{i}"
            ids[name] = rng.choice([0, 1, 2, IGNORED], (4, 5)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            rgb = paint(ids[name])
            if stray is not None and name == "train0":
                rgb[:2, :2] = stray
            WRITERS[kind](rgb, folder / "masks" / name)
            Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8)).save(folder / "images" / f"{name}.png")
    return ids


def data(folder, **more):
    return config_from({"data": {"format": "folder", "root": str(folder)} | more}, "test").data


def labels(image_set):
    return {image_set.name(i): image_set.label(i) for i in range(len(image_set))}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "rgba", "palette"])
def test_colours_become_the_ids_that_were_painted(kind, flat, tmp_path):
    """Also where train/ is the root itself."""
    painted = write(tmp_path / "data", kind, flat)
    settings = data(tmp_path / "data", colours=GIVEN)
    splits = load_splits(settings)
    assert splits.class_names == tuple(RGB) and splits.colours.tolist() == [list(c) for c in RGB.values()]
    found = labels(splits.labelled) | labels(splits.val)
    assert found.keys() == painted.keys()
    for name, label in found.items():
        np.testing.assert_array_equal(label, painted[name])
        assert label.dtype == np.uint8
    assert survey(splits, settings) == [] and not [note for note in splits.notes if "not used" in note]
    assert survey(load_splits(settings), settings) == []  # what was kept of the files


def test_the_order_is_that_of_the_classes(tmp_path):
    painted, root = write(tmp_path / "data"), tmp_path / "data"
    (root / "classes.txt").write_text("tree\nsky\nroad\n")
    splits = load_splits(data(root, colours=GIVEN))
    new = np.array([1, 2, 0, *range(3, 256)])
    assert splits.class_names == ("tree", "sky", "road") and splits.colours[0].tolist() == list(RGB["tree"])
    np.testing.assert_array_equal(splits.labelled.label(1), new[painted["train1"]])
    in_order = [RGB[name] for name in ("tree", "sky", "road")] + [NONE]
    splits = load_splits(data(root, colours=[list(c) for c in in_order], classes=["tree", "sky", "road", "snow"]))
    np.testing.assert_array_equal(splits.val.label(1), np.where(new == IGNORED, 3, new)[painted["val1"]])
    merged = {"sky": GIVEN["sky"], "ground": ["#5a5a5a", GIVEN["tree"]], "ignore": NONE_TEXT}
    (root / "classes.txt").unlink()
    label = load_splits(data(root, colours=merged)).labelled.label(0)
    np.testing.assert_array_equal(label, np.array([0, 1, 1, *range(3, 256)])[painted["train0"]])


def test_config_yaml_gives_the_colours_again(tmp_path):
    text = '{sky: [0, 128, 255], road: "#5A5A5A", tree: "#14a028", ignore: ["#ffffff", [1, 2, 3]]}'
    (tmp_path / "c.yaml").write_text(f"data: {{root: x, colours: {text}}}")
    config = load_config(tmp_path / "c.yaml")
    assert config.data.colours == {"sky": "#0080ff", "road": "#5a5a5a", "tree": "#14a028", "ignore": ["#ffffff", "#010203"]}
    assert config_from(yaml.safe_load(dump_config(config)), "again") == config
    assert load_config(tmp_path / "c.yaml", ["--data.colours", text]) == config


def test_a_colour_of_no_class_is_named_with_its_share(tmp_path):
    write(tmp_path / "data", stray=(1, 2, 3))
    settings = data(tmp_path / "data", colours=GIVEN)
    splits = load_splits(settings)
    for refused in (lambda: survey(splits, settings), lambda: splits.labelled.label(0)):
        with pytest.raises(UserError, match=r"train0.png has the colour #010203 in 0.3% of its pixels, which is no class"):
            refused()
    settings = data(tmp_path / "data", colours=GIVEN | {"ignore": ["#ffffff", "#010203"]})
    splits = load_splits(settings)
    assert survey(splits, settings) == [] and (splits.labelled.label(0)[:2, :2] == IGNORED).all()
    settings = data(tmp_path / "data", colours=GIVEN, colour_tolerance=9)  # another reading of the files that are kept
    (line,) = survey(load_splits(settings), settings)
    assert line.startswith("0.0521% of the pixels of the masks have a colour farther than data.colour_tolerance 9")


def test_jpeg_masks_are_read_by_the_nearest_colour(tmp_path):
    painted = write(tmp_path / "data", "jpeg")
    with pytest.raises(
        UserError, match=r"train0.jpg is stored as JPEG, which changes colours: give --data.colour_tolerance 60"
    ):
        survey(load_splits(data(tmp_path / "data", colours=GIVEN)), data(tmp_path / "data", colours=GIVEN))
    settings = data(tmp_path / "data", colours=GIVEN, colour_tolerance=60)
    splits = load_splits(settings)
    found = labels(splits.labelled) | labels(splits.val)
    right = np.mean([found[name] == painted[name] for name in painted])
    far = np.mean([(found[name] == IGNORED) & (painted[name] != IGNORED) for name in painted])
    assert right > 0.9 and right + far > 0.98
    (line,) = survey(splits, settings)
    assert re.match(r"[\d.]+% of the pixels of the masks", line)


def test_the_nearest_colour_against_all_distances():
    rng = np.random.default_rng(0)
    names = [f"#{code:06x}" for code in rng.integers(0, 1 << 24, 6).tolist()]
    pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
    for tolerance in (0.0, 40.5, 100, 442):
        found = Colours(tuple((name,) for name in names[:5]), (names[5],), tolerance).values(pixels)
        rgb = np.array([list(bytes.fromhex(name[1:])) for name in names])
        distance = np.linalg.norm(pixels[:, :, None].astype(float) - rgb, axis=-1)
        nearest = np.array([0, 1, 2, 3, 4, IGNORED])[distance.argmin(-1)]
        np.testing.assert_array_equal(found, np.where(distance.min(-1) <= tolerance, nearest, NO_CLASS))


def test_colour_masks_without_colours_get_a_value_to_paste(tmp_path):
    root = tmp_path / "data"
    painted = write(root)
    indexed(paint(painted["val0"])).save(root / "val/masks/val0.png")  # its palette counts too
    for classes in ({}, {"classes": 3}):
        settings = data(root, **classes)
        with pytest.raises(UserError, match=r"train0.png is a colour picture") as caught:
            survey(load_splits(settings), settings)
        text = re.search(r"--data.colours '(.*?)'", str(caught.value))[1]
        given = yaml.safe_load(text)
        assert set(given.values()) == {"#0080ff", "#5a5a5a", "#14a028", "#ffffff"} and "%" in str(caught.value)
    shares = [float(s) for s in re.findall(r"([\d.]+)%", str(caught.value))]
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 100) < 0.3
    splits = load_splits(data(root, colours=given))
    assert len(splits.class_names) == 4 and splits.val.label(0).max() < 4


@pytest.mark.parametrize("quality", [60, 95])
def test_the_colours_of_jpegs_are_named_once(quality):
    rng, names = np.random.default_rng(0), ["#0080ff", "#5a5a5a", "#14a028"]
    file = io.BytesIO()
    ids = rng.choice(3, (8, 8), p=[0.6, 0.3, 0.1]).repeat(29, 0).repeat(37, 1)
    Image.fromarray(paint(ids)).save(file, "JPEG", quality=quality)
    said = colour_picture("m.jpg", count_colours(np.asarray(Image.open(file))))
    found = [name for _, name in re.findall(r'(name\d+): "(#\w+)"', said)][:3]
    rgb = lambda text: np.array(list(bytes.fromhex(text[1:])))  # noqa: E731
    assert all(np.abs(rgb(a) - rgb(b)).max() < 8 for a, b in zip(found, names, strict=True)), found
    assert "--data.colour_tolerance 60" in said


def test_evaluation_reads_the_same_colours(tmp_path):
    painted = write(tmp_path / "data")
    image_set, names = load_held_out(data(tmp_path / "data", colours=GIVEN), "val")
    assert names == tuple(RGB)
    np.testing.assert_array_equal(image_set.label(1), painted["val1"])


MISTAKES = {
    "a name": ({"colours": {"sky": "blue", "road": "#000000"}}, "data.colours: sky is 'blue', expected a colour"),
    "an empty value": ({"colours": {"sky": None, "road": "#000000"}}, "sky is None, expected a colour: .*in quotes"),
    "beyond 255": ({"colours": [[0, 0, 256], [1, 1, 1]]}, r"entry 0 is \[0, 0, 256\]"),
    "no colours": ({"colours": 3}, r"data.colours is 3, expected \{class: .* or a list of colours"),
    "twice": ({"colours": {"a": "#000000", "b": "#000000"}}, "gives #000000 twice"),
    "one class": ({"colours": {"a": "#000000", "ignore": "#111111"}}, "data.colours gives 1 classes"),
    "too few": (
        {"colours": GIVEN, "classes": ["sky", "road", "tree", "sea"]},
        "no colour for sea: the classes are sky, road",
    ),
    "too many": ({"colours": GIVEN, "classes": ["sky", "road"]}, "a colour for tree, which is no class"),
    "a list": ({"colours": ["#000000", "#111111"], "classes": 3}, "lists 2 colours, but there are 3 classes"),
    "a class ignore": ({"colours": {"a": "#000000"}, "classes": ["a", "ignore"]}, "a class is called ignore"),
    "label_map": ({"colours": GIVEN, "label_map": {1: 2}}, "data.label_map maps numbers, but with data.colours"),
    "ignore": ({"colours": GIVEN, "ignore": 3}, "data.ignore is a number, but with data.colours"),
    "tolerance alone": ({"colour_tolerance": 3}, "data.colour_tolerance is given without data.colours"),
    "negative": ({"colours": GIVEN, "colour_tolerance": -1}, "data.colour_tolerance: .* 0 to 442"),
    "drawn": ({"format": "shapes", "root": None, "colours": GIVEN}, "data.colours is given, but data.format shapes"),
    "benchmark": ({"format": "voc", "colours": GIVEN}, "data.colours: voc has its own classes"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, tmp_path):
    settings, message = MISTAKES[case]
    write(tmp_path / "data")
    with pytest.raises(UserError, match=message) as caught:
        load_splits(data(tmp_path / "data", **settings))
    assert "\n" not in str(caught.value)


def test_a_run_evaluates_and_predicts_in_these_colours(tmp_path, capsys):
    write(tmp_path / "data")
    run = run_tiny(tmp_path / "run", data__root=str(tmp_path / "data"), data__colours=GIVEN, **FOLDER)
    run_tiny(run.folder, "--resume", data__root=str(tmp_path / "data"), data__colours=GIVEN, **FOLDER)
    evaluate.main([str(run.folder), "--split", "val"])
    table = capsys.readouterr().out
    assert all(name in table for name in RGB)
    predict.main([str(run.folder), str(tmp_path / "data/val/images"), "-o", str(tmp_path / "out")])
    with Image.open(tmp_path / "out/masks/val0.png") as mask:
        assert mask.getpalette()[:9] == [value for colour in RGB.values() for value in colour]
    with pytest.raises(UserError, match=r"data.colours differs from"):
        run_tiny(
            run.folder, "--resume", data__root=str(tmp_path / "data"), data__colours=GIVEN | {"more": "#123456"}, **FOLDER
        )


AERIAL = os.environ.get("CMIM_TEST_AERIAL")


@pytest.mark.skipif(not AERIAL, reason="CMIM_TEST_AERIAL names no folder of the aerial images, with NAME_raw beside it")
def test_aerial_masks_in_colours_are_those_of_ids():
    """The masks as they are distributed against crops of the same ones, stored as ids."""
    colours = {"building": "#3C1098", "land": "#8429F6", "road": "#6EC1E4", "vegetation": "#FEDD3A", "water": "#E2A929"}
    settings = DataSettings(root=Path(AERIAL), colours=colours | {"ignore": "#9B9B9B"})
    made, compared = class_colours(settings, tuple(colours)), 0
    assert (Path(AERIAL) / "classes.txt").read_text().split() == list(colours)
    for path in sorted(Path(f"{AERIAL}_raw/masks").iterdir()):
        tile, part = re.fullmatch(r"tile(\d)_part_00(\d)", path.stem).groups()
        values = made.values(open_colours(path, 0))
        assert NO_CLASS not in values
        for crop in sorted(Path(AERIAL).glob(f"*/masks/t{tile}_p{part}_*.png")):
            y, x = map(int, crop.stem.split("_")[2:])
            np.testing.assert_array_equal(values[y : y + 256, x : x + 256], np.asarray(Image.open(crop)))
            compared += 1
    assert compared > 40
