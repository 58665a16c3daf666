"""A dense prediction transformer (DPT; Ranftl et al. 2021, arXiv 2103.13413) on a plain vision transformer, with the
widths of UniMatch V2 (arXiv 2410.10777).

There are three differences from V2's network. Its deepest fusion block has a residual unit that its forward pass never uses;
it is left out (DistributedDataParallel would wait for its gradient). The 1 x 1 convolution of a fusion block comes before
the upsampling instead of after it, which is the same function (bilinear weights add up to one) at a quarter of the cost. And
timm interpolates position embeddings with antialiasing.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmim.models.geometry import Geometry
from cmim.models.segmenter import Segmenter
from cmim.models.weights import create_transformer
from cmim.settings import ModelSettings


def geometry(settings: ModelSettings) -> Geometry:
    """The strides, from a transformer on the meta device.

    Raises:
        UserError: see `create_transformer`.
    """
    with torch.device("meta"):
        patch = create_transformer(settings.encoder, "none").feature_info[-1]["reduction"]
    return Geometry(patch // 8 if patch % 8 == 0 else patch / 8, patch, patch, patch)


def build(settings: ModelSettings, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Segmenter:
    strides = geometry(settings)
    encoder = TransformerEncoder(create_transformer(settings.encoder, settings.weights, channels=len(mean)))
    width, levels = decoder_widths(encoder.channels)
    width = settings.decoder_width or width
    return Segmenter(
        encoder,
        DPTDecoder(encoder.channels, width=width, levels=levels),
        num_classes,
        mean=mean,
        std=std,
        geometry=strides,
        feature_channels=width,
        encoder_channels=encoder.channels,
    )


class TransformerEncoder(nn.Module):
    """Four maps of a timm vision transformer, each after its final norm.

    Args:
        model: a model from `create_transformer`; layers that the maps do not need are removed.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.layers = taken_layers(len(model.blocks))
        self.channels, self.patch = model.embed_dim, model.feature_info[-1]["reduction"]
        model.prune_intermediate_layers(self.layers, prune_head=True)

    def layers_above(self, name: str) -> int:
        """The number of layers between the encoder's output and that of a parameter, by its name: 0 for the final norm, 1
        for the last of n blocks, n for the first, n + 1 for the embeddings below it."""
        _, part, index, *_ = [*name.split("."), "", ""]
        if part == "blocks":
            return len(self.model.blocks) - int(index)
        return 0 if part == "norm" else len(self.model.blocks) + 1

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, channels, H, W), sides multiples of the patch p -> 4 maps (B, C, H / p, W / p), channels-last."""
        height, width = (side // self.patch for side in images.shape[-2:])
        layers = self.model.forward_intermediates(
            images, indices=self.layers, norm=True, output_fmt="NLC", intermediates_only=True
        )
        maps = [tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2) for tokens in layers]
        return tuple(m.contiguous(memory_format=torch.channels_last) for m in maps)


def taken_layers(depth: int) -> list[int]:
    """Indices of the four blocks whose outputs are used: the last block of each quarter; for 24 blocks those of V2."""
    return [4, 11, 17, 23] if depth == 24 else [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]


def decoder_widths(channels: int) -> tuple[int, tuple[int, ...]]:
    """Channels of V2's decoder, and of its four levels, for an encoder with this number of channels.

    Up to 384 channels: 64 (S); up to 768: 128 (B); up to 1024: 256 (L); above: 384 (g). For S and B the levels have an
    eighth, a quarter, half and all of the encoder's channels.
    """
    if channels <= 768:
        return (64 if channels <= 384 else 128), (channels // 8, channels // 4, channels // 2, channels)
    return (256, (256, 512, 1024, 1024)) if channels <= 1024 else (384, (1536,) * 4)


class DPTDecoder(nn.Module):
    """Turns four maps of one size into a pyramid at 4, 2, 1 and 1/2 times that size, and fuses it from coarse to fine.

    Args:
        in_channels: channels of the maps.
        width: channels of the fusion blocks and of the returned feature map.
        levels: channels of the four levels before they are fused, largest map first.
    """

    def __init__(self, in_channels: int, *, width: int, levels: Sequence[int]):
        super().__init__()
        self.project = nn.ModuleList([nn.Conv2d(in_channels, channels, 1) for channels in levels])
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(levels[0], levels[0], 4, stride=4),
                nn.ConvTranspose2d(levels[1], levels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(levels[3], levels[3], 3, stride=2, padding=1),
            ]
        )
        self.narrow = nn.ModuleList([nn.Conv2d(channels, width, 3, padding=1, bias=False) for channels in levels])
        self.fuse = nn.ModuleList([_Fusion(width, joins=level < 3) for level in range(4)])
        self.output = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """4 maps (B, in_channels, h, w) -> (B, width, 8 h, 8 w)."""
        steps = zip(self.project, self.resize, self.narrow, maps, strict=True)
        levels = [narrow(resize(project(m))) for project, resize, narrow, m in steps]
        height, width = levels[0].shape[-2:]
        sizes = [(2 * height, 2 * width)] + [level.shape[-2:] for level in levels[:3]]
        x = self.fuse[3](levels[3], None, sizes[3])
        for i in (2, 1, 0):
            x = self.fuse[i](x, levels[i], sizes[i])
        return self.output(x)


class _Fusion(nn.Module):
    """Add a level, refine, and upsample to the size of the next one."""

    def __init__(self, width, joins):
        super().__init__()
        self.join = _ResidualUnit(width) if joins else None
        self.refine = _ResidualUnit(width)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x, level, size):
        if self.join is not None:
            x = x + self.join(level)
        x = self.project(self.refine(x))
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class _ResidualUnit(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.second(F.relu(self.first(F.relu(x))))
