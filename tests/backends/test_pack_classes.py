import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import pack_classes
from cmim_kernels.triton_kernels.pack_classes import MAX_CLASSES

from .against_torch import DEVICE, LABELS, assert_like_torch, few, random_labels, strided

OPS = ("pack_classes",)


def check(labels, masked, classes):
    return assert_like_torch(lambda labels, masked: pack_classes(labels, masked, classes), [labels, masked], gradient=False)


@few
@given(
    batch=st.integers(0, 3), tokens=st.integers(0, 400), classes=st.integers(1, 40), dtype=st.sampled_from(LABELS),
    other_strides=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_like_torch(batch, tokens, classes, dtype, other_strides, seed):
    labels, masked = random_labels((batch, tokens), classes, dtype, seed)
    check(*[strided(x) if other_strides else x for x in (labels, masked)], classes)


@pytest.mark.parametrize("tokens", [127, 128, 129, 256, 128 * 129])  # around a tile; more tiles than the scan takes at once
def test_whole_and_broken_tiles(tokens):
    check(*random_labels((1, tokens), 3), 3)


@pytest.mark.parametrize("classes", [15, 16, 700, MAX_CLASSES, MAX_CLASSES + 1])
def test_numbers_of_classes(classes):
    check(*random_labels((2, 200), classes), classes)


@pytest.mark.parametrize("value", [-1, 0, 2, 3, 2**32])
@pytest.mark.parametrize("masked", [False, True])
def test_one_label_everywhere(value, masked):
    labels = torch.full((2, 150), value, device=DEVICE)
    check(labels, torch.full_like(labels, masked, dtype=torch.bool), 3)
