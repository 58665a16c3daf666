"""Networks of segmentation_models_pytorch (smp), as `smp:ARCH/ENCODER`.

smp's list of encoder maps begins with the image itself, followed by an empty map if the encoder has none at stride 2.
Neither is a feature, so `encode` leaves them out; smp's decoders use only their sizes, so `decode` replaces them by zeros.
Dropout in some of smp's decoders uses PyTorch's default generator.
"""

import difflib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmim.errors import UserError
from cmim.models.geometry import Geometry
from cmim.models.segmenter import Segmenter
from cmim.models.weights import (
    brief,
    check_name,
    fetch,
    load_timm_file,
    load_weights,
    package_weights,
    read_weights,
    timm_names,
    timm_normalisation,
)
from cmim.settings import NAMED_WEIGHTS, ModelSettings


class EncoderMap(NamedTuple):
    channels: int
    stride: int
    learned: bool  # not the image, and not empty


class Layout(NamedTuple):
    geometry: Geometry
    maps: tuple[EncoderMap, ...]  # smp's list
    feature_channels: int
    unused: frozenset[str]  # parameters that no gradient reaches

    @property
    def learned(self) -> list[EncoderMap]:
        """The maps that `SmpSegmenter.encode` returns."""
        return [m for m in self.maps if m.learned]

    @property
    def fine_map(self) -> int:
        """The index of the shallowest of them from stride 4 on."""
        return _fine_map(self.learned)


