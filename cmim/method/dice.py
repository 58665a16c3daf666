"""The Dice loss of the labelled images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmim.distributed import all_reduce


def dice_loss(logits: Tensor, target: Tensor, align_corners: bool, ranks: int = 1) -> tuple[Tensor, Tensor]:
    """One minus the soft Dice of each class k, with sums over the pixels with a class in the images of all processes:

        1 - 2 sum p_k [y = k] / (sum p_k + sum [y = k])

    This is the multi-class Dice of nnU-Net with sums over the batch (Isensee et al. 2018, arXiv 1809.10486). Logits are
    upsampled and softmax is taken in float32, sums over processes are float64.

    Args:
        logits: (B, K, h, w), any float dtype.
        target: (B, H, W) integers; pixels outside [0, K) are ignored.
        align_corners: of the bilinear upsampling of the logits to (H, W).
        ranks: number of processes.

    Returns:
        loss (K,) float32, 0 for classes without a pixel; whether a class has one (K,) int64. In all processes the same.
    """
    logits = F.interpolate(logits.float(), target.shape[1:], mode="bilinear", align_corners=align_corners)
    probability = logits.softmax(1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    truth = target[:, None] == classes[:, None, None]
    sums = [
        torch.where(truth, probability, 0).sum((0, 2, 3)),
        torch.where(truth.any(1, keepdim=True), probability, 0).sum((0, 2, 3)),
        truth.sum((0, 2, 3)),
    ]
    sums = torch.stack([values.double() for values in sums])
    if ranks > 1:  # with its gradient, because the denominator has one too
        sums = all_reduce(sums)
    both, predicted, true = sums
    occurs = true > 0
    loss = 1 - 2 * both / torch.where(occurs, predicted + true, 1)
    return torch.where(occurs, loss, 0).float(), occurs.long()
