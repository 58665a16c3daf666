"""Checkpoints: written atomically, read with weights_only."""

import os
import warnings
from pathlib import Path

import torch

from cmim.errors import UserError


def save(state, path):
    """Write a dict of tensors and plain values so that `path` always holds a whole checkpoint."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path, device="cpu"):
    """Read a checkpoint; nothing in it can run code."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of foreign files; the error below says it
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}; train first, or give another run folder") from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}); it may be damaged") from None
    if not isinstance(state, dict) or "class_names" not in state:
        raise UserError(f"{path} is not a checkpoint of cmim.train; give another run folder")
    return state


def load_into(module, state, path):
    """Load a state dict into a module; a checkpoint of another model is a user's mistake."""
    ours = module.state_dict()
    missing, unexpected = ours.keys() - state.keys(), state.keys() - ours.keys()
    other_shape = [k for k in ours.keys() & state.keys() if ours[k].shape != state[k].shape]
    if missing or unexpected or other_shape:
        key = sorted([*missing, *unexpected, *other_shape])[0]
        raise UserError(
            f"{path} belongs to another model: {len(missing)} tensors missing, {len(unexpected)} unknown, "
            f"{len(other_shape)} of another shape, first {key}; use the config it was trained with"
        )
    module.load_state_dict(state)
