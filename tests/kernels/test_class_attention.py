import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cmim_kernels import ClassLayout, class_attention, pack_classes
from cmim_kernels.reference import class_attention as reference

from .op_checks import assert_equal, assert_repeatable, check_registration, run


def make(batch=2, heads=2, tokens=9, dim=3, classes=3, ratio=0.5, seed=0, dtype=torch.float64):
    """[q, k, v] and the layout."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes + 1, (batch, tokens), generator=g)
    masked = torch.rand(batch, tokens, generator=g) < ratio
    qkv = [torch.randn(batch, heads, tokens, dim, generator=g, dtype=dtype) for _ in range(3)]
    return qkv, pack_classes(labels, masked, classes)


def brute_force(q, k, v, layout, classes):
    """One query at a time: scores against the tokens of its class, exponentials, weighted mean."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*[torch.arange(n) for n in q.shape[:3]]).view(-1, 3).tolist():
        classes_of = [s // 2 for s in layout.segment[b].tolist()]
        if classes_of[i] < classes:
            members = [j for j, c in enumerate(classes_of) if c == classes_of[i]]
            weights = [float((q[b, h, i] * k[b, h, j]).sum() / q.shape[-1] ** 0.5) for j in members]
            weights = [2.718281828459045**w for w in weights]
            out[b, h, i] = sum(w * v[b, h, j] for w, j in zip(weights, members, strict=True)) / sum(weights)
    return out


@contextlib.contextmanager
def formulation(name):
    """`segments` is what the CPU runs; `pairs`, what other devices run, is run on the CPU here."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "pairs":
            patch.setattr(reference, "_parts", lambda q, segment, offsets: [(..., reference.same_class(segment, offsets))])
        yield


both = pytest.mark.parametrize("name", ["segments", "pairs"])


@both
@given(
    batch=st.integers(0, 2), heads=st.integers(1, 2), tokens=st.integers(0, 8), dim=st.integers(1, 4),
    classes=st.integers(1, 4), ratio=st.sampled_from([0, 0.5, 1]), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_brute_force(name, batch, heads, tokens, dim, classes, ratio, seed):
    (q, k, v), layout = make(batch, heads, tokens, dim, classes, ratio, seed)
    with formulation(name):
        got = class_attention(q, k, v, layout)
    torch.testing.assert_close(got, brute_force(q, k, v, layout, classes))


@both
def test_gradients(name):
    qkv, layout = make()
    with formulation(name):
        torch.autograd.gradcheck(lambda *qkv: class_attention(*qkv, layout), [x.clone().requires_grad_() for x in qkv])
        got = run(lambda *qkv: class_attention(*qkv, layout), qkv)
    assert_equal(got, run(lambda *qkv: reference.class_attention(*qkv, layout.offsets), qkv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    qkv, layout = make(dtype=dtype)

    def op(q, k, v, *layout):
        return class_attention(q, k, v, ClassLayout(*layout)).transpose(1, 2).contiguous()

    check_registration(op, [*qkv, *layout])


@both
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("poisoned", [1, 3])
def test_no_value_of_another_class_or_of_an_ignored_token_passes(name, poison, poisoned):
    """Not to an output, not to a gradient, wherever it comes in: q, k, v or the gradient of the output."""
    qkv, layout = make()
    bad = (layout.segment // 2 == poisoned)[:, None, :, None]
    assert bad.any() and not bad.all()
    others = (~bad).expand_as(qkv[0])

    def op(q, k, v):
        return class_attention(q, k, v, layout) * torch.where(bad, poison, 1.0)

    with formulation(name):
        clean = run(lambda *qkv: class_attention(*qkv, layout), qkv)
        dirty = run(op, [torch.where(bad, poison, x) for x in qkv])
    for got, want in zip(dirty[0] + dirty[1], clean[0] + clean[1], strict=True):
        assert torch.equal(got[others], want[others])


@both
def test_ignored_tokens_are_zero_and_get_no_gradient(name):
    qkv, layout = make()
    ignored = (layout.segment == 6)[:, None, :, None].expand_as(qkv[0])
    dirty = [torch.where(ignored, torch.nan, x) for x in qkv]
    with formulation(name):
        (out,), gradients = run(lambda *qkv: class_attention(*qkv, layout), dirty)
    for x in (out, *gradients):
        assert ignored.any() and not x[ignored].any() and x.isfinite().all()


@both
def test_non_finite_values_show_in_their_own_class(name):
    (q, k, v), layout = make(batch=1, heads=1, tokens=4, dim=1, classes=1, ratio=0)
    layout = pack_classes(torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.bool), 1)
    v[0, 0, 2] = torch.nan
    with formulation(name):
        assert class_attention(q, k, v, layout).isnan().all()


@pytest.mark.parametrize("change", ["all ignored", "no image", "no token"])
def test_empty(change):
    batch, tokens = 0 if change == "no image" else 2, 0 if change == "no token" else 9
    qkv, _ = make(batch=batch, tokens=tokens)
    layout = pack_classes(torch.full((batch, tokens), -1), torch.ones(batch, tokens, dtype=torch.bool), 3)
    for name in ("segments", "pairs"):
        with formulation(name):
            (out,), gradients = run(lambda *qkv: class_attention(*qkv, layout), qkv)
        for x in (out, *gradients):
            assert x.shape == qkv[0].shape and not x.any()


@both
def test_mixed_dtypes_and_autocast_accumulate_in_float32(name):
    (q, k, v), layout = make(tokens=20, dtype=torch.float32)
    inputs = [q, k.bfloat16(), v]
    with formulation(name), torch.autocast("cpu", dtype=torch.bfloat16):
        (out,), gradients = run(lambda *qkv: class_attention(*qkv, layout), inputs)
    (exact,), exact_gradients = run(lambda *qkv: class_attention(*qkv, layout), [x.double() for x in inputs])
    for got, want, like in zip([out, *gradients], [exact, *exact_gradients], [q, *inputs], strict=True):
        assert got.dtype == like.dtype
        tolerance = 1e-5 if got.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-5)


def test_large_scores_do_not_overflow():
    (q, k, v), layout = make(dtype=torch.float32)
    out = class_attention(q * 1e4, k * 1e4, v, layout)
    assert out.isfinite().all()


@both
def test_strided_inputs_and_repeatability(name):
    qkv, layout = make()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    op = lambda *qkv: class_attention(*qkv, layout)  # noqa: E731
    with formulation(name):
        assert_equal(run(op, strided), run(op, qkv))
        assert_repeatable(op, strided)


def test_no_host_sync():
    """A fake tensor has no data: whatever would wait for the device to read some raises."""
    with FakeTensorMode():
        q = torch.zeros(2, 2, 9, 3, device="cuda")
        segment, offsets = (torch.zeros(2, n, dtype=torch.int32, device="cuda") for n in (9, 8))
        out, logsumexp = reference.class_attention_forward(q, q, q, segment, offsets)
        reference.class_attention_backward(q, q, q, q, out, logsumexp, segment, offsets)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=torch.zeros(2, 9, 3)), ValueError, r"q has shape \(2, 9, 3\), expected \(B, heads, N, d\)"),
        (dict(q=torch.zeros(2, 2, 9, 0)), ValueError, "d of at least 1"),
        (dict(k=torch.zeros(2, 2, 9, 4)), ValueError, r"k has shape \(2, 2, 9, 4\), expected \(2, 2, 9, 3\)"),
        (dict(v=torch.zeros(2, 2, 8, 3)), ValueError, r"v has shape \(2, 2, 8, 3\), expected \(2, 2, 9, 3\)"),
        (dict(v=torch.zeros(2, 2, 9, 3, dtype=torch.int64)), TypeError, "v has dtype int64"),
        (dict(v=torch.zeros(2, 2, 9, 3, device="meta")), ValueError, "v is on meta"),
        (dict(layout=()), TypeError, "layout must be a ClassLayout"),
        (dict(layout=make(tokens=8)[1]), ValueError, r"layout.order has shape \(2, 8\), expected \(2, 9\)"),
    ],
)
def test_wrong_arguments(change, error, message):
    (q, k, v), layout = make(dtype=torch.float32)
    arguments = dict(q=q, k=k, v=v, layout=layout) | change
    with pytest.raises(error, match=message):
        class_attention(**arguments)
