"""Random block masks with an exact count: the blocks with the smallest noise are masked."""

import torch


def random_mask_forward(noise, height, width, ratio, block):
    """Mask the round(ratio x blocks) blocks with the smallest noise.

    Args:
        noise: (B, rows, columns) float, one number for each block of the grid, ceil(height / block) x ceil(width / block).

    Returns:
        (B, height, width) bool, True where masked.
    """
    batch, rows, columns = noise.shape
    order = noise.reshape(batch, rows * columns).argsort(dim=1, stable=True)
    first = torch.arange(rows * columns, device=noise.device) < round(ratio * (rows * columns))
    blocks = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, first.expand_as(order))
    pixels = blocks.view(batch, rows, 1, columns, 1).expand(-1, -1, block, -1, block)
    pixels = pixels.reshape(batch, rows * block, columns * block)
    return pixels[:, :height, :width].contiguous()
