"""Confusion matrix and scores."""

from typing import NamedTuple

import torch
from torch import Tensor


def confusion_matrix(prediction: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Pixels of each (truth, prediction).

    Args:
        prediction: classes in [0, K), integers of any shape.
        truth: integers of the same shape; pixels outside [0, K) do not count.
        num_classes: K.

    Returns:
        (K, K) int64 on the same device; rows are the truth.
    """
    size = num_classes
    truth = truth.long()  # PyTorch wraps the bound of `uint8 < 300` to 44
    known = (truth >= 0) & (truth < size)
    index = torch.where(known, truth * size + prediction.long(), size * size)
    return torch.bincount(index.flatten(), minlength=size * size + 1)[:-1].view(size, size)


class Scores(NamedTuple):
    """All in [0, 1]. With T and P the pixels of a class in the truth and in the prediction and H those in both:

        IoU = H / (T + P - H)    Dice = 2 H / (T + P), the F1 score    precision = H / P    recall = H / T

    A score whose denominator is zero is None: IoU and Dice of a class that occurs in neither, precision of a class that is
    never predicted, recall of a class without a pixel in the truth. Means over classes are over those with a score.
    """

    miou: float
    iou: list[float | None]
    dice: list[float | None]
    precision: list[float | None]
    recall: list[float | None]
    mean_dice: float
    mean_precision: float
    mean_accuracy: float  # the mean of recall, which is also called class accuracy
    pixel_accuracy: float
    image_miou: float
    """Mean over the images of the mean IoU of the classes that occur in the truth or the prediction of an image. Images
    without a pixel with a class are left out."""


def scores(matrix: Tensor, image_miou: Tensor) -> Scores:
    """Scores of a set of images.

    Args:
        matrix: (K, K), the confusion matrix over all images.
        image_miou: (n,) `mean_iou` of each image, NaN where none of its pixels has a class.
    """
    matrix = matrix.double().cpu()
    hit, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou, dice = hit / (truth + predicted - hit), 2 * hit / (truth + predicted)  # 0 / 0 is NaN
    precision, recall = hit / predicted, hit / truth
    listed = lambda values: [None if v != v else v for v in values.tolist()]  # noqa: E731
    return Scores(
        miou=_mean(iou),
        iou=listed(iou),
        dice=listed(dice),
        precision=listed(precision),
        recall=listed(recall),
        mean_dice=_mean(dice),
        mean_precision=_mean(precision),
        mean_accuracy=_mean(recall),
        pixel_accuracy=float(hit.sum() / matrix.sum().clamp(min=1)),
        image_miou=_mean(image_miou.cpu()),
    )


def mean_iou(matrix: Tensor) -> Tensor:
    """The mean IoU of the classes that occur, of a confusion matrix: a float64 scalar on its device, NaN if none occurs."""
    matrix = matrix.double()
    hit = matrix.diagonal()
    return (hit / (matrix.sum(0) + matrix.sum(1) - hit)).nanmean()


def _mean(values):
    """The mean without NaN; 0 of nothing."""
    values = values[~values.isnan()]
    return float(values.mean()) if values.numel() else 0.0
