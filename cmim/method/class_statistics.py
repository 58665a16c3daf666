"""Running statistics of the classes, which adjust pseudo-labels to few labels: `method.align`, `method.class_thresholds`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmim.distributed import all_reduce
from cmim.method.pseudo_labels import PseudoLabels

DECAY = 0.99
"""Factor of the sums with each step: they remember about a hundred batches."""


class ClassStatistics(nn.Module):
    """Sums over the last batches of all processes, for each class, at the resolution of the logits."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.register_buffer("labelled", torch.zeros(num_classes))  # labelled pixels
        self.register_buffer("predicted", torch.zeros(num_classes))  # probabilities of unlabelled pixels
        self.register_buffer("chosen", torch.zeros(num_classes))  # unlabelled pixels whose pseudo-label is this class
        self.register_buffer("confidence", torch.zeros(num_classes))  # of these pixels

    @torch.no_grad()
    def align(self, logits: Tensor, valid: Tensor, labels: Tensor, ranks: int) -> Tensor:
        """Distribution alignment (Berthelot et al. 2020, ReMixMatch, section 3.1): the probabilities of a class are
        multiplied by the ratio of its share of the labelled pixels to its share of the predictions.

        Args:
            logits: (B, K, h, w) of unlabelled images.
            valid: (B, H, W) bool, false on padding.
            labels: (B', H, W) of labelled images; values from K on are ignored.
            ranks: number of processes.

        Returns:
            logits (B, K, h, w) float32 with the logarithm of this ratio added. It is the same everywhere in an image, and so
            can be added before the upsampling.
        """
        labels = F.interpolate(labels[:, None].float(), size=logits.shape[-2:])
        classes = torch.arange(len(self.labelled), device=logits.device).view(-1, 1, 1)
        probability = logits.float().softmax(1) * _at_logits(valid, logits)
        self._add(("labelled", labels == classes), ("predicted", probability), ranks=ranks)
        shares = [(total + 1) / (total + 1).sum() for total in (self.labelled, self.predicted)]
        return logits.float() + (shares[0] / shares[1]).log().view(-1, 1, 1)

    @torch.no_grad()
    def relative(self, pseudo: PseudoLabels, logits: Tensor, ranks: int) -> PseudoLabels:
        """Pseudo-labels whose confidence is divided by the mean confidence of their class, relative to that of the most
        confident class. So a class that is learnt later gets a lower threshold, as in FlexMatch (Zhang et al. 2021, section
        3.1), which counts confident samples instead: in segmentation their number says more about the size of a class.

        Args:
            pseudo: of (B, H, W) pixels.
            logits: (B, K, h, w), those of `pseudo`.
            ranks: number of processes.
        """
        probability = logits.float().softmax(1)
        first = (probability == probability.amax(1, keepdim=True)) & _at_logits(pseudo.valid, logits).bool()
        self._add(("chosen", first), ("confidence", torch.where(first, probability, 0)), ranks=ranks)
        mean = torch.where(self.chosen > 0, self.confidence / self.chosen.clamp(min=1), 1)
        highest = torch.where(self.chosen > 0, mean, 0).amax().clamp(min=1e-6)
        relative = (mean / highest).clamp(max=1)
        return pseudo._replace(confidence=pseudo.confidence / relative[pseudo.label.long()])

    def _add(self, *sums, ranks):
        """Add maps (B, K, h, w) to the sums of these names."""
        new = torch.stack([values.float().sum((0, 2, 3)) for _, values in sums])
        new = all_reduce(new) if ranks > 1 else new
        for (name, _), values in zip(sums, new, strict=True):
            getattr(self, name).mul_(DECAY).add_(values)


def _at_logits(valid, logits):
    """(B, 1, h, w) float."""
    return F.interpolate(valid[:, None].float(), size=logits.shape[-2:])
