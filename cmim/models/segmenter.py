"""What every segmentation network offers here: an encoder, a decoder whose feature map others may use, and a head."""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmim.models.deeplabv3plus import DeepLabV3PlusDecoder
from cmim.models.weights import create_encoder


class Segmenter(nn.Module):
    """`encoder`, `decoder` and `head`, called one after the other, or one at a time to perturb what lies between.

    Args:
        encoder: (B, 3, H, W) -> maps, shallowest first.
        decoder: those maps -> one feature map (B, `feature_channels`, h, w).
        num_classes: number of classes K.
        mean, std: of each channel of the images, of values in [0, 1].
        feature_channels, feature_stride: channels of the decoder's feature map, and pixels per side of its cells.
        encoder_channels, encoder_stride: the same of the encoder's deepest map.

    Images are normalised floats of any size. Where a side is no multiple of the stride s, a map has ceil(H / s) rows
    with most encoders, floor(H / s) with a patch stem (ConvNeXt).
    """

    align_corners = True
    """How the logits are upsampled to pixels: bilinear with corners aligned."""

    def __init__(
        self, encoder, decoder, num_classes, *, mean, std, feature_channels, feature_stride, encoder_channels, encoder_stride
    ):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.head = nn.Conv2d(feature_channels, num_classes, 1)
        self.feature_channels, self.feature_stride = feature_channels, feature_stride
        self.encoder_channels, self.encoder_stride = encoder_channels, encoder_stride
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def normalise(self, images):
        """uint8 images (B, 3, H, W) as the encoder expects them: float32, (x / 255 - mean) / std."""
        return (images.float() / 255 - self.mean) / self.std

    def encode(self, images):
        """(B, 3, H, W) -> tuple of encoder maps, the deepest last."""
        return tuple(self.encoder(images))

    def decode(self, maps):
        """Encoder maps -> decoder feature (B, feature_channels, h, w)."""
        return self.decoder(maps)

    def classify(self, feature):
        """Decoder feature -> logits (B, K, h, w), one for each cell of the feature map."""
        return self.head(feature)

    def forward(self, images):
        """(B, 3, H, W) -> logits (B, K, h, w) at `feature_stride`."""
        return self.classify(self.decode(self.encode(images)))


def build_segmenter(settings, num_classes, mean, std):
    """The network of a `ModelSettings`, for images with the channels of `mean` and `std`.

    Raises:
        UserError: the encoder is unknown or has no maps at the wanted strides; its weights are missing or do not fit.
    """
    encoder = create_encoder(settings.encoder, settings.weights, strides=(4, settings.output_stride))
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
        feature_channels=width,
        feature_stride=4,
        encoder_channels=encoder_channels,
        encoder_stride=settings.output_stride,
    )


@contextmanager
def batch_norm_mode(net, mode):
    """How the BatchNorm layers of a net in train mode see the passes inside the `with` block.

    Args:
        net: any module; layers of every kind but BatchNorm, and BatchNorm layers in eval mode, are left alone.
        mode: `batch`: batch statistics, running ones untouched; `shared`: as in train mode, running statistics
            updated; `running`: running statistics, as in eval mode.
    """
    if mode not in ("batch", "shared", "running"):
        raise ValueError(f"batch_norm_mode: mode is {mode!r}, expected 'batch', 'shared' or 'running'")
    layers = [m for m in _batch_norms(net) if m.training and m.track_running_stats]
    buffers = [(m.running_mean, m.running_var) for m in layers]
    copies = _snapshot([b for pair in buffers for b in pair]) if mode == "running" and layers else []
    try:
        for i, layer in enumerate(layers):
            if mode == "batch":
                # Momentum 0 would still count batches, and turn an infinite batch statistic into NaN.
                layer.track_running_stats = False
            elif mode == "running":
                layer.training = False
                layer.running_mean, layer.running_var = copies[2 * i], copies[2 * i + 1]
        yield
    finally:
        for layer, (mean, variance) in zip(layers, buffers, strict=True):
            if mode == "batch":
                layer.track_running_stats = True
            elif mode == "running":
                layer.training = True
                layer.running_mean, layer.running_var = mean, variance


@torch.library.custom_op("cmim::snapshot", mutates_args=())
def _snapshot(tensors: list[Tensor]) -> list[Tensor]:
    """Copies. Backward reads running statistics again, and by then a later pass in train mode may have changed them;
    nothing warns. The op is opaque because a compiler drops a plain clone and reads the changed original."""
    return [t.clone() for t in tensors]


@_snapshot.register_fake
def _(tensors):
    return [torch.empty_like(t) for t in tensors]


def _batch_norms(module):
    """`module.modules()` would ask BatchNorm layers for children, which a compiler refuses once their flags changed."""
    if isinstance(module, _BatchNorm):
        return [module]
    return [layer for child in module.children() for layer in _batch_norms(child)]
