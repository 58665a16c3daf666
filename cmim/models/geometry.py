"""The strides of a network, which are known before it is built."""

from typing import NamedTuple


class Geometry(NamedTuple):
    feature_stride: float  # stride of the decoder's feature map in pixels
    encoder_stride: int  # stride of the encoder's deepest map
    multiple: int  # sides of images must be multiples of this
    fine_stride: int  # stride of the encoder's shallowest map from stride 4 on, which may be the deepest one


def nearest_multiple(side: float, multiple: int) -> int:
    """The multiple nearest to a side, but at least one times `multiple`."""
    return max(1, int(side / multiple + 0.5)) * multiple
