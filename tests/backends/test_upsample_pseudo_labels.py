from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmim_kernels import upsample_pseudo_labels
from cmim_kernels.backends import use_backend
from cmim_kernels.triton_kernels import upsample_pseudo_labels as kernels
from cmim_kernels.triton_kernels import upsampling

from . import against_torch
from .against_torch import DTYPES, assert_like_torch
from .test_upsample_cross_entropy import LAYOUTS, make

OPS = ("upsample_pseudo_labels",)


def check(logits, size, align_corners=False):
    op = lambda x: upsample_pseudo_labels(x, size, align_corners=align_corners)  # noqa: E731
    (label, confidence), _ = assert_like_torch(op, [logits], gradient=False)
    return label, confidence


def small_tiles(rows, columns):
    return mock.patch.object(
        kernels, "tile_launch", lambda _: upsampling.TileLaunch(rows, columns, num_warps=1, maxnreg=128)
    )


sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=20)
@given(
    batch=st.integers(0, 2), classes=st.integers(1, 4), source=sizes, size=sizes, align_corners=st.booleans(),
    layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES), rows=st.sampled_from([1, 4]),
    columns=st.sampled_from([2, 8]), seed=st.integers(0, 99),
)  # fmt: skip
def test_like_torch(batch, classes, source, size, align_corners, layout, dtype, rows, columns, seed):
    with small_tiles(rows, columns):
        check(make(batch, classes, source, size, layout, dtype, seed), size, align_corners)


@pytest.mark.parametrize(("classes", "source", "size"), [(3, (2, 3), (28, 70)), (21, (2, 3), (8, 12)), (41, (1, 1), (1, 2))])
def test_launch_configurations(classes, source, size):
    """More than one block of rows (14 in a span) and of columns (70)."""
    check(make(1, classes, source), size)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("cells", "pixels"), [(1, 5), (5, 1), (4, 4), (7, 3), (3, 8), (2, 11), (5, 2)])
def test_sizes_along_one_axis(cells, pixels, axis, align_corners):
    source, size = ((n, 1) if axis == 0 else (1, n) for n in (cells, pixels))
    with small_tiles(4, 8):
        check(make(1, 3, source, layout="slice"), size, align_corners)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(12, 24), (11, 31)])
def test_ties(size, align_corners):
    """Classes that tie everywhere, and classes that mirror another and tie with it wherever rounding lets them."""
    logits = make(1, 2, (3, 7))
    logits = torch.cat([logits, logits.flip(3), logits.flip(2), logits], dim=1)
    label, confidence = check(logits, size, align_corners)
    assert label.unique().tolist() == [0, 1, 2, 3, 4, 5] and confidence[label < 2].max() <= 0.5


@pytest.mark.parametrize("align_corners", [False, True])
def test_labels_that_only_rounding_decides(align_corners):
    check(1 + 2**-21 * make(1, 8, (4, 5)), (23, 39), align_corners)


def test_a_logit_that_is_not_finite_stays_in_its_image():
    logits = make(3, 3, (2, 2))
    clean = check(logits, (3, 3))
    logits[1, 1, 0, 0] = float("nan")
    with use_backend(against_torch.kernels_of):
        label, confidence = upsample_pseudo_labels(logits, (3, 3))
    assert torch.equal(label[::2], clean[0][::2]) and torch.equal(confidence[::2], clean[1][::2])
    assert confidence[1].isnan().any() and label.min() >= 0 and label.max() < 3


def test_logits_of_any_size():
    logits = make(1, 4, (2, 3))
    logits[:, 1] = torch.finfo(torch.float32).min
    label, _ = check(logits, (4, 5))
    assert (label != 1).all()
    check(1000 * make(1, 4, (2, 3)) - 3e4, (4, 5))
