import colorsys
from collections import deque
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmim.data.augmentation import _turn_hue, cutmix_box, resize, strong, weak


class Scripted:
    """A generator whose draws are known."""

    def __init__(self, integers=(), random=()):
        self._integers, self._random = deque(integers), deque(random)

    def integers(self, *bounds):
        low, high = bounds if len(bounds) == 2 else (0, *bounds)
        return min(max(self._integers.popleft(), low), high - 1)

    def random(self):
        return self._random.popleft()


def photograph(width, height, seed=0, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8), rng.integers(0, 5, (height, width), np.uint8)


def resized_by_pillow(image, size):
    """Every channel by itself; `size` is (width, height)."""
    parts = [
        Image.fromarray(np.ascontiguousarray(c)).resize(size, Image.Resampling.BILINEAR) for c in image.transpose(2, 0, 1)
    ]
    return np.stack([np.asarray(part) for part in parts], -1)


@given(
    width=st.integers(5, 40), height=st.integers(5, 40), factor=st.floats(0.5, 2), crop=st.integers(4, 40),
    left=st.integers(0, 80), top=st.integers(0, 80), flip=st.booleans(), seed=st.integers(0, 9),
    channels=st.sampled_from([1, 2, 3, 4, 6]),
)  # fmt: skip
def test_weak_is_resize_pad_crop_flip(width, height, factor, crop, left, top, flip, seed, channels):
    image, label = photograph(width, height, seed, channels)
    target = round(max(width, height) * factor)
    rng = Scripted([target, left, top], [0.0 if flip else 0.9])
    got, got_label, got_valid = weak(image, label, rng, crop, (0.01, 100))

    resized = tuple(max(1, round(s * target / max(width, height))) for s in (width, height))
    pixels = resized_by_pillow(image, resized)
    x, y = (
        [floor(Fraction(2 * i + 1, 2) * old / new) for i in range(new)]
        for new, old in zip(resized, (width, height), strict=True)
    )
    classes = label[np.ix_(y, x)]
    padding = [(0, max(crop - side, 0)) for side in resized[::-1]]
    pixels, classes = np.pad(pixels, [*padding, (0, 0)]), np.pad(classes, padding, constant_values=255)
    top, left = min(top, pixels.shape[0] - crop), min(left, pixels.shape[1] - crop)
    window = (slice(top, top + crop), slice(left, left + crop))
    turn = (slice(None), slice(None, None, -1 if flip else 1))
    pixels, classes = pixels[window][turn], classes[window][turn]

    assert got.dtype == got_label.dtype == torch.uint8 and got.is_contiguous()
    difference = np.abs(got.permute(1, 2, 0).numpy().astype(int) - pixels)
    assert difference.max() <= 1  # Pillow rounds the corners of a box to float32
    assert (got_label.numpy() == classes).all()
    assert torch.equal(got_valid, got_label != 255)


def test_weak_draws_its_parameters():
    image, label = photograph(40, 30)
    rng = np.random.default_rng(0)
    views = [weak(image, label, rng, 16, (1, 1)) for _ in range(300)]
    # At scale 1 every view is a window of the image or of its mirror image: find which.
    pixels, windows = image, {}
    for top in range(15):
        for left in range(25):
            window = pixels[top : top + 16, left : left + 16]
            windows[window.tobytes()] = (top, left, False)
            windows[window[:, ::-1].tobytes()] = (top, left, True)
    found = [windows[v[0].permute(1, 2, 0).numpy().tobytes()] for v in views]
    assert {f[0] for f in found} == set(range(15)) and {f[1] for f in found} == set(range(25))
    assert 0.4 < np.mean([f[2] for f in found]) < 0.6
    # Bounds of the resize: the longer side of what is not padding.
    sides = [int(weak(image, None, rng, 90, (0.5, 2.0))[2].sum(1).max()) for _ in range(400)]
    assert min(sides) in (20, 21) and max(sides) in (79, 80) and 45 < np.mean(sides) < 55


ALL = (("horizontal", "vertical"), True)


@pytest.mark.parametrize(
    "flips, rotate90, number",
    [(("horizontal",), False, 2), ((), False, 1), (("vertical",), False, 2), (("horizontal", "vertical"), False, 4),
     ((), True, 4), (("horizontal",), True, 8), (*ALL, 8)],
)  # fmt: skip
def test_flips_and_turns_are_drawn_alike_and_with_the_mask(flips, rotate90, number):
    square = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rng, views = np.random.default_rng(0), {}
    for _ in range(800):
        image, label, _ = weak(np.stack([square] * 3, -1), square, rng, 16, (1, 1), flips, rotate90)
        assert (image[0] == label).all() and (image[2] == label).all() and label.is_contiguous()
        views[label.numpy().tobytes()] = views.get(label.numpy().tobytes(), 0) + 1
    assert len(views) == number and all(0.6 < number * count / 800 < 1.4 for count in views.values())
    expected = [square]
    expected += [view[:, ::-1] for view in expected] if "horizontal" in flips else []
    expected += [view[::-1] for view in expected] if "vertical" in flips else []
    expected = [np.rot90(view, turns) for view in expected for turns in range(4 if rotate90 else 1)]
    assert {view.tobytes() for view in expected} == set(views)


