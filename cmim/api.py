"""The Python interface: `cmim.load` and `cmim.fit`.

    import cmim

    run = cmim.fit("configs/shapes.yaml", settings={"train.steps": 200})
    segmenter = cmim.load(run)
    classes, confidence = segmenter.predict("photo.jpg")
    print(segmenter.classes[classes[0, 0]], confidence.mean())

Mistakes in settings and data raise `cmim.UserError`, whose message is one line.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from cmim import train
from cmim.config import dump_config, plain, words_of
from cmim.engine.exported import load_model
from cmim.engine.prediction import TrainedSegmenter
from cmim.errors import UserError
from cmim.settings import Config


def load(
    run: str | Path,
    checkpoint: Literal["last", "best"] | None = None,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    settings: Mapping[str, Any] | None = None,
) -> TrainedSegmenter:
    """The trained network of a run folder, ready to predict.

    Args:
        run: a run folder, or a .safetensors, .pt2 or .onnx file that `cmim.export` wrote.
        checkpoint: of a run folder, `last` (the default) or `best` (on val) weights.
        device: where it runs; auto: on a CUDA device if there is one.
        settings: other settings of prediction than those of the run: {"evaluation.flip": True}.

    Raises:
        UserError: there is no such run or checkpoint, or a setting is wrong or matters in training only.
    """
    return TrainedSegmenter(load_model(run, checkpoint, [f"--train.device={device}", *words_of(settings or {})]))


def fit(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Train, as `python -m cmim.train` does in this process; progress is printed.

    Args:
        config: a YAML file; a folder of images; the settings themselves, {"data": {"root": ..., "crop": 320}, ...} or a
            `Config`; None: the built-in set `shapes`.
        output: run folder; by default runs/<config>-<time>.
        resume: continue the run in `output`, or start it if there is none.
        settings: overrides, {"train.steps": 200}.

    Returns:
        the run folder, for `cmim.load`.

    Raises:
        UserError: a setting or the data are wrong.
        Stopped: the process got SIGINT or SIGTERM; a checkpoint is written, with which `resume` continues.
    """
    words = ["--output", str(output)] if output is not None else []
    words += [*(["--resume"] if resume else []), *words_of(settings or {})]
    if config is None or isinstance(config, str | Path):
        return _train([*([] if config is None else [str(config)]), *words])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "python.yaml"
        text = dump_config(config) if isinstance(config, Config) else yaml.safe_dump(plain(config), sort_keys=False)
        path.write_text(text, encoding="utf-8")
        return _train([str(path), *words], {f"{path}: ": "config: "})  # the file is gone when a message is read


def _train(words: Sequence[str], names: Mapping[str, str] | None = None) -> Path:
    """Train; messages on mistakes call the places of settings as the caller of `fit` knows them."""
    try:
        return train.main(words)
    except UserError as error:
        message = str(error)
        for before, after in {"command line: ": "settings: ", **(names or {})}.items():
            if message.startswith(before):
                message = after + message.removeprefix(before)
        raise UserError(message) from None
