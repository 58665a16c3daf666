import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cmim_kernels import ClassLayout, gather_class_tokens, pack_classes
from cmim_kernels.reference import gather_class_tokens as reference

from .op_checks import assert_equal, assert_repeatable, check_registration, run


def make(batch=2, tokens=7, channels=3, classes=2, ratio=0.5, seed=0, dtype=torch.float64):
    """tokens, mask_token, position, layout, and the labels and masks that the layout packs."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes + 1, (batch, tokens), generator=g)
    masked = torch.rand(batch, tokens, generator=g) < ratio
    shapes = (batch, tokens, channels), (channels,), (tokens, channels)
    values = [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]
    return *values, pack_classes(labels, masked, classes), labels, masked


def brute_force(tokens, mask_token, position, labels, masked, classes, length):
    out = tokens.new_zeros(tokens.shape[0], length, tokens.shape[2])
    for b in range(len(tokens)):
        valid = lambda n: 0 <= labels[b, n] < classes  # noqa: B023, E731
        key = lambda n: (int(labels[b, n]), bool(masked[b, n])) if valid(n) else (classes, False)  # noqa: B023, E731
        for i, n in enumerate(sorted(range(tokens.shape[1]), key=key)[:length]):
            replaced = mask_token is not None and masked[b, n] and valid(n)
            out[b, i] = mask_token if replaced else tokens[b, n]
            if position is not None:
                out[b, i] += position[n]
    return out


@given(
    batch=st.integers(0, 2), tokens=st.integers(0, 8), channels=st.integers(0, 3), classes=st.integers(1, 3),
    ratio=st.sampled_from([0, 0.5, 1]), shorter=st.integers(0, 8), with_mask_token=st.booleans(),
    with_position=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_brute_force(batch, tokens, channels, classes, ratio, shorter, with_mask_token, with_position, seed):
    x, mask_token, position, layout, labels, masked = make(batch, tokens, channels, classes, ratio, seed)
    mask_token, position = mask_token if with_mask_token else None, position if with_position else None
    length = max(0, tokens - shorter)
    want = brute_force(x, mask_token, position, labels, masked, classes, length)
    got = gather_class_tokens(x, layout, mask_token=mask_token, position=position, length=length if shorter else None)
    torch.testing.assert_close(got, want)


def call(layout, with_mask_token, with_position, length):
    """The op as a function of those float inputs that it gets."""

    def op(tokens, *rest):
        rest = list(rest)
        mask_token = rest.pop(0) if with_mask_token else None
        position = rest.pop(0) if with_position else None
        return gather_class_tokens(tokens, layout, mask_token=mask_token, position=position, length=length)

    return op


@pytest.mark.parametrize("length", [None, 5, 0])
@pytest.mark.parametrize(("with_mask_token", "with_position"), [(True, True), (True, False), (False, True), (False, False)])
def test_gradients(with_mask_token, with_position, length):
    tokens, mask_token, position, layout, *_ = make()
    inputs = [tokens] + [mask_token] * with_mask_token + [position] * with_position
    op = call(layout, with_mask_token, with_position, length)
    torch.autograd.gradcheck(op, [x.clone().requires_grad_() for x in inputs])

    def definition(tokens, *rest):
        rest = (*rest[:1], *rest[1:]) if with_mask_token else (None, *rest)
        return reference.gather_class_tokens(
            tokens, layout.order, layout.segment, *rest, length=7 if length is None else length
        )

    assert_equal(run(op, inputs), run(definition, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("with_mask_token", "with_position"), [(True, True), (False, False)])
def test_registration(with_mask_token, with_position, dtype):
    tokens, mask_token, position, layout, *_ = make(dtype=dtype)
    inputs = [tokens] + [mask_token] * with_mask_token + [position] * with_position

    def op(tokens, *rest):
        *rest, order, inverse, segment, offsets, cu_seqlens = rest
        layout = ClassLayout(order, inverse, segment, offsets, cu_seqlens)
        # The transposition gives the backward op a gradient that is not contiguous.
        return call(layout, with_mask_token, with_position, 5)(tokens, *rest).transpose(1, 2).contiguous()

    check_registration(op, [*inputs, *layout])


def test_compiles_after_packing():
    tokens, mask_token, position, _, labels, masked = make()

    def op(tokens, mask_token, position):
        return gather_class_tokens(tokens, pack_classes(labels, masked, 2), mask_token=mask_token, position=position)

    check_registration(op, [tokens, mask_token, position])


def test_bfloat16_tokens_with_float32_parameters():
    tokens, mask_token, position, layout, *_ = make(dtype=torch.float32)
    inputs = [tokens.bfloat16(), mask_token, position]
    op = call(layout, True, True, 5)
    (out,), gradients = run(op, inputs)
    assert out.dtype == torch.bfloat16 and [g.dtype for g in gradients] == [x.dtype for x in inputs]
    (exact,), _ = run(op, [x.double() for x in inputs])
    assert torch.equal(out, exact.bfloat16())


def test_sums_of_half_precision_gradients_run_in_float32():
    tokens, mask_token, position, layout, *_ = make(batch=601, tokens=3, channels=1, ratio=1, dtype=torch.bfloat16)
    mask_token, position = mask_token.float().requires_grad_(), position.float().requires_grad_()
    gather_class_tokens(tokens, layout, mask_token=mask_token, position=position).sum().backward()
    count = int((layout.segment % 2 == 1).sum())
    assert count != torch.tensor(count).bfloat16().item() and mask_token.grad.item() == count
    assert position.grad.tolist() == [[601]] * 3


def test_no_gradient_through_replaced_or_left_out_tokens():
    tokens, mask_token, position, layout, *_ = make()
    tokens = torch.where((layout.segment % 2 == 1).gather(1, layout.inverse.long())[..., None], torch.nan, tokens)
    (out,), (grad, *_) = run(call(layout, True, True, 5), [tokens, mask_token, position])
    assert out.isfinite().all()
    used = (layout.inverse < 5) & (layout.segment % 2 == 0).gather(1, layout.inverse.long())
    assert torch.equal(grad.ne(0).any(dim=-1), used)


def test_strided_inputs_and_repeatability():
    tokens, mask_token, position, layout, *_ = make()
    op = call(layout, True, True, None)
    strided = [tokens.transpose(1, 2).contiguous().transpose(1, 2), mask_token, position.T.contiguous().T]
    assert_equal(run(op, strided), run(op, [tokens, mask_token, position]), rtol=0, atol=0)
    assert_repeatable(op, strided)


def test_no_host_sync():
    """A fake tensor has no data: whatever would wait for the device to read some raises."""
    with FakeTensorMode():
        tokens, mask_token, position = (torch.zeros(s, device="cuda") for s in ((2, 7, 3), (3,), (7, 3)))
        index = torch.zeros(2, 7, dtype=torch.int32, device="cuda")
        out = reference.gather_class_tokens_forward(tokens, index, index, index, mask_token, position, 5)
        reference.gather_class_tokens_backward(out, index, index, mask_token, position)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(tokens=torch.zeros(2, 7)), ValueError, r"tokens has shape \(2, 7\), expected \(B, N, C\)"),
        (dict(tokens=torch.zeros(2, 6, 3)), ValueError, r"layout.order has shape \(2, 7\), expected \(2, 6\)"),
        (dict(layout=torch.zeros(2, 7)), TypeError, "layout must be a ClassLayout from pack_classes, got Tensor"),
        (dict(mask_token=torch.zeros(1, 3)), ValueError, r"mask_token has shape \(1, 3\), expected \(3,\)"),
        (dict(mask_token=torch.zeros(3, dtype=torch.int32)), TypeError, "mask_token has dtype int32"),
        (dict(position=torch.zeros(6, 3)), ValueError, r"position has shape \(6, 3\), expected \(7, 3\)"),
        (dict(position=torch.zeros(7, 3, device="meta")), ValueError, "position is on meta, expected cpu"),
        (dict(length=8), ValueError, "length is 8, expected at most the number of tokens, 7"),
        (dict(length=-1), ValueError, "length is -1"),
    ],
)
def test_wrong_arguments(change, error, message):
    tokens, mask_token, position, layout, *_ = make(dtype=torch.float32)
    arguments = dict(tokens=tokens, layout=layout, mask_token=mask_token, position=position) | change
    with pytest.raises(error, match=message):
        gather_class_tokens(**arguments)


@pytest.mark.parametrize("name", ["order", "inverse", "segment", "offsets"])
def test_layout_of_another_dtype(name):
    tokens, _, _, layout, *_ = make()
    with pytest.raises(TypeError, match=rf"layout.{name} has dtype int64, expected one of int32"):
        gather_class_tokens(tokens, layout._replace(**{name: getattr(layout, name).long()}))
