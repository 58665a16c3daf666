"""What only the CUDA kernels have: their tiles, 16-byte accesses, and addresses beyond 32 bits."""

import functools
import importlib
import pkgutil

import numpy as np
import pytest
import torch

from cmim_kernels import (
    class_centroids,
    cuda_kernels,
    gather_class_tokens,
    masked_patch_loss,
    pack_classes,
    same_class_conv2d,
    scatter_class_tokens,
)
from cmim_kernels.cuda_kernels import constant
from tests.csrc.emulation import csrc, implemented

from .against_torch import DEVICE, DTYPES, INTERPRETED, assert_like_torch, random_labels

BACKENDS = ("cuda",)

random = lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)  # noqa: E731


@pytest.mark.parametrize("classes", [1, 31, 32, 255, 256, 1151, 1152])
@pytest.mark.parametrize("tokens", [1023, 1024, 1025, 3000])
def test_packing_around_tiles_and_sizes_of_counters(tokens, classes):
    assert constant("PACK_TILE") == 1024 and constant("PACK_MAX_CLASSES") == 1151
    labels, masked = random_labels((2, tokens), classes)
    assert_like_torch(lambda *x: pack_classes(*x, classes), [labels, masked], gradient=False)


@pytest.mark.parametrize("size", [3, 5, 7, 1, 9])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 6), (1, 40, 17, 33), (2, 7, 34, 70), (1, 1, 16, 64), (0, 2, 4, 4), (1, 4, 43, 3)]
)
def test_convolution_around_tiles(shape, channels_last, size):
    """A tile has at most 40 rows, which are taken 8 at a time, and 16 columns of 32 channels."""
    batch, channels, height, width = shape
    labels, _ = random_labels((batch, height // 3 + 1, width // 3 + 1), 3)
    labels = labels.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :height, :width]
    inputs = [random(*shape), random(channels, size, size), random(channels)]
    if channels_last:
        inputs[0] = inputs[0].to(memory_format=torch.channels_last)
    # Sums of thousands of products: scaled to their size.
    op = lambda x, w, b: same_class_conv2d(x, labels, w / size, b, num_classes=3) / max(1, width)  # noqa: E731
    assert_like_torch(op, inputs)


def test_columns_that_are_too_far_apart_for_the_kernels_offsets_are_computed_otherwise():
    from cmim_kernels.cuda_kernels.same_class_conv2d import is_compiled

    weight = torch.empty(1, 3, 3)
    image = lambda distance: torch.empty_strided((1, 1, 1, 2), (1, 1, 1, distance), device="meta")  # noqa: E731
    assert is_compiled(image(2**30 - 1), weight) and not is_compiled(image(2**30), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_convolution_of_each_type(dtype, with_bias):
    labels, _ = random_labels((2, 9, 10), 2, torch.uint8)
    x, weight, bias = random(2, 4, 9, 10).to(dtype), random(4, 3, 3).to(dtype), random(4)
    op = lambda x, w, *b: same_class_conv2d(x, labels, w, *b, num_classes=2)  # noqa: E731
    assert_like_torch(op, [x, weight, bias][: 2 + with_bias])


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_convolution_lets_nothing_of_another_class_pass(poison):
    labels, _ = random_labels((1, 20, 20), 3)
    x, weight = random(1, 5, 20, 20), random(5, 7, 7)
    op = lambda x: same_class_conv2d(x, labels, weight, num_classes=3)  # noqa: E731
    clean = assert_like_torch(op, [x])[0][0]
    dirty = op_of_backend(op, torch.where((labels == 1)[:, None], poison, x))
    others = (labels != 1)[:, None].expand_as(x)
    assert torch.equal(dirty[others], clean[others])


def op_of_backend(op, x):
    return assert_like_torch(op, [x], gradient=False)[0][0]


NAMES = (
    "gather",
    "scatter",
    "loss of tokens",
    "loss of images",
    "centroids of tokens",
    "centroids of images",
    "convolution",
)


def calls():
    """Name -> (op, input): whose rows or patches are so regular that they are read 16 bytes at a time."""
    labels, masked = random_labels((2, 36), 3)
    layout = pack_classes(labels, masked, 3)
    tokens, images = random(2, 36, 16).bfloat16(), random(2, 3, 24, 24).bfloat16()
    last = images.to(memory_format=torch.channels_last)
    loss = functools.partial(masked_patch_loss, masked=masked, labels=labels, num_classes=3, patch_size=4, normalize=True)
    convolve = functools.partial(same_class_conv2d, num_classes=3, weight=random(16, 3, 3))
    return {
        "gather": (lambda x: gather_class_tokens(x, layout), tokens),
        "scatter": (lambda x: scatter_class_tokens(x, layout), tokens),
        "loss of tokens": (lambda x: loss(x, random(2, 3, 24, 24)), random(2, 36, 48).bfloat16()),
        "loss of images": (lambda x: loss(last, x), last),
        "centroids of tokens": (lambda x: class_centroids(x, labels, masked, 3), tokens),
        "centroids of images": (lambda x: class_centroids(x, labels, masked, 3), tokens.mT.contiguous().view(2, 16, 6, 6)),
        "convolution": (lambda x: convolve(x, labels.view(2, 6, 6)), tokens.mT.contiguous().view(2, 16, 6, 6)),
    }


def far(x):
    """The values of x with more than 2**31 elements from one row of its first dimension to the next, and as aligned."""
    stride = 2**31 + 64
    memory = torch.from_numpy(np.empty(stride * (len(x) - 1) + x[0].numel(), np.int16))  # never touched: no memory behind it
    if not INTERPRETED:
        if torch.cuda.mem_get_info()[0] < 2 * memory.numel():
            pytest.skip("needs a device with more free memory")
        memory = torch.empty(memory.shape, dtype=memory.dtype, device=DEVICE)
    order = sorted(range(1, x.dim()), key=x.stride, reverse=True)
    strides = [stride] + [0] * (x.dim() - 1)
    step = 1
    for dimension in reversed(order):
        strides[dimension], step = step, step * x.shape[dimension]
    return memory.view(x.dtype).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("name", NAMES)
def test_addresses_beyond_32_bits(name):
    op, x = calls()[name]
    want, got = (assert_like_torch(op, [value], gradient=False)[0] for value in (x, far(x)))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["begins between", "rows between", "every other"])
@pytest.mark.parametrize("name", NAMES)
def test_memory_that_16_bytes_do_not_fit(name, kind):
    op, x = calls()[name]
    *rest, last = x.shape
    memory = x.new_empty(*rest, 2 * last if kind == "every other" else last + 1)
    part = {"begins between": slice(1, None), "rows between": slice(0, last), "every other": slice(0, None, 2)}[kind]
    assert_like_torch(op, [memory[..., part].copy_(x)])


@pytest.mark.parametrize("op", ["gather", "scatter", "loss", "centroids"])
def test_aligned_rows_that_end_within_16_bytes(op):
    labels, masked = random_labels((2, 36), 3)
    layout = pack_classes(labels, masked, 3)
    x = random(2, 36, 16).bfloat16()[..., :12]
    ops = {
        "gather": lambda x: gather_class_tokens(x, layout),
        "scatter": lambda x: scatter_class_tokens(x, layout),
        "loss": lambda x: masked_patch_loss(x, random(2, 3, 12, 12), masked, labels, 3, patch_size=2),
        "centroids": lambda x: class_centroids(x, labels, masked, 3),
    }
    assert_like_torch(ops[op], [x])


def recorded_launches(monkeypatch):
    """Arguments of one launch of every op of the library."""
    launch, recorded = cuda_kernels.launch, {}

    def record(op, *arguments):
        launch(op, *arguments)
        recorded[op] = arguments

    for module in pkgutil.iter_modules(cuda_kernels.__path__, "cmim_kernels.cuda_kernels."):
        monkeypatch.setattr(importlib.import_module(module.name), "launch", record)
    labels, masked = random_labels((2, 1400), 3)
    assert_like_torch(lambda *x: pack_classes(*x, 3), [labels, masked], gradient=False)
    layout = pack_classes(labels, masked, 3)
    x, p, q = random(2, 1400, 8), random(8), random(1400, 8)
    assert_like_torch(lambda x, p, q: gather_class_tokens(x, layout, mask_token=p, position=q), [x, p, q])
    assert_like_torch(lambda x, p, q: scatter_class_tokens(x, layout, mask_token=p, position=q), [x[:, :9], p, q])
    assert_like_torch(lambda x: class_centroids(x, labels, masked, 3), [x])
    loss = functools.partial(masked_patch_loss, masked=masked, labels=labels, num_classes=3, patch_size=2)
    assert_like_torch(lambda x: loss(x, random(2, 3, 70, 80)), [random(2, 1400, 12)])
    grid, weight = x.mT.reshape(2, 8, 35, 40), random(8, 3, 3)
    convolve = functools.partial(same_class_conv2d, labels=labels.view(2, 35, 40), num_classes=3)
    assert_like_torch(lambda x, w, b: convolve(x, weight=w, bias=b) / 40, [grid, weight, p])
    return recorded


ANY_DTYPE = {
    ("sum_rows", "out"), ("sum_rows", "other_out"), ("gather_backward", "grad_position"),
    ("scatter_backward", "grad_position"), ("centroids_backward", "grad"),
}  # fmt: skip
"""What may have another dtype than the op's other tensors."""


def test_the_library_checks_what_it_relies_on(monkeypatch):
    """Each tensor that an op writes is refused in another dtype or another shape."""
    recorded = recorded_launches(monkeypatch)
    said = "`recorded_launches` above calls others than csrc/library.cpp implements"
    assert set(recorded) == set(implemented(csrc.CSRC / "library.cpp")), said
    for name, arguments in recorded.items():
        op = getattr(torch.ops.cmim_cuda, name).default
        schema = op._schema.arguments[1:]  # without the stream
        for i, (argument, value) in enumerate(zip(schema, arguments, strict=True)):
            if not argument.is_write or value is None:
                continue
            wrong = [torch.cat([value, value], dim=-1)] if value.dim() else []
            if (name, argument.name) not in ANY_DTYPE:
                wrong.append(value.half())
            for bad in wrong:
                with pytest.raises(RuntimeError, match=r"cmim_cuda: .* of the wrong kind"):
                    op(0, *arguments[:i], bad, *arguments[i + 1 :])


def test_the_library_refuses_options_that_it_does_not_know(monkeypatch):
    recorded = recorded_launches(monkeypatch)
    op, arguments = torch.ops.cmim_cuda.patch_loss_forward.default, list(recorded["patch_loss_forward"])
    distance = next(i for i, a in enumerate(arguments) if a == "l1")
    with pytest.raises(RuntimeError, match="unknown distance"):
        op(0, *arguments[:distance], "l3", *arguments[distance + 1 :])
    with pytest.raises(RuntimeError, match="mean and std"):
        op(0, *[[0.5] * 17 if a == [] else a for a in arguments])
    with pytest.raises(RuntimeError, match="no constant is called TILE"):
        constant("TILE")
