"""From settings to a network. `ARCHITECTURES` names the module of each architecture, which offers

    geometry(settings) -> Geometry                           from a `ModelSettings`, without building the network
    build(settings, num_classes, mean, std) -> Segmenter

and is imported when a run asks for it, so that a library that only one architecture needs may be missing.
"""

import difflib
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from types import ModuleType

from cmim.errors import UserError
from cmim.models.geometry import Geometry
from cmim.models.segmenter import Segmenter
from cmim.models.weights import check_name, timm_normalisation
from cmim.settings import Config, ModelSettings

ARCHITECTURES = {
    "deeplabv3plus": "cmim.models.deeplabv3plus",
    "dpt": "cmim.models.dpt",
    "smp": "cmim.models.smp",  # as smp:ARCH/ENCODER
}


@lru_cache
def geometry(settings: ModelSettings) -> Geometry:
    """The strides of a network; one that has to be asked is laid out without memory or weights.

    Raises:
        UserError: `arch` is unknown; the `encoder` of dpt is, or is no plain vision transformer; smp is missing or
            cannot build the pair.
    """
    return _module(settings.arch).geometry(settings)


def build_segmenter(settings: ModelSettings, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Segmenter:
    """The network of a `ModelSettings`, for images with the channels of `mean` and `std`.

    Raises:
        UserError: the architecture or the encoder is unknown; the encoder has not the maps that the architecture
            needs; its weights are missing or do not fit.
    """
    net = _module(settings.arch).build(settings, num_classes, mean, std)
    if settings.freeze_encoder:
        net.freeze_encoder()
    return net


def normalisation(settings: ModelSettings, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of each channel in [0, 1] that the pretrained weights of an encoder expect; None for
    random weights, and where nothing is known of them.

    Raises:
        UserError: the encoder is unknown, or what its weights expect has to be fetched and cannot.
    """
    if settings.weights == "none":
        return None
    if settings.arch.startswith("smp:"):
        found = _module(settings.arch).normalisation(settings)
    else:
        check_name(settings.encoder)
        found = timm_normalisation(settings.encoder)
    if found is None or channels == 3:
        return found
    mean, std = ((sum(values) / 3,) * channels for values in found)
    return mean, std


def token_stride(config: Config) -> float:
    """Pixels per side of a token, which is also the patch that is reconstructed from it."""
    form = geometry(config.model)
    return form.feature_stride if config.reconstruction.tokens == "decoder" else form.encoder_stride


def check_sizes(config: Config) -> None:
    """Raise a UserError where the network cannot take the crops, or has tokens that do not fill the mask blocks."""
    form, crop = geometry(config.model), config.data.crop
    if crop % form.multiple:
        raise UserError(
            f"data.crop is {crop}, but model.arch {config.model.arch} takes multiples of {form.multiple}; try "
            f"{max(form.multiple, crop // form.multiple * form.multiple)}"
        )
    if not config.preset.masked:
        return
    stride = token_stride(config)
    if stride != int(stride):
        raise UserError(
            f"reconstruction.tokens is decoder, but cells of that map are {stride:g} pixels wide, no whole number; "
            "use --reconstruction.tokens encoder"
        )
    if config.mask.block % stride:
        raise UserError(f"mask.block is {config.mask.block}, which is not a multiple of the token stride {stride}")


def _module(arch: str) -> ModuleType:
    name, colon, _ = arch.partition(":")
    if name in ARCHITECTURES and bool(colon) == (name == "smp"):
        return import_module(ARCHITECTURES[name])
    names = [name for name in ARCHITECTURES if name != "smp"]
    nearest = difflib.get_close_matches(arch, names, 1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"expected {', '.join(names)} or smp:ARCH/ENCODER"
    raise UserError(f"model.arch: unknown architecture {arch}; {hint}")
