"""A network with all that is around it, as one module: from an image as it is stored to logits at its resolution."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, padding
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cmim.models.segmenter import Segmenter


class WholeSegmenter(nn.Module):
    """What `torch.export` makes a program of; it computes what `cmim.engine.inference` does with whole images.

    Args:
        net: the network; a copy of it in eval mode is used.
        argmax: return the classes instead of the logits.
    """

    def __init__(self, net: Segmenter, argmax: bool = False):
        super().__init__()
        self.net, self.argmax = _with_fixed_padding(net).eval().requires_grad_(False), argmax

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) float32, values from 0 to 255, of any size -> logits (B, K, H, W) float32, or classes
        (B, H, W) uint8."""
        net, size = self.net, images.shape[-2:]
        if net.size_multiple > 1:
            # As `Segmenter.accepted_size`, in integers, which a program with sizes that are not known has.
            m = net.size_multiple
            inner = [torch.sym_max(1, (2 * side + m) // (2 * m)) * m for side in size]
            images = F.interpolate(images, inner, mode="bilinear", align_corners=net.align_corners)
        logits = F.interpolate(net(net.normalise(images)), size, mode="bilinear", align_corners=net.align_corners)
        return logits.argmax(1).to(torch.uint8) if self.argmax else logits


def trace(whole: WholeSegmenter, example: Tensor, free: tuple[int, ...]) -> ExportedProgram:
    """The program of a `WholeSegmenter`, without places in source files; the dimensions `free` of its images may have any
    size. Networks refuse free sizes by exceptions of many types."""
    with _integer_padding(), torch.no_grad():
        program = torch.export.export(whole, (example,), dynamic_shapes={"images": dict.fromkeys(free, Dim.DYNAMIC)})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


@contextmanager
def _integer_padding() -> Iterator[None]:
    """Inside the `with` block, timm computes the padding of TensorFlow in integers; a program has no `math.ceil`."""
    before = padding.get_same_padding
    padding.get_same_padding = lambda x, kernel, stride, dilation: max(
        (-x) % stride + (kernel - 1) * dilation + 1 - stride, 0
    )
    try:
        yield
    finally:
        padding.get_same_padding = before


def _with_fixed_padding(net: Segmenter) -> Segmenter:
    """A copy in the contiguous memory layout, in which convolutions that pad by the size of their input (those of
    TensorFlow) pad by a constant."""
    net = deepcopy(net).to(memory_format=torch.contiguous_format)
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Conv2dSame) and _FromTheEnd.can_replace(layer):
                setattr(parent, name, _FromTheEnd(layer))
    return net


class _FromTheEnd(nn.Module):
    """A strided convolution with TensorFlow's padding, whose last window ends at a fixed distance behind the image, while
    the start of the first depends on the size. Computed on the mirrored image with the mirrored kernel, it pads equally on
    all sides. (Padding by the size makes expressions of the size that grow with each layer: `torch.export` then takes
    minutes.)"""

    def __init__(self, layer: Conv2dSame):
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().flip(-2, -1))
        self.bias, self.groups, self.dilation = layer.bias, layer.groups, layer.dilation
        self.stride, self.padding = layer.stride, [_reach(layer, i) // 2 for i in (0, 1)]

    @staticmethod
    def can_replace(layer: Conv2dSame) -> bool:
        """Whether the padding behind the image does not depend on its size: with stride 2 and a kernel that has a
        centre."""
        return layer.stride == (2, 2) and all(_reach(layer, i) % 2 == 0 for i in (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x.flip(-2, -1), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return x.flip(-2, -1)


def _reach(layer, i):
    """Distance of the first and the last pixel that a kernel sees."""
    return (layer.kernel_size[i] - 1) * layer.dilation[i]
