import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import ClassLayout, class_centroids, pack_classes
from cmim_kernels.reference import class_centroids as reference

from .op_checks import assert_equal, assert_repeatable, check_registration, run


def make(batch=2, channels=3, height=3, width=4, classes=3, dtype=torch.float64, grid=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, channels, height, width, dtype=dtype, generator=g)
    labels = torch.randint(-1, classes + 1, (batch, height, width), generator=g)
    masked = torch.rand(batch, height, width, generator=g) < 0.5
    if grid:
        return features, labels, masked
    return features.flatten(2).transpose(1, 2).contiguous(), labels.flatten(1), masked.flatten(1)


def brute_force(features, labels, masked, classes):
    """Tokens one at a time, from (B, C, h, w) features."""
    batch, channels = features.shape[:2]
    mean, count = torch.zeros(batch, classes, 2, channels, dtype=features.dtype), torch.zeros(batch, classes, 2).int()
    for b, i, j in torch.cartesian_prod(*[torch.arange(n) for n in labels.shape]).view(-1, 3).tolist():
        if 0 <= (k := int(labels[b, i, j])) < classes:
            mean[b, k, int(masked[b, i, j])] += features[b, :, i, j]
            count[b, k, int(masked[b, i, j])] += 1
    return mean / count.clamp(min=1)[..., None], count


@given(
    batch=st.integers(0, 2), channels=st.integers(1, 3), height=st.integers(0, 3), width=st.integers(1, 4),
    classes=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_brute_force(batch, channels, height, width, classes, seed):
    inputs = make(batch, channels, height, width, classes, seed=seed)
    want = brute_force(*inputs, classes)
    features, labels, masked = make(batch, channels, height, width, classes, grid=False, seed=seed)
    for arguments in (inputs, (features, labels, masked), (features, *inputs[1:]), (inputs[0], labels, masked)):
        mean, count = class_centroids(*arguments, classes)
        torch.testing.assert_close(mean, want[0])
        assert torch.equal(count, want[1])
        mean, count = reference.class_centroids(arguments[0], labels, masked, classes)
        torch.testing.assert_close(mean, want[0])
        assert torch.equal(count, want[1])


@pytest.mark.parametrize("grid", [True, False])
def test_gradients(grid):
    features, labels, masked = make(grid=grid)
    op = lambda x: class_centroids(x, labels, masked, 3)  # noqa: E731
    torch.autograd.gradcheck(op, [features.clone().requires_grad_()])
    definition = lambda x: reference.class_centroids(x, labels.flatten(1), masked.flatten(1), 3)  # noqa: E731
    assert_equal(run(op, [features]), run(definition, [features]))


@pytest.mark.parametrize(("grid", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_registration(grid, dtype):
    check_registration(lambda *a: class_centroids(*a, 3), list(make(grid=grid, dtype=dtype)))


def test_channels_last_features_get_a_channels_last_gradient():
    features, labels, masked = make()
    op = lambda x: class_centroids(x, labels, masked, 3)  # noqa: E731
    got = run(op, [features.to(memory_format=torch.channels_last)])
    assert got[1][0].is_contiguous(memory_format=torch.channels_last)
    assert run(op, [features])[1][0].is_contiguous()
    assert_equal(got, run(op, [features]), rtol=0, atol=0)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_a_class_keeps_its_inf_and_nan_to_itself(poison):
    features, labels, masked = make(height=6, width=6)
    dirty = torch.where((((labels == 1) & masked) | (labels < 0))[:, None], poison, features)
    clean, got = (class_centroids(x, labels, masked, 3).mean for x in (features, dirty))
    assert not got[:, 1, 1].isfinite().any()
    got[:, 1, 1] = clean[:, 1, 1]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    features, labels, masked = make(height=16, width=16, dtype=dtype)
    (mean, _), (grad,) = run(lambda x: class_centroids(x, labels, masked, 3), [features])
    assert mean.dtype == torch.float32 and grad.dtype == dtype
    exact = class_centroids(features.double(), labels, masked, 3).mean
    torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_dtypes_and_repeatability_on_threads(dtype):
    features, labels, masked = make(channels=16, height=48, width=48, dtype=torch.float32)
    labels = torch.where(labels < 0, 255, labels).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_repeatable(lambda x: class_centroids(x, labels, masked, 3), [features])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(
        class_centroids(features, labels, masked, 300).count[:, 255].sum(1), (labels == 255).flatten(1).sum(1)
    )


def test_no_token_of_a_class_is_a_zero_that_stays_connected():
    features, labels, masked = make()
    (mean, count), (grad,) = run(lambda x: class_centroids(x, labels.fill_(-1), masked, 3), [features])
    assert not mean.any() and not count.any() and torch.equal(grad, torch.zeros_like(features))


@pytest.mark.parametrize("poison", [1.0, float("inf")])
def test_long_sums_stay_exact(poison):
    features = torch.rand(1, 40_000, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, 40_000, dtype=torch.int64)
    labels[0, 0], features[0, 0] = 1, poison  # the other class keeps its own to itself
    mean = class_centroids(features, labels, labels < 0, 2).mean[:, 0, 0]
    exact = features[:, 1:].double().mean(1)
    assert (mean - exact).abs().max() <= 2 * (features[:, 1:].mean(1) - exact).abs().max()


def layout(order=(2, 12), offsets=(2, 8)):
    order, offsets = torch.zeros(order, dtype=torch.int32), torch.zeros(offsets, dtype=torch.int32)
    return ClassLayout(order, order, order, offsets, offsets)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(features=torch.zeros(2, 3)), ValueError, r"shape \(2, 3\), expected \(B, C, h, w\) or \(B, N, C\)"),
        (dict(features=torch.zeros(2, 3, 3, 4).int()), TypeError, "features has dtype int32"),
        (dict(labels=torch.zeros(2, 4, 3, dtype=torch.int64)), ValueError, r"labels .* expected \(2, 12\) or \(2, 3, 4\)"),
        (dict(labels=torch.zeros(2, 12)), TypeError, "labels has dtype float32"),
        (dict(masked=torch.zeros(2, 11, dtype=torch.bool)), ValueError, "masked has shape"),
        (dict(masked=torch.zeros(2, 12, dtype=torch.uint8)), TypeError, "masked has dtype uint8"),
        (dict(num_classes=0), ValueError, "num_classes is 0"),
        (dict(layout=3), TypeError, "layout must be a ClassLayout from pack_classes, got int"),
        (dict(layout=layout(order=(2, 11))), ValueError, "layout.order has shape"),
        (dict(layout=layout(offsets=(2, 7))), ValueError, r"layout.offsets has shape \(2, 7\), expected \(2, 8\)"),
    ],
)  # fmt: skip
def test_wrong_arguments(change, error, message):
    features, labels, masked = make(dtype=torch.float32)
    arguments = dict(features=features, labels=labels, masked=masked, num_classes=3) | change
    with pytest.raises(error, match=message):
        class_centroids(**arguments)


def test_a_layout_changes_nothing():
    features, labels, masked = make(grid=False)
    packed = pack_classes(labels, masked, 3)
    got = run(lambda x: class_centroids(x, labels, masked, 3, layout=packed), [features])
    assert_equal(got, run(lambda x: class_centroids(x, labels, masked, 3), [features]), rtol=0, atol=0)
