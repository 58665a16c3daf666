"""What every segmentation network offers here: an encoder, a decoder whose feature map others may use, and a head."""

import torch
from torch import nn

from cmim.models.deeplabv3plus import DeepLabV3PlusDecoder
from cmim.models.dpt import DPTDecoder, TransformerEncoder, decoder_widths
from cmim.models.geometry import geometry
from cmim.models.weights import create_encoder, create_transformer
from cmim_kernels import checks


class Segmenter(nn.Module):
    """`encoder`, `decoder` and `head`, called one after the other, or one at a time to perturb what lies between.

    Args:
        encoder: (B, c, H, W) -> maps, shallowest first.
        decoder: those maps -> one feature map (B, `feature_channels`, h, w).
        num_classes: number of classes K.
        mean, std: of each of the c channels of the images, of values in [0, 1].
        feature_channels, feature_stride: channels of the decoder's feature map, and pixels per side of its cells.
        encoder_channels, encoder_stride: the same of the encoder's deepest map.
        size_multiple: sides of images must be multiples of it.
        head: (B, feature_channels, h, w) -> (B, K, h, w); by default a 1 x 1 convolution.

    Images are normalised floats. With a size_multiple of 1 they have any size: where a side is no multiple of the
    stride s, a map has ceil(H / s) rows with most encoders, floor(H / s) with a patch stem (ConvNeXt).
    """

    align_corners = True
    """How the logits are upsampled to pixels: bilinear with corners aligned."""

    def __init__(
        self, encoder, decoder, num_classes, *, mean, std, feature_channels, feature_stride,
        encoder_channels, encoder_stride, size_multiple=1, head=None,
    ):  # fmt: skip
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.head = nn.Conv2d(feature_channels, num_classes, 1) if head is None else head
        self.feature_channels, self.feature_stride = feature_channels, feature_stride
        self.encoder_channels, self.encoder_stride = encoder_channels, encoder_stride
        self.size_multiple = size_multiple
        self.encoder_frozen = False
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def freeze_encoder(self):
        """From now on the encoder does not learn and stays in eval mode: BatchNorm keeps its statistics."""
        self.encoder.requires_grad_(False).eval()
        self.encoder_frozen = True

    def train(self, mode=True):
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self

    def normalise(self, images):
        """uint8 images (B, c, H, W) as the encoder expects them: float32, (x / 255 - mean) / std."""
        return (images.float() / 255 - self.mean) / self.std

    def encode(self, images):
        """(B, c, H, W) -> tuple of encoder maps, the deepest last.

        Raises:
            ValueError: a side is no multiple of `size_multiple`; compiled code does not ask.
        """
        if checks.enabled() and any(side % self.size_multiple for side in images.shape[-2:]):
            height, width = images.shape[-2:]
            raise ValueError(f"Segmenter: images are {height} x {width}, expected multiples of {self.size_multiple}")
        return tuple(self.encoder(images))

    def decode(self, maps):
        """Encoder maps -> decoder feature (B, feature_channels, h, w)."""
        return self.decoder(maps)

    def classify(self, feature):
        """Decoder feature -> logits (B, K, h, w), one for each cell of the feature map."""
        return self.head(feature)

    def forward(self, images):
        """(B, c, H, W) -> logits (B, K, h, w) at `feature_stride`."""
        return self.classify(self.decode(self.encode(images)))


def build_segmenter(settings, num_classes, mean, std):
    """The network of a `ModelSettings`, for images with the channels of `mean` and `std`.

    Raises:
        UserError: the architecture or the encoder is unknown; the encoder has not the maps that the architecture
            needs; its weights are missing or do not fit.
    """
    strides = geometry(settings)  # refuses what is unknown
    if settings.arch.startswith("smp:"):
        from cmim.models.zoo import build_zoo  # a library that only these networks need

        net = build_zoo(settings, num_classes, mean, std)
    else:
        build = _dpt if settings.arch == "dpt" else _deeplabv3plus
        encoder, encoder_channels, decoder, width = build(settings, len(mean))
        net = Segmenter(
            encoder,
            decoder,
            num_classes,
            mean=mean,
            std=std,
            feature_channels=width,
            feature_stride=strides.feature_stride,
            encoder_channels=encoder_channels,
            encoder_stride=strides.encoder_stride,
            size_multiple=strides.multiple,
        )
    if settings.freeze_encoder:
        net.freeze_encoder()
    return net


def _deeplabv3plus(settings, channels):
    encoder = create_encoder(settings.encoder, settings.weights, strides=(4, settings.output_stride), channels=channels)
    low_level_channels, encoder_channels = encoder.feature_info.channels()
    width = settings.decoder_width or 256
    decoder = DeepLabV3PlusDecoder(
        encoder_channels,
        low_level_channels,
        width=width,
        low_level_width=settings.low_level_width,
        atrous_rates=settings.atrous_rates,
    )
    return encoder, encoder_channels, decoder, width


def _dpt(settings, channels):
    encoder = TransformerEncoder(create_transformer(settings.encoder, settings.weights, channels=channels))
    width, levels = decoder_widths(encoder.channels)
    width = settings.decoder_width or width
    return encoder, encoder.channels, DPTDecoder(encoder.channels, width=width, levels=levels), width
