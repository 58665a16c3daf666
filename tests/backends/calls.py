"""Calls of the public functions, at least one of every op that has kernels: what tests of all ops go through."""

import math
from typing import NamedTuple

import torch

from cmim_kernels import (
    class_attention,
    class_centroids,
    gather_class_tokens,
    masked_patch_loss,
    pack_classes,
    patch_labels,
    same_class_conv2d,
    scatter_class_tokens,
    upsample_cross_entropy,
    upsample_pseudo_labels,
)

from .declared import OPS

BATCH, SIDE, CHANNELS, CLASSES, PATCH = 4, 24, 96, 11, 4


class Inputs(NamedTuple):
    """What the calls have in common, of one dtype on one device."""

    random: object
    """shape -> a new tensor"""
    labels: torch.Tensor
    masked: torch.Tensor
    target: torch.Tensor
    classes: int

    @property
    def batch(self):
        return len(self.labels)

    @property
    def tokens(self):
        return self.labels.shape[1]

    @property
    def side(self):
        return math.isqrt(self.tokens)

    @property
    def layout(self):
        return pack_classes(self.labels, self.masked, self.classes)

    @property
    def grid(self):
        return self.labels.unflatten(1, (self.side, self.side))


def inputs(dtype=torch.float32, device="cuda", classes=CLASSES, batch=BATCH, side=SIDE):
    g = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=g).to(device, dtype)  # noqa: E731
    labels = lambda *shape: torch.randint(-1, classes + 2, shape, generator=g).to(device)  # noqa: E731
    masked = (torch.rand(batch, side * side, generator=g) < 0.5).to(device)
    return Inputs(random, labels(batch, side * side), masked, labels(batch, side * PATCH, side * PATCH), classes)


def _pack(i):
    return lambda labels, masked: pack_classes(labels, masked, i.classes), [i.labels, i.masked]


def _gather(i):
    layout = i.layout
    parameters = [i.random(CHANNELS), i.random(i.tokens, CHANNELS)]
    function = lambda x, m, p: gather_class_tokens(x, layout, mask_token=m, position=p)  # noqa: E731
    return function, [i.random(i.batch, i.tokens, CHANNELS), *parameters]


def _scatter(i):
    layout = i.layout
    parameters = [i.random(CHANNELS), i.random(i.tokens, CHANNELS)]
    function = lambda x, m, p: scatter_class_tokens(x, layout, mask_token=m, position=p)  # noqa: E731
    return function, [i.random(i.batch, i.tokens // 3, CHANNELS), *parameters]


def _gather_alone(i):
    layout = i.layout
    return lambda x: gather_class_tokens(x, layout), [i.random(i.batch, i.tokens, CHANNELS)]


def _scatter_alone(i):
    layout = i.layout
    return lambda x: scatter_class_tokens(x, layout), [i.random(i.batch, i.tokens, CHANNELS)]


def _loss(i):
    image = i.random(i.batch, 3, i.side * PATCH, i.side * PATCH).to(memory_format=torch.channels_last)
    options = dict(patch_size=PATCH, distance="mse", normalize=True, balance="class")
    function = lambda pred: masked_patch_loss(pred, image, i.masked, i.labels, i.classes, **options)  # noqa: E731
    return function, [i.random(i.batch, i.tokens, 3 * PATCH * PATCH)]


def _centroids(i):
    return lambda x: class_centroids(x, i.labels, i.masked, i.classes), [i.random(i.batch, i.tokens, CHANNELS)]


def _centroids_of_many_classes(i):
    layout = pack_classes(i.labels, i.masked, 100)
    function = lambda x: class_centroids(x, i.labels, i.masked, 100, layout=layout)  # noqa: E731
    return function, [i.random(i.batch, i.tokens, CHANNELS)]


def _centroids_that_sort(i):
    return lambda x: class_centroids(x, i.labels, i.masked, 100), [i.random(i.batch, i.tokens, CHANNELS)]


def _centroids_of_images(i):
    return lambda x: class_centroids(x, i.labels, i.masked, i.classes), [i.random(i.batch, CHANNELS, i.side, i.side)]


def _patch_labels(i):
    return lambda labels: patch_labels(labels, PATCH, i.classes), [i.target]


def _convolution(i):
    grid = i.grid
    x = i.random(i.batch, CHANNELS, i.side, i.side).to(memory_format=torch.channels_last)
    function = lambda x, weight, bias: same_class_conv2d(x, grid, weight, bias, num_classes=i.classes)  # noqa: E731
    return function, [x, i.random(CHANNELS, 7, 7), i.random(CHANNELS)]


def _cross_entropy(i):
    return lambda x: upsample_cross_entropy(x, i.target), [i.random(i.batch, i.classes, i.side, i.side)]


def _pseudo_labels(i):
    size = i.target.shape[1:]
    return lambda x: upsample_pseudo_labels(x, size), [i.random(i.batch, i.classes, i.side, i.side)]


def _attention(i):
    layout = i.layout
    qkv = [i.random(i.batch, 2, i.tokens, CHANNELS // 2) for _ in range(3)]
    return lambda q, k, v: class_attention(q, k, v, layout), qkv


CALLS = {
    "pack": ("pack_classes", _pack),
    "gather": ("gather_class_tokens", _gather),
    "gather alone": ("gather_class_tokens", _gather_alone),
    "scatter": ("scatter_class_tokens", _scatter),
    "scatter alone": ("scatter_class_tokens", _scatter_alone),
    "loss": ("masked_patch_loss", _loss),
    "centroids": ("class_centroids", _centroids),
    "centroids of many classes": ("class_centroids", _centroids_of_many_classes),
    "centroids that sort": ("class_centroids", _centroids_that_sort),
    "centroids of images": ("class_centroids", _centroids_of_images),
    "patch labels": ("patch_labels", _patch_labels),
    "convolution": ("same_class_conv2d", _convolution),
    "cross-entropy": ("upsample_cross_entropy", _cross_entropy),
    "pseudo-labels": ("upsample_pseudo_labels", _pseudo_labels),
    "attention": ("class_attention", _attention),
}
"""Name -> the op, and `Inputs` -> (function, its tensors). "Alone": without mask token and positions."""

PAIRS = [(name, backend) for name, (op, _) in CALLS.items() for backend in sorted(OPS.get(op, ()), reverse=True)]
"""Each call with each backend that has kernels of its op."""


def call(name, dtype=torch.float32, device="cuda", **sizes):
    """The function and its tensors. `sizes`: classes, batch, side (of the square of tokens)."""
    return CALLS[name][1](inputs(dtype, device, **sizes))