def test_padding_is_flipped_and_turned_too():
    image, label = photograph(40, 30)
    for seed in range(20):
        view, classes, valid = weak(image, label, np.random.default_rng(seed), 48, (1, 1), *ALL)
        assert int(valid.sum()) == 40 * 30 and torch.equal(valid, classes != 255) and not view[:, ~valid].any()


@pytest.mark.parametrize("seed", range(8))
def test_other_draws_do_not_depend_on_flips_and_turns(seed):
    """Nor are those of the default affected: without them a view is the default's, turned back."""
    image, label = photograph(40, 30)
    plain, _, _ = weak(image, label, np.random.default_rng(seed), 16, (0.5, 2), ())
    default, _, _ = weak(image, label, np.random.default_rng(seed), 16, (0.5, 2))
    every, _, _ = weak(image, label, np.random.default_rng(seed), 16, (0.5, 2), *ALL)
    assert torch.equal(default, plain) or torch.equal(default, plain.flip(-1))
    sides = (plain, plain.flip(-1))
    assert any(torch.equal(every, side.rot90(turns, (1, 2))) for side in sides for turns in range(4))


def test_weak_takes_a_label_of_another_resolution():
    label = np.kron(np.arange(12).reshape(3, 4), np.ones((40, 40))).astype(np.uint8)  # 120 x 160
    image = np.stack([label[20::40, 20::40].repeat(10, 0).repeat(10, 1) * 20] * 3, -1)
    agree = []
    for seed in range(20):
        view, classes, valid = weak(image, label, np.random.default_rng(seed), 32, (0.8, 2))
        agree.append((view[0] == classes * 20)[valid].float().mean())
    assert np.mean(agree) > 0.8  # all but the blended borders


def test_weak_without_a_label():
    image, _ = photograph(40, 30)
    _, label, valid = weak(image, None, np.random.default_rng(0), 32, (0.5, 0.5))
    assert (label == 255).all() and int(valid.sum()) == 20 * 15


