"""Pictures of the method: what the tiles show."""

import numpy as np
import pytest
import torch
from PIL import Image

from cmim.config import default_config_path, load_config
from cmim.data.datasets import IGNORED
from cmim.data.labels import colour_map
from cmim.engine import pictures
from cmim.method import masking
from cmim.method.objective import Objective
from cmim.randomness import torch_generator
from cmim_kernels import random_mask
from tests.tiny_runs import tiny

SIDE, STRIDE, BLOCK = 32, 4, 16


class Images:
    """Two squares of the picture's size, so that nothing is resized."""

    def __init__(self, channels):
        rng = np.random.default_rng(channels)
        self.images = rng.integers(0, 256, (2, SIDE, SIDE, channels), np.uint8)
        self.labels = rng.integers(0, 3, (2, SIDE, SIDE)).astype(np.uint8)

    def __len__(self):
        return 2

    def image(self, i):
        return self.images[i]

    def label(self, i):
        return self.labels[i]


def drawn(tmp_path, monkeypatch, channels, guess, **settings):
    """The tiles of each column, for a decoder that answers `guess(images)`, rows (row, column, channel) of each token."""
    config = load_config(default_config_path(), tiny("unused", mask__block=BLOCK, **settings)[2:])
    config = config.model_copy(update={"data": config.data.model_copy(update={"channels": channels})})
    image_set, columns = Images(channels), {}
    torch.manual_seed(0)
    objective = Objective(config, 3)
    images = torch.from_numpy(image_set.images).permute(0, 3, 1, 2)
    monkeypatch.setattr(objective, "reconstruction", torch.nn.Identity(), raising=False)
    monkeypatch.setattr(objective.reconstruction, "forward", lambda *_: guess(objective.net.normalise(images)))
    monkeypatch.setattr(pictures, "grid", lambda tiles, *_: columns.update(tiles) or Image.new("RGB", (1, 1)))
    colours = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
    pictures.save_picture(
        tmp_path / "p" / "a.png", objective, image_set, config, ["a", "b", "c"], colours, torch.device("cpu")
    )
    return {name: np.stack(tiles) for name, tiles in columns.items()}, image_set, config


def patches(images):
    """(B, h w, p p c) of images (B, c, H, W), one after another."""
    rows = range(0, SIDE, STRIDE)
    cut = [images[:, :, y : y + STRIDE, x : x + STRIDE].permute(0, 2, 3, 1).flatten(1) for y in rows for x in rows]
    return torch.stack(cut, 1)


def as_shown(images):
    """(n, H, W, c) as a picture shows them."""
    return images[..., :3] if images.shape[-1] > 2 else images[..., :1].repeat(3, -1)


