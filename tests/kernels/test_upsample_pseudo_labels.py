import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import upsample_cross_entropy, upsample_pseudo_labels
from cmim_kernels.reference import upsample_pseudo_labels as reference

from .op_checks import assert_repeatable, check_registration
from .test_upsample_cross_entropy import brute_force, sizes


def make(batch=2, classes=4, source=(3, 4), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(batch, classes, *source, dtype=dtype, generator=g)


@given(
    batch=st.integers(0, 2), classes=st.integers(1, 4), source=sizes, size=sizes, align_corners=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_brute_force(batch, classes, source, size, align_corners, seed):
    logits = make(batch, classes, source, seed=seed)
    label, confidence = upsample_pseudo_labels(logits, size, align_corners=align_corners)
    assert label.dtype == torch.int32 and label.shape == confidence.shape == (batch, *size)
    # The negative log-probability of each class, pixel by pixel.
    each = [brute_force(logits, torch.full((batch, *size), k), align_corners) for k in range(classes)]
    least, want = torch.stack(each).min(dim=0)
    assert torch.equal(label.long(), want)
    torch.testing.assert_close(confidence, (-least).exp())


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(11, 13), (3, 4), (2, 2)])
def test_matches_the_definition(size, align_corners):
    logits = make(dtype=torch.float32)
    got = upsample_pseudo_labels(logits, size, align_corners=align_corners)
    want = reference.upsample_pseudo_labels(logits, size, align_corners=align_corners)
    assert torch.equal(got.label, want[0])
    torch.testing.assert_close(got.confidence, want[1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("classes", [4, 19])
def test_the_smallest_of_equal_classes_wins(classes, layout):
    logits = make(batch=2, classes=classes, source=(9, 11), dtype=torch.float32)
    winner = logits.amax(dim=1) + 1
    logits[:, 2] = logits[:, -1] = winner
    label, confidence = upsample_pseudo_labels(logits.to(memory_format=layout), (37, 45))
    assert (label == 2).all() and (confidence <= 0.5).all()


def test_confidence_is_the_exponential_of_the_cross_entropy():
    logits = make()
    label, confidence = upsample_pseudo_labels(logits, (12, 16))
    torch.testing.assert_close(confidence, (-upsample_cross_entropy(logits, label)).exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    check_registration(lambda logits: upsample_pseudo_labels(logits, (7, 9)), [make(dtype=dtype)])


def test_no_gradient():
    label, confidence = upsample_pseudo_labels(make().requires_grad_(), (7, 9))
    assert not label.requires_grad and not confidence.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_repeatability(dtype):
    logits = make(dtype=dtype)
    op = lambda logits: upsample_pseudo_labels(logits, (7, 9))  # noqa: E731
    assert_repeatable(op, [logits])
    exact = op(logits.double()).confidence
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            confidence = op(logits).confidence
        assert confidence.dtype == torch.float32 and exact.dtype == torch.float64
        torch.testing.assert_close(confidence.double(), exact, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    label, confidence = upsample_pseudo_labels(torch.tensor([-3e4, 3e4, 1e4]).view(1, 3, 1, 1), (2, 2))
    assert (label == 1).all() and (confidence == 1).all()


@pytest.mark.parametrize(("batch", "size"), [(0, (4, 4)), (2, (0, 4)), (2, (4, 0))])
def test_no_pixels(batch, size):
    label, confidence = upsample_pseudo_labels(make(batch=batch), size)
    assert label.shape == confidence.shape == (batch, *size)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(logits=torch.zeros(2, 3, 4)), ValueError, r"logits has shape \(2, 3, 4\), expected \(B, K, h, w\)"),
        (dict(logits=torch.zeros(2, 0, 4, 4)), ValueError, "no empty dimension but B"),
        (dict(size=7), TypeError, r"size must be a pair \(H, W\), got 7"),
        (dict(size=(7, 9.0)), TypeError, r"size\[1\] must be an int, got float"),
        (dict(size=(-1, 9)), ValueError, r"size\[0\] is -1"),
        (dict(align_corners=1), TypeError, "align_corners must be a bool"),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        upsample_pseudo_labels(**(dict(logits=make(), size=(7, 9)) | change))
