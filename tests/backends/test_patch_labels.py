import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import patch_labels
from cmim_kernels.triton_kernels import patch_labels as kernels

from .against_torch import DEVICE, LABELS, assert_like_torch, few, random_labels, strided

OPS = ("patch_labels",)


def check(labels, patch_size, classes, min_share=0.0):
    op = lambda labels: patch_labels(labels, patch_size, classes, min_share=min_share)  # noqa: E731
    (got,), _ = assert_like_torch(op, [labels], gradient=False)
    return got


@few
@given(
    batch=st.integers(0, 3), rows=st.integers(0, 4), columns=st.integers(0, 4), patch_size=st.integers(1, 17),
    classes=st.sampled_from([1, 2, 3, 5, 40, 300]), min_share=st.sampled_from([0, 0.07, 0.25, 0.3, 0.5, 1]),
    dtype=st.sampled_from(LABELS), other_strides=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_like_torch(batch, rows, columns, patch_size, classes, min_share, dtype, other_strides, seed):
    labels, _ = random_labels((batch, rows * patch_size, columns * patch_size), classes, dtype, seed)
    labels = torch.where(labels % 3 == 1, 1, labels)  # so that there are majorities
    check(strided(labels) if other_strides else labels, patch_size, classes, min_share)


@pytest.mark.parametrize("patch_size", [1, 7, 8, 16, 17, 32, kernels.MAX_PATCH_SIZE, kernels.MAX_PATCH_SIZE + 1])
def test_patch_sizes(patch_size):
    check(random_labels((1, patch_size, 2 * patch_size), 5)[0], patch_size, 5)


def test_more_patches_than_a_program_takes():
    assert kernels.patch_labels_launch(2, 3).PATCHES < 130
    check(random_labels((1, 4, 260), 3)[0], 2, 3)


@pytest.mark.parametrize("patch_size", [4, 8])  # of the one kernel and of the other
@pytest.mark.parametrize("classes", [255, 256, 257, 600, 2**31 - 1])
def test_ties_within_and_between_ranges_of_classes(patch_size, classes):
    half = patch_size**2 // 2
    for low, high in [(0, 1), (3, 255), (254, 256), (255, 599), (256, 512), (0, 2**31 - 2)]:
        labels = torch.tensor([high] * half + [low] * half, device=DEVICE).view(1, patch_size, patch_size)
        got = check(labels, patch_size, classes, 0.5).item()
        assert got == (low if low < classes else -1)
        labels[0, 0, 0], labels[0, -1, -1] = high, high  # one vote decides
        assert check(labels, patch_size, classes).item() == (high if high < classes else low if low < classes else -1)


@pytest.mark.parametrize("patch_size", [2, 10])
def test_no_wide_label_wraps_into_range(patch_size):
    for value in (2**32, 2**40 + 1, -(2**32), 2**31 - 1, 2**31, -1, 3):
        labels = torch.full((1, patch_size, patch_size), value, device=DEVICE)
        assert check(labels, patch_size, 3).item() == -1


def test_votes_needed():
    # 0.07 x 100 rounds to more than 7, yet 7 of 100 pixels are a share of 0.07.
    assert kernels.votes_needed(100, 0.07) == 7
    assert [kernels.votes_needed(4, share) for share in (0, 0.25, 0.26, 1, 1.1)] == [0, 1, 2, 4, 5]
