import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cmim_kernels import ClassLayout, gather_class_tokens, pack_classes, scatter_class_tokens
from cmim_kernels.reference import scatter_class_tokens as reference

from .op_checks import assert_equal, assert_repeatable, check_registration, run


def make(batch=2, tokens=7, length=5, channels=3, classes=2, seed=0, dtype=torch.float64):
    """packed, mask_token, position, layout."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes + 1, (batch, tokens), generator=g)
    masked = torch.rand(batch, tokens, generator=g) < 0.5
    shapes = (batch, length, channels), (channels,), (tokens, channels)
    values = [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]
    return *values, pack_classes(labels, masked, classes)


def brute_force(packed, mask_token, position, order):
    (batch, length, channels), tokens = packed.shape, order.shape[1]
    out = packed.new_zeros(batch, tokens, channels)
    for b in range(batch):
        for i, n in enumerate(order[b].tolist()):
            if i < length:
                out[b, n] = packed[b, i]
            elif mask_token is not None:
                out[b, n] = mask_token
            if position is not None:
                out[b, n] += position[n]
    return out


@given(
    batch=st.integers(0, 2), tokens=st.integers(0, 8), channels=st.integers(0, 3), shorter=st.integers(0, 8),
    with_mask_token=st.booleans(), with_position=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_brute_force(batch, tokens, channels, shorter, with_mask_token, with_position, seed):
    length = max(0, tokens - shorter)
    packed, mask_token, position, layout = make(batch, tokens, length, channels, seed=seed)
    mask_token, position = mask_token if with_mask_token else None, position if with_position else None
    got = scatter_class_tokens(packed, layout, mask_token=mask_token, position=position)
    torch.testing.assert_close(got, brute_force(packed, mask_token, position, layout.order))


@given(tokens=st.integers(0, 9), classes=st.integers(1, 3), seed=st.integers(0, 99))
def test_inverse_of_gather(tokens, classes, seed):
    _, _, _, layout = make(tokens=tokens, length=0, classes=classes, seed=seed)
    x = torch.randn(2, tokens, 3)
    assert torch.equal(scatter_class_tokens(gather_class_tokens(x, layout), layout), x)


def call(layout, with_mask_token, with_position):
    """The op as a function of those float inputs that it gets."""

    def op(packed, *rest):
        rest = list(rest)
        mask_token = rest.pop(0) if with_mask_token else None
        position = rest.pop(0) if with_position else None
        return scatter_class_tokens(packed, layout, mask_token=mask_token, position=position)

    return op


@pytest.mark.parametrize("length", [7, 5, 0])
@pytest.mark.parametrize(("with_mask_token", "with_position"), [(True, True), (True, False), (False, True), (False, False)])
def test_gradients(with_mask_token, with_position, length):
    packed, mask_token, position, layout = make(length=length)
    inputs = [packed] + [mask_token] * with_mask_token + [position] * with_position
    op = call(layout, with_mask_token, with_position)
    torch.autograd.gradcheck(op, [x.clone().requires_grad_() for x in inputs])

    def definition(packed, *rest):
        rest = rest if with_mask_token else (None, *rest)
        return reference.scatter_class_tokens(packed, layout.inverse, *rest)

    assert_equal(run(op, inputs), run(definition, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("with_mask_token", "with_position"), [(True, True), (False, False)])
def test_registration(with_mask_token, with_position, dtype):
    packed, mask_token, position, layout = make(dtype=dtype)
    inputs = [packed] + [mask_token] * with_mask_token + [position] * with_position

    def op(packed, *rest):
        *rest, order, inverse, segment, offsets, cu_seqlens = rest
        layout = ClassLayout(order, inverse, segment, offsets, cu_seqlens)
        # The transposition gives the backward op a gradient that is not contiguous.
        return call(layout, with_mask_token, with_position)(packed, *rest).transpose(1, 2).contiguous()

    check_registration(op, [*inputs, *layout])


def test_bfloat16_tokens_with_float32_parameters():
    packed, mask_token, position, layout = make(dtype=torch.float32)
    inputs = [packed.bfloat16(), mask_token, position]
    op = call(layout, True, True)
    (out,), gradients = run(op, inputs)
    assert out.dtype == torch.bfloat16 and [g.dtype for g in gradients] == [x.dtype for x in inputs]
    (exact,), _ = run(op, [x.double() for x in inputs])
    assert torch.equal(out, exact.bfloat16())


def test_sums_of_half_precision_gradients_run_in_float32():
    packed, mask_token, position, layout = make(batch=601, tokens=2, length=1, channels=1, dtype=torch.bfloat16)
    mask_token, position = mask_token.float().requires_grad_(), position.float().requires_grad_()
    scatter_class_tokens(packed, layout, mask_token=mask_token, position=position).sum().backward()
    # bfloat16 holds 600 and 604, but not 601.
    assert mask_token.grad.item() == 601 and position.grad.tolist() == [[601], [601]]


def test_strided_inputs_and_repeatability():
    packed, mask_token, position, layout = make()
    op = call(layout, True, True)
    strided = [packed.transpose(1, 2).contiguous().transpose(1, 2), mask_token, position.T.contiguous().T]
    assert_equal(run(op, strided), run(op, [packed, mask_token, position]), rtol=0, atol=0)
    assert_repeatable(op, strided)


def test_no_host_sync():
    """A fake tensor has no data: whatever would wait for the device to read some raises."""
    with FakeTensorMode():
        packed, mask_token, position = (torch.zeros(s, device="cuda") for s in ((2, 5, 3), (3,), (7, 3)))
        index = torch.zeros(2, 7, dtype=torch.int32, device="cuda")
        out = reference.scatter_class_tokens_forward(packed, index, mask_token, position)
        reference.scatter_class_tokens_backward(out, index, index, mask_token, position, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(packed=torch.zeros(2, 7, 3, dtype=torch.int32)), TypeError, "packed has dtype int32"),
        (dict(packed=torch.zeros(3, 5, 3)), ValueError, r"layout.order has shape \(2, 7\), expected \(3, N\)"),
        (dict(packed=torch.zeros(2, 8, 3)), ValueError, "packed has 8 tokens an image, expected at most the 7 of layout"),
        (dict(layout=None), TypeError, "layout must be a ClassLayout from pack_classes, got NoneType"),
        (dict(mask_token=torch.zeros(2)), ValueError, r"mask_token has shape \(2,\), expected \(3,\)"),
        (dict(position=torch.zeros(5, 3)), ValueError, r"position has shape \(5, 3\), expected \(7, 3\)"),
    ],
)
def test_wrong_arguments(change, error, message):
    packed, mask_token, position, layout = make(dtype=torch.float32)
    arguments = dict(packed=packed, layout=layout, mask_token=mask_token, position=position) | change
    with pytest.raises(error, match=message):
        scatter_class_tokens(**arguments)
