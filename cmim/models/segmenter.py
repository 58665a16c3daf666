"""The interface of all segmentation networks: an encoder, a decoder that returns a feature map, and a head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmim.models.geometry import Geometry, nearest_multiple
from cmim_kernels import checks


class Segmenter(nn.Module):
    """`encoder`, `decoder` and `head`, called one after another, or separately so that features in between can be perturbed.

    Args:
        encoder: (B, c, H, W) -> maps, shallowest first.
        decoder: those maps -> one feature map (B, `feature_channels`, h, w).
        num_classes: number of classes K.
        mean, std: of each of the c channels of the images, of values in [0, 1].
        geometry: strides of the decoder's feature map and of the encoder's deepest map, the number that sides of images must
            be multiples of, and the stride of a fine map; the attributes `feature_stride`, `encoder_stride`, `size_multiple`
            and `fine_stride`.
        feature_channels, encoder_channels: channels of the first two maps.
        fine_map, fine_channels: index of the fine map among the encoder's, and its channels; by default the deepest map.
        head: (B, feature_channels, h, w) -> (B, K, h, w); by default a 1 x 1 convolution.

    Images are normalised floats. With a size_multiple of 1 they may have any size: if a side is not a multiple of the stride
    s, a map has ceil(H / s) rows with most encoders, and floor(H / s) rows with a patch stem (ConvNeXt).
    """

    align_corners = True
    """Whether the bilinear upsampling of the logits aligns corners."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        num_classes: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        geometry: Geometry,
        feature_channels: int,
        encoder_channels: int,
        fine_map: int = -1,
        fine_channels: int | None = None,
        head: nn.Module | None = None,
    ):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.head = nn.Conv2d(feature_channels, num_classes, 1) if head is None else head
        self.feature_channels, self.encoder_channels = feature_channels, encoder_channels
        self.fine_map, self.fine_channels = fine_map, fine_channels or encoder_channels
        self.feature_stride, self.encoder_stride, self.size_multiple, self.fine_stride = geometry
        self.encoder_frozen = False
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def freeze_encoder(self) -> None:
        """Stop training the encoder and keep it in eval mode, so that BatchNorm keeps its statistics."""
        self.encoder.requires_grad_(False).eval()
        self.encoder_frozen = True

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise uint8 images (B, c, H, W) for the encoder: (x / 255 - mean) / std, float32."""
        return (images.float() / 255 - self.mean) / self.std

    def accepted_size(self, height: float, width: float) -> tuple[int, int]:
        """The size nearest to this one that the network takes."""
        return nearest_multiple(height, self.size_multiple), nearest_multiple(width, self.size_multiple)

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, c, H, W) -> tuple of encoder maps, the deepest last.

        Raises:
            ValueError: a side is not a multiple of `size_multiple`; compiled code does not check this.
        """
        if checks.enabled() and any(side % self.size_multiple for side in images.shape[-2:]):
            height, width = images.shape[-2:]
            raise ValueError(f"Segmenter: images are {height} x {width}, expected multiples of {self.size_multiple}")
        return tuple(self.encoder(images))

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """Encoder maps -> decoder feature (B, feature_channels, h, w)."""
        return self.decoder(maps)

    def classify(self, feature: Tensor) -> Tensor:
        """Decoder feature -> logits (B, K, h, w), one for each cell of the feature map."""
        return self.head(feature)

    def forward(self, images: Tensor) -> Tensor:
        """(B, c, H, W) -> logits (B, K, h, w) at `feature_stride`."""
        return self.classify(self.decode(self.encode(images)))
