"""Strides of a network, known before it is built."""

from typing import NamedTuple


class Geometry(NamedTuple):
    feature_stride: float  # pixels per side of a cell of the decoder's feature map
    encoder_stride: int  # the same of the encoder's deepest map
    multiple: int  # sides of images are multiples of it
