"""The transforms of `torch.func` give each op's true first derivative, or an error; never zeros in silence."""

import os

import pytest
import torch
from torch.autograd import forward_ad

from cmim_kernels import (
    ClassCentroids,
    centroid_distance,
    class_attention,
    class_centroids,
    gather_class_tokens,
    masked_patch_loss,
    pack_classes,
    same_class_conv2d,
    scatter_class_tokens,
    upsample_cross_entropy,
    use_backend,
)
from cmim_kernels.ops.library import KERNELS

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
]
BATCH, TOKENS, CHANNELS, CLASSES = 2, 16, 4, 3


def calls():
    """Name of each differentiable op -> (function of float tensors to a scalar, those tensors)."""
    g = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    labels, masked = torch.randint(-1, CLASSES, (BATCH, TOKENS), generator=g), torch.rand(BATCH, TOKENS, generator=g) < 0.5
    layout, grid = pack_classes(labels, masked, CLASSES), labels.view(BATCH, 4, 4)
    tokens, token, position = random(BATCH, TOKENS, CHANNELS), random(CHANNELS), random(TOKENS, CHANNELS)
    image, count = random(BATCH, 3, 8, 8), torch.full((BATCH, CLASSES, 2), 4, dtype=torch.int32)
    target = torch.randint(-1, CLASSES, (BATCH, 8, 8), generator=g)
    square = lambda x: x.square().sum()  # noqa: E731
    return {
        "gather_class_tokens": (
            lambda x, t, p: square(gather_class_tokens(x, layout, mask_token=t, position=p)), [tokens, token, position],
        ),
        "scatter_class_tokens": (
            lambda x, t, p: square(scatter_class_tokens(x, layout, mask_token=t, position=p)),
            [tokens[:, :9], token, position],
        ),
        "class_centroids": (lambda x: square(class_centroids(x, labels, masked, CLASSES).mean), [tokens]),
        "centroid_distance": (
            lambda x: centroid_distance(ClassCentroids(x, count)).loss, [random(BATCH, CLASSES, 2, CHANNELS)],
        ),
        "masked_patch_loss": (
            lambda x: masked_patch_loss(x, image, masked, labels, CLASSES, patch_size=2, distance="mse").loss,
            [random(BATCH, TOKENS, 12)],
        ),
        "class_attention": (
            lambda q, k, v: square(class_attention(q, k, v, layout)), [random(BATCH, 2, TOKENS, 4) for _ in range(3)],
        ),
        "same_class_conv2d": (
            lambda x, w, b: square(same_class_conv2d(x, grid, w, b, num_classes=CLASSES)),
            [random(BATCH, CHANNELS, 4, 4), random(CHANNELS, 3, 3), random(CHANNELS)],
        ),
        "upsample_cross_entropy": (lambda x: upsample_cross_entropy(x, target).sum(), [random(BATCH, CLASSES, 4, 4)]),
    }  # fmt: skip


def cases(backend):
    return [(op, backend) for op in calls() if backend == "torch" or backend in KERNELS[f"{op}_forward"]]


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@pytest.fixture(params=cases("torch"), ids=lambda case: case[0])
def call(request):
    op, backend = request.param
    with use_backend(backend):
        yield calls()[op]


@pytest.fixture(params=cases("torch") + (cases("triton") if INTERPRETED else []), ids=lambda case: "-".join(case))
def call_of_each_backend(request):
    op, backend = request.param
    with use_backend(backend):
        yield calls()[op]


def gradients(function, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs)


def test_every_differentiable_op_is_here():
    assert {f"{op}_backward" for op in calls()} == {name for name in KERNELS if name.endswith("_backward")}


def test_grad(call_of_each_backend):
    function, inputs = call_of_each_backend
    got = torch.func.grad(function, argnums=tuple(range(len(inputs))))(*inputs)
    torch.testing.assert_close(got, gradients(function, inputs), rtol=0, atol=0)


def vmapped(function, inputs):
    """Three samples of the inputs, and the gradients of each."""
    samples = [torch.stack([x, 2 * x, x - 1]) for x in inputs]
    each = [gradients(function, sample) for sample in zip(*samples, strict=True)]
    return samples, [torch.stack(parts) for parts in zip(*each, strict=True)]


def test_vmap_of_a_leaf_outside(call_of_each_backend):
    function, inputs = call_of_each_backend
    samples, want = vmapped(function, inputs)
    got = gradients(lambda *x: torch.vmap(function)(*x).sum(), samples)
    torch.testing.assert_close(list(got), want)


@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap"])
def test_vmap_and_grad(call, order):
    function, inputs = call
    samples, want = vmapped(function, inputs)
    every = tuple(range(len(inputs)))
    if order == "vmap of grad":
        got = torch.vmap(torch.func.grad(function, argnums=every))(*samples)
    else:
        got = torch.func.grad(lambda *x: torch.vmap(function)(*x).sum(), argnums=every)(*samples)
    torch.testing.assert_close(list(got), want)


def test_jacrev(call):
    function, inputs = call
    torch.testing.assert_close(torch.func.jacrev(function)(*inputs), gradients(function, inputs)[0])


def test_forward_mode_is_an_error(call):
    function, inputs = call
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        torch.func.jvp(function, tuple(inputs), tuple(map(torch.ones_like, inputs)))
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        function(*(forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs))


def test_a_second_derivative_is_an_error(call):
    function, inputs = call
    for outer in range(len(inputs)):
        for inner in range(len(inputs)):

            def gradient_sum(*x, inner=inner):
                return torch.func.grad(function, argnums=inner)(*x).square().sum()

            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.func.grad(gradient_sum, argnums=outer)(*inputs)
    leaf = inputs[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf, *inputs[1:]), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.sum().backward()
