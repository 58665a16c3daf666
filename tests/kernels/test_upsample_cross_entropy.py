import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import upsample_cross_entropy
from cmim_kernels.reference import upsample_cross_entropy as reference

from .op_checks import assert_equal, assert_repeatable, check_registration, run


def make(batch=2, classes=3, source=(3, 4), size=(7, 9), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, *source, dtype=dtype, generator=g)
    return logits, torch.randint(-1, classes + 1, (batch, *size), generator=g)


def taps(i, source, size, align_corners):
    """The source positions and weights of output position i along one axis."""
    at = i * (source - 1) / max(1, size - 1) if align_corners else max(0.0, (i + 0.5) * source / size - 0.5)
    low = min(math.floor(at), source - 1)
    return (low, 1 - (at - low)), (min(low + 1, source - 1), at - low)


def brute_force(logits, target, align_corners):
    """Pixel by pixel, from the formula of bilinear interpolation."""
    loss = torch.zeros(target.shape, dtype=torch.float64)
    for b, i, j in torch.cartesian_prod(*[torch.arange(n) for n in target.shape]).view(-1, 3).tolist():
        if 0 <= (k := int(target[b, i, j])) < logits.shape[1]:
            z = torch.zeros(logits.shape[1], dtype=torch.float64)
            for y, wy in taps(i, logits.shape[2], target.shape[1], align_corners):
                for x, wx in taps(j, logits.shape[3], target.shape[2], align_corners):
                    z += wy * wx * logits[b, :, y, x]
            loss[b, i, j] = math.log(sum(math.exp(v) for v in z.tolist())) - z[k]
    return loss


sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@given(
    batch=st.integers(0, 2), classes=st.integers(1, 4), source=sizes, size=sizes, align_corners=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_brute_force(batch, classes, source, size, align_corners, seed):
    logits, target = make(batch, classes, source, size, seed=seed)
    got = upsample_cross_entropy(logits, target, align_corners=align_corners)
    torch.testing.assert_close(got, brute_force(logits, target, align_corners))


@pytest.mark.parametrize("band", [1, 40, 90, 10**6])  # logits at once: a row, some rows, an image and part, everything
@pytest.mark.parametrize("align_corners", [False, True])
def test_bands_match_interpolate_and_cross_entropy(band, align_corners, monkeypatch):
    monkeypatch.setattr(reference, "_BAND", band)
    logits, target = make(batch=3, size=(5, 6))
    got = run(lambda x: upsample_cross_entropy(x, target, align_corners=align_corners), [logits])
    want = run(lambda x: reference.upsample_cross_entropy(x, target, align_corners=align_corners), [logits])
    assert_equal(got, want)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(7, 9), (3, 4), (2, 3), (1, 1)])
