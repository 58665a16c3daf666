"""Pseudo-labels from bilinearly upsampled logits: schema, fake tensors, public function. There is no gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from cmim_kernels import checks
from cmim_kernels.numerics import accumulation_dtype
from cmim_kernels.ops.library import declare
from cmim_kernels.reference import upsample_pseudo_labels as reference


class PseudoLabels(NamedTuple):
    """The result of `upsample_pseudo_labels`."""

    label: torch.Tensor
    """(B, H, W) int32: the most likely class; the smallest id among equally likely ones."""
    confidence: torch.Tensor
    """(B, H, W) float32 (float64 for float64 logits): its softmax probability."""


def _forward_fake(logits, size, align_corners):
    shape = (logits.shape[0], *size)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=accumulation_dtype(logits))


_forward = declare(
    "upsample_pseudo_labels_forward(Tensor logits, SymInt[] size, bool align_corners) -> (Tensor, Tensor)",
    torch_backend=reference.upsample_pseudo_labels_forward,
    kernels=("triton", "cpu"),
    fake=_forward_fake,
)


def upsample_pseudo_labels(logits: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> PseudoLabels:
    """The most likely class and its softmax probability at each pixel, for logits that are upsampled to `size`.

    Equal to argmax and max of `F.interpolate(logits, size, mode="bilinear").softmax(1)`, but the
    full-resolution probabilities are never stored. There is no gradient.

    Args:
        logits: (B, K, h, w), contiguous or channels-last; float16, bfloat16, float32 or float64.
        size: (H, W) in pixels; need not exceed (h, w).
        align_corners: as in `F.interpolate`.

    Returns:
        `PseudoLabels(label, confidence)`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype or shape (the message names it).
    """
    if checks.enabled():
        op = "upsample_pseudo_labels"
        checks.tensor(op, "logits", logits, dtypes=checks.FLOATS, shape=("B", "K", "h", "w"))
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise TypeError(f"{op}: size must be a pair (H, W), got {size!r}")
        for name, value in zip(("size[0]", "size[1]"), size, strict=True):
            checks.integer(op, name, value, at_least=0)
        checks.flag(op, "align_corners", align_corners)
        checks.upsampling(op, logits, size)
    return PseudoLabels(*_forward(logits.detach(), list(size), align_corners))