class SmpSegmenter(Segmenter):
    """A `Segmenter` around the encoder, the decoder and the head's convolution of a network of smp.

    Args:
        model: a network from smp.create_model.
        layout: its `Layout`.
        mean, std: of each channel of the images, of values in [0, 1].
    """

    def __init__(self, model: nn.Module, layout: Layout, *, mean: Sequence[float], std: Sequence[float]):
        convolution, upsampling, _ = model.segmentation_head
        super().__init__(
            model.encoder,
            model.decoder,
            convolution.out_channels,
            head=convolution,
            mean=mean,
            std=std,
            geometry=layout.geometry,
            feature_channels=layout.feature_channels,
            encoder_channels=layout.maps[-1].channels,
            fine_map=layout.fine_map,
            fine_channels=layout.learned[layout.fine_map].channels,
        )
        self.maps = layout.maps
        self.align_corners = getattr(
            upsampling, "align_corners", True
        )  # where the head does not upsample, it makes no difference

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = super().encode(images)
        return tuple(m for m, form in zip(maps, self.maps, strict=True) if form.learned)

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        learned, zero = iter(maps), maps[0].new_zeros(())
        stride = next(form.stride for form in self.maps if form.learned)
        height, width = (side * stride for side in maps[0].shape[-2:])

        def stand_in(form: EncoderMap) -> Tensor:
            return zero.expand(maps[0].shape[0], form.channels, height // form.stride, width // form.stride)

        return self.decoder([next(learned) if form.learned else stand_in(form) for form in self.maps])


def geometry(settings: ModelSettings) -> Geometry:
    """Raises UserError: see `measure`."""
    return measure(settings.arch).geometry


def build(settings: ModelSettings, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Segmenter:
    """The `SmpSegmenter` of a `ModelSettings` whose arch is smp:ARCH/ENCODER."""
    layout = measure(settings.arch)
    _, encoder = _parse(settings.arch)
    options = dict(in_channels=len(mean), classes=num_classes)
    if settings.weights == "timm":
        # For a timm model, any value but None makes smp download the weights that belong to its name.
        weights = True if encoder.startswith("tu-") else "imagenet"
        model = fetch(encoder, lambda: _create(settings.arch, weights, **options))
    else:
        model = _create(settings.arch, None, **options)
    if settings.weights == "package":
        found = package_weights(encoder.removeprefix("tu-"))
        load_weights(model.encoder.model, *found)
    elif settings.weights not in NAMED_WEIGHTS:
        path = Path(settings.weights)
        if encoder.startswith("tu-"):
            load_timm_file(model.encoder.model, encoder.removeprefix("tu-"), path)
        else:
            load_weights(model.encoder, read_weights(path), encoder, path)
    if encoder.startswith("tu-"):
        _refuse_tables(model, settings.arch, layout.geometry.multiple, len(mean))
    for name, parameter in model.named_parameters():
        if name in layout.unused:
            parameter.requires_grad_(False)
    return SmpSegmenter(model, layout, mean=mean, std=std)


def normalisation(settings: ModelSettings) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation that the weights of the encoder were trained with, in the form of `timm_normalisation`;
    None if smp does not give them, or not for red, green and blue in [0, 1].

    Raises:
        UserError: smp has to download them and cannot.
    """
    _, encoder = _parse(settings.arch)
    if encoder.startswith("tu-"):
        return timm_normalisation(encoder.removeprefix("tu-"))
    if settings.weights != "timm":
        return None
    given = fetch(encoder, lambda: _library().encoders.get_preprocessing_params(encoder))
    mean, std = given.get("mean"), given.get("std")
    if not mean or not std or given.get("input_space") != "RGB" or list(given.get("input_range") or [0, 1]) != [0, 1]:
        return None
    return tuple(map(float, mean)), tuple(map(float, std))


@torch.no_grad()
def _refuse_tables(model: nn.Module, arch: str, multiple: int, channels: int) -> None:
    """Raise a UserError if an encoder looks up positions in a table for one image size. It then fails on an image of at
    least 288 pixels; meta tensors cannot show this."""
    side = -(-288 // multiple) * multiple
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()(torch.zeros(1, channels, side, side))
    except Exception as error:  # of many types, as networks word it
        raise UserError(
            f"model.arch: {arch} takes no images of {side} pixels ({brief(error)}); choose another encoder"
        ) from error
    finally:
        for module, training in modes:
            module.training = training


@lru_cache
def measure(arch: str) -> Layout:
    """The `Layout` of smp:ARCH/ENCODER, from a forward and a backward pass, on the meta device if possible.

    Raises:
        UserError: smp is not installed, has no such architecture or encoder, or cannot build the network.
    """
    _parse(arch)
    with torch.random.fork_rng(devices=[]):
        try:
            return _measure(arch, "meta")
        except Exception:  # the network needs values, or smp cannot build it: try the CPU to find out
            pass
        try:
            return _measure(arch, "cpu")
        except Exception as error:  # constructors raise exceptions of many types
            raise UserError(
                f"model.arch: segmentation_models_pytorch cannot build {arch} ({brief(error)}); choose another encoder"
            ) from error


def _measure(arch: str, device: str) -> Layout:
    with torch.device(device):
        model = _create(arch, None, in_channels=3, classes=2).eval()
        multiple = _size_multiple(model)
        side = 8 * multiple  # large enough for decoders that pool the deepest map
        images = torch.zeros(1, 3, side, side)
        features = model.encoder(images)
        maps = [EncoderMap(m.shape[1], side // m.shape[-1], m is not images and m.shape[1] > 0) for m in features]
        feature = model.decoder(features)
        model.segmentation_head[0](feature).sum().backward()
    unused = frozenset(name for name, parameter in model.named_parameters() if parameter.grad is None)
    learned = [m for m in maps if m.learned]
    strides = Geometry(side // feature.shape[-1], maps[-1].stride, multiple, learned[_fine_map(learned)].stride)
    return Layout(strides, tuple(maps), feature.shape[1], unused)


def _fine_map(learned: Sequence[EncoderMap]) -> int:
    return next((i for i, m in enumerate(learned) if m.stride >= 4), len(learned) - 1)


@torch.no_grad()
def _size_multiple(model: nn.Module) -> int:
    """The number that sides of images must be multiples of: the stride of the encoder, or a multiple of it for encoders that
    divide their maps into windows. A number is accepted if square and non-square images with 8 and 9 times this side
    work."""
    stride, error = model.encoder.output_stride, None
    for multiple in (stride, 2 * stride, 4 * stride, 8 * stride):
        try:
            for height, width in ((9, 9), (8, 9), (9, 8)):
                model.decoder(model.encoder(torch.zeros(1, 3, height * multiple, width * multiple)))
        except Exception as found:  # of many types, as networks word it
            error = error or found
        else:
            return multiple
    raise ValueError(f"it takes no images of other sizes: {brief(error)}")


def _create(arch: str, weights: str | bool | None, **options) -> nn.Module:
    name, encoder = _parse(arch)
    if encoder.startswith(("tu-swin_", "tu-swinv2_")):
        options["strict_img_size"] = False  # otherwise timm's Swin accepts a single image size
    return _library().create_model(name, encoder, encoder_weights=weights, **options)


def _parse(arch: str) -> tuple[str, str]:
    """("upernet", "tu-convnext_tiny") of "smp:upernet/tu-convnext_tiny", both known to smp."""
    smp = _library()
    name, slash, encoder = arch.removeprefix("smp:").partition("/")
    if not (name and slash and encoder):
        raise UserError(f"model.arch: {arch} is not of the form smp:ARCH/ENCODER, such as smp:upernet/tu-convnext_tiny")
    if name == "dpt":
        raise UserError(
            f"model.arch: for {arch} give --model.arch dpt --model.encoder {encoder.removeprefix('tu-')}, which takes "
            "patches of 14 and of 16 pixels"
        )
    architectures = [a for a in smp.MODEL_ARCHITECTURES_MAPPING if a != "dpt"]
    if name not in architectures:
        nearest = difflib.get_close_matches(name, architectures, 1)
        hint = f"did you mean smp:{nearest[0]}/{encoder}?" if nearest else f"it has {', '.join(architectures)}"
        raise UserError(f"model.arch: segmentation_models_pytorch has no {name}; {hint}")
    if encoder.startswith("tu-"):
        check_name(encoder.removeprefix("tu-"), "model.arch")
        return name, encoder
    encoders = smp.encoders.get_encoder_names()
    if encoder not in encoders:
        nearest = [f"tu-{encoder}"] if encoder in timm_names(encoder) else difflib.get_close_matches(encoder, encoders, 1)
        hint = f"did you mean smp:{name}/{nearest[0]}?" if nearest else "models of timm are written tu-NAME"
        raise UserError(f"model.arch: segmentation_models_pytorch has no encoder {encoder}; {hint}")
    return name, encoder


def _library() -> ModuleType:
    try:
        import segmentation_models_pytorch
    except ImportError as error:
        raise UserError(
            f"model.arch: smp: needs segmentation_models_pytorch ({brief(error)}); pip install segmentation-models-pytorch"
        ) from error
    return segmentation_models_pytorch
