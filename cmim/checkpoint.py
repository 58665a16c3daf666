"""Checkpoints: writing them atomically, reading them with weights_only, choosing student or teacher weights, warm starts."""

import os
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from cmim.errors import UserError


def save(state: dict[str, Any], path: str | Path) -> None:
    """Write a dict of tensors and plain values atomically, so that `path` always holds a complete checkpoint."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as raw:
            file = _Writer(raw, path)
            try:
                torch.save(state, file)
            except RuntimeError as error:  # PyTorch's message does not say, for example, that the disk is full
                raise file.error or error from None
            file.flush()
            os.fsync(raw.fileno())
        os.replace(partial, path)
    except BaseException as error:  # do not leave a partial file behind
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.filename is None:  # raised when the file was closed
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


class _Writer:
    """A file that keeps the error with which writing failed."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path, self.error = file, path, None

    def write(self, data: bytes) -> int:
        return self._try(self.file.write, data)

    def flush(self) -> None:
        self._try(self.file.flush)

    def _try(self, method, *arguments):
        try:
            return method(*arguments)
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, str(self.path))
            raise self.error from None


def _refuse_other_bits(path):
    """Verify the checksums, which PyTorch writes but does not verify."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile


def load(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint, without running any code in it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns about other files; the error below reports them
            _refuse_other_bits(path)
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}; train first, or give another run folder") from None
    except Exception as error:  # a damaged file raises exceptions of many types
        remedy = "put an earlier copy of it there, or start again with another --output"
        best = Path(path).with_name("best.pt")
        if Path(path).name == "last.pt" and best.exists():
            remedy += f"; {best} still has weights: --checkpoint best, or --model.init_from for a new run"
        raise UserError(
            f"{path} is not a readable checkpoint ({type(error).__name__}); it may be damaged: {remedy}"
        ) from None
    if not isinstance(state, dict) or "class_names" not in state:
        raise UserError(f"{path} is not a checkpoint of cmim.train; give another run folder")
    return state


def load_into(module: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a state dict into a module; a UserError if it belongs to another model or is not finite."""
    ours = module.state_dict()
    missing, unexpected = ours.keys() - state.keys(), state.keys() - ours.keys()
    other_shape = [k for k in ours.keys() & state.keys() if ours[k].shape != state[k].shape]
    if missing or unexpected or other_shape:
        key = sorted([*missing, *unexpected, *other_shape])[0]
        raise UserError(
            f"{path} belongs to another model: {len(missing)} tensors missing, {len(unexpected)} unknown, "
            f"{len(other_shape)} of another shape, first {key}; use the config it was trained with"
        )
    broken = [k for k, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(
            f"{path} holds weights that are not finite, {len(broken)} tensors, first {broken[0]}; use another checkpoint"
        )
    module.load_state_dict(state)


def network_weights(
    state: dict[str, Any], path: str | Path, wanted: Literal["teacher", "student"] | None = None
) -> dict[str, Tensor]:
    """The network's weights in a checkpoint, by name.

    `best.pt` holds only the weights that were evaluated; `last.pt` holds the student's and, with an EMA teacher, the
    teacher's.

    Args:
        state: the checkpoint.
        path: its file, for error messages.
        wanted: which weights; by default those that the run evaluated. Older checkpoints do not say which these are: then
            the teacher's, if there is a teacher.

    Raises:
        UserError: the checkpoint holds only the other weights.
    """
    evaluated = state.get("evaluated")
    if "net" in state:
        if wanted is not None and evaluated is not None and wanted != evaluated:
            raise UserError(
                f"{path} holds the {evaluated}'s weights only; use --checkpoint last, or leave out evaluation.weights"
            )
        return dict(state["net"])
    objective = state.get("objective", {})
    if wanted is None:
        wanted = evaluated or ("teacher" if any(name.startswith("teacher.") for name in objective) else "student")
    prefix = "teacher." if wanted == "teacher" else "net."
    return {name.removeprefix(prefix): value for name, value in objective.items() if name.startswith(prefix)}


def warm_start(net: nn.Module, path: str | Path) -> str | None:
    """Load the evaluated weights of a checkpoint, or of the last checkpoint in a run folder, into a network with a `head`.

    Returns:
        None, or a line that says that the head was not loaded because the number of classes differs.

    Raises:
        UserError: there is no such checkpoint, or it belongs to another network.
    """
    if Path(path).is_dir():
        path = Path(path) / "checkpoints" / "last.pt"
    try:
        state = load(path)
        weights = network_weights(state, path)
        classes, wanted = len(state["class_names"]), net.head.out_channels
        if classes != wanted:
            weights |= {f"head.{name}": value for name, value in net.head.state_dict().items()}
        load_into(net, weights, path)
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None
    return f"{path} has {classes} classes, the data {wanted}: the head starts anew" if classes != wanted else None
