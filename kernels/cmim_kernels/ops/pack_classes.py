"""Packing of tokens by (class, visible or masked): schema, fake tensors, public function, layout checks."""

from typing import NamedTuple

import torch
from torch import Tensor

from cmim_kernels import checks
from cmim_kernels.ops.library import declare
from cmim_kernels.reference import pack_classes as reference


class ClassLayout(NamedTuple):
    """The positions of the tokens of each image when they are packed by class.

    Segment 2k holds the visible tokens of class k, segment 2k + 1 its masked tokens, and segment 2K the ignored tokens.
    """

    order: torch.Tensor
    """(B, N) int32: the original place of each packed token. Within a segment the original order is kept."""
    inverse: torch.Tensor
    """(B, N) int32: the packed position of each original token."""
    segment: torch.Tensor
    """(B, N) int32: the segment of each packed position."""
    offsets: torch.Tensor
    """(B, 2K + 2) int32: the packed position where each of the 2K + 1 segments starts, then N."""
    cu_seqlens: torch.Tensor
    """(B (K + 1) + 1,) int32 over the flat B N packed tokens: the start of each (image, class) and of the ignored tokens of
    each image, then B N. These are the cumulative sequence lengths for variable-length attention."""


_forward = declare(
    "pack_classes_forward(Tensor labels, Tensor masked, SymInt num_classes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    torch_backend=reference.pack_classes_forward,
    kernels=("triton", "cuda", "cpu"),
    fake=reference.empty_layout,
)


def pack_classes(labels: Tensor, masked: Tensor, num_classes: int) -> ClassLayout:
    """Sort the tokens of each image by class, visible before masked within a class, ignored tokens last.

    With one class (labels all zero) this is the shuffle of a masked autoencoder: `order[:, :L]` are the L visible tokens,
    which are kept, and `inverse` restores the original order.

    Args:
        labels: (B, N) uint8, int32 or int64. Values outside [0, num_classes) are ignored.
        masked: (B, N) bool.
        num_classes: number of classes K.

    Returns:
        `ClassLayout(order, inverse, segment, offsets, cu_seqlens)`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device (the message names it), or B N
            does not fit in int32.
    """
    if checks.enabled():
        op = "pack_classes"
        checks.tensor(op, "labels", labels, dtypes=checks.LABELS, shape=("B", "N"))
        checks.tensor(op, "masked", masked, dtypes=(torch.bool,), shape=tuple(labels.shape), like=labels)
        checks.integer(op, "num_classes", num_classes)
        if labels.numel() >= 2**31:
            raise ValueError(f"{op}: labels has {labels.numel()} entries, expected fewer than 2**31 (cu_seqlens is int32)")
    return ClassLayout(*_forward(labels, masked, num_classes))


def check_layout(op, layout, *, batch, tokens, like, num_classes=None):
    """Check that `layout` is a ClassLayout of `batch` images with `tokens` tokens each, on the device of `like`, and
    of `num_classes` classes where the caller knows how many there are."""
    if not isinstance(layout, ClassLayout):
        raise TypeError(f"{op}: layout must be a ClassLayout from pack_classes, got {type(layout).__name__}")
    integers, size = (torch.int32,), (batch, tokens)
    for name, value in (("order", layout.order), ("inverse", layout.inverse), ("segment", layout.segment)):
        checks.tensor(op, f"layout.{name}", value, dtypes=integers, shape=size, like=like)
    starts = "2K + 2" if num_classes is None else 2 * num_classes + 2
    checks.tensor(op, "layout.offsets", layout.offsets, dtypes=integers, shape=(batch, starts), like=like)
