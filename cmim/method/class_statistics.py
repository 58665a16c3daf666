"""Running statistics of the classes, which adjust pseudo-labels, or what is learnt from them, to few labels: `method.align`,
`class_thresholds`, `class_balance` and `logit_adjustment`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmim.distributed import all_reduce
from cmim.method.pseudo_labels import PseudoLabels

DECAY = 0.99
"""Factor of the sums with each step: they remember about a hundred batches."""
MOST_WEIGHT = 10.0
"""Of a class, and one over it the least."""


class ClassStatistics(nn.Module):
    """Sums over the last batches of all processes, for each class, at the resolution of the logits."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.register_buffer("labelled", torch.zeros(num_classes))  # labelled pixels
        self.register_buffer("predicted", torch.zeros(num_classes))  # probabilities of unlabelled pixels
        self.register_buffer("chosen", torch.zeros(num_classes))  # unlabelled pixels whose pseudo-label is this class
        self.register_buffer("confidence", torch.zeros(num_classes))  # of these pixels
        self.register_buffer("counted", torch.zeros(num_classes))  # those of them that are confident enough to train

    @torch.no_grad()
    def count_labels(self, labels: Tensor, size: tuple[int, int], ranks: int) -> None:
        """Count the classes of labelled images (B, H, W) at the resolution `size` of the logits; values from K on are
        ignored."""
        self._add(("labelled", self._one_hot(labels, size)), ranks=ranks)

    @torch.no_grad()
    def align(self, logits: Tensor, valid: Tensor, ranks: int) -> Tensor:
        """Distribution alignment (Berthelot et al. 2020, ReMixMatch, section 3.1): the probabilities of a class are
        multiplied by the ratio of its share of the labelled pixels to its share of the predictions.

        Args:
            logits: (B, K, h, w) of unlabelled images.
            valid: (B, H, W) bool, false on padding.
            ranks: number of processes.

        Returns:
            logits (B, K, h, w) float32 with the logarithm of this ratio added. It is the same everywhere in an image, and so
            can be added before the upsampling.
        """
        self._add(("predicted", logits.float().softmax(1) * _at_logits(valid, logits)), ranks=ranks)
        return logits.float() + (_shares(self.labelled) / _shares(self.predicted)).log().view(-1, 1, 1)

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

    @torch.no_grad()
    def count_pseudo_labels(self, target: Tensor, size: tuple[int, int], ranks: int) -> None:
        """Count the pseudo-labels (B, H, W) that train at the resolution `size` of the logits; values from K on are
        ignored."""
        self._add(("counted", self._one_hot(target, size)), ranks=ranks)

    def weights(self) -> Tensor:
        """Weights of the classes (K,) that give them the same shares in pseudo-labels as in labelled images. Only confident
        pixels train, and those of a rare class are few: without weights, they teach the network that this class is rarer
        still."""
        return (_shares(self.labelled) / _shares(self.counted)).clamp(1 / MOST_WEIGHT, MOST_WEIGHT)

    def adjust(self, logits: Tensor) -> Tensor:
        """Logits (B, K, h, w) plus the logarithm of each class's share of the pseudo-labels that train, relative to its
        share of the labels; float32. The cross-entropy of the sum trains the network as if both shares were equal (logit
        adjustment, Menon et al. 2021, arXiv 2007.07314): a class that pseudo-labels do not have yet is not unlearnt."""
        return logits.float() + (_shares(self.counted) / _shares(self.labelled)).log().view(-1, 1, 1)

    def _one_hot(self, labels, size):
        """(B, K, h, w) bool."""
        classes = torch.arange(len(self.labelled), device=labels.device).view(-1, 1, 1)
        return F.interpolate(labels[:, None].float(), size=size) == classes

    def _add(self, *sums, ranks):
        """Add maps (B, K, h, w) to the sums of these names."""
        new = torch.stack([values.float().sum((0, 2, 3)) for _, values in sums])
        new = all_reduce(new) if ranks > 1 else new
        for (name, _), values in zip(sums, new, strict=True):
            getattr(self, name).mul_(DECAY).add_(values)


def _shares(total):
    """From one pixel of each class on, so that no share is zero."""
    return (total + 1) / (total + 1).sum()


def _at_logits(valid, logits):
    """(B, 1, h, w) float."""
    return F.interpolate(valid[:, None].float(), size=logits.shape[-2:])
