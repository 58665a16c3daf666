import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import same_class_conv2d
from cmim_kernels.triton_kernels import same_class_conv2d as kernels

from .against_torch import DEVICE, DTYPES, LABELS, assert_like_torch, few, random_labels

OPS = ("same_class_conv2d",)

LAYOUTS = ("contiguous", "channels_last", "slice", "transposed")


def make(batch=2, channels=5, height=6, width=9, size=3, classes=3, layout="contiguous", dtype=torch.float32,
         weight_dtype=torch.float32, label_dtype=torch.int64, bias=True, seed=0):  # fmt: skip
    """Inputs x, weight and bias; and labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width + 2, generator=g).to(DEVICE, dtype)
    x = x[..., :width] if layout == "slice" else x[..., :width].contiguous()
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        x = x.mT.contiguous().mT
    labels, _ = random_labels((batch, height, width), classes, label_dtype, seed)
    weight = torch.randn(channels, size, size, generator=g).to(DEVICE, weight_dtype)
    return [x, weight, torch.randn(channels, generator=g).to(DEVICE) if bias else None], labels


def check(inputs, labels, classes=3, *, gradient="uneven"):
    """`gradient`: how that of the output lies in memory."""
    flatten = {
        "uneven": lambda out: out,
        "contiguous": lambda out: out.flatten(),
        "channels_last": lambda out: out.permute(0, 2, 3, 1).flatten(),
    }[gradient]
    op = lambda x, weight, *bias: flatten(same_class_conv2d(x, labels, weight, *bias, num_classes=classes))  # noqa: E731
    return assert_like_torch(op, [i for i in inputs if i is not None])


@few
@given(
    batch=st.integers(0, 2), channels=st.sampled_from([0, 1, 5]), height=st.integers(1, 9),
    width=st.integers(1, 34), size=st.sampled_from([1, 3, 5]), classes=st.integers(1, 4),
    layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES), weight_dtype=st.sampled_from(DTYPES),
    label_dtype=st.sampled_from(LABELS), bias=st.booleans(),
    gradient=st.sampled_from(["uneven", "contiguous", "channels_last"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_like_torch(batch, channels, height, width, size, classes, layout, dtype, weight_dtype, label_dtype, bias,
                    gradient, seed):  # fmt: skip
    arguments = batch, channels, height, width, size, classes, layout, dtype, weight_dtype, label_dtype, bias, seed
    check(*make(*arguments), classes, gradient=gradient)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_blocks_of_channels_and_chunks_of_rows(layout):
    inputs, labels = make(1, 130, 3, 4, layout=layout)
    assert kernels.convolve_launch(130, layout == "channels_last").CHANNELS < 130
    check(inputs, labels, gradient=layout)


@pytest.mark.parametrize("layout, height, width", [("contiguous", 4, 32), ("channels_last", 8, 8)])
def test_images_that_fill_their_tiles(layout, height, width):
    inputs, labels = make(2, 2, height, width, size=5, layout=layout, classes=1)
    launch = kernels.convolve_launch(2, layout == "channels_last")
    assert (height, width) == (launch.ROWS, launch.COLUMNS)
    check(inputs, labels, classes=1, gradient=layout)


def test_many_taps():
    check(*make(1, 1, 3, 10, size=9))


def test_weights_too_large_for_the_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_SIZE", 1)
    monkeypatch.setattr(kernels, "_convolve", None)
    check(*make(size=3))


def test_many_rows_share_a_program(monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda x: 1)
    check(*make(2, 3, 5, 3))


@pytest.mark.parametrize("channels", [16, 40, 64, 128, 500])
@pytest.mark.parametrize("lines", [1, 75, 640, 40_000])
def test_all_chunks_run_at_the_same_time_and_cover_all_lines(channels, lines, monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda x: 132)
    launch = kernels.weight_launch(7, channels, True)
    programs, places = 7 * -(-channels // launch.CHANNELS), 132 * kernels.RESIDENT[launch.CHANNELS]
    of_chunk = kernels.lines_of_chunk(launch, lines, programs, None)
    assert programs * -(-lines // of_chunk) <= places
    assert of_chunk == 1 or programs * -(-lines // (of_chunk - 1)) > places


@pytest.mark.parametrize("kind", ["all ignored", "one class", "all different"])
def test_labels(kind):
    inputs, labels = make()
    if kind == "all different":
        labels = torch.arange(labels.numel(), device=DEVICE).view(labels.shape)
    else:
        labels = torch.full_like(labels, -1 if kind == "all ignored" else 2)
    check(inputs, labels, classes=labels.numel())


def test_labels_that_only_agree_in_their_lowest_bits():
    """Classes 256 apart, and values outside the range that are classes after a cast to fewer bits."""
    inputs, labels = make()
    labels = torch.where(labels > 1, 2**32 + 256, labels.clamp(0, 1) * 256)
    (out, *_), _ = check(inputs, labels, classes=257)
    assert (out.movedim(1, -1)[labels >= 257] == 0).all() and (labels >= 257).any()


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_class_keeps_its_inf_and_nan_to_itself(poison, layout):
    (x, weight, bias), labels = make(layout=layout)
    bad = ((labels == 1) | (labels < 0) | (labels >= 3))[:, None]
    dirty = torch.where(bad, poison, x)
    op = lambda x: same_class_conv2d(x, labels, weight, bias, num_classes=3)  # noqa: E731
    clean, got = (assert_like_torch(op, [x])[0][0] for x in (x, dirty))
    assert not got.movedim(1, -1)[labels == 1].isfinite().all()
    other = (labels != 1)[:, None].expand_as(x)
    assert torch.equal(got[other], clean[other])


def test_a_gradient_that_is_not_finite_where_labels_are_ignored():
    """Nothing of it arrives anywhere."""
    (x, weight, bias), labels = make()
    ignored = ((labels < 0) | (labels >= 3))[:, None]

    def op(x, weight, bias, scale):
        return same_class_conv2d(x, labels, weight, bias, num_classes=3) * scale

    scale = torch.where(ignored, float("inf"), 1.0).to(x).expand_as(x).clone()
    _, grads = assert_like_torch(op, [x, weight, bias, scale])
    assert all(g.isfinite().all() for g in grads[:3])
