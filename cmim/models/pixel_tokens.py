"""Tokens of a pixel decoder that does not read the semantic decoder, whose channels are trained to forget colour."""

import torch.nn.functional as F
from torch import Tensor, nn


class PixelTokens(nn.Module):
    """Fuses a fine and the deepest map of an encoder: GELU(LayerNorm(W fine + upsample(V deepest))).

    Everything after the upsampling is token-wise. Classes are not mixed from these tokens on; the encoder and the cells of
    its deepest map have mixed them before.

    Args:
        fine_channels, deep_channels: channels of the two maps.
        width: channels of a token.
    """

    def __init__(self, fine_channels: int, deep_channels: int, width: int):
        super().__init__()
        self.fine, self.deep = nn.Linear(fine_channels, width), nn.Linear(deep_channels, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, fine: Tensor, deepest: Tensor) -> Tensor:
        """(B, fine_channels, h, w), (B, deep_channels, h', w') -> (B, width, h, w), channels-last."""
        deepest = self.deep(deepest.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        deepest = F.interpolate(deepest, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        tokens = self.fine(fine.permute(0, 2, 3, 1)) + deepest.permute(0, 2, 3, 1)
        return F.gelu(self.norm(tokens)).permute(0, 3, 1, 2)