def hidden_pixels(config):
    grid = SIDE // STRIDE
    masks = [
        random_mask(1, grid, grid, config.mask.ratio, block=BLOCK // STRIDE, generator=torch_generator(0, i, "picture"))
        for i in (0, 1)
    ]
    return masking.expand(torch.cat(masks), STRIDE).numpy()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_decoder_that_knows_the_image_gives_it_back(channels, tmp_path, monkeypatch):
    tiles, image_set, config = drawn(tmp_path, monkeypatch, channels, patches)
    names = ["image", "masked", "reconstruction", "pseudo-label", "confidence", "prediction", "truth"]
    assert list(tiles) == names and (tmp_path / "p" / "a.png").exists()
    expected, hidden = as_shown(image_set.images), hidden_pixels(config)
    assert np.array_equal(tiles["image"], expected)
    mean = as_shown(np.array(config.data.normalisation()[0])[None, None, None] * 255).round()
    assert np.array_equal(tiles["masked"], np.where(hidden[..., None], mean, expected))
    restored = (tiles["reconstruction"] == expected).all(-1)
    assert restored[~hidden].all() and restored[hidden].any()
    assert (tiles["reconstruction"] == tiles["masked"]).all(-1)[~restored].all()


def test_without_a_decoder_there_is_no_reconstruction(tmp_path, monkeypatch):
    tiles, _, _ = drawn(tmp_path, monkeypatch, 3, lambda _: pytest.fail("decoded"), method__preset="semantic")
    assert "masked" in tiles and "reconstruction" not in tiles


def test_normalised_patches_get_their_mean_and_spread_back(tmp_path, monkeypatch):
    def normalised(images):
        target = patches(images)
        return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()

    tiles, image_set, _ = drawn(tmp_path, monkeypatch, 5, normalised, reconstruction__normalize=True)
    restored = (tiles["reconstruction"] == as_shown(image_set.images)).all(-1)
    assert (restored | (tiles["reconstruction"] == tiles["masked"]).all(-1)).all() and restored.mean() > 0.6


def test_colours_are_those_of_the_classes(tmp_path, monkeypatch):
    tiles, image_set, _ = drawn(tmp_path, monkeypatch, 3, patches)
    assert np.array_equal(tiles["truth"], np.eye(3, dtype=np.uint8)[image_set.labels] * 250)
    assert np.array_equal(tiles["pseudo-label"], tiles["prediction"])  # mim.tau is 0
    assert {tuple(c) for c in tiles["prediction"].reshape(-1, 3)} <= {(250, 0, 0), (0, 250, 0), (0, 0, 250)}


@pytest.mark.parametrize("size", [(40, 64), (64, 40)])
def test_the_middle_of_an_image_is_shown(size):
    image, label = np.zeros((*size, 5), np.uint8), np.full(size, 7, np.uint8)
    long = size.index(64)
    middle = [slice(None)] * 2
    middle[long] = slice(12, 52)
    image[tuple(middle)], label[tuple(middle)] = [10, 20, 30, 40, 50], 1
    for side, edge in ((40, 0), (20, 1)):  # where it shrinks, a pixel at the edge is drawn from beyond it too
        pixels, classes = pictures._square(image, label, side)
        assert pixels.shape == (5, side, side) and (classes == 1).all()
        inner = pixels[:, edge : side - edge, edge : side - edge]
        assert (inner == torch.tensor([10, 20, 30, 40, 50], dtype=torch.uint8)[:, None, None]).all()


def test_what_has_no_class_is_hatched_and_looks_like_no_class():
    colours = colour_map(255)
    tile = pictures.colourise(np.full((48, 64), IGNORED), colours)
    assert {tuple(c) for c in tile.reshape(-1, 3).tolist()} == {(96,) * 3, (224,) * 3}
    assert all((tile[y] != tile[y, :1]).any() for y in range(48))  # stripes, whatever the palette
    classes = np.arange(255).reshape(15, 17)
    assert np.array_equal(pictures.colourise(classes, colours), colours[classes])


def test_an_overlay_leaves_a_class_clear_and_names_the_others():
    image = np.random.default_rng(0).integers(0, 256, (20, 160, 3), np.uint8)
    classes = np.zeros((20, 160), np.uint8)
    classes[:, 80:] = 2
    colours = colour_map(3)
    laid = np.asarray(pictures.overlay(image, classes, colours, clear=0))
    assert np.array_equal(laid[:, :80], image[:, :80]) and (laid[:, 80:] != image[:, 80:]).any()
    sheet = np.asarray(pictures.with_legend(Image.fromarray(laid), ["ground", "road", "tree"], colours, [2]))
    assert sheet.shape == (20 + 4 + 24, 160, 3) and np.array_equal(sheet[:20], laid)
    assert (sheet[20:] == colours[2]).all(-1).sum() > 100 and not (sheet[20:] == colours[1]).all(-1).any()


def test_the_legend_of_a_picture_explains_the_hatch():
    tiles = {"masked": [np.zeros((8, 8, 3), np.uint8)], "truth": [np.zeros((8, 8, 3), np.uint8)]}
    sheet = np.asarray(pictures.grid(tiles, ["a", "b"], colour_map(2)))
    assert (sheet[-28:] == 96).all(-1).any() and (sheet[-28:] == 224).all(-1).any()


@pytest.mark.parametrize("width, scale", [(90, 1), (999, 1), (4000, 4)])
def test_the_legend_grows_with_the_image(width, scale):
    colours = np.array([[9, 9, 9], [200, 30, 40]], np.uint8)
    sheet = np.asarray(pictures.with_legend(Image.new("RGB", (width, 8)), ["ground", "road"], colours, [1]))
    rows = np.nonzero((sheet == colours[1]).all(-1).any(1))[0]
    assert sheet.shape[0] == 8 + 4 + 24 * scale and rows[0] >= 8 and len(rows) in range(15 * scale, 16 * scale + 1)
