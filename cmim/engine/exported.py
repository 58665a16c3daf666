"""Exported files: the description inside each of them, and a network made of one for `evaluate` and `predict`.

The description is the JSON document that `cmim.engine.export.describe` makes; ONNX files hold it in their metadata under the
key `cmim`, safetensors files likewise, .pt2 files as the extra file `cmim.json`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cmim import checkpoint
from cmim.config import overridden, override
from cmim.engine.device import choose_device
from cmim.engine.program_file import read_extra, read_program
from cmim.engine.run import with_data
from cmim.engine.trained import Trained, load_trained
from cmim.errors import UserError
from cmim.models.build import build_segmenter
from cmim.models.geometry import nearest_multiple
from cmim.settings import Config

SUFFIXES = (".safetensors", ".pt2", ".onnx")
KEY = "cmim"
EXTRA = "cmim.json"
INSTALL = "pip install 'cmim[export]'"

_FREE = ("data.", "evaluation.", "train.device", "method.tau")
_FREE_OF_WEIGHTS = (*_FREE, "train.precision", "train.channels_last")
"""Prefixes of the settings that may be overridden; a program computes in float32 whatever the precision."""


class Program:
    """An exported program in the place of a `Segmenter`: `inference` calls it in the same way.

    Args:
        run: (B, C, H, W) float32, values from 0 to 255 -> logits (B, K, H, W).
        about: the description of the file.
    """

    size_multiple = 1

    def __init__(self, run: Callable[[Tensor], Tensor], about: dict[str, Any]):
        self.run, self.align_corners = run, bool(about["align_corners"])
        batch, _, *size = about["input"]["shape"]
        self.batch = batch if isinstance(batch, int) else None
        self.size = tuple(size) if all(isinstance(side, int) for side in size) else None

    def accepted_size(self, height: float, width: float) -> tuple[int, int]:
        return self.size or (nearest_multiple(height, 1), nearest_multiple(width, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """Only the dtype: the program normalises."""
        return images.float()

    def __call__(self, images: Tensor) -> Tensor:
        parts = images.split(self.batch or len(images))
        return torch.cat([self.run(part) for part in parts]) if len(parts) > 1 else self.run(images)

    def to(self, device: torch.device) -> "Program":
        return self  # it was made for the device of `train.device`

    def eval(self) -> "Program":
        return self


def is_exported(path: str | Path) -> bool:
    return Path(path).suffix in SUFFIXES and not Path(path).is_dir()


def load_model(
    source: str | Path, which: Literal["last", "best"] | None = None, overrides: Sequence[str] = (), data: bool = False
) -> Trained:
    """The network of a run folder, or of an exported file.

    Args:
        source: a run folder, or a .safetensors, .pt2 or .onnx file that `cmim.export` wrote.
        which: the checkpoint of a run, by default `last`; a file has no others.
        overrides: settings, as on a command line.
        data: whether the data of the settings are needed: a file does not say where they lie.

    Raises:
        UserError: there is no such run, checkpoint or file, it is not readable, or a setting has no effect on it.
    """
    if not is_exported(source):
        return load_trained(source, which or "last", overrides)
    path = Path(source)
    if which is not None:
        raise UserError(f"--checkpoint {which} is for a run folder; {path} holds one network: leave it out")
    if not path.is_file():
        raise UserError(f"there is no file {path}; python -m cmim.export RUN writes it")
    free = _FREE_OF_WEIGHTS if path.suffix == ".safetensors" else _FREE
    for key, _ in overridden(overrides):
        if not key.startswith(free) or key == "evaluation.weights":
            raise UserError(f"--{key} has no effect on {path}; leave it out")
    about = read_about(path)
    config = _config(about, path, overrides, data)
    colours = [list(bytes.fromhex(colour[1:])) for colour in about["colours"]]
    if path.suffix == ".safetensors":
        net = _weights(path, about, config)
    elif about["output"]["name"] != "logits":
        raise UserError(f"{path} gives classes alone (--argmax), without their scores; give the file exported without it")
    else:
        run = _onnx(path, config) if path.suffix == ".onnx" else _pt2(path, config)
        net = Program(run, about)
    return Trained(net, config, list(about["classes"]), colours, int(about["step"]))


def read_about(path: Path) -> dict[str, Any]:
    """The description in an exported file.

    Raises:
        UserError: `cmim.export` did not write it.
    """
    try:
        about = json.loads(_ABOUT[path.suffix](path))
        input_shape, names, colours = about["input"]["shape"], about["classes"], about["colours"]
        mean, std = about["mean"], about["std"]
        good = len(input_shape) == 4 and isinstance(about["config"], dict) and isinstance(about["step"], int)
        good &= isinstance(about["output"]["name"], str) and isinstance(about["align_corners"], bool)
        good &= all(isinstance(name, str) for name in names) and 0 < len(names) == len(colours)
        good &= all(len(bytes.fromhex(colour[1:])) == 3 for colour in colours)
        good &= len(mean) == len(std) == input_shape[1] and all(isinstance(v, int | float) for v in (*mean, *std))
    except UserError:
        raise
    except Exception:  # a damaged file raises exceptions of many types
        good = False
    if not good:
        raise UserError(f"{path} is not a file of cmim.export, or damaged; export the run again")
    return about


def _config(about: dict[str, Any], path: Path, overrides: Sequence[str], data: bool) -> Config:
    values = json.loads(json.dumps(about["config"]))
    section = values.setdefault("data", {})
    given = {key for key, _ in overridden(overrides)}
    stand_in = not data and section.get("format") != "shapes" and "data.root" not in given
    if stand_in:
        section["root"] = "."
    if path.suffix != ".safetensors":
        values.setdefault("train", {})["precision"] = "fp32"
    config = override(values, path, overrides)
    return with_data(config, root=None) if stand_in else config


def _weights(path, about, config):
    from safetensors.torch import load_file

    net = build_segmenter(config.model.untrained(), len(about["classes"]), about["mean"], about["std"])
    checkpoint.load_into(net, load_file(path), path)
    if config.train.channels_last:
        net.to(memory_format=torch.channels_last)
    return net


def open_session(path: Path, cuda: bool = False) -> Any:
    """The session of onnxruntime for a file.

    Raises:
        UserError: onnxruntime is not installed, or cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path}: onnxruntime is not installed; {INSTALL}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    wanted = ["CUDAExecutionProvider"] * cuda + ["CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # of many types of its own
        raise UserError(f"{path} cannot be read by onnxruntime ({type(error).__name__}); export the run again") from None


def _onnx(path, config):
    device = choose_device(config.train.device)
    session = open_session(path, device.type == "cuda")
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {name: images.float().cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)

    return run


def _pt2(path, config):
    return read_program(path, choose_device(config.train.device))


def _about_onnx(path):
    return open_session(path).get_modelmeta().custom_metadata_map[KEY]


def _about_safetensors(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()[KEY]


_ABOUT = {".onnx": _about_onnx, ".safetensors": _about_safetensors, ".pt2": lambda path: read_extra(path, EXTRA)}
