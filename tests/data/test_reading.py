"""How masks are read, decided from what all of them hold."""

import re

import numpy as np
import pytest
from PIL import Image

from cmim.data.class_files import ClassFile
from cmim.data.colours import class_colours
from cmim.data.files import open_image
from cmim.data.inspection import look_at_image, look_at_mask
from cmim.data.labels import encoding_of
from cmim.data.reading import class_pixels, decide
from cmim.errors import UserError
from cmim.settings import DataSettings


def decided(folder, masks, names=None, **save):
    """The `Reading` of masks that are given as images, and their `MaskFacts`."""
    facts = {}
    for i, mask in enumerate(masks):
        path = folder / f"{i}{save.get('suffix', '.png')}"
        mask.save(path, **{key: value for key, value in save.items() if key != "suffix"})
        facts[path] = look_at_mask(path)
    return decide(facts, ClassFile(folder / "classes.txt", tuple(names)) if names else None), facts


def grey(*values, mode="L"):
    """A mask with a 16 x 16 square of each value."""
    image = Image.fromarray(np.repeat(np.array(values, np.uint8), 16)[None].repeat(16, 0))
    return image if mode == "L" else Image.merge(mode, [image] * 3 + [Image.new("L", image.size, 255)] * (mode == "RGBA"))


def coloured(*colours):
    return Image.fromarray(np.repeat(np.array(colours, np.uint8), 16, axis=0)[None].repeat(16, 0))


def totals(reading, facts):
    """Pixels of each class over all masks."""
    settings = DataSettings(root=".", **reading.data)
    names = tuple(reading.data["classes"])
    encoding, total = encoding_of(settings, class_colours(settings, names), len(names)), {}
    for mask in facts.values():
        for k, n in class_pixels(mask, encoding).items():
            total[k] = total.get(k, 0) + n
    return total