@given(width=st.integers(2, 30), height=st.integers(2, 30), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_resize_takes_every_channel_by_itself(width, height, size):
    for channels in (1, 3, 4, 5):
        image = photograph(width, height, 0, channels)[0]
        assert (resize(image, size) == resized_by_pillow(image, size[::-1])).all()


def test_strong_of_other_channels_is_brightness_contrast_and_blur():
    """A flat image of level v becomes v x brightness, on which contrast changes nothing; blur neither."""
    rng = np.random.default_rng(0)
    for channels in (1, 2, 4, 9):
        flat = torch.full((channels, 5, 7), 100, dtype=torch.uint8)
        views = [strong(flat, rng) for _ in range(400)]
        assert all(v.shape == flat.shape and v.dtype == torch.uint8 and v.unique().numel() == 1 for v in views)
        levels = np.array([int(v[0, 0, 0]) for v in views])
        assert levels.min() in range(50, 56) and levels.max() in range(144, 151)
        assert 0.15 < np.mean(levels == 100) < 0.27  # 0.2 without jitter, and factors that round to 100
    # Channels of two levels: brightness keeps their ratio, contrast moves them around their mean, the same for each pixel.
    two = torch.tensor([60, 120], dtype=torch.uint8)[:, None, None].expand(2, 4, 4).contiguous()
    spread = [(float(v[0, 0, 0]), float(v[1, 0, 0])) for v in (strong(two, rng) for _ in range(400))]
    ratio = np.array([b / a for a, b in spread])
    assert 1.35 < ratio.min() < 1.5 and 2.7 < ratio.max() < 3.2 and abs(np.median(ratio) - 2) < 0.1  # 105 / 75 to 135 / 45
    assert two.tolist() == torch.tensor([60, 120])[:, None, None].expand(2, 4, 4).tolist()


def test_strong_blurs_channels_apart():
    pixels = torch.zeros(4, 16, 16, dtype=torch.uint8)
    pixels[2] = torch.from_numpy(photograph(16, 16)[1] * 60)
    views = [strong(pixels, np.random.default_rng(seed)) for seed in range(60)]
    assert all(v[i].unique().numel() == 1 for v in views for i in (0, 1, 3))  # nothing leaks into the flat ones
    inner = lambda v: (v[2].float().diff(dim=0).abs().mean() / v[2].float().mean()).item()  # noqa: E731
    roughness = np.array([inner(v) for v in views])
    assert roughness.min() < 0.1 * roughness.max() and 0.3 < np.mean(roughness < 0.7 * roughness.max()) < 0.7


def test_strong_probabilities():
    pixels = torch.zeros(3, 6, 6, dtype=torch.uint8)
    pixels[0], pixels[1] = 200, 90
    rng = np.random.default_rng(0)
    views = [strong(pixels, rng) for _ in range(1000)]
    assert pixels[0].eq(200).all() and all(v.shape == pixels.shape and v.dtype == torch.uint8 for v in views)
    grey = np.mean([bool((v[0] == v[1]).all() and (v[1] == v[2]).all()) for v in views])
    same = np.mean([torch.equal(v, pixels) for v in views])  # blur leaves a flat picture alone
    assert abs(grey - 0.2) < 0.05 and abs(same - 0.2 * 0.8) < 0.05
    textured = torch.from_numpy(photograph(6, 6)[0]).permute(2, 0, 1).contiguous()
    same = np.mean([torch.equal(strong(textured, rng), textured) for _ in range(1000)])
    assert 0.04 < same < 0.13  # 0.2 x 0.8 x 0.5, and blurs of a radius too small to show


@pytest.mark.parametrize("channels", [3, 4])
def test_less_colour_jitter(channels):
    """Closer to the image; with 0 only blur is left."""
    pixels = torch.tensor([160, 80, 90, 70][:channels], dtype=torch.uint8)[:, None, None].expand(channels, 4, 4).contiguous()
    views = lambda colour: [strong(pixels, np.random.default_rng(seed), colour) for seed in range(200)]  # noqa: E731
    assert all(torch.equal(view, pixels) for view in views(0))
    assert all(torch.equal(a, strong(pixels, np.random.default_rng(i))) for i, a in enumerate(views(1)))
    spread = {colour: max((v.float() - pixels.float()).abs().max().item() for v in views(colour)) for colour in (0.2, 1)}
    assert 5 < spread[0.2] < 0.5 * spread[1]
    grey = [sum(bool((v[0] == v[1]).all()) for v in views(colour)) for colour in (0.2, 1)]
    assert channels > 3 or 1 <= grey[0] < grey[1] / 2


def test_strong_ranges():
    """A flat colour shows the jitter in HSV."""
    pixels = torch.tensor([160, 80, 80], dtype=torch.uint8)[:, None, None].expand(3, 4, 4).contiguous()
    rng = np.random.default_rng(1)
    colours = [strong(pixels, rng)[:, 0, 0].tolist() for _ in range(1500)]
    colours = [colorsys.rgb_to_hsv(*(c / 255 for c in colour)) for colour in colours if len(set(colour)) > 1]
    hue = np.array([(h + 0.5) % 1 - 0.5 for h, _, _ in colours])
    assert -0.27 < hue.min() < -0.22 and 0.22 < hue.max() < 0.27 and abs(hue.mean()) < 0.02
    value, saturation = np.array([v for _, _, v in colours]), np.array([s for _, s, _ in colours])
    assert 0.15 < value.min() < 0.35 and 0.9 < value.max() <= 1
    assert saturation.min() < 0.3 and saturation.max() > 0.65


def test_a_third_of_a_turn_makes_red_green():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    r, g, b = _turn_hue(red, 1 / 3).getpixel((0, 0))
    assert g == 255 and r < 12 and b < 12
    assert _turn_hue(red, 0).getpixel((0, 0)) == (255, 0, 0)


def test_views_repeat_for_equal_generators():
    image, label = photograph(40, 30)
    make = lambda seed: weak(image, label, np.random.default_rng(seed), 32, (0.5, 2))  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(make(3), make(3), strict=True))
    assert torch.equal(*(strong(make(3)[0], np.random.default_rng(4)) for _ in range(2)))


@given(size=st.integers(8, 800), seed=st.integers(0, 10_000))
def test_cutmix_box_lies_inside(size, seed):
    top, left, bottom, right = cutmix_box(np.random.default_rng(seed), size, 1.0)
    assert 0 <= top < bottom <= size and 0 <= left < right <= size
    height, width = bottom - top, right - left
    assert (height + 1) * (width + 1) >= 0.02 * size**2 and height * width <= 0.4 * size**2
    assert (height + 1) / width >= 0.3 and (width + 1) / height >= 0.3


def test_cutmix_boxes_are_spread():
    rng = np.random.default_rng(0)
    boxes = np.array([cutmix_box(rng, 100, 0.5) for _ in range(2000)])
    cut = boxes[boxes.any(1)]
    assert abs(len(cut) / len(boxes) - 0.5) < 0.04
    middle = (cut[:, :2] + cut[:, 2:]).mean(0) / 2
    assert np.abs(middle - 50).max() < 3
    height, width = (cut[:, 2:] - cut[:, :2]).T
    flat = height * width < 1000  # larger ones are rejected more often where they are long
    assert abs((height / width)[flat].mean() - 1.8) < 0.2 and np.median(height * width) == pytest.approx(2100, rel=0.1)
    assert cutmix_box(rng, 100, 0.0) == (0, 0, 0, 0)
