"""Figures that show whether a run works; they are computed without synchronising with the device."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmim.data.datasets import IGNORED
from cmim.distributed import sum_over_ranks
from cmim.method.masking import expand
from cmim.method.pseudo_labels import PseudoLabels
from cmim_kernels import ClassCentroids, class_centroids, masked_patch_loss, upsample_pseudo_labels


@torch.no_grad()
def coverage(labels: PseudoLabels, tau: float, background: int | None) -> dict[str, Tensor]:
    """Share of the valid pixels whose pseudo-label is confident, over all classes and without the class `background`."""
    sure = labels.valid & (labels.confidence >= tau)
    figures = {"coverage": sure.sum() / labels.valid.sum().clamp(min=1)}
    if background is not None:
        foreground = labels.valid & (labels.label != background)
        figures["coverage_foreground"] = (sure & foreground).sum() / foreground.sum().clamp(min=1)
    return figures


@torch.no_grad()
def mean_colour_error(images: Tensor, target: dict[str, Any]) -> Tensor:
    """`masked_patch_loss` of a simple baseline: the mean colour of the visible tokens of the same (image, class).

    A decoder that does not beat it has learnt no more than a colour for each class. With normalised patches the baseline is
    the mean of each patch, which is zero.

    Args:
        images: (B, channels, H, W) normalised.
        target: the keyword arguments of the loss, without the prediction.
    """
    patch = target["patch_size"]
    batch, channels, height, width = images.shape
    if target["normalize"]:
        guess = images.new_zeros(batch, (height // patch) * (width // patch), channels * patch**2)
    else:
        colours = F.avg_pool2d(images, patch).flatten(2).transpose(1, 2)
        centroids = class_centroids(colours.contiguous(), target["labels"], target["masked"], target["num_classes"])
        index = target["labels"].clamp(min=0).long()[:, :, None].expand(-1, -1, channels)
        guess = centroids.mean[:, :, 0].gather(1, index).repeat(1, 1, patch**2)
    return masked_patch_loss(guess, **target).loss


@torch.no_grad()
def separation(centroids: ClassCentroids) -> Tensor:
    """Ratio of the between-class to the within-class distance of the centroids of an image.

    Between: mean l2 distance between the visible centroids of two classes of an image. Within: mean l2 distance between the
    hidden and the visible centroid of a class. Above 1, classes are further apart than hidden and visible parts of a class.
    """
    visible, hidden = centroids.mean.unbind(2)
    has = centroids.count > 0
    both = has.all(2)
    within = ((visible - hidden).norm(dim=-1) * both).sum() / both.sum().clamp(min=1)
    pairs = has[:, :, None, 0] & has[:, None, :, 0]
    pairs = pairs & ~torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device)
    # |a - b|^2 is computed from products, because differences (B, K, K, C) would be large for many classes.
    square = (visible**2).sum(-1)
    distance = (square[:, :, None] + square[:, None, :] - 2 * visible @ visible.transpose(1, 2)).clamp(min=0).sqrt()
    between = (distance * pairs).sum() / pairs.sum().clamp(min=1)
    return between / within.clamp(min=1e-8)


def gradient_norms(terms: dict[str, Tensor], features: Sequence[Tensor], ranks: int = 1) -> dict[str, Tensor]:
    """L2 norm of the gradient of each term with respect to the features of all passes of all processes.

    Args:
        terms: {name: scalar}; the term is the mean of these scalars over the processes.
        features: tensors of the graph, one for each pass.
        ranks: number of processes.
    """
    norms, features = {}, [f for f in features if f.requires_grad]  # those of a frozen encoder do not
    for name, term in terms.items():
        known = features and term.requires_grad
        gradients = torch.autograd.grad(term, features, retain_graph=True, allow_unused=True) if known else ()
        square = sum((g.float().square().sum() for g in gradients if g is not None), torch.zeros_like(term.detach()))
        norms[f"gradient_{name}"] = sum_over_ranks(square).sqrt() / ranks
    return norms


def agreement(terms: dict[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Cosine between the gradient of each term and that of L_sup, over the parameters: above 0, a small step that lowers the
    term lowers L_sup too.

    Args:
        terms: {name: scalar}, `sup` among them; a term is the mean of these scalars over the processes.
        parameters: those of the segmenter.
    """
    parameters = [p for p in parameters if p.requires_grad]
    figures, of_sup = {}, None
    for name in ["sup", *(name for name in terms if name != "sup")]:
        if not terms[name].requires_grad:
            continue
        parts = torch.autograd.grad(terms[name], parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        gradient = sum_over_ranks(torch.cat([part.float().flatten() for part in parts]))
        of_sup = gradient if name == "sup" else of_sup
        if name != "sup" and of_sup is not None:
            figures[f"agreement_{name}"] = F.cosine_similarity(gradient, of_sup, dim=0)
    return figures


@torch.no_grad()
def hidden_accuracy(logits: Tensor, classes: Tensor, hidden: Tensor, align_corners: bool) -> Tensor:
    """Share of the hidden pixels with a class whose class is predicted from the masked image.

    Args:
        logits: (V, K, h, w) of masked images.
        classes: (V, H, W), IGNORED where there is none.
        hidden: (V, H, W) bool.
    """
    label, _ = upsample_pseudo_labels(logits.detach(), tuple(classes.shape[-2:]), align_corners=align_corners)
    counted = hidden & (classes != IGNORED)
    return ((label == classes) & counted).sum() / counted.sum().clamp(min=1)


@torch.no_grad()
def token_purity(classes: Tensor, token_classes: Tensor, stride: int) -> Tensor:
    """Share of the pixels of the tokens with a class that have that class themselves.

    Args:
        classes: (V, H, W), IGNORED where there is none.
        token_classes: (V, h, w), -1 where there is none.
        stride: pixels per side of a token.
    """
    same = classes == expand(token_classes, stride)
    return same.sum() / ((token_classes >= 0).sum() * stride**2).clamp(min=1)


@torch.no_grad()
def share_in_reach(reached: Tensor, token_classes: Tensor, masked: Tensor) -> Tensor:
    """Share of the hidden tokens with a class that are reconstructed from a visible one. All arguments are (V, h, w);
    `reached` is the result of the decoder's `in_reach`."""
    counted = masked & (token_classes >= 0)
    return (reached & counted).sum() / counted.sum().clamp(min=1)
