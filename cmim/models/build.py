"""Builds a network from its settings. `ARCHITECTURES` has the module of each architecture, with the functions

    geometry(settings) -> Geometry                           from a `ModelSettings`, without building the network
    build(settings, num_classes, mean, std) -> Segmenter

The module is imported when a run uses it, so that libraries of other architectures need not be installed.
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
    """The strides of a network. If necessary, the network is built on the meta device, without memory or weights.

    Raises:
        UserError: `arch` is unknown; the `encoder` of dpt is unknown or not a plain vision transformer; smp is not installed
            or cannot build the network.
    """
    return _module(settings.arch).geometry(settings)


def build_segmenter(settings: ModelSettings, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Segmenter:
    """The network of a `ModelSettings`, for images with the channels of `mean` and `std`.

    Raises:
        UserError: the architecture or the encoder is unknown; the encoder does not have the feature maps that the
            architecture needs; its weights are missing or do not fit.
    """
    net = _module(settings.arch).build(settings, num_classes, mean, std)
    if settings.freeze_encoder:
        net.freeze_encoder()
    return net


def normalisation(settings: ModelSettings, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of each channel in [0, 1] that the pretrained weights of an encoder expect; None for
    random weights, and if these values are not known.

    Raises:
        UserError: the encoder is unknown, or these values have to be downloaded and cannot be.
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
    """Side length in pixels of a token and of the patch that is reconstructed from it."""
    return _stride(config, config.reconstruction.tokens)


def centroid_stride(config: Config) -> float:
    """Side length in pixels of a token of the map whose centroids are compared."""
    return _stride(config, config.centroid_features)


def _stride(config, name):
    form = geometry(config.model)
    return {"decoder": form.feature_stride, "encoder": form.encoder_stride, "pixel": form.fine_stride}[name]


def check_sizes(config: Config) -> None:
    """Raise a UserError if the network does not support the crop size, or if mask blocks are not whole tokens."""
    form, crop = geometry(config.model), config.data.crop
    if crop % form.multiple:
        raise UserError(
            f"data.crop is {crop}, but model.arch {config.model.arch} takes multiples of {form.multiple}; try "
            f"{max(form.multiple, crop // form.multiple * form.multiple)}"
        )
    if not config.preset.masked:
        return
    strides = {"reconstruction.tokens": token_stride(config)}
    if "feat" in config.preset.masked:
        strides["centroids.features"] = centroid_stride(config)
    for key, stride in strides.items():
        if stride != int(stride):
            raise UserError(
                f"{key} is decoder, but its stride is {stride:g} pixels, not a whole number; use --{key} encoder"
            )
        if config.mask.block % stride:
            raise UserError(f"mask.block is {config.mask.block}, which is not a multiple of the token stride {stride}")
    small, large = sorted(strides.values()) if len(strides) > 1 else (1, 1)
    if large % small:
        raise UserError(f"centroids.features has tokens of {large} pixels, no multiple of {small} of reconstruction.tokens")


def _module(arch: str) -> ModuleType:
    name, colon, _ = arch.partition(":")
    if name in ARCHITECTURES and bool(colon) == (name == "smp"):
        return import_module(ARCHITECTURES[name])
    names = [name for name in ARCHITECTURES if name != "smp"]
    nearest = difflib.get_close_matches(arch, names, 1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"expected {', '.join(names)} or smp:ARCH/ENCODER"
    raise UserError(f"model.arch: unknown architecture {arch}; {hint}")
