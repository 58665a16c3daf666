"""Evaluation at the original resolution of every image."""

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress

from cmim.data.batches import default_workers, evaluation_loader
from cmim.engine.device import autocast
from cmim.engine.metrics import Confusion, Scores, scores


class Evaluation(NamedTuple):
    scores: Scores
    pseudo_labels: dict[str, float]
    """What pseudo-labels of these weights would be worth: share of confident pixels and their accuracy, over all
    pixels with a class and over those whose class is not the background."""


def upsample(logits, size, net):
    """Logits (n, K, h, w) of `net` as float32 at the pixels of `size`."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=net.align_corners)


def predict_logits(net, images, size):
    """Logits (n, K, H, W) in float32 at `size` of uint8 images (n, 3, h, w)."""
    return upsample(net(net.normalise(images)), size, net)


@torch.inference_mode()
def evaluate(net, image_set, config, num_classes, device, dtype, title):
    """Evaluate `net` on an ImageSet; progress under `title`."""
    net.eval()
    torch.backends.cudnn.benchmark = False  # it would tune for every image size anew
    confusion = Confusion(num_classes, device)
    background = config.data.background
    # rows: all pixels, foreground; columns: pixels with a class, confident ones, confident and right ones
    counts = torch.zeros(2, 3, dtype=torch.int64, device=device)
    workers = default_workers() if config.data.workers is None else config.data.workers
    loader = evaluation_loader(image_set, config.data, config.evaluation.batch, workers)
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(title, total=len(image_set))
        for images, labels, _ in loader:
            with autocast(device, dtype):
                logits = net(net.normalise(images.to(device, non_blocking=True)))
            # Labels of one batch may differ in size where the images were resized.
            for size in dict.fromkeys(tuple(label.shape) for label in labels):
                chosen = [i for i, label in enumerate(labels) if tuple(label.shape) == size]
                truth = torch.stack([labels[i] for i in chosen]).to(device)
                confidence, prediction = upsample(logits[chosen], size, net).softmax(1).max(1)
                confusion.add(prediction, truth)
                known = truth < num_classes
                sure = known & (confidence >= config.method.tau)
                right = sure & (prediction == truth)
                foreground = known & (truth != (-1 if background is None else background))
                areas = [[(m & area).sum() for m in (known, sure, right)] for area in (known, foreground)]
                counts += torch.stack([torch.stack(row) for row in areas])
            progress.advance(task, len(images))
    names = ("",) if background is None else ("", "_foreground")
    figures = {}
    for name, (total, sure, right) in zip(names, counts.tolist(), strict=False):
        figures[f"pseudo_label_coverage{name}"] = sure / max(1, total)
        figures[f"pseudo_label_accuracy{name}"] = right / max(1, sure)
    return Evaluation(scores(confusion.matrix), figures)
