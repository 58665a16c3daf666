"""Majority vote of the labels in each patch: schema, fake tensors, public function."""

import torch
from torch import Tensor

from cmim_kernels import checks
from cmim_kernels.ops.library import declare
from cmim_kernels.reference import patch_labels as reference


def _fake(labels, patch_size, num_classes, min_share):
    batch, height, width = labels.shape
    return labels.new_empty((batch, height // patch_size, width // patch_size), dtype=torch.int32)


_forward = declare(
    "patch_labels_forward(Tensor labels, SymInt patch_size, SymInt num_classes, float min_share) -> Tensor",
    torch_backend=reference.patch_labels_forward,
    kernels=("triton", "cpu"),
    fake=_fake,
)


def patch_labels(labels: Tensor, patch_size: int, num_classes: int, *, min_share: float = 0.0) -> Tensor:
    """The most frequent valid class in each patch: turns classes of pixels into classes of tokens.

    Args:
        labels: (B, H, W) uint8, int32 or int64. Values outside [0, num_classes) are ignored.
        patch_size: side p of a patch in pixels; it divides H and W.
        num_classes: number of classes K.
        min_share: smallest share of the patch's pixels, 0 to 1, that the most frequent class must have. The share is the
            float64 quotient of its number of pixels and p x p; ignored pixels count in p x p. Under `torch.compile` with
            dynamic=True each new value compiles again.

    Returns:
        (B, H / p, W / p) int32; the smallest id among equally frequent classes; -1 where no pixel is valid or the most
        frequent class has less than `min_share`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value (the message names it).
    """
    if checks.enabled():
        op = "patch_labels"
        checks.tensor(op, "labels", labels, dtypes=checks.LABELS, shape=("B", "H", "W"))
        checks.integer(op, "patch_size", patch_size)
        if labels.shape[1] % patch_size or labels.shape[2] % patch_size:
            raise ValueError(
                f"{op}: labels has shape {tuple(labels.shape)}, expected (B, H, W) with H and W multiples of "
                f"patch_size {patch_size}"
            )
        checks.integer(op, "num_classes", num_classes)
        checks.number(op, "min_share", min_share, low=0, high=1)
    return _forward(labels, patch_size, num_classes, min_share)