def test_gradients(size, align_corners):
    logits, target = make(size=size)
    op = lambda x: upsample_cross_entropy(x, target, align_corners=align_corners)  # noqa: E731
    torch.autograd.gradcheck(op, [logits.requires_grad_()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    check_registration(upsample_cross_entropy, list(make(dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_compute_in_float32(dtype):
    logits, target = make(size=(12, 16), dtype=dtype)
    op = lambda x: upsample_cross_entropy(x, target)  # noqa: E731
    exact = run(op, [logits.double()])
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            got = run(op, [logits.float()])
            assert op(logits).dtype == torch.float32 and run(op, [logits])[1][0].dtype == dtype
        assert_equal(([got[0][0].double()], [got[1][0].double()]), exact, rtol=1e-5, atol=1e-5)


def test_matmul_settings_come_back():
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        logits, target = make(size=(12, 16), dtype=torch.float32)
        got = upsample_cross_entropy(logits, target)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    torch.testing.assert_close(got.double(), upsample_cross_entropy(logits.double(), target), rtol=1e-5, atol=1e-5)


def test_inherited_settings_stay_inherited():
    settings = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    before = [s.fp32_precision for s in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "none"
        for precision in ("tf32", "ieee"):
            torch.backends.fp32_precision = precision
            upsample_cross_entropy(*make())
            assert [s.fp32_precision for s in settings] == [precision] * 4
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def test_a_class_may_be_switched_off_by_a_large_negative_number():
    logits, target = make(dtype=torch.float32)
    logits[:, 1] = -1e4
    target = torch.where(target == 1, 0, target)
    got = run(lambda x: upsample_cross_entropy(x, target), [logits])
    assert_equal(got, run(lambda x: reference.upsample_cross_entropy(x, target), [logits]))
    assert got[0][0].max() < 100 and not got[1][0][:, 1].any()


@pytest.mark.parametrize("poison", [-float("inf"), float("inf"), float("nan")])
def test_a_logit_that_is_not_finite_stays_in_its_image(poison):
    logits, target = make()
    dirty = logits.clone()
    dirty[0, 1, 0, 0] = poison
    op = lambda x: upsample_cross_entropy(x, target)  # noqa: E731
    (got,), (grad,) = run(op, [dirty])
    (want,), (want_grad,) = run(op, [logits])
    assert torch.equal(got[1], want[1]) and torch.equal(grad[1], want_grad[1])
    ignored = (target[0] < 0) | (target[0] > 2)
    assert got[0].isnan().any() and not got[0][ignored].any() and grad[0].isnan().all()


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_ignored_pixels_are_zero_without_gradient(poison):
    logits, target = make(source=(3, 8), size=(3, 8))
    target[:, :, 5:] = -7
    dirty = logits.clone()
    dirty[:, :, :, 6:] = poison
    weight = torch.where(target < 0, poison, 1.0)
    want = run(lambda x: upsample_cross_entropy(x, target), [logits])[0][0]
    assert (want[(target < 0) | (target > 2)] == 0).all()
    # Not even where the gradient that arrives at them is not finite.
    x = logits.requires_grad_()
    (grad,) = torch.autograd.grad(upsample_cross_entropy(x, target), x, weight)
    assert grad.isfinite().all() and not grad[..., 5:].any()
    x = dirty.requires_grad_()
    (grad,) = torch.autograd.grad(upsample_cross_entropy(x, target.fill_(255)), x, weight)
    assert not grad.any() and not upsample_cross_entropy(x, target).any()


def test_channels_last_logits_get_a_channels_last_gradient():
    logits, target = make()
    op = lambda x: upsample_cross_entropy(x, target)  # noqa: E731
    got = run(op, [logits.to(memory_format=torch.channels_last)])
    assert got[1][0].is_contiguous(memory_format=torch.channels_last)
    assert_equal(got, run(op, [logits]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_dtypes_and_repeatability(dtype):
    logits, target = make(dtype=torch.float32)
    want = upsample_cross_entropy(logits, target)
    target = torch.where(target < 0, 255, target).to(dtype)
    assert torch.equal(upsample_cross_entropy(logits, target), want)
    assert_repeatable(lambda x: upsample_cross_entropy(x, target), [logits])


@pytest.mark.parametrize(("batch", "size"), [(0, (4, 4)), (2, (0, 4)), (2, (4, 0))])
def test_no_pixels(batch, size):
    logits, target = make(batch=batch, size=size)
    (loss,), (grad,) = run(lambda x: upsample_cross_entropy(x, target), [logits])
    assert loss.shape == target.shape and torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(logits=torch.zeros(2, 3, 4)), ValueError, r"logits has shape \(2, 3, 4\), expected \(B, K, h, w\)"),
        (dict(logits=torch.zeros(2, 3, 4, 4).long()), TypeError, "logits has dtype int64"),
        (dict(logits=torch.zeros(2, 3, 0, 4)), ValueError, "no empty dimension but B"),
        (dict(target=torch.zeros(1, 7, 9).long()), ValueError, r"target has shape \(1, 7, 9\), expected \(2, H, W\)"),
        (dict(target=torch.zeros(2, 7, 9)), TypeError, "target has dtype float32"),
        (dict(align_corners=None), TypeError, "align_corners must be a bool"),
    ],
)
def test_wrong_arguments(change, error, message):
    logits, target = make()
    with pytest.raises(error, match=message):
        upsample_cross_entropy(**(dict(logits=logits, target=target) | change))
