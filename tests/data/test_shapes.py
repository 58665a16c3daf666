import numpy as np
import pytest

from cmim.data import load_splits
from cmim.data.shapes import CLASS_NAMES, COLOURS, SIZE, ShapesSet
from cmim.settings import Config


def shapes(**settings):
    return load_splits(Config(data={"format": "shapes", **settings}).data)


def test_the_splits_share_no_image():
    splits = shapes(shapes={"labelled": 5, "unlabelled": 7, "val": 4, "test": 3})
    sets = [splits.labelled, splits.unlabelled, splits.val, splits.test]
    assert [len(s) for s in sets] == [5, 7, 4, 3]
    images = {s.image(i).tobytes() for s in sets for i in range(len(s))}
    names = {s.name(i) for s in sets for i in range(len(s))}
    assert len(images) == len(names) == 19
    assert splits.class_names == CLASS_NAMES and len(np.unique(COLOURS, axis=0)) == 5


def test_the_split_seed_draws_them_and_nothing_else_does():
    first = lambda **s: shapes(**s).labelled.image(0).tobytes()  # noqa: E731
    assert first() == first(shapes={"labelled": 2, "val": 9}) != first(split_seed=1)
    splits = shapes(shapes={"labelled": 2})
    more = shapes(shapes={"labelled": 3})
    assert (splits.unlabelled.image(0) == more.labelled.image(2)).all()
    assert (splits.val.image(0) == more.val.image(0)).all()


def test_an_image_does_not_depend_on_what_was_drawn_before():
    a, b = ShapesSet(range(4), 0), ShapesSet(range(4), 0)
    b.image(0)
    assert (a.image(3) == b.image(3)).all() and (a.label(3) == b.label(3)).all() and a.name(3) == b.name(3) == "shapes_3"


@pytest.fixture(scope="module")
def drawn():
    s = ShapesSet(range(300), 0)
    return np.stack([s.image(i) for i in range(300)]), np.stack([s.label(i) for i in range(300)])


def test_images_and_labels(drawn):
    images, labels = drawn
    assert images.shape == (300, SIZE, SIZE, 3) and images.dtype == np.uint8
    assert labels.shape == (300, SIZE, SIZE) and labels.dtype == np.uint8
    share = np.bincount(labels.ravel()) / labels.size
    assert len(share) == 5 and 0.5 < share[0] < 0.7 and share[1:].min() > 0.06 and share[1:].max() < 0.14


def test_colour_is_no_cue_and_texture_is(drawn):
    images, labels = drawn
    pixels = images.astype(float)
    objects = [pixels[labels == k].mean(0) for k in range(1, 5)]
    assert np.ptp(objects, axis=0).max() < 15  # mean colours of the four classes agree
    # The brightness of an object flips within a few pixels; that of the ground does not.
    step = np.abs(np.diff(pixels.mean(-1), axis=2))
    same = labels[:, :, 1:] == labels[:, :, :-1]
    change = [step[same & (labels[:, :, 1:] == k)].mean() for k in range(5)]
    assert min(change[1:]) > 1.5 * change[0]
