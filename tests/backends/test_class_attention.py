import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmim_kernels import class_attention, pack_classes
from cmim_kernels.backends import use_backend
from cmim_kernels.reference import class_attention as reference
from cmim_kernels.triton_kernels import class_attention as kernels
from tests.kernels.op_checks import run

from . import against_torch
from .against_torch import DEVICE, DTYPES, INTERPRETED, TOLERANCE, assert_like_torch, random_labels, strided

OPS = ("class_attention",)

# Gradients are small differences of sums.
TOLERANCES = {dtype: dict(TOLERANCE[dtype], atol=max(TOLERANCE[dtype]["atol"], 1e-5)) for dtype in DTYPES}


def like_torch(qkv, layout, *, gradient=True):
    return assert_like_torch(lambda *qkv: class_attention(*qkv, layout), qkv, gradient=gradient, tolerance=TOLERANCES)


def make(batch=1, heads=2, tokens=70, dim=16, classes=3, dtypes=(torch.float32,) * 3, by_token=False, seed=0):
    """[q, k, v] and the layout; `by_token`: heads next to each other in memory, as a linear layer leaves them."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, heads, dim) if by_token else (batch, heads, tokens, dim)
    qkv = [torch.randn(shape, generator=g).to(DEVICE, dtype) for dtype in dtypes]
    labels, masked = random_labels((batch, tokens), classes, seed=seed)
    return [x.transpose(1, 2) if by_token else x for x in qkv], pack_classes(labels, masked, classes)


def classes_of(lengths, seed=0):
    """The layout of one image whose classes have these numbers of tokens; the last are ignored."""
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(lengths)]).to(DEVICE)[None]
    masked = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < 0.5
    return pack_classes(labels, masked, len(lengths) - 1)


@settings(max_examples=8)  # a pair of blocks takes the interpreter ten milliseconds
@given(
    batch=st.integers(0, 2), heads=st.integers(1, 2), tokens=st.integers(0, 70), dim=st.sampled_from([1, 5, 16, 24, 40]),
    classes=st.sampled_from([1, 3, 40]), dtype=st.sampled_from([torch.float32, torch.float16]), by_token=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_like_torch(batch, heads, tokens, dim, classes, dtype, by_token, seed):
    qkv, layout = make(batch, heads, tokens, dim, classes, (dtype,) * 3, by_token, seed)
    like_torch(qkv, layout)


SAME, MIXED = [(dtype,) * 3 for dtype in DTYPES], [DTYPES, DTYPES[1:] + DTYPES[:1]]


@pytest.mark.parametrize(
    "dtypes, dim", [*itertools.product(SAME + MIXED, [16, 40]), *itertools.product(SAME[1:], [100, 128])]
)
def test_each_op_like_torch(dtypes, dim):
    """On the same output: from bfloat16 that the interpreter truncates, other gradients follow."""
    (q, k, v), layout = make(heads=1, dim=dim, dtypes=dtypes)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, q.dtype)
    saved = reference.class_attention_forward(q, k, v, *layout[2:4])
    got = (
        *kernels.class_attention_forward(q, k, v, *layout[2:4]),
        *kernels.class_attention_backward(grad, q, k, v, *saved, *layout[2:4]),
    )
    want = (*saved, *reference.class_attention_backward(grad, q, k, v, *saved, *layout[2:4]))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **TOLERANCES[a.dtype])


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float16,) * 3, DTYPES], ids=str)
@pytest.mark.parametrize("dim", [32, 40])
def test_strided_inputs(dim, dtypes):
    (q, k, v), layout = make(tokens=20, dim=dim, dtypes=dtypes)
    inputs = [strided(q), k.transpose(0, 2).contiguous().transpose(0, 2), torch.stack([v, v], -1)[..., 0]]
    assert [x.stride() for x in inputs] != [q.stride()] * 3
    op = lambda *qkv: class_attention(*qkv, layout)  # noqa: E731
    with use_backend(against_torch.kernels_of):
        got, want = run(op, inputs), run(op, [q, k, v])
    # Another launch configuration: other blocks, other rounding.
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        torch.testing.assert_close(a, b, **TOLERANCES[a.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "lengths",
    [[100, 7], [1, 66, 1, 3], [64, 64, 0], [63, 1, 65, 2], [0, 0, 33, 0, 40, 9], [5, 0, 140, 0], [1] * 80, [2, 1, 3] * 12],
    ids=["two", "long between single", "on blocks", "beside blocks", "empty", "longer than a block", "single", "tiny"],
)
def test_classes_of_all_lengths(lengths, dtype):
    layout = classes_of(lengths)
    g = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 1, sum(lengths), 16, generator=g).to(DEVICE, dtype) for _ in range(3)]
    like_torch(qkv, layout)


@pytest.mark.parametrize("where", ["q", "k", "v", "grad", "all"])
@pytest.mark.parametrize(
    "poison, poisoned, dtype",
    [
        (float("nan"), [1], torch.float16),
        (float("inf"), [0, 2, 5, 6], torch.float16),
        (float("nan"), [3], torch.float32),
    ],
)
def test_no_bit_of_another_class_changes(poison, poisoned, dtype, where):
    """A class alone in a block, one that begins where another ends, several at once, and the ignored tokens; of the
    clean classes every output and gradient keeps its bits."""
    lengths = [70, 5, 10, 20, 0, 9, 7]
    layout = classes_of(lengths)
    g = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 1, sum(lengths), 16, generator=g).to(DEVICE, dtype) for _ in range(3)]
    bad = torch.isin(layout.segment // 2, torch.tensor(poisoned, device=DEVICE))[:, None, :, None]
    dirty = [torch.where(bad & (where in (name, "all")), poison, x) for name, x in zip("qkv", qkv, strict=True)]
    factor = torch.where(bad & (where in ("grad", "all")), poison, 1.0).to(dtype)
    with use_backend(against_torch.kernels_of):
        clean = run(lambda *qkv: class_attention(*qkv, layout), qkv)
        got = run(lambda *qkv: class_attention(*qkv, layout) * factor, dirty)
    valid = bad & (layout.segment < 12)[:, None, :, None]
    if where != "grad":
        assert not got[0][0].isfinite()[valid.expand_as(qkv[0])].all()
    for a, b in zip(got[0] + got[1], clean[0] + clean[1], strict=True):
        assert b.isfinite().all() and torch.equal(a[~bad.expand_as(a)], b[~bad.expand_as(b)])


def test_one_value_spoils_its_channel_of_its_class_only():
    """As it does in PyTorch, entry by entry."""
    layout = classes_of([30, 50, 25, 3])
    g = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 1, 108, 16, generator=g).to(DEVICE) for _ in range(3)]
    qkv[2][0, 0, 40, 3] = torch.nan
    got = like_torch(qkv, layout, gradient=False)[0][0]
    assert got[0, 0, 30:80, 3].isnan().all() and got.isnan().sum() == 50


def test_ignored_tokens_get_zeros():
    layout = classes_of([9, 70])
    qkv = [
        torch.full((1, 1, 79, 16), torch.nan, device=DEVICE).index_fill_(2, torch.arange(9, device=DEVICE), 1) for _ in "qkv"
    ]
    got = like_torch(qkv, layout)
    for x in got[0] + got[1]:
        assert not x[:, :, 9:].any()
    _, logsumexp = kernels.class_attention_forward(*qkv, *layout[2:4])
    assert (logsumexp[:, :, 9:] == -torch.inf).all()


@pytest.mark.parametrize("batch, tokens", [(0, 9), (2, 0), (2, 70)])
def test_empty_or_all_ignored(batch, tokens):
    layout = pack_classes(
        torch.full((batch, tokens), -1, device=DEVICE), torch.ones(batch, tokens, dtype=torch.bool, device=DEVICE), 3
    )
    qkv = [torch.randn(batch, 2, tokens, 16, device=DEVICE) for _ in range(3)]
    like_torch(qkv, layout)


def test_large_scores():
    (q, k, v), layout = make()
    got = like_torch([q * 1e4, k * 1e4, v], layout, gradient=False)
    assert got[0][0].isfinite().all()


@pytest.mark.parametrize(
    "dim, dtype, launches",
    [(128, torch.float16, 1), (129, torch.float16, 0), (64, torch.float32, 1), (65, torch.float32, 0)],
)
def test_long_rows_go_to_pytorch(dim, dtype, launches):
    qkv, layout = make(heads=1, tokens=9, dim=dim, dtypes=(dtype,) * 3)
    with mock.patch.object(kernels, "forward_launch", wraps=kernels.forward_launch) as launch, use_backend("triton"):
        class_attention(*qkv, layout)
    assert launch.call_count == launches
    like_torch(qkv, layout)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies in float32")
@pytest.mark.parametrize("dim", [16, 64])
def test_float32_products_keep_float32_accuracy(dim):
    qkv, layout = make(tokens=300, dim=dim)
    like_torch(qkv, layout)
