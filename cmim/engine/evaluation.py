"""Evaluation at the original resolution of every image."""

from typing import NamedTuple

import torch

from cmim import distributed
from cmim.data.batches import evaluation_loader
from cmim.data.datasets import ImageSet
from cmim.engine.device import autocast
from cmim.engine.inference import NOT_FINITE, probabilities
from cmim.engine.logging import Progress
from cmim.engine.metrics import Scores, confusion_matrix, mean_iou, scores
from cmim.errors import UserError
from cmim.models.segmenter import Segmenter
from cmim.settings import Config


class Evaluation(NamedTuple):
    scores: Scores
    pseudo_labels: dict[str, float]
    """Quality of the pseudo-labels that these weights would give: the share of confident pixels and their accuracy, over all
    pixels with a class and over those whose class is not the background."""
    pseudo_label_classes: dict[str, list[float | None]]
    """The same of the pixels that are predicted as each class: the share of confident ones, and the share of these that are
    right; None where there are none."""
    confusion: list[list[int]]
    """Pixels by their class in the truth (rows) and in the prediction (columns)."""


@torch.inference_mode()
def evaluate(
    net: Segmenter,
    image_set: ImageSet,
    config: Config,
    num_classes: int,
    device: torch.device,
    dtype: torch.dtype | None,
    title: str,
) -> Evaluation:
    """Evaluate `net` on an ImageSet; `title` is shown with the progress.

    Each process evaluates its share of the images; all of them return the result over all images.

    Raises:
        UserError: the outputs of the network are not finite.
    """
    net.eval()
    torch.backends.cudnn.benchmark = False  # it would search for the fastest algorithms again for every image size
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    # One entry for each image, so that the sum over processes, to which others add zeros, is exact.
    image_miou = torch.zeros(len(image_set), dtype=torch.float64, device=device)
    sure = torch.zeros_like(matrix)  # the confident pixels alone
    broken = torch.zeros((), dtype=torch.int64, device=device)
    workers = distributed.loader_workers(config.data.workers)
    rank, ranks = distributed.rank(), distributed.size()
    loader = evaluation_loader(image_set, config.data, config.evaluation.batch, workers, rank=rank, world_size=ranks)
    with Progress(title, len(image_set), "images") as progress, autocast(device, dtype):
        for images, labels, indices in loader:
            sizes = [tuple(label.shape) for label in labels]
            predictions = probabilities(net, images.to(device, non_blocking=True), sizes, config)
            for i, label, prediction in zip(indices, labels, predictions, strict=True):
                truth = label.to(device, non_blocking=True)
                confidence, classes = prediction.max(0)
                broken += confidence.isnan().sum()
                own = confusion_matrix(classes, truth, num_classes)
                matrix += own
                image_miou[i] = mean_iou(own)
                kept = torch.where(confidence >= config.method.tau, truth.long(), num_classes)
                sure += confusion_matrix(classes, kept, num_classes)
            progress.advance(len(images) * ranks)
    distributed.sum_over_ranks(matrix)
    distributed.sum_over_ranks(image_miou)
    distributed.sum_over_ranks(sure)
    if distributed.sum_over_ranks(broken):
        raise UserError(NOT_FINITE)
    figures, background = _quality("", matrix, sure, sure.diagonal()), config.data.background
    if background is not None:
        rows = [k for k in range(num_classes) if k != background]
        figures |= _quality("_foreground", matrix[rows], sure[rows], sure.diagonal()[rows])
    return Evaluation(scores(matrix, image_miou), figures, _quality_of_classes(matrix, sure), matrix.tolist())


def _quality(name, matrix, sure, right):
    total, confident = int(matrix.sum()), int(sure.sum())
    return {
        f"pseudo_label_coverage{name}": confident / max(1, total),
        f"pseudo_label_accuracy{name}": int(right.sum()) / max(1, confident),
    }


def _quality_of_classes(matrix, sure):
    share = lambda parts, wholes: [p / w if w else None for p, w in zip(parts.tolist(), wholes.tolist(), strict=True)]  # noqa: E731
    return {
        "pseudo_label_class_coverage": share(sure.sum(0), matrix.sum(0)),
        "pseudo_label_class_accuracy": share(sure.diagonal(), sure.sum(0)),
    }
