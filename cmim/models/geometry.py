"""Strides of a network, known before it is built."""

import difflib
from functools import lru_cache
from typing import NamedTuple

from cmim.errors import UserError


class Geometry(NamedTuple):
    feature_stride: float  # pixels per side of a cell of the decoder's feature map
    encoder_stride: int  # the same of the encoder's deepest map
    multiple: int  # sides of images are multiples of it


@lru_cache
def geometry(settings):
    """The `Geometry` of a `ModelSettings`; a network that has to be asked is laid out without memory or weights.

    Raises:
        UserError: `arch` is unknown; the `encoder` of dpt is, or is no plain vision transformer; smp is missing or
            cannot build the pair.
    """
    if settings.arch == "deeplabv3plus":
        return Geometry(4, settings.output_stride, 1)
    if settings.arch == "dpt":
        from cmim.models.dpt import patch_size  # here, as below: reading settings needs neither timm nor smp

        patch = patch_size(settings.encoder)
        return Geometry(patch // 8 if patch % 8 == 0 else patch / 8, patch, patch)
    if settings.arch.startswith("smp:"):
        from cmim.models.zoo import measure

        return measure(settings.arch).geometry
    nearest = difflib.get_close_matches(settings.arch, ("deeplabv3plus", "dpt"), 1)
    hint = f"did you mean {nearest[0]}?" if nearest else "expected deeplabv3plus, dpt or smp:ARCH/ENCODER"
    raise UserError(f"model.arch: unknown architecture {settings.arch}; {hint}")
