"""Distance between masked and visible class centroids: schema, fake tensors, autograd, public function."""

from typing import Literal, NamedTuple

import torch

from cmim_kernels import checks
from cmim_kernels.numerics import accumulation_dtype
from cmim_kernels.ops.autograd import Function, differentiable, first_derivative
from cmim_kernels.ops.class_centroids import ClassCentroids
from cmim_kernels.ops.library import declare
from cmim_kernels.reference import centroid_distance as reference


class CentroidDistance(NamedTuple):
    """The result of `centroid_distance`. Floats are float32, or float64 for float64 centroids."""

    loss: torch.Tensor
    """Scalar: pair_sum / max(1, pair_count)."""
    pair_sum: torch.Tensor
    """Scalar: sum of the distances of all pairs; differentiable."""
    pair_count: torch.Tensor
    """Scalar int32: number of (image, class) pairs with enough tokens of both kinds."""


def _forward_fake(mean, count, distance, min_tokens):
    scalar = mean.new_empty((), dtype=accumulation_dtype(mean))
    return scalar, torch.empty_like(scalar), mean.new_empty((), dtype=torch.int32)


def _backward_fake(grad_loss, grad_pair_sum, pair_count, mean, *rest):
    return mean.new_empty(mean.shape)


_forward = declare(
    "centroid_distance_forward(Tensor mean, Tensor count, str distance, SymInt min_tokens) -> (Tensor, Tensor, Tensor)",
    torch_backend=reference.centroid_distance_forward,
    fake=_forward_fake,
)
_backward = declare(
    "centroid_distance_backward(Tensor grad_loss, Tensor grad_pair_sum, Tensor pair_count, Tensor mean, Tensor count, "
    "str distance, str detach, SymInt min_tokens) -> Tensor",
    torch_backend=reference.centroid_distance_backward,
    fake=_backward_fake,
)


class _CentroidDistance(Function):
    @staticmethod
    def forward(mean, count, distance, detach, min_tokens):
        return _forward(mean, count, distance, min_tokens)

    @staticmethod
    def setup_context(ctx, inputs, output):
        mean, count, *ctx.options = inputs
        pair_count = output[2]
        ctx.mark_non_differentiable(pair_count)
        ctx.save_for_backward(pair_count, mean, count)

    @first_derivative
    def backward(ctx, grad_loss, grad_pair_sum, _):
        return _backward(grad_loss, grad_pair_sum, *ctx.saved_tensors, *ctx.options), None, None, None, None


def centroid_distance(
    centroids: ClassCentroids, *, distance: Literal["cosine", "l2"] = "cosine",
    detach: Literal["visible", "masked", "none"] = "visible", min_tokens: int = 1,
) -> CentroidDistance:  # fmt: skip
    """Mean distance between the masked and the visible centroid of the same class in the same image.

    A pair is an (image, class) with at least `min_tokens` visible and `min_tokens` masked tokens. The values of other
    centroids, even NaN, do not affect the result.

    Args:
        centroids: `ClassCentroids(mean (B, K, 2, C), count (B, K, 2))` of `class_centroids`.
        distance: "cosine" (1 - cosine, with norms clamped at 1e-8) or "l2" (mean over C of squared differences).
        detach: the centroid that gets no gradient: "visible", "masked" or "none".
        min_tokens: minimum number of visible and of masked tokens of a pair, at least 1.

    Returns:
        `CentroidDistance(loss, pair_sum, pair_count)`; the loss is 0 if there is no pair.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value (the message names it).
    """
    if checks.enabled():
        op = "centroid_distance"
        if not isinstance(centroids, tuple) or len(centroids) != 2:
            raise TypeError(f"{op}: centroids must be a ClassCentroids, got {type(centroids).__name__}")
        mean, count = centroids
        checks.tensor(op, "centroids.mean", mean, dtypes=checks.FLOATS, shape=("B", "K", 2, "C"))
        ints = (torch.int32, torch.int64)
        checks.tensor(op, "centroids.count", count, dtypes=ints, shape=tuple(mean.shape[:3]), like=mean)
        checks.choice(op, "distance", distance, ("cosine", "l2"))
        checks.choice(op, "detach", detach, ("visible", "masked", "none"))
        checks.integer(op, "min_tokens", min_tokens)
    mean, count = centroids
    return CentroidDistance(*differentiable(_CentroidDistance, mean, count, distance, detach, min_tokens))
