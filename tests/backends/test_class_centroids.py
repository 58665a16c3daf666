from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import class_centroids, pack_classes
from cmim_kernels.triton_kernels import class_centroids as kernels

from .against_torch import DEVICE, DTYPES, LABELS, assert_like_torch, few, random_labels, strided

OPS = ("class_centroids",)


def runs_from(classes):
    """Tokens in class order from that number of classes on: many segments take the interpreter long."""
    return mock.patch.object(kernels, "MAX_ONE_HOT", 2 * classes - 1)


LAYOUTS = ("contiguous", "channels_last", "slice", "tokens", "strided tokens")


def make(batch=2, channels=5, height=6, width=9, classes=3, layout="contiguous", dtype=torch.float32,
         label_dtype=torch.int64, seed=0):  # fmt: skip
    """features, labels (B, N), masked (B, N)."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, channels, height, width + 2, generator=g).to(DEVICE, dtype)
    features = features[..., :width] if layout == "slice" else features[..., :width].contiguous()
    if layout == "channels_last":
        features = features.to(memory_format=torch.channels_last)
    if "tokens" in layout:
        features = features.flatten(2).transpose(1, 2).contiguous()
    if layout == "strided tokens":
        features = strided(features)
    return features, *random_labels((batch, height * width), classes, label_dtype, seed)


@few
@given(
    batch=st.integers(0, 2), channels=st.sampled_from([0, 1, 5, 33, 70]), height=st.integers(0, 12),
    width=st.integers(1, 20), classes=st.sampled_from([1, 3, 8, 9, 32]), in_runs=st.booleans(),
    layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES), label_dtype=st.sampled_from(LABELS),
    with_layout=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_like_torch(batch, channels, height, width, classes, in_runs, layout, dtype, label_dtype, with_layout, seed):
    features, labels, masked = make(batch, channels, height, width, classes, layout, dtype, label_dtype, seed)
    packed = pack_classes(labels, masked, classes) if with_layout else None
    with runs_from(1 if in_runs else 33):
        assert_like_torch(lambda x: class_centroids(x, labels, masked, classes, layout=packed), [features])


@pytest.mark.parametrize("classes", [32, 33])
def test_around_the_largest_number_of_segments_for_one_hot(classes):
    features, labels, masked = make(1, classes=classes)
    assert_like_torch(lambda x: class_centroids(x, labels, masked, classes), [features])


def test_splits():
    features, labels, masked = make(2, 5, 20, 20, classes=1)
    launch = kernels.one_hot_launch(2, 4)
    assert kernels.one_hot_splits(2, 400, 5, 2, launch, features) > 2
    assert_like_torch(lambda x: class_centroids(x, labels, masked, 1), [features])


@pytest.mark.parametrize("batch, channels", [(1, 64), (8, 256), (16, 256), (3, 700), (100, 256)])
def test_splits_are_what_the_device_holds_at_a_time(batch, channels, monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda tensor: 132)
    launch = kernels.one_hot_launch(42, 2)
    splits = kernels.one_hot_splits(batch, 10**6, channels, 42, launch, None)
    programs = batch * -(-channels // launch.CHANNELS)
    assert programs * (splits + 1) > 132 * kernels.RESIDENT and (splits == 1 or programs * splits <= 132 * kernels.RESIDENT)


@pytest.mark.parametrize("kind", ["visible", "masked", "mixed"])
def test_runs(kind):
    """Segments of all lengths around one run and several, in every position relative to the runs; ignored tokens last."""
    lengths = [1, 127, 128, 129, 0, 255, 256, 257, 300, 3, 400]
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(lengths)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))].to(DEVICE)[None]
    features = torch.randn(1, labels.shape[1], 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    masked = {"visible": labels < 0, "masked": labels >= 0, "mixed": labels % 2 == 1}[kind]
    with runs_from(1):
        assert_like_torch(lambda x: class_centroids(x, labels, masked, 10), [features])


@pytest.mark.parametrize("first_with_runs", [1, 33])
@pytest.mark.parametrize("change", ["nothing masked", "all masked", "all ignored"])
def test_edges(change, first_with_runs):
    features, labels, masked = make()
    masked = torch.full_like(masked, change != "nothing masked")
    labels = torch.full_like(labels, -1 if change == "all ignored" else 2)
    with runs_from(first_with_runs):
        assert_like_torch(lambda x: class_centroids(x, labels, masked, 3), [features])


@pytest.mark.parametrize("first_with_runs", [1, 33])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan"), "both"])
def test_a_class_keeps_its_inf_and_nan_to_itself(poison, dtype, first_with_runs):
    features, labels, masked = make(2, 5, 12, 12, dtype=dtype)
    if poison == "both":
        poison = torch.where(torch.arange(12, device=DEVICE) % 2 == 0, float("inf"), float("-inf"))
    bad = (((labels == 1) & masked) | (labels < 0) | (labels >= 3)).view(2, 1, 12, 12)
    dirty = torch.where(bad, poison, features.float()).to(dtype)
    op = lambda x: class_centroids(x, labels, masked, 3)  # noqa: E731
    with runs_from(first_with_runs):
        clean, got = (assert_like_torch(op, [x])[0][0] for x in (features, dirty))
    assert not got[:, 1, 1].isfinite().any()
    got[:, 1, 1] = clean[:, 1, 1]
    torch.testing.assert_close(got, clean, rtol=0, atol=0)


def test_float32_features_keep_all_their_bits():
    """Ten values of very different sizes in one segment each: three parts of 8 bits hold all 24 bits of each."""
    features = torch.randn(1, 10, 3, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-30, 30, 6)[:, None]
    features[0, 0, 0] = torch.finfo(torch.float32).max
    features, labels = features.to(DEVICE), torch.arange(10, device=DEVICE)[None]
    (mean, _), _ = assert_like_torch(lambda x: class_centroids(x, labels, labels < 0, 10), [features])
    assert torch.equal(mean[0, :, 0], features[0])
