"""Encoders of timm and where their weights come from."""

import difflib
import logging
import re
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

from cmim.errors import UserError


def create_encoder(name, weights, *, strides):
    """A timm encoder that returns one map at each of `strides`.

    Args:
        name: timm model, with or without the tag of its weights: `resnet101s`, `resnet101s.gluon_in1k`.
        weights: `timm` (fetched, or from timm's cache), `none` (random) or a file: .safetensors, or .pt or .pth
            that holds a state dict in timm's names, with or without the layers of its classifier.
        strides: pixels per side of a cell of the returned maps, ascending; the last is the output stride.

    Raises:
        UserError: the model is unknown or has no such maps, or the weights cannot be fetched or do not fit.
    """
    if name not in _names(name):
        nearest = difflib.get_close_matches(name, _names(name), 1)
        raise UserError(f"model.encoder: timm has no model {name}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    options = dict(features_only=True, output_stride=strides[-1])
    options["out_indices"] = _map_indices(name, strides, options)
    if weights == "timm":
        hub = logging.getLogger("huggingface_hub")
        level = hub.level
        hub.setLevel(logging.ERROR)  # it warns of every retry
        try:
            return timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # the network, the hub, a proxy, a full disk: each raises its own kind
            raise UserError(
                f"model.weights: timm could not fetch the weights of {name} ({_brief(error)}); give a file as "
                "--model.weights PATH, or start from random weights with --model.weights none"
            ) from error
        finally:
            hub.setLevel(level)
    encoder = timm.create_model(name, pretrained=False, **options)
    if weights != "none":
        _load_file(encoder, name, Path(weights))
    return encoder


def _names(name):
    return timm.list_pretrained() if "." in name else timm.list_models()


def _map_indices(name, strides, options):
    """Which of timm's feature maps has which stride: the last one where there are several."""
    try:
        with torch.device("meta"):  # the layout is asked for, so no memory and no initialisation
            reductions = timm.create_model(name, pretrained=False, **options).feature_info.reduction()
    except Exception as error:  # a model without this option raises whatever its constructor raises
        raise UserError(
            f"model.encoder: {name} cannot return feature maps at output stride {strides[-1]} ({_brief(error)}); "
            "choose a ResNet, ConvNeXt or EfficientNet, for example"
        ) from error
    for stride in strides:
        if stride not in reductions:
            raise UserError(
                f"model.encoder: {name} has no feature map at stride {stride}, only at {sorted(set(reductions))}"
            )
    return tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in strides)


def _load_file(encoder, name, path):
    """Load a file into the encoder; every weight of the encoder must be there, and nothing that the model lacks."""
    given = {_model_key(key): value for key, value in _read(path).items()}
    wanted = {_model_key(key): (key, value) for key, value in encoder.state_dict().items()}
    with torch.device("meta"):
        whole = timm.create_model(name, pretrained=False)
    # The encoder ends at its last map; a file may hold the rest, above all a classifier, whose size is anyone's.
    known = {_model_key(key) for key in whole.state_dict()}
    problems = {
        # Files older than PyTorch 0.4.1 do not count batches; nothing here reads the count.
        "lacks": [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")],
        "has unknown": [k for k in given if k not in known],
        "has other shapes of": [k for k in wanted if k in given and given[k].shape != wanted[k][1].shape],
    }
    problems = {what: keys for what, keys in problems.items() if keys}
    if problems:
        details = "; ".join(f"{what} {', '.join(keys[:3])} ({len(keys)} in all)" for what, keys in problems.items())
        raise UserError(f"model.weights: {path} does not fit {name}: it {details}")
    encoder.load_state_dict({key: given.get(full, value) for full, (key, value) in wanted.items()})


def _read(path):
    if not path.is_file():
        raise UserError(f"model.weights: there is no file {path}; give timm, none, or a .pt, .pth or .safetensors file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and unzipping garbage raises many kinds
        raise UserError(f"model.weights: cannot read {path} ({_brief(error)}); expected a state dict") from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"model.weights: {path} is not a state dict (names and tensors)")
    return state


def _model_key(key):
    """A key of the whole model: timm's feature nets flatten `stages.0.conv` to `stages_0.conv`."""
    return re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", key)


def _brief(error):
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]
