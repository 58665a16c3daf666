"""`gather_class_tokens` and `scatter_class_tokens`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import gather_class_tokens, pack_classes, scatter_class_tokens
from cmim_kernels.triton_kernels import rows

from .against_torch import DEVICE, DTYPES, assert_like_torch, few, random_labels, strided

OPS = ("gather_class_tokens", "scatter_class_tokens")


def make(batch, tokens, channels, dtype=torch.float32, parameters=torch.float32, classes=3, seed=0):
    """tokens, mask_token, position, layout."""
    g = torch.Generator().manual_seed(seed)
    layout = pack_classes(*random_labels((batch, tokens), classes, seed=seed), classes)
    random = lambda dtype, *shape: torch.randn(shape, generator=g).to(DEVICE, dtype)  # noqa: E731
    return random(dtype, batch, tokens, channels), random(parameters, channels), random(parameters, tokens, channels), layout


def call(op, layout, with_mask_token, with_position, **options):
    """The op as a function of those float inputs that it gets."""

    def function(x, mask_token, position):
        mask_token, position = mask_token if with_mask_token else None, position if with_position else None
        return op(x, layout, mask_token=mask_token, position=position, **options)

    return function


shapes = dict(
    batch=st.sampled_from([0, 1, 2, 3, 5, 17]), tokens=st.integers(0, 70), channels=st.sampled_from([0, 1, 3, 32, 48, 300]),
    shorter=st.sampled_from([0, 0, 1, 20, 70]), with_mask_token=st.booleans(), with_position=st.booleans(),
    dtype=st.sampled_from(DTYPES), parameters=st.sampled_from(DTYPES), other_strides=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip


@few
@given(**shapes)
def test_gather_like_torch(
    batch, tokens, channels, shorter, with_mask_token, with_position, dtype, parameters, other_strides, seed
):  # fmt: skip
    *inputs, layout = make(batch, tokens, channels, dtype, parameters, seed=seed)
    inputs = [strided(x) if other_strides else x for x in inputs]
    length = max(0, tokens - shorter)
    assert_like_torch(call(gather_class_tokens, layout, with_mask_token, with_position, length=length), inputs)


@few
@given(**shapes)
def test_scatter_like_torch(
    batch, tokens, channels, shorter, with_mask_token, with_position, dtype, parameters, other_strides, seed
):  # fmt: skip
    x, *inputs, layout = make(batch, tokens, channels, dtype, parameters, seed=seed)
    inputs = [x[:, : max(0, tokens - shorter)], *inputs]
    inputs = [strided(x) if other_strides else x for x in inputs]
    assert_like_torch(call(scatter_class_tokens, layout, with_mask_token, with_position), inputs)


@pytest.mark.parametrize("op", [gather_class_tokens, scatter_class_tokens])
def test_groups_of_several_blocks_of_places(op, monkeypatch):
    monkeypatch.setattr(rows, "multiprocessors", lambda tensor: 1)
    *inputs, layout = make(2, 100, 300)
    launch = rows.backward_launch(2, 300)
    assert rows.backward_grid(launch, 100, 300, inputs[0])[1] > 1
    assert_like_torch(call(op, layout, True, True), inputs)


@pytest.mark.parametrize("tokens", [1, 660, 661, 6400, 100_000])
@pytest.mark.parametrize("channels", [20, 128, 256, 1000])
def test_all_groups_run_at_the_same_time_and_cover_all_places(tokens, channels, monkeypatch):
    monkeypatch.setattr(rows, "multiprocessors", lambda tensor: 132)
    launch = rows.backward_launch(8, channels)
    (groups, columns), blocks_in_group = rows.backward_grid(launch, tokens, channels, None)
    blocks, places = -(-tokens // launch.PLACES), 132 * rows.RESIDENT[launch.CHANNELS]
    assert groups * columns <= places and columns * launch.CHANNELS >= channels
    assert groups * blocks_in_group >= blocks > (groups - 1) * blocks_in_group
    # With a block less in each group there would be more groups than places.
    assert (blocks_in_group - 1) * (places // columns) < blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [gather_class_tokens, scatter_class_tokens])
def test_gradients_that_lie_in_rows(op, dtype):
    *inputs, layout = make(5, 40, 48, dtype)
    assert_like_torch(lambda *inputs: call(op, layout, True, True)(*inputs).flatten(), inputs)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_replaced_or_left_out_does_not_matter(poison):
    tokens, mask_token, position, layout = make(2, 40, 8)
    segment = layout.segment.gather(1, layout.inverse.long())
    unused = ((segment % 2 == 1) | (layout.inverse >= 30))[..., None]
    op = call(gather_class_tokens, layout, True, True, length=30)
    want = assert_like_torch(op, [tokens, mask_token, position])
    got = assert_like_torch(op, [torch.where(unused, poison, tokens), mask_token, position])
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        assert torch.equal(a, b)
