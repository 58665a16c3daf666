from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import patch_labels

from .op_checks import check_registration


def make(batch=2, rows=2, columns=3, patch_size=2, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, classes + 1, (batch, rows * patch_size, columns * patch_size), generator=g)


def brute_force(labels, patch_size, classes, min_share):
    batch, height, width = labels.shape
    out = torch.full((batch, height // patch_size, width // patch_size), -1, dtype=torch.int32)
    for b, i, j in torch.cartesian_prod(*[torch.arange(n) for n in out.shape]).view(-1, 3).tolist():
        rows, columns = (slice(n * patch_size, (n + 1) * patch_size) for n in (i, j))
        votes = Counter(c for c in labels[b, rows, columns].flatten().tolist() if 0 <= c < classes)
        if votes:
            winner = min(votes, key=lambda c: (-votes[c], c))
            if votes[winner] / patch_size**2 >= min_share:
                out[b, i, j] = winner
    return out


@given(
    batch=st.integers(0, 2), rows=st.integers(0, 3), columns=st.integers(0, 3), patch_size=st.integers(1, 4),
    classes=st.integers(1, 5), min_share=st.sampled_from([0, 0.25, 0.3, 0.5, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_brute_force(batch, rows, columns, patch_size, classes, min_share, seed):
    labels = make(batch, rows, columns, patch_size, classes, seed)
    got = patch_labels(labels, patch_size, classes, min_share=min_share)
    assert torch.equal(got, brute_force(labels, patch_size, classes, min_share)) and got.dtype == torch.int32


def test_share_counts_ignored_pixels_and_ties_go_to_the_smaller_id():
    labels = torch.tensor([[[2, 1, 255, 255], [1, 2, 0, 255]]], dtype=torch.uint8)
    assert patch_labels(labels, 2, 3).tolist() == [[[1, 0]]]
    assert patch_labels(labels, 2, 3, min_share=0.5).tolist() == [[[1, -1]]]
    assert patch_labels(labels, 2, 3, min_share=0.5 + 1e-9).tolist() == [[[-1, -1]]]
    # 0.07 x 100 rounds to more than 7, yet 7 of 100 pixels are a share of 0.07.
    labels = torch.full((1, 10, 10), -1)
    labels[0, 0, :7] = 4
    assert patch_labels(labels, 10, 5, min_share=0.07).item() == 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_dtypes_and_strides(dtype):
    labels = make().clamp(min=0)
    want = brute_force(labels, 2, 3, 0)
    strided = labels.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(patch_labels(strided, 2, 3), want)
    assert torch.equal(patch_labels(strided, 1, 3), brute_force(labels, 1, 3, 0))
    assert torch.equal(patch_labels(labels.to(dtype), 2, 300), brute_force(labels, 2, 300, 0))


def test_no_wide_label_wraps_into_range():
    labels = torch.tensor([[[2**32, 2**40 + 1, -(2**32)]]])
    assert patch_labels(labels, 1, 3).tolist() == [[[-1, -1, -1]]]


@pytest.mark.parametrize("patch_size", [1, 2])
def test_registration(patch_size):
    labels = make(patch_size=patch_size).transpose(1, 2)
    check_registration(lambda labels: patch_labels(labels, patch_size, 3, min_share=0.5), [labels], gradient=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(labels=torch.zeros(1, 4, 4)), TypeError, "labels has dtype float32"),
        (dict(labels=torch.zeros(4, 4, dtype=torch.int32)), ValueError, r"labels has shape \(4, 4\), expected \(B, H, W\)"),
        (dict(patch_size=3), ValueError, "H and W multiples of patch_size 3"),
        (dict(patch_size=0), ValueError, "patch_size is 0"),
        (dict(num_classes=True), TypeError, "num_classes must be an int, got bool"),
        (dict(min_share=-0.1), ValueError, "min_share is -0.1"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = dict(labels=torch.zeros(1, 4, 4, dtype=torch.int32), patch_size=2, num_classes=3) | change
    with pytest.raises(error, match=message):
        patch_labels(**arguments)
