"""Class centroids of visible and masked tokens: schema, fake tensors, autograd, public function."""

from typing import NamedTuple

import torch
from torch import Tensor

from cmim_kernels import checks
from cmim_kernels.numerics import accumulation_dtype, empty_like_layout
from cmim_kernels.ops.autograd import Function, differentiable, first_derivative
from cmim_kernels.ops.library import declare
from cmim_kernels.ops.pack_classes import ClassLayout, check_layout
from cmim_kernels.reference import class_centroids as reference


class ClassCentroids(NamedTuple):
    """The result of `class_centroids`. Index 0 of the third dimension: visible tokens; index 1: masked tokens."""

    mean: torch.Tensor
    """(B, K, 2, C) float32 (float64 for float64 features): mean feature, zero where `count` is zero."""
    count: torch.Tensor
    """(B, K, 2) int32: number of tokens in each mean."""


def _forward_fake(features, labels, masked, num_classes, order, offsets):
    batch, channels = features.shape[0], features.shape[1 if features.dim() == 4 else 2]
    mean = features.new_empty(batch, num_classes, 2, channels, dtype=accumulation_dtype(features))
    return mean, features.new_empty(batch, num_classes, 2, dtype=torch.int32)


def _backward_fake(grad_mean, count, features, labels, masked, num_classes):
    return empty_like_layout(features)


_forward = declare(
    "class_centroids_forward(Tensor features, Tensor labels, Tensor masked, SymInt num_classes, Tensor? order, "
    "Tensor? offsets) -> (Tensor, Tensor)",
    torch_backend=reference.class_centroids_forward,
    kernels=("triton", "cuda", "cpu"),
    fake=_forward_fake,
)
_backward = declare(
    "class_centroids_backward(Tensor grad_mean, Tensor count, Tensor features, Tensor labels, Tensor masked, "
    "SymInt num_classes) -> Tensor",
    torch_backend=reference.class_centroids_backward,
    kernels=("triton", "cuda", "cpu"),
    fake=_backward_fake,
)


class _ClassCentroids(Function):
    @staticmethod
    def forward(features, labels, masked, num_classes, order, offsets):
        return _forward(features, labels, masked, num_classes, order, offsets)

    @staticmethod
    def setup_context(ctx, inputs, output):
        features, labels, masked, ctx.num_classes, _, _ = inputs
        count = output[1]
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(count, features, labels, masked)

    @first_derivative
    def backward(ctx, grad_mean, _):
        return _backward(grad_mean, *ctx.saved_tensors, ctx.num_classes), None, None, None, None, None


def class_centroids(
    features: Tensor, labels: Tensor, masked: Tensor, num_classes: int, *, layout: ClassLayout | None = None
) -> ClassCentroids:
    """Mean feature of the visible and of the masked tokens of each class in each image.

    Tokens with a label outside [0, num_classes) belong to no centroid. An inf or NaN in a token affects only the centroid
    that the token belongs to.

    Args:
        features: (B, C, h, w), contiguous or channels-last, or (B, N, C); float16, bfloat16, float32 or float64.
        labels: (B, N) or (B, h, w) with h w = N; uint8, int32 or int64.
        masked: (B, N) or (B, h, w), bool.
        num_classes: number of classes K.
        layout: `pack_classes(labels, masked, num_classes)`, if it was computed already. It does not change the result;
            it saves the sorting in backends that read tokens in class order. The PyTorch backend does not.

    Returns:
        `ClassCentroids(mean, count)`. The gradient of the features has the dtype and memory layout of the features.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device (the message names it).
    """
    if checks.enabled():
        _check(features, labels, masked, num_classes, layout)
    order, offsets = (None, None) if layout is None else (layout.order, layout.offsets)
    outputs = differentiable(_ClassCentroids, features, labels.flatten(1), masked.flatten(1), num_classes, order, offsets)
    return ClassCentroids(*outputs)


def _check(features, labels, masked, num_classes, layout):
    op = "class_centroids"
    checks.tensor(op, "features", features, dtypes=checks.FLOATS)
    if features.dim() not in (3, 4):
        raise ValueError(f"{op}: features has shape {tuple(features.shape)}, expected (B, C, h, w) or (B, N, C)")
    batch, grid = features.shape[0], tuple(features.shape[2:] if features.dim() == 4 else features.shape[1:2])
    tokens = grid[0] if len(grid) == 1 else grid[0] * grid[1]
    for name, value, dtypes in (("labels", labels, checks.LABELS), ("masked", masked, (torch.bool,))):
        checks.tensor(op, name, value, dtypes=dtypes, like=features)
        shape = tuple(value.shape)
        # For (B, N, C) features any (B, h, w) with h w = N fits; for (B, C, h, w) features only their own grid.
        fits = shape in ((batch, tokens), (batch, *grid)) or (
            features.dim() == 3 and len(shape) == 3 and shape[0] == batch and shape[1] * shape[2] == tokens
        )
        if not fits:
            expected = (batch, *grid) if len(grid) == 2 else "(B, h, w) with h w = N"
            raise ValueError(f"{op}: {name} has shape {shape}, expected {(batch, tokens)} or {expected}")
    checks.integer(op, "num_classes", num_classes)
    if layout is not None:
        check_layout(op, layout, batch=batch, tokens=tokens, like=features, num_classes=num_classes)
