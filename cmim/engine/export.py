"""Files with a trained network that run without cmim: safetensors with JSON, `torch.export` (.pt2) and ONNX.

Each is written under another name, read again, compared with our own output on images of several sizes, and only then
takes its name.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from cmim.engine.exported import EXTRA, INSTALL, KEY, load_model, open_session
from cmim.engine.inference import full_logits
from cmim.engine.program_file import read_program
from cmim.engine.run import with_data
from cmim.engine.study import portable
from cmim.engine.trained import Trained
from cmim.errors import UserError
from cmim.models.segmenter import Segmenter
from cmim.models.whole import WholeSegmenter, trace
from cmim.settings import Config
from cmim_kernels import __version__

FORMATS = {"safetensors": ("safetensors",), "pt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
"""Format, which is also the suffix -> the modules that it needs."""
TOLERANCE = 1e-3
"""Largest difference of logits that is taken for rounding, relative to the largest logit or to 1."""
EQUAL = 0.999
"""Least share of pixels with the same class."""
FREE = ((0, 2, 3), (0,), ())
"""Dimensions of the images that may have any size; the next ones are tried where a network does not allow the first."""
SIDE = 192
"""Side of the images that are compared, or that of a smaller crop; at least three times the size multiple."""


class Written(NamedTuple):
    """An exported file and how it compares with our own output."""

    path: Path
    about: dict[str, Any]
    """The description in it."""
    difference: float
    """The largest of the logits; with argmax, by how much our own logits prefer another class."""
    equal: float
    """Share of the pixels that have the same class."""
    sizes: list[tuple[int, ...]]
    """(batch, height, width) of the images that were compared."""

    @property
    def shape(self) -> list[int | str]:
        """Of the images that it takes; a text where any number is allowed."""
        return self.about["input"]["shape"]


def require(formats: Sequence[str]) -> None:
    """Raise a UserError if a package that a format needs is not installed."""
    lacking = [module for name in formats for module in FORMATS[name] if find_spec(module) is None]
    if lacking:
        rest = [name for name in FORMATS if not any(module in lacking for module in FORMATS[name])]
        raise UserError(f"{', '.join(lacking)} not installed: {INSTALL}, or leave ONNX out: --formats {' '.join(rest)}")


def describe(trained: Trained, checkpoint: str, scores: Mapping[str, Any] | None) -> dict[str, Any]:
    """What every exported file says about its network, as a JSON document."""
    data, channels = trained.config.data, trained.config.data.channels
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    return {
        "cmim": __version__,
        "input": {
            "name": "images", "dtype": "float32", "shape": ["batch", channels, "height", "width"],
            "values": f"{kind}, 0 to 255; normalised inside",
        },
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", len(trained.class_names), "height", "width"]},
        "classes": list(trained.class_names),
        "colours": [f"#{bytes(colour).hex()}" for colour in trained.colours],
        "mean": trained.net.mean.flatten().tolist(),
        "std": trained.net.std.flatten().tolist(),
        "range": None if data.range is None else list(data.range),
        "size_multiple": trained.net.size_multiple,
        "align_corners": trained.net.align_corners,
        "checkpoint": checkpoint,
        "step": trained.step,
        "scores": scores,
        "config": _without_paths(trained.config).model_dump(mode="json"),
    }  # fmt: skip


def _without_paths(config: Config) -> Config:
    """`config` as it may be published: of paths only the names."""
    config, data = portable(config), config.data
    names = {key: Path(value).name for key in ("val", "test") if isinstance(value := getattr(data, key), str)}
    if isinstance(data.labelled, Path):
        names["labelled"] = Path(data.labelled.name)
    weights = config.model.weights
    model = config.model.model_copy(update={"weights": Path(weights).name})
    return with_data(config.model_copy(update={"model": model}), **names)


class Exporter:
    """Writes the files of one network.

    Args:
        trained: the network; left as it is.
        about: its description, from `describe`.
        folder: where the files come.
        argmax: whether programs return classes instead of logits.
    """

    def __init__(self, trained: Trained, about: dict[str, Any], folder: Path, argmax: bool = False):
        self.trained, self.about, self.folder, self.argmax = trained, about, folder, argmax
        self.net: Segmenter = trained.net.cpu().eval()
        self.channels, self.crop = trained.config.data.channels, trained.config.data.crop
        self.whole = WholeSegmenter(self.net, argmax)
        self._programs: dict[tuple[int, ...], ExportedProgram] = {}

    def write(self, name: str) -> Written:
        """Write and check the file of one of the `FORMATS`.

        Raises:
            UserError: the file does not give what our own network gives, or the network cannot be exported.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"model.{name}"
        # The suffix stays, because it says how a file is read.
        partial = path.with_name(f".partial-{path.name}")
        try:
            if name == "safetensors":
                written = self._weights(partial)
            else:
                written = self._program(partial, {"pt2": self._save_pt2, "onnx": self._save_onnx}[name])
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return written._replace(path=path)

    def _weights(self, path):
        from safetensors.torch import save_file

        weights = {key: value.detach().cpu().contiguous().clone() for key, value in self.net.state_dict().items()}
        save_file(weights, path, {KEY: json.dumps(self.about)})
        net = load_model(path).net.eval()
        return self._checked(path, lambda images: full_logits(net, images), self.about, argmax=False)

    def _program(self, path, save):
        """Write a program whose sizes are as free as the network allows."""
        refused = None
        for free in FREE:
            shape = self._shape(free)
            about = self.about | {"input": self.about["input"] | {"shape": shape}, "output": self._output(shape)}
            try:
                with _quiet():
                    run = save(path, self._traced(free), about)
                    return self._checked(path, run, about, self.argmax)
            except Exception as error:  # networks and converters refuse what they cannot do by exceptions of many types
                refused = error
        if isinstance(refused, UserError):
            raise refused
        line = next(iter(str(refused).strip().splitlines()), "")
        raise UserError(
            f"{path.suffix} cannot hold this network ({type(refused).__name__}: {line:.160}); leave it out of --formats"
        ) from refused

    def _output(self, shape):
        batch, _, *size = shape
        if self.argmax:
            return {"name": "classes", "dtype": "uint8", "shape": [batch, *size]}
        return self.about["output"] | {"shape": [batch, len(self.about["classes"]), *size]}

    def _shape(self, free):
        fixed = (1, self.channels, *self.net.accepted_size(self.crop, self.crop))
        return [n if i not in free else ("batch", "", "height", "width")[i] for i, n in enumerate(fixed)]

    def _traced(self, free):
        if free not in self._programs:
            multiple = self.net.size_multiple
            # Sizes that differ from each other and from one another's multiples, so that nothing is taken for a constant.
            side = max(64, 2 * multiple)
            size = (side + 1, side + multiple + 34) if 2 in free else self._shape(())[2:]
            example = torch.rand(2 if 0 in free else 1, self.channels, *size) * 255
            self._programs[free] = trace(self.whole, example, free)
        return self._programs[free]

    def _save_pt2(self, path, program, about):
        torch.export.save(program, path, extra_files={EXTRA: json.dumps(about)})
        return read_program(path, torch.device("cpu"))

    def _save_onnx(self, path, program, about):
        name = about["output"]["name"]
        made = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=[name], verbose=False)
        graph = made.model.graph
        for value, shape in ((graph.inputs[0], about["input"]["shape"]), (graph.outputs[0], about["output"]["shape"])):
            value.shape = type(value.shape)(shape)
        for node in graph.all_nodes():
            node.metadata_props.clear()  # among them, places in source files
            for value in node.outputs:
                if value is not graph.outputs[0]:
                    value.shape = None  # in the tracer's names of the sizes
        made.model.metadata_props[KEY] = json.dumps(about)
        made.save(path)
        session = open_session(path)
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    def _checked(self, path, run, about, argmax):
        """Compare a file with our own output."""
        difference, equal, pixels, largest, sizes = 0.0, 0, 0, 1.0, []
        with torch.inference_mode():
            side = max(min(self.crop, SIDE), 3 * self.net.size_multiple)
            for images in _images(about["input"]["shape"], side):
                ours, theirs = full_logits(self.net, images), run(images)
                best, classes = ours.max(1)
                found = theirs.long() if argmax else theirs.argmax(1)
                off = best - ours.gather(1, found[:, None])[:, 0] if argmax else (ours - theirs).abs()
                off = torch.where(off.isfinite(), off, torch.inf)  # max() would pass over NaN
                difference, largest = max(difference, float(off.max())), max(largest, float(ours.abs().max()))
                equal, pixels = equal + int((found == classes).sum()), pixels + found.numel()
                sizes.append((len(images), *images.shape[-2:]))
        written = Written(path, about, difference, equal / pixels, sizes)
        if difference > TOLERANCE * largest or written.equal < EQUAL:
            raise UserError(
                f"{path.name.removeprefix('.partial-')} does not give what the run gives: the largest difference is "
                f"{difference:.3g}, {written.equal:.2%} of the pixels have the same class; it is not written: leave this "
                "format out of --formats, and report it"
            )
        return written


def _images(shape: Sequence[int | str], side: int) -> Iterator[Tensor]:
    """Images (B, C, H, W) float32 of smooth colours and noise, of sizes that a file of this shape takes: odd ones among
    them."""
    generator = torch.Generator().manual_seed(0)
    for batch, *size in ((1, side, side), (2, side * 2 // 3 | 1, side * 4 // 3 | 1), (3, side + 37, side // 2 | 1)):
        batch, height, width = (
            own if isinstance(n, str) else n for own, n in zip((batch, *size), _sizes(shape), strict=True)
        )
        coarse = torch.rand(batch, shape[1], height // 16 + 2, width // 16 + 2, generator=generator)
        smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
        noise = torch.rand(batch, shape[1], height, width, generator=generator)
        yield ((0.9 * smooth + 0.1 * noise) * 255).round()


def _sizes(shape):
    batch, _, height, width = shape
    return batch, height, width


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what PyTorch's exporters print about their own work."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
