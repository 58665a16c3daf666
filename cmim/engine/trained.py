"""A trained run: its network, settings and classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from cmim import checkpoint
from cmim.config import load_config, overridden
from cmim.engine.run import Run
from cmim.errors import UserError
from cmim.models.build import build_segmenter, check_sizes
from cmim.models.segmenter import Segmenter
from cmim.settings import Config

_NOT_OF_TRAINING = ("data.", "evaluation.", "train.device", "train.precision", "train.channels_last", "method.tau")
"""Prefixes of the settings that may be overridden for a trained run."""


class Trained(NamedTuple):
    net: Segmenter
    config: Config
    class_names: list[str]
    colours: list[list[int]]
    step: int


def load_trained(folder: str | Path, which: Literal["last", "best"], overrides: Sequence[str] = ()) -> Trained:
    """Load the evaluated weights of a run: `last` or `best`.

    Raises:
        UserError: there is no such run or checkpoint, or it belongs to another model.
    """
    run = Run(folder)
    if not run.config.exists():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    for key, _ in overridden(overrides):
        if not key.startswith(_NOT_OF_TRAINING):
            raise UserError(f"--{key} has an effect only in training; leave it out")
    config = load_config(run.config, overrides)
    check_sizes(config)
    path = run.last if which == "last" else run.best
    state = checkpoint.load(path)
    lacking = [key for key in ("step", "colours") if key not in state]
    if lacking:
        raise UserError(f"{path} is not a complete checkpoint of cmim.train, it has no {lacking[0]}; use another checkpoint")
    state.setdefault("evaluated", load_config(run.config).evaluated_weights)  # older checkpoints do not say
    weights = checkpoint.network_weights(state, path, config.evaluated_weights)
    net = build_segmenter(config.model.untrained(), len(state["class_names"]), *config.data.normalisation())
    checkpoint.load_into(net, weights, path)
    if config.train.channels_last:  # as in training, because another memory layout may round differently
        net.to(memory_format=torch.channels_last)
    return Trained(net, config, state["class_names"], state["colours"], state["step"])
