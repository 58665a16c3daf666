"""Confusion matrix and scores."""

from typing import NamedTuple

import torch
from torch import Tensor


class Confusion:
    """Counts of (truth, prediction), kept on the device: matrix[t, p]."""

    def __init__(self, num_classes: int, device: torch.device | str):
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, prediction: Tensor, truth: Tensor) -> None:
        """Count the pixels of two int tensors of equal shape; pixels whose truth is outside [0, K) do not count."""
        size = len(self.matrix)
        truth = truth.long()  # PyTorch wraps the bound of `uint8 < 300` to 44
        known = (truth >= 0) & (truth < size)
        index = torch.where(known, truth * size + prediction.long(), size * size)
        self.matrix += torch.bincount(index.flatten(), minlength=size * size + 1)[:-1].view(size, size)


class Scores(NamedTuple):
    miou: float
    iou: list[float | None]  # None for a class that is neither in the truth nor in the prediction
    pixel_accuracy: float
    mean_accuracy: float


def scores(matrix: Tensor) -> Scores:
    """Scores from a confusion matrix, all in [0, 1]: mIoU over the classes that occur, IoU of each class, and accuracies."""
    matrix = matrix.double().cpu()
    hit, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    union = truth + predicted - hit
    iou = hit / union.clamp(min=1)
    present = union > 0
    accuracy = (hit / truth.clamp(min=1))[truth > 0]
    mean = lambda values: float(values.mean()) if values.numel() else 0.0  # noqa: E731
    return Scores(
        miou=mean(iou[present]),
        iou=[float(v) if p else None for v, p in zip(iou, present, strict=True)],
        pixel_accuracy=float(hit.sum() / matrix.sum().clamp(min=1)),
        mean_accuracy=mean(accuracy),
    )
