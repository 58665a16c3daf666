"""Pseudo-labels of weak views."""

from typing import NamedTuple

import torch
from torch import Tensor

from cmim.data.datasets import IGNORED
from cmim_kernels import upsample_pseudo_labels


class PseudoLabels(NamedTuple):
    label: Tensor  # (B, H, W) int32
    confidence: Tensor  # (B, H, W) float32, the largest softmax probability
    valid: Tensor  # (B, H, W) bool, false on padding

    def classes(self, tau: float) -> Tensor:
        """The label where it is valid and confidence >= tau, IGNORED elsewhere."""
        return torch.where(self.valid & (self.confidence >= tau), self.label, IGNORED)


def pseudo_labels(logits: Tensor, valid: Tensor, align_corners: bool) -> PseudoLabels:
    """Labels and confidences at the resolution of `valid` from logits (B, K, h, w); no gradient."""
    label, confidence = upsample_pseudo_labels(logits.detach(), tuple(valid.shape[-2:]), align_corners=align_corners)
    return PseudoLabels(label, confidence, valid)
