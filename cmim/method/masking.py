"""What is hidden from the network: block masks, masks within each class, all classes but one, and the fill colour.

A mask M is (B, h, w) bool on the token grid, true where a token is hidden. Block masks come with the batch, with one value
for each block (`cmim_kernels.random_mask`: an exact count in every image), and `expand` upsamples them to tokens. Masks that
depend on the classes are drawn here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmim.data.datasets import IGNORED
from cmim.randomness import uniform


def expand(grid: Tensor, side: int) -> Tensor:
    """Nearest-neighbour upsampling from (B, h, w) to (B, h * side, w * side)."""
    batch, height, width = grid.shape
    wide = grid[:, :, None, :, None].expand(batch, height, side, width, side)
    return wide.reshape(batch, height * side, width * side)


class Fill(nn.Module):
    """fill(v, M): sets the hidden pixels of normalised images to one colour.

    fill: `mean` (the mean colour of the data, which is zero after normalisation), `black`, or `learned`.
    mean, std: of each channel, used to normalise the images.
    """

    def __init__(self, fill: str, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        black = -torch.tensor(mean) / torch.tensor(std)
        colour = black if fill == "black" else torch.zeros(len(mean))
        if fill == "learned":
            self.colour = nn.Parameter(colour)
        else:
            self.register_buffer("colour", colour, persistent=False)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """images (B, channels, H, W) float, hidden (B, H, W) bool."""
        return torch.where(hidden[:, None], self.colour.view(1, -1, 1, 1), images)


def per_class_mask(labels: Tensor, keys: Tensor, num_classes: int, ratio: float, block: int) -> Tensor:
    """Hide exactly round(ratio x n) of the n tokens of every class of every image.

    Within a class, blocks are hidden one after another in a random order, so that hidden tokens form blocks: only the last
    one may be hidden partly.

    Args:
        labels: (B, h, w) token classes; those outside [0, num_classes) count as one more class.
        keys: (B,) int64, one random key per image.
        ratio: share of hidden tokens, in (0, 1).
        block: side of a block in tokens.

    Returns:
        (B, h, w) bool.
    """
    batch, height, width = labels.shape
    rows, columns = -(-height // block), -(-width // block)
    draws = uniform(keys, rows * columns + height * width)
    rank = draws[:, : rows * columns].argsort(dim=1, stable=True).argsort(1).view(batch, rows, columns)
    of_block = expand(rank, block)[:, :height, :width].reshape(batch, -1)
    of_token = draws[:, rows * columns :]

    labels = labels.long()  # PyTorch wraps the bound of `uint8 < 300` to 44
    known = (labels >= 0) & (labels < num_classes)
    group = torch.where(known, labels, num_classes).reshape(batch, -1)
    in_group = group[:, :, None] == torch.arange(num_classes + 1, device=labels.device)
    count = in_group.sum(1)
    start = count.cumsum(1) - count
    order = (group * rows * columns + of_block + of_token.double()).argsort(dim=1, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(height * width, device=order.device).expand_as(order))
    hidden = place - start.gather(1, group) < torch.round(ratio * count.double()).long().gather(1, group)
    return hidden.view(batch, height, width)


def isolate_class(classes: Tensor, keys: Tensor, num_classes: int) -> Tensor:
    """Keep one class per image, drawn uniformly from those present; all other pixels become IGNORED.

    Args:
        classes: (B, H, W) pixel classes, IGNORED where there is none.
        keys: (B,) int64.
    """
    known = torch.arange(num_classes, device=classes.device)
    present = torch.stack([(classes == k).flatten(1).any(1) for k in known.unbind()], dim=1)
    drawn = torch.where(present, uniform(keys, num_classes), -1).argmax(1)
    return torch.where(classes == drawn[:, None, None], classes, IGNORED)
