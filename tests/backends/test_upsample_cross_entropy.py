from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmim_kernels import upsample_cross_entropy
from cmim_kernels.backends import use_backend
from cmim_kernels.triton_kernels import upsample_cross_entropy as kernels
from cmim_kernels.triton_kernels import upsampling
from tests.kernels.op_checks import run

from . import against_torch
from .against_torch import DEVICE, DTYPES, LABELS, assert_like_torch, random_labels, strided

OPS = ("upsample_cross_entropy",)

LAYOUTS = ("contiguous", "channels_last", "strided", "slice")


def make(batch=1, classes=3, source=(3, 4), size=(7, 9), layout="contiguous", dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(batch, classes, *source, generator=g)).to(DEVICE, dtype)
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    if layout == "slice":  # nothing around it may be read
        around = torch.nn.functional.pad(logits, (1, 1, 1, 1), value=float("nan"))
        logits = around[:, :, 1:-1, 1:-1]
    return strided(logits) if layout == "strided" else logits


def check(logits, target, align_corners=False):
    (loss,), (grad,) = assert_like_torch(lambda x: upsample_cross_entropy(x, target, align_corners=align_corners), [logits])
    return loss, grad


def small_programs(rows=2, columns=4, classes=2, spans=2, program_rows=1):
    """Small launch configurations, so that small inputs have many programs."""
    return mock.patch.multiple(
        kernels,
        tile_launch=lambda _: upsampling.TileLaunch(rows, columns, num_warps=1, maxnreg=128),
        cell_launch=lambda *_: kernels.CellLaunch(classes, spans, num_warps=1, maxnreg=248),
        rows_of_program=lambda *_: program_rows,
    )


sizes = st.tuples(st.integers(1, 3), st.integers(1, 4))


@settings(max_examples=8)
@given(
    batch=st.integers(0, 2), classes=st.integers(1, 3), source=sizes, size=sizes, align_corners=st.booleans(),
    layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES), label_dtype=st.sampled_from(LABELS),
    rows=st.sampled_from([1, 2, 4]), columns=st.sampled_from([2, 4]), class_block=st.sampled_from([1, 2, 4]),
    spans=st.sampled_from([2, 4]), program_rows=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_like_torch(batch, classes, source, size, align_corners, layout, dtype, label_dtype, rows, columns, class_block,
                    spans, program_rows, seed):  # fmt: skip
    logits = make(batch, classes, source, size, layout, dtype, seed)
    target, _ = random_labels((batch, *size), classes, label_dtype, seed)
    with small_programs(rows, columns, class_block, spans, program_rows):
        check(logits, strided(target) if layout == "strided" else target, align_corners)


@pytest.mark.parametrize(
    ("classes", "source", "size"),
    [(21, (2, 3), (8, 12)), (5, (2, 34), (3, 70)), (2, (2, 1), (28, 2)), (35, (2, 1), (2, 1))],
)
def test_launch_configurations(classes, source, size):
    """More than one block of everything: pixels down (14 in a span) and along (70), cells (34), classes."""
    logits, (target, _) = make(1, classes, source), random_labels((1, *size), classes)
    check(logits, target)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("cells", "pixels"), [(1, 5), (5, 1), (4, 4), (7, 3), (3, 8), (2, 11), (5, 2)])
def test_sizes_along_one_axis(cells, pixels, axis, align_corners):
    shapes = [(cells, 1), (pixels, 1)]
    source, size = shapes if axis == 0 else [s[::-1] for s in shapes]
    target = torch.arange(pixels, device=DEVICE).view(1, *size) % 2
    with small_programs(rows=4, columns=8, spans=4, program_rows=4):
        check(make(1, 2, source, layout="slice"), target, align_corners)


def test_no_label_out_of_range_counts():
    """Not even where its last 32 bits are a class."""
    target = torch.tensor([-(2**63), -(2**32), -1, 0, 1, 2, 2**32, 2**32 + 1, 2**40], device=DEVICE).view(1, 1, -1)
    loss, _ = check(make(1, 2, (1, 1)), target)
    assert loss[0, 0].nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_ignored_pixels_are_zero_without_gradient(poison):
    """Not even where the gradient that arrives at them is not finite, or a logit where all are ignored."""
    logits, (target, _) = make(1, 3, (2, 4)), random_labels((1, 2, 6), 3)
    target[:, :, 3:] = -7
    weight = torch.where((target < 0) | (target > 2), poison, 1.0)
    with use_backend(against_torch.kernels_of):
        x = logits.requires_grad_()
        loss = upsample_cross_entropy(x, target)
        (grad,) = torch.autograd.grad(loss, x, weight)
        assert not loss[weight != 1].any() and loss[weight == 1].all()
        assert grad.isfinite().all() and not grad[..., 3:].any() and grad[..., :2].all()
        x = torch.full_like(logits, poison).requires_grad_()
        loss = upsample_cross_entropy(x, target.fill_(255))
        assert not loss.any() and not torch.autograd.grad(loss, x, weight)[0].any()


@pytest.mark.parametrize("poison", [-float("inf"), float("inf"), float("nan")])
def test_a_logit_that_is_not_finite_stays_in_its_image(poison):
    logits, (target, _) = make(3, 3, (2, 2)), random_labels((3, 3, 3), 3)
    clean, clean_grad = check(logits, target)
    logits[1, 1, 0, 0] = poison
    with use_backend(against_torch.kernels_of):
        (loss,), (grad,) = run(lambda x: upsample_cross_entropy(x, target), [logits])
    assert torch.equal(loss[::2], clean[::2]) and torch.equal(grad[::2], clean_grad[::2])
    ignored = (target[1] < 0) | (target[1] > 2)
    assert not loss[1][ignored].any() and not (loss[1].isfinite() | ignored).all()


def test_logits_of_any_size():
    logits, (target, _) = make(1, 4, (2, 3)), random_labels((1, 4, 5), 4)
    logits[:, 1] = torch.finfo(torch.float32).min
    target = torch.where(target == 1, 0, target)
    loss, grad = check(logits, target)
    assert loss.max() < 100 and not grad[:, 1].any()
    for shift in (-3e4, 3e4):
        check(1000 * make(1, 4, (2, 3)) + shift, target)


@pytest.mark.parametrize(
    ("blocks", "height", "places", "rows"),
    # 72 x 14 programs of 7 spans at once; 72 x 20 of 5 spans would be two rounds. 216 x 9 of 10 spans in two rounds.
    [(72, 80, 1056, 6), (216, 80, 1056, 9), (1, 1, 1056, 1), (9, 80, 1056, 1), (5000, 4, 1056, 4)],
)
def test_rows_of_a_program_are_done_in_the_fewest_spans(blocks, height, places, rows):
    assert kernels.rows_of_program(blocks, height, places) == rows
