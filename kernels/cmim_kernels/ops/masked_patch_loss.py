"""Reconstruction loss over masked patches: schema, fake tensors, autograd, public function."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cmim_kernels import checks
from cmim_kernels.numerics import accumulation_dtype, empty_like_layout
from cmim_kernels.ops.autograd import Function, differentiable, first_derivative
from cmim_kernels.ops.library import declare
from cmim_kernels.reference import masked_patch_loss as reference


class PatchLoss(NamedTuple):
    """The result of `masked_patch_loss`. Floats are float32, or float64 for float64 inputs."""

    loss: torch.Tensor
    """Scalar."""
    class_sum: torch.Tensor
    """(K,): sum of the token errors of each class over the batch; differentiable."""
    class_count: torch.Tensor
    """(K,) int32: number of tokens in each sum."""


_OPTIONS = "SymInt num_classes, SymInt patch_size, str distance, bool normalize, str balance, float[]? mean, float[]? std"


def _forward_fake(pred, image, masked, labels, num_classes, *options):
    dtype = accumulation_dtype(pred, image)
    return (
        pred.new_empty((), dtype=dtype),
        pred.new_empty(num_classes, dtype=dtype),
        pred.new_empty(num_classes, dtype=torch.int32),
    )


def _backward_fake(grad_loss, grad_class_sum, class_count, pred, *rest):
    return empty_like_layout(pred)


_forward = declare(
    f"masked_patch_loss_forward(Tensor pred, Tensor image, Tensor masked, Tensor? labels, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    torch_backend=reference.masked_patch_loss_forward,
    kernels=("triton", "cuda", "cpu"),
    fake=_forward_fake,
)
_backward = declare(
    "masked_patch_loss_backward(Tensor grad_loss, Tensor grad_class_sum, Tensor class_count, Tensor pred, Tensor image, "
    f"Tensor masked, Tensor? labels, {_OPTIONS}) -> Tensor",
    torch_backend=reference.masked_patch_loss_backward,
    kernels=("triton", "cuda", "cpu"),
    fake=_backward_fake,
)


class _MaskedPatchLoss(Function):
    @staticmethod
    def forward(pred, image, masked, labels, *options):
        return _forward(pred, image, masked, labels, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pred, image, masked, labels, *ctx.options = inputs
        class_count = output[2]
        ctx.mark_non_differentiable(class_count)
        ctx.save_for_backward(class_count, pred, image, masked, labels)

    @first_derivative
    def backward(ctx, grad_loss, grad_class_sum, _):
        grad = _backward(grad_loss, grad_class_sum, *ctx.saved_tensors, *ctx.options)
        return grad, None, None, None, *[None] * len(ctx.options)


def masked_patch_loss(
    pred: Tensor, image: Tensor, masked: Tensor, labels: Tensor | None = None, num_classes: int | None = None, *,
    patch_size: int, distance: Literal["l1", "mse", "smooth_l1"] = "l1", normalize: bool = False,
    balance: Literal["token", "class"] = "token", mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
) -> PatchLoss:  # fmt: skip
    """Distance between predicted and true pixels of the masked tokens, by class.

    The image is cut into p x p patches (p = patch_size), one for each of the N = (H / p) (W / p) tokens in row-major
    order. A token's error is the mean over its p p c entries of the distance between prediction and target. Only masked
    tokens with a valid label count; the values of other tokens, even NaN, do not affect the result. The image gets no
    gradient.

    Args:
        pred: (B, N, p p c), entries ordered (row, column, channel), or (B, c, H, W), contiguous or channels-last;
            float16, bfloat16, float32 or float64.
        image: (B, c, H, W), H and W multiples of p. Float, or uint8, which is normalised to (x / 255 - mean) / std.
        masked: (B, N) bool.
        labels: (B, N) uint8, int32 or int64; tokens with values outside [0, num_classes) are ignored. None: one class.
        num_classes: number of classes K; given together with `labels`.
        patch_size: p, in pixels.
        distance: "l1", "mse" or "smooth_l1" (beta 1).
        normalize: replace each target patch t by (t - mean) / sqrt(unbiased variance + 1e-6), over its p p c entries,
            as MAE (arXiv 2111.06377) does.
        balance: "token": sum of errors / max(1, number of tokens). "class": mean, over the classes that have tokens
            in this batch, of the mean error of their tokens.
        mean, std: c numbers each, for values in [0, 1]; required for a uint8 image, not allowed for a float image.

    Returns:
        `PatchLoss(loss, class_sum, class_count)`; the loss is 0 if no token counts.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value (the message names it).
    """
    if checks.enabled():
        _check(pred, image, masked, labels, num_classes, patch_size, distance, normalize, balance, mean, std)
    num_classes = 1 if labels is None else num_classes
    if mean is not None:
        mean, std = [float(m) for m in mean], [float(s) for s in std]
    return PatchLoss(
        *differentiable(
            _MaskedPatchLoss, pred, image, masked, labels, num_classes, patch_size, distance, normalize, balance, mean, std
        )
    )


def _check(pred, image, masked, labels, num_classes, patch_size, distance, normalize, balance, mean, std):
    op = "masked_patch_loss"
    checks.tensor(op, "pred", pred, dtypes=checks.FLOATS)
    checks.tensor(op, "image", image, dtypes=(*checks.FLOATS, torch.uint8), shape=("B", "c", "H", "W"), like=pred)
    checks.integer(op, "patch_size", patch_size)
    batch, channels, height, width = image.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"{op}: image has size {height} x {width}, expected multiples of patch_size {patch_size}")
    tokens = (height // patch_size) * (width // patch_size)
    entries = patch_size * patch_size * channels
    if tuple(pred.shape) not in ((batch, tokens, entries), tuple(image.shape)):
        expected = f"{(batch, tokens, entries)} or {tuple(image.shape)}"
        raise ValueError(f"{op}: pred has shape {tuple(pred.shape)}, expected {expected}")
    checks.tensor(op, "masked", masked, dtypes=(torch.bool,), shape=(batch, tokens), like=pred)
    if (labels is None) != (num_classes is None):
        given = "num_classes" if labels is None else "labels"
        raise ValueError(f"{op}: labels and num_classes must be given together, got only {given}")
    if labels is not None:
        checks.tensor(op, "labels", labels, dtypes=checks.LABELS, shape=(batch, tokens), like=pred)
        checks.integer(op, "num_classes", num_classes)
    checks.choice(op, "distance", distance, ("l1", "mse", "smooth_l1"))
    checks.choice(op, "balance", balance, ("token", "class"))
    checks.flag(op, "normalize", normalize)
    if normalize and entries < 2:
        raise ValueError(f"{op}: normalize needs patches of at least 2 entries, got {entries}")
    for name, value in (("mean", mean), ("std", std)):
        if image.dtype == torch.uint8 and value is None:
            raise ValueError(f"{op}: {name} is None, expected {channels} numbers for a uint8 image")
        if image.dtype != torch.uint8 and value is not None:
            raise ValueError(f"{op}: {name} is given, expected None for a {str(image.dtype).removeprefix('torch.')} image")
        if value is not None:
            checks.numbers(op, name, value, length=channels, positive=name == "std")
