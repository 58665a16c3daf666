import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import masked_patch_loss
from cmim_kernels.triton_kernels import masked_patch_loss as kernels

from .against_torch import DEVICE, DTYPES, LABELS, assert_like_torch, few, random_labels

OPS = ("masked_patch_loss",)

DISTANCES = ("l1", "mse", "smooth_l1")
LAYOUTS = ("tokens", "slice", "contiguous", "channels_last")


def make(batch=2, grid=(3, 4), size=2, channels=3, classes=3, layout="tokens", image_layout="contiguous",
         dtype=torch.float32, image_dtype=torch.float32, label_dtype=torch.int64, seed=0):  # fmt: skip
    """pred, image, masked, labels, and the numbers that a uint8 image needs."""
    g = torch.Generator().manual_seed(seed)
    tokens, entries = grid[0] * grid[1], size * size * channels
    image = torch.randn(batch, channels, grid[0] * size, grid[1] * size, generator=g)
    shape = image.shape if layout in LAYOUTS[2:] else (batch, tokens + 1, entries + 2)
    pred = 2 * torch.randn(shape, generator=g).to(DEVICE, dtype)
    if layout == "slice":
        pred = pred[:, 1:, 1:-1]
    elif layout == "tokens":
        pred = pred[:, 1:, 1:-1].contiguous()
    elif layout == "channels_last":
        pred = pred.to(memory_format=torch.channels_last)
    image = (image.sigmoid() * 255 if image_dtype == torch.uint8 else image).to(DEVICE, image_dtype)
    if image_layout == "channels_last":
        image = image.to(memory_format=torch.channels_last)
    labels, masked = random_labels((batch, tokens), classes, label_dtype, seed)
    numbers = {}
    if image_dtype == torch.uint8:
        numbers = dict(mean=[0.4 + 0.1 * c for c in range(channels)], std=[0.2 + 0.05 * c for c in range(channels)])
    return pred, image, masked, labels, numbers


@few
@given(
    batch=st.integers(0, 3), grid=st.tuples(st.integers(0, 5), st.integers(1, 5)), size=st.integers(1, 5),
    channels=st.integers(2, 4), classes=st.integers(1, 20), layout=st.sampled_from(LAYOUTS),
    image_layout=st.sampled_from(LAYOUTS[2:]), dtype=st.sampled_from(DTYPES),
    image_dtype=st.sampled_from((*DTYPES, torch.uint8)), label_dtype=st.sampled_from((None, *LABELS)),
    distance=st.sampled_from(DISTANCES), normalize=st.booleans(), balance=st.sampled_from(["token", "class"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_like_torch(
    batch, grid, size, channels, classes, layout, image_layout, dtype, image_dtype, label_dtype,
    distance, normalize, balance, seed,
):  # fmt: skip
    pred, image, masked, labels, numbers = make(
        batch, grid, size, channels, classes, layout, image_layout, dtype, image_dtype, label_dtype or torch.int64, seed
    )
    labels, classes = (None, None) if label_dtype is None else (labels, classes)
    options = dict(patch_size=size, distance=distance, normalize=normalize, balance=balance, **numbers)
    assert_like_torch(lambda pred: masked_patch_loss(pred, image, masked, labels, classes, **options), [pred])


@pytest.mark.parametrize("layout", ["tokens", "channels_last", "contiguous"])
def test_patches_of_several_blocks_of_entries(layout):
    pred, image, masked, labels, _ = make(1, (2, 2), size=27, layout=layout)
    image = image + 100  # a variance that sums of squares would lose
    op = lambda pred: masked_patch_loss(pred, image, masked, labels, 3, patch_size=27, normalize=True)  # noqa: E731
    assert_like_torch(op, [pred])


@pytest.mark.parametrize("balance", ["token", "class"])
@pytest.mark.parametrize("classes", [16, 17, 64, 65, 300])
def test_numbers_of_classes(classes, balance):
    pred, image, masked, labels, _ = make(2, (15, 20), size=1, classes=classes)
    op = lambda pred: masked_patch_loss(pred, image, masked, labels, classes, patch_size=1, balance=balance)  # noqa: E731
    assert_like_torch(op, [pred])


def test_more_tokens_than_the_programs_take_at_once(monkeypatch):
    monkeypatch.setattr(kernels, "sum_launch", lambda num_classes: kernels.SumLaunch(32, 16, PROGRAMS=4, num_warps=4))
    pred, image, masked, labels, _ = make(1, (15, 20), size=1)
    assert_like_torch(lambda pred: masked_patch_loss(pred, image, masked, labels, 3, patch_size=1), [pred])


@pytest.mark.parametrize("balance", ["token", "class"])
@pytest.mark.parametrize("change", ["nothing masked", "all masked", "all ignored"])
def test_edges(change, balance):
    pred, image, masked, labels, _ = make()
    masked = torch.full_like(masked, change != "nothing masked")
    labels = torch.full_like(labels, -1 if change == "all ignored" else 1)
    op = lambda pred: masked_patch_loss(pred, image, masked, labels, 3, patch_size=2, balance=balance)  # noqa: E731
    assert_like_torch(op, [pred])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", ["tokens", "contiguous"])
def test_other_tokens_do_not_matter(poison, normalize, layout):
    pred, image, masked, labels, _ = make(layout=layout)
    idle = ~masked | (labels < 0) | (labels >= 3)
    pixels = idle.view(2, 1, 3, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    run = lambda pred, image: assert_like_torch(  # noqa: E731
        lambda pred: masked_patch_loss(pred, image, masked, labels, 3, patch_size=2, normalize=normalize), [pred]
    )
    want = run(pred, image)
    where = idle[..., None] if layout == "tokens" else pixels
    got = run(torch.where(where, poison, pred), torch.where(pixels, poison, image))
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("distance", ["l1", "mse", "smooth_l1"])
def test_a_class_keeps_its_nan_to_itself(distance):
    pred, image, masked, labels, _ = make()
    pred = torch.where((labels == 1)[..., None], float("nan"), pred)
    (_, class_sum, _), (grad,) = assert_like_torch(
        lambda pred: masked_patch_loss(pred, image, masked, labels, 3, patch_size=2, distance=distance), [pred]
    )
    assert class_sum.isnan().tolist() == [False, True, False]
    if distance != "l1":  # its slope at NaN is 0 in PyTorch
        assert torch.equal(grad.isnan().any(-1), masked & (labels == 1))
