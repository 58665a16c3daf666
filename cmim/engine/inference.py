"""Class probabilities at the original resolution: whole images or sliding windows, mirrored images, several scales."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cmim.models.geometry import nearest_multiple
from cmim.models.segmenter import Segmenter
from cmim.settings import Config

NOT_FINITE = (
    "the outputs of the network are not finite; lower optimizer.lr, use --train.precision fp32 or another checkpoint"
)


def probabilities(net: Segmenter, images: Tensor, sizes: Sequence[tuple[int, int]], config: Config) -> Iterator[Tensor]:
    """Class probabilities of each image, one after another, so that only one is in memory at full resolution.

    With `evaluation.mode` `whole`, the network gets whole images, resized to the nearest multiple of its `size_multiple`;
    its logits are upsampled directly to the original resolution. With `slide` it gets windows, and the probabilities are
    averaged where windows overlap. They are also averaged over all `evaluation.scales` and, with `evaluation.flip`, over the
    mirrored image. Resizing is bilinear without antialiasing; corners are aligned if those of the logits are.

    Args:
        net: a `Segmenter` in eval mode; inside `autocast`, everything after the network is still float32.
        images: (n, C, h, w) uint8, the input of the network.
        sizes: the n original sizes (H, W).
        config: a `Config`; uses `evaluation` and, for the default window, `data.crop`.

    Yields:
        (K, H, W) float32, one for each size.
    """
    settings = config.evaluation
    predict = _slide if settings.mode == "slide" else _whole
    views = [(scale, mirrored) for scale in settings.scales for mirrored in ((False, True) if settings.flip else (False,))]
    passes = [predict(net, images.flip(-1) if mirrored else images, scale, sizes, config) for scale, mirrored in views]
    for _ in sizes:
        total = None
        for (_, mirrored), predictions in zip(views, passes, strict=True):
            prediction = next(predictions)
            prediction = prediction.flip(-1) if mirrored else prediction
            total = prediction if total is None else total.add_(prediction)
        yield total if len(views) == 1 else total.div_(len(views))


def _whole(net, images, scale, sizes, config):
    logits = _logits(net, images, scale)
    for i, size in enumerate(sizes):
        yield _softmax(logits[i : i + 1], size, net)[0]


def _slide(net, images, scale, sizes, config):
    images = _resize(images, [nearest_multiple(side * scale, 1) for side in images.shape[-2:]], net.align_corners)
    side = config.evaluation.window or config.data.crop
    stride = config.evaluation.stride or max(1, side * 2 // 3)
    height, width = images.shape[-2:]
    window = (min(side, height), min(side, width))
    places = [
        (slice(top, top + window[0]), slice(left, left + window[1]))
        for top in _starts(height, side, stride)
        for left in _starts(width, side, stride)
    ]
    count = torch.zeros(height, width, device=images.device)
    for rows, columns in places:
        count[rows, columns] += 1
    batch = config.evaluation.batch
    for image, size in zip(images, sizes, strict=True):
        total = None
        for first in range(0, len(places), batch):
            some = places[first : first + batch]
            logits = _logits(net, torch.stack([image[:, rows, columns] for rows, columns in some]))
            parts = _softmax(logits, window, net)
            total = parts.new_zeros(parts.shape[1], height, width) if total is None else total
            for (rows, columns), part in zip(some, parts, strict=True):
                total[:, rows, columns] += part
        yield _resize(total.div_(count)[None], size, net.align_corners)[0]


def _starts(length, window, stride):
    """The first pixels of the windows along a side: every `stride` pixels; the last window ends at the edge."""
    return [*range(0, length - window, stride), max(0, length - window)]


def _logits(net, images, scale=1.0):
    """Logits, at the stride of the network, for uint8 or float images, which are resized to a size that the network
    supports."""
    size = net.accepted_size(*(side * scale for side in images.shape[-2:]))
    return net(net.normalise(_resize(images, size, net.align_corners)))


def full_logits(net: Segmenter, images: Tensor) -> Tensor:
    """(B, C, H, W) uint8 or float images -> logits (B, K, H, W) float32, those that `probabilities` normalises."""
    return _upsample(_logits(net, images), images.shape[-2:], net)


def _softmax(logits, size, net):
    return _upsample(logits, size, net).softmax(1)


def _upsample(logits, size, net):
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=net.align_corners)


def _resize(images, size, align_corners):
    """Resize (n, C, h, w) to `size`: unchanged if they have that size, else float32."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images.float(), tuple(size), mode="bilinear", align_corners=align_corners)
