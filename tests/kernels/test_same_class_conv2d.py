import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmim_kernels import same_class_conv2d
from cmim_kernels.reference import same_class_conv2d as reference

from .op_checks import assert_equal, assert_repeatable, check_registration, run


def make(batch=2, channels=3, height=5, width=6, size=3, classes=3, dtype=torch.float64, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, dtype=dtype, generator=g)
    labels = torch.randint(-1, classes + 1, (batch, height, width), generator=g)
    weight = torch.randn(channels, size, size, dtype=dtype, generator=g)
    return x, labels, weight, torch.randn(channels, dtype=dtype, generator=g) if bias else None


def brute_force(x, labels, weight, bias, classes):
    """One number at a time, straight from the formula."""
    out, reach = torch.zeros_like(x), weight.shape[-1] // 2
    for b, c, i, j in torch.cartesian_prod(*[torch.arange(n) for n in x.shape]).view(-1, 4).tolist():
        label = int(labels[b, i, j])
        if not 0 <= label < classes:
            continue
        out[b, c, i, j] = 0 if bias is None else bias[c]
        for di in range(-reach, reach + 1):
            for dj in range(-reach, reach + 1):
                y, z = i + di, j + dj
                if 0 <= y < x.shape[2] and 0 <= z < x.shape[3] and labels[b, y, z] == label:
                    out[b, c, i, j] += weight[c, di + reach, dj + reach] * x[b, c, y, z]
    return out


@given(
    batch=st.integers(0, 2), channels=st.integers(1, 3), height=st.integers(1, 5), width=st.integers(1, 5),
    size=st.sampled_from([1, 3, 5]), classes=st.integers(1, 4), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_brute_force(batch, channels, height, width, size, classes, bias, seed):
    x, labels, weight, b = make(batch, channels, height, width, size, classes, bias=bias, seed=seed)
    got = same_class_conv2d(x, labels, weight, b, num_classes=classes)
    torch.testing.assert_close(got, brute_force(x, labels, weight, b, classes))


@pytest.mark.parametrize("bias", [True, False])
def test_gradients(bias):
    x, labels, weight, b = make(bias=bias)
    inputs = [t.requires_grad_() for t in (x, weight, b) if t is not None]
    op = lambda x, weight, b=None: same_class_conv2d(x, labels, weight, b, num_classes=3)  # noqa: E731
    torch.autograd.gradcheck(op, inputs)
    definition = lambda x, weight, b=None: reference.same_class_conv2d(x, labels, weight, b, num_classes=3)  # noqa: E731
    assert_equal(run(op, inputs), run(definition, inputs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(bias, dtype):
    x, labels, weight, b = make(bias=bias, dtype=dtype)
    check_registration(lambda *a: same_class_conv2d(*a, num_classes=3), [x, labels, weight, b])


def test_channels_last_in_channels_last_out():
    x, labels, weight, b = make()
    y = x.to(memory_format=torch.channels_last)
    op = lambda x: same_class_conv2d(x, labels, weight, b, num_classes=3)  # noqa: E731
    (out,), (grad,) = run(op, [y])
    assert out.is_contiguous(memory_format=torch.channels_last) and grad.is_contiguous(memory_format=torch.channels_last)
    assert_equal(([out], [grad]), run(op, [x]))


def test_bfloat16_tokens_with_float32_weights():
    x, labels, weight, b = make(dtype=torch.float32)
    out = same_class_conv2d(x.bfloat16(), labels, weight, b, num_classes=3)
    assert out.dtype == torch.bfloat16
    exact = same_class_conv2d(x.bfloat16().double(), labels, weight.double(), b.double(), num_classes=3)
    assert torch.equal(out, exact.bfloat16())


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_no_value_of_another_class_passes(poison):
    x, labels, weight, b = make()
    clean = run(lambda x: same_class_conv2d(x, labels, weight, b, num_classes=3), [x])
    dirty_x = torch.where((labels == 1)[:, None], poison, x)
    dirty = same_class_conv2d(dirty_x, labels, weight, b, num_classes=3)
    others = (labels != 1)[:, None].expand_as(x)
    assert torch.equal(dirty[others], clean[0][0][others])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_dtypes_and_repeatability(dtype):
    x, labels, weight, b = make()
    labels = labels.clamp(min=0).to(dtype)
    assert_repeatable(lambda x: same_class_conv2d(x, labels, weight, b, num_classes=3), [x])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 3, 5)), ValueError, r"x has shape \(2, 3, 5\), expected \(B, C, h, w\)"),
        (dict(x=torch.zeros(2, 3, 5, 6, dtype=torch.int32)), TypeError, "x has dtype int32"),
        (
            dict(labels=torch.zeros(2, 5, 5, dtype=torch.int64)),
            ValueError,
            r"labels has shape \(2, 5, 5\), expected \(2, 5, 6\)",
        ),
        (dict(labels=torch.zeros(2, 5, 6)), TypeError, "labels has dtype float32"),
        (dict(weight=torch.zeros(3, 2, 2)), ValueError, "odd k"),
        (dict(bias=torch.zeros(4)), ValueError, r"bias has shape \(4,\), expected \(3,\)"),
        (dict(num_classes=0), ValueError, "num_classes is 0"),
        (dict(num_classes=2.0), TypeError, "num_classes must be an int"),
    ],
)
def test_wrong_arguments(change, error, message):
    x, labels, weight, b = make(dtype=torch.float32)
    arguments = dict(x=x, labels=labels, weight=weight, bias=b, num_classes=3) | change
    with pytest.raises(error, match=message):
        same_class_conv2d(**arguments)


@pytest.mark.parametrize("empty", ["batch", "channels", "height", "width"])
def test_nothing_to_convolve(empty):
    x, labels, weight, b = make(**{empty: 0})
    (out,), grads = run(lambda *a: same_class_conv2d(a[0], labels, *a[1:], num_classes=3), [x, weight, b])
    assert out.shape == x.shape
    for got, like in zip(grads, (x, weight, b), strict=True):
        assert torch.equal(got, torch.zeros_like(like))


def test_autocast_does_not_reach_inside():
    x, labels, weight, b = make(dtype=torch.float32)
    op = lambda *a: same_class_conv2d(a[0], labels, a[1], a[2], num_classes=3)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(op, [x, weight, b])
    assert_equal(inside, run(op, [x, weight, b]), rtol=0, atol=0)


def test_more_classes_than_a_uint8_holds():
    x, labels, weight, b = make(dtype=torch.float32)
    labels = torch.where(labels == 1, 200, labels.clamp(min=0)).to(torch.uint8)
    got = same_class_conv2d(x, labels, weight, b, num_classes=300)
    assert torch.equal(got, same_class_conv2d(x, labels.long(), weight, b, num_classes=300)) and got.abs().min() > 0


def test_the_definition_off_the_cpu_matches_the_loop_over_classes():
    """Other devices convolve tap by tap, the CPU class by class."""
    inputs = make()
    torch.testing.assert_close(
        reference.same_class_conv2d(*inputs, num_classes=3), same_class_conv2d(*inputs, num_classes=3)
    )