@pytest.mark.parametrize(
    "values, names, expected, labels",
    [
        ([0, 1, 2, 255], None, ["class 0", "class 1", "class 2"], None),
        ([0, 255], None, ["background", "object"], {255: 1}),
        ([0, 255], ["sky", "nucleus"], ["sky", "nucleus"], {255: 1}),
        ([1, 2, 3], None, ["value 1", "value 2", "value 3"], {1: 0, 2: 1, 3: 2}),
        ([0, 5, 9], None, ["value 0", "value 5", "value 9"], {5: 1, 9: 2}),
        ([0, 85, 170, 255], None, ["value 0", "value 85", "value 170", "value 255"], {85: 1, 170: 2, 255: 3}),
        ([0, 127, 255], ["a", "b", "c"], ["a", "b", "c"], {127: 1, 255: 2}),
        ([0, 1], ["a", "b", "c"], ["a", "b", "c"], None),
        ([10, 20], ["a", "b"], ["a", "b"], {10: 0, 20: 1}),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_numbers(values, names, expected, labels, mode, tmp_path):
    reading, facts = decided(tmp_path, [grey(*values, mode=mode)] * 2, names)
    assert reading.data == {"classes": expected} | ({"label_map": labels} if labels else {})
    assert not reading.problems and reading.unnamed == (names is None)
    assert -1 not in totals(reading, facts)


@pytest.mark.parametrize(
    "masks, names, said",
    [
        (
            [grey(0, 1), grey(0, 9)],
            ["a", "b"],
            r"the value 9 in 1 mask, such as .*1.png, is no class.*data.label_map {9: 255}",
        ),
        ([grey(7)] * 2, None, "all masks hold the value 7 only"),
        ([grey(*range(255))], None, "they seem to number objects"),
        ([grey(0, 255)], ["a", "b", "c"], "hold 0 and 255, two classes, but .* names 3"),
        ([grey(0, 1), coloured((255, 0, 0), (0, 255, 0))], None, "1 masks hold (numbers|colours) where 1 hold"),
    ],
)
def test_what_cannot_be_read_is_a_problem(masks, names, said, tmp_path):
    reading, _ = decided(tmp_path, masks, names)
    assert len(reading.problems) == 1 and re.search(said, reading.problems[0])


def test_colours_are_classes(tmp_path):
    reading, facts = decided(tmp_path, [coloured((255, 0, 0), (255, 0, 0), (0, 0, 9)), coloured((255, 0, 0), (0, 0, 9))])
    assert reading.data["colours"] == {"colour ff0000": "#ff0000", "colour 000009": "#000009"} and reading.unnamed
    assert totals(reading, facts) == {0: 3 * 256, 1: 2 * 256}


def test_a_table_of_colours_gives_their_names(tmp_path):
    table = ClassFile(tmp_path / "t.csv", ("water", "void", "land"), ("#0000ff", "#000000", "#00ff00"))
    path = tmp_path / "a.png"
    coloured((0, 0, 255), (0, 0, 0), (0, 255, 0)).save(path)
    facts = {path: look_at_mask(path)}
    reading = decide(facts, table)
    assert reading.data["colours"] == {"water": "#0000ff", "land": "#00ff00", "ignore": "#000000"}
    assert totals(reading, facts) == {0: 256, 255: 256, 1: 256} and not reading.problems
    coloured((0, 0, 255), (1, 2, 3)).save(path)
    assert "#010203" in decide({path: look_at_mask(path)}, table).problems[0]


def test_jpeg_masks_in_black_and_white_and_in_colours(tmp_path):
    rng = np.random.default_rng(0)
    blobs = [np.kron(rng.integers(0, 3, (8, 8)), np.ones((16, 16), int)) for _ in range(3)]
    black = [Image.fromarray(((blob == 2) * 255).astype(np.uint8)) for blob in blobs]
    reading, facts = decided(tmp_path, black, suffix=".jpg", quality=80)
    assert reading.data["colours"] == {"background": "#000000", "object": "#ffffff"}
    found, true = totals(reading, facts), sum((blob == 2).sum() for blob in blobs)
    assert set(found) == {0, 1} and abs(found[1] - true) < 0.02 * true
    y, x = np.mgrid[:128, :128]
    blobs = [np.digitize(np.hypot(y - c, x - c), [25, 70]) for c in (40, 57, 66)]
    palette = np.array([[255, 0, 0], [20, 120, 20], [0, 0, 255]], np.uint8)
    reading, facts = decided(tmp_path, [Image.fromarray(palette[blob]) for blob in blobs], suffix=".jpg", quality=80)
    assert len(reading.data["classes"]) == 3 and reading.data["colour_tolerance"] == 60 and not reading.problems
    ids = [Image.fromarray(blob.astype(np.uint8)) for blob in blobs]
    reading, _ = decided(tmp_path, ids, suffix=".jpg", quality=80)
    assert "JPEG has mixed up" in reading.problems[0] and "classes" not in reading.data


def test_palettes_that_contradict_each_other_are_read_by_colour(tmp_path):
    first, second = grey(0, 0, 1), grey(0, 1, 1)
    for image, palette in ((first, [255, 0, 0, 0, 255, 0]), (second, [0, 255, 0, 255, 0, 0])):
        image.putpalette(palette)
    reading, facts = decided(tmp_path, [first, second])
    assert set(reading.data["colours"].values()) == {"#ff0000", "#00ff00"} and "palettes differ" in reading.notes[0]
    assert totals(reading, facts) == {0: 4 * 256, 1: 2 * 256}
    second.putpalette([255, 0, 0, 0, 0, 255])  # the index of no colour changes: the indices are meant
    reading, _ = decided(tmp_path, [first, second])
    assert "colours" not in reading.data


def test_a_mask_in_the_alpha_channel_is_named(tmp_path):
    Image.fromarray(np.dstack([np.full((4, 4, 3), 255), np.eye(4) * 255]).astype(np.uint8)).save(tmp_path / "a.png")
    assert "in the alpha channel" in look_at_mask(tmp_path / "a.png").error


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_images_with_more_than_eight_bits(suffix, tmp_path):
    values = np.array([[0, 1000, 2000, 3000, 4000, 65535]], np.uint16)
    path = tmp_path / f"a{suffix}"
    channels = 2 if suffix == ".npy" else 1
    np.save(path, values[..., None].repeat(2, 2)) if suffix == ".npy" else Image.fromarray(values).save(path)
    facts = look_at_image(path)
    assert facts.deep and facts.channels == channels and facts.sample.max() == 65535
    read = open_image(path, channels, limits=(1000, 3000))
    assert read.shape == (1, 6, channels) and read[0, :, -1].tolist() == [0, 0, 128, 255, 255, 255]
    with pytest.raises(UserError, match=r"--data\.range"):
        open_image(path, channels)
    if suffix != ".npy":
        assert (open_image(path, 3, limits=(1000, 3000)) == read).all()
    eight = tmp_path / f"b{suffix}"
    small = (values // 257).astype(np.uint8)
    np.save(eight, small[..., None].repeat(2, 2)) if suffix == ".npy" else Image.fromarray(small).save(eight)
    with pytest.raises(UserError, match=r"data\.range"):
        open_image(eight, channels, limits=(0, 255))


def test_floats_and_nan(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[[np.nan], [0.5], [np.inf]]], np.float32))
    assert open_image(tmp_path / "a.npy", 1, limits=(0, 1)).ravel().tolist() == [0, 128, 255]
