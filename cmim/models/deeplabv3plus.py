"""The decoder of DeepLabV3+ (Chen et al. 2018, arXiv 1802.02611) with plain convolutions in atrous spatial pyramid
pooling and no dropout: with `resnet101s` and the default settings, the network of UniMatch (arXiv 2208.09910)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmim.models.geometry import Geometry
from cmim.models.segmenter import Segmenter
from cmim.models.weights import create_encoder
from cmim.settings import ModelSettings


def geometry(settings: ModelSettings) -> Geometry:
    return Geometry(4, settings.output_stride, 1, 4)


def build(settings: ModelSettings, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Segmenter:
    strides = (4, settings.output_stride)
    encoder = create_encoder(settings.encoder, settings.weights, strides=strides, channels=len(mean))
    low_level_channels, encoder_channels = encoder.feature_info.channels()
    width = settings.decoder_width or 256
    decoder = DeepLabV3PlusDecoder(
        encoder_channels,
        low_level_channels,
        width=width,
        low_level_width=settings.low_level_width,
        atrous_rates=settings.atrous_rates,
    )
    return Segmenter(
        encoder,
        decoder,
        num_classes,
        mean=mean,
        std=std,
        geometry=geometry(settings),
        feature_channels=width,
        encoder_channels=encoder_channels,
        fine_map=0,
        fine_channels=low_level_channels,
    )


class DeepLabV3PlusDecoder(nn.Module):
    """Atrous spatial pyramid pooling on the deepest map, upsampled and fused with the map at stride 4.

    Args:
        in_channels: channels of the deepest map.
        low_level_channels: channels of the map at stride 4.
        width: channels of the pyramid's branches and of the returned feature.
        low_level_width: channels to which the map at stride 4 is reduced.
        atrous_rates: dilations of the 3 x 3 branches.
    """

    def __init__(
        self,
        in_channels: int,
        low_level_channels: int,
        *,
        width: int,
        low_level_width: int,
        atrous_rates: Sequence[int],
    ):
        super().__init__()
        self.pyramid = AtrousPyramid(in_channels, width, atrous_rates)
        self.reduce = conv_bn_relu(low_level_channels, low_level_width, 1)
        self.fuse = nn.Sequential(conv_bn_relu(low_level_width + width, width, 3), conv_bn_relu(width, width, 3))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(map at stride 4, ..., deepest map) -> (B, width, h, w) at stride 4."""
        low_level, deepest = maps[0], maps[-1]
        context = F.interpolate(self.pyramid(deepest), size=low_level.shape[-2:], mode="bilinear", align_corners=True)
        return self.fuse(torch.cat([self.reduce(low_level), context], dim=1))


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling: a 1 x 1 branch, dilated 3 x 3 branches, and global average pooling, in parallel."""

    def __init__(self, in_channels: int, width: int, atrous_rates: Sequence[int]):
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_bn_relu(in_channels, width, 1)]
            + [conv_bn_relu(in_channels, width, 3, dilation=rate) for rate in atrous_rates]
        )
        self.pool = conv_bn_relu(in_channels, width, 1)
        self.project = conv_bn_relu((len(atrous_rates) + 2) * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, width, h, w)."""
        maps = [branch(x) for branch in self.branches]
        mean = self.pool(x.mean(dim=(2, 3), keepdim=True))
        # With this sum the concatenation stays channels-last; with an expanded mean it would be contiguous.
        maps.append(mean + torch.zeros_like(maps[0]))
        return self.project(torch.cat(maps, dim=1))


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, *, dilation: int = 1) -> nn.Sequential:
    """Convolution with same padding, BatchNorm, ReLU."""
    padding = kernel_size // 2 * dilation
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
