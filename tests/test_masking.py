import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim.method.masking import Fill, expand, isolate_class, per_class_mask
from cmim.settings import IMAGENET_MEAN, IMAGENET_STD


def keys(count, seed=0):
    return torch.randint(0, 2**62, (count,), generator=torch.Generator().manual_seed(seed))


def random_labels(seed, batch, height, width, classes):
    """Token classes in patches of two, so that classes have unlike sizes; -1 and `classes` are ignored."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(-1, classes + 1, (batch, -(-height // 2), -(-width // 2)), generator=g, dtype=torch.int32)
    return expand(coarse, 2)[:, :height, :width]


@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    classes=st.integers(1, 4),
    ratio=st.floats(0.01, 0.99),
    block=st.integers(1, 4),
)
def test_per_class_mask_hides_an_exact_count_of_every_class_in_whole_blocks(seed, height, width, classes, ratio, block):
    labels = random_labels(seed, 3, height, width, classes)
    masked = per_class_mask(labels, keys(3, seed), classes, ratio, block)
    assert masked.shape == labels.shape and masked.dtype == torch.bool
    for image, hidden in zip(labels, masked, strict=True):
        for own in [image == k for k in range(classes)] + [(image < 0) | (image >= classes)]:
            assert int(hidden[own].sum()) == round(ratio * int(own.sum()))
            in_part = 0
            for top in range(0, height, block):
                for left in range(0, width, block):
                    place = slice(top, top + block), slice(left, left + block)
                    here = hidden[place][own[place]]
                    in_part += bool(here.any()) and not bool(here.all())
            assert in_part <= 1


def test_per_class_mask_is_drawn_evenly_and_by_key_alone():
    labels = random_labels(3, 1, 6, 6, 2).expand(4000, -1, -1)
    drawn = keys(4000)
    masked = per_class_mask(labels, drawn, 2, 0.5, 2)
    for k in (0, 1):
        own = labels[0] == k
        share = masked[:, own].float().mean(0)
        assert (share - round(0.5 * int(own.sum())) / int(own.sum())).abs().max() < 0.05
    some = torch.tensor([17, 5])
    assert torch.equal(per_class_mask(labels[some], drawn[some], 2, 0.5, 2), masked[some])
    assert len(masked.flatten(1).unique(dim=0)) > 10


@given(seed=st.integers(0, 10**6), classes=st.integers(1, 4))
def test_isolate_class_keeps_one_whole_class(seed, classes):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, classes + 1, (4, 2, 3), generator=g, dtype=torch.int32)
    pixels = torch.where(pixels == classes, 255, pixels)
    pixels[0] = 255
    kept = isolate_class(pixels, keys(4, seed), classes)
    for before, after in zip(pixels, kept, strict=True):
        present = set(before.unique().tolist()) - {255}
        left = set(after.unique().tolist()) - {255}
        assert len(left) == min(1, len(present)) and left <= present
        for k in left:
            assert torch.equal(after == k, before == k)


def test_isolate_class_draws_evenly_among_the_present():
    image = torch.full((5, 5), 255)
    image[0, 0], image[1], image[2:] = 0, 2, 3  # class 1 is absent, class 0 is one pixel
    drawn = keys(6000)
    kept = isolate_class(image.expand(6000, -1, -1), drawn, 5)
    share = torch.stack([(kept == k).flatten(1).any(1).float().mean() for k in range(5)])
    torch.testing.assert_close(share, torch.tensor([1, 0, 1, 1, 0]) / 3, atol=0.03, rtol=0)
    some = torch.tensor([70, 3])
    assert torch.equal(isolate_class(image.expand(2, -1, -1), drawn[some], 5), kept[some])


def test_expand():
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    pixels = expand(mask, 3)
    assert pixels.shape == (2, 9, 12) and pixels.dtype == torch.bool
    for b in range(2):
        for row in range(9):
            for column in range(12):
                assert pixels[b, row, column] == mask[b, row // 3, column // 3]


@pytest.mark.parametrize(
    ("kind", "pixel"), [("mean", [0.485, 0.456, 0.406]), ("black", [0.0, 0.0, 0.0]), ("learned", [0.485, 0.456, 0.406])]
)
def test_fill(kind, pixel):
    """Hidden pixels get the colour `pixel` of the scale [0, 1], and nothing of an image comes through."""
    fill = Fill(kind, IMAGENET_MEAN, IMAGENET_STD)
    g = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 4, 4, generator=g).requires_grad_()
    hidden = torch.rand(2, 4, 4, generator=g) < 0.5
    seen = fill(images, hidden)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    colours = seen.movedim(1, -1)
    torch.testing.assert_close(colours[hidden] * std + mean, torch.tensor(pixel).expand(int(hidden.sum()), 3))
    assert torch.equal(colours[~hidden], images.movedim(1, -1)[~hidden])
    seen.sum().backward()
    assert torch.equal(images.grad.movedim(1, -1)[..., 0] == 0, hidden)
    if kind == "learned":
        assert torch.equal(fill.colour.grad, torch.full((3,), float(hidden.sum())))
    else:
        assert not list(fill.parameters())
    assert torch.equal(fill(torch.full_like(images, float("nan")), hidden).isnan()[:, 0], ~hidden)
