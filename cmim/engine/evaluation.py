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
    background = config.data.background
    # rows: all pixels, foreground; columns: pixels with a class, confident pixels, confident and correct pixels
    counts = torch.zeros(2, 3, dtype=torch.int64, device=device)
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
                known = truth < num_classes
                sure = known & (confidence >= config.method.tau)
                right = sure & (classes == truth)
                foreground = known & (truth != (-1 if background is None else background))
                areas = [[(m & area).sum() for m in (known, sure, right)] for area in (known, foreground)]
                counts += torch.stack([torch.stack(row) for row in areas])
            progress.advance(len(images) * ranks)
    distributed.sum_over_ranks(matrix)
    distributed.sum_over_ranks(image_miou)
    distributed.sum_over_ranks(counts)
    if distributed.sum_over_ranks(broken):
        raise UserError(NOT_FINITE)
    names = ("",) if background is None else ("", "_foreground")
    figures = {}
    for name, (total, sure, right) in zip(names, counts.tolist(), strict=False):
        figures[f"pseudo_label_coverage{name}"] = sure / max(1, total)
        figures[f"pseudo_label_accuracy{name}"] = right / max(1, sure)
    return Evaluation(scores(matrix, image_miou), figures)
