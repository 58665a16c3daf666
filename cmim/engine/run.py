"""The run folder: config.yaml, labelled.txt, metrics.jsonl, result.json, checkpoints/, pictures/, tensorboard/."""

import json
import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from cmim import checkpoint
from cmim.config import dump_config, load_config
from cmim.errors import UserError
from cmim.models.build import build_segmenter, check_sizes
from cmim.models.segmenter import Segmenter
from cmim.settings import Config

# Keys that may differ when a run is resumed: they change how long or where it runs, not what it computes.
FREE_ON_RESUME = (("train", "steps"), ("train", "epochs"), ("train", "device"), ("data", "workers"))

SETTLED = ("exif", "mean", "std")
"""Keys of `data` that a new run decides where they are not given, and a continued one takes over."""


class Run:
    """Paths of a run folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = self.folder / "config.yaml"
        self.labelled = self.folder / "labelled.txt"
        self.metrics = self.folder / "metrics.jsonl"
        self.result = self.folder / "result.json"
        self.last = self.folder / "checkpoints" / "last.pt"
        self.best = self.folder / "checkpoints" / "best.pt"
        self.pictures = self.folder / "pictures"
        self.tensorboard = self.folder / "tensorboard"


def default_folder(config_path: str | Path) -> Path:
    """runs/<config>-<time>."""
    return Path("runs") / f"{Path(config_path).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def open_run(folder: str | Path, config: Config, resume: bool) -> Run:
    """The run of a folder, new or to be continued; nothing is written yet.

    Raises:
        UserError: the folder holds a run and `resume` is false; or the run had another config.
    """
    run = Run(folder)
    if run.config.exists():
        if not resume:
            raise UserError(f"{run.folder} holds a run; continue it with --resume, or give another --output")
        key = changed_setting(load_config(run.config), config)
        if key is not None:
            raise UserError(f"{key} differs from {run.config}; resume with the same settings, or give another --output")
    elif run.folder.exists() and (not run.folder.is_dir() or any(p.suffix != ".partial" for p in run.folder.iterdir())):
        raise UserError(f"{run.folder} exists and is not a run folder; give another --output")
    return run


def start_run(run: Run, config: Config, labelled: Iterable[str]) -> None:
    """Write the settings and the names of the labelled images, which a continued run must share."""
    names = "".join(f"{name}\n" for name in labelled)
    if run.labelled.exists() and run.labelled.read_text() != names:
        raise UserError(f"the labelled images are not those of {run.labelled}; restore the data, or give another --output")
    run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.config, dump_config(config))  # first, because this file marks the folder as a run
    write_text(run.labelled, names)


def take_over(config: Config, old: Config) -> Config:
    """`config` with what the run with the config `old` decided at its start and `config` leaves open."""
    if old.data.exif is None and old.data.format != "shapes":  # runs of before this was a setting ignored orientations
        old = with_data(old, exif="ignore")
    return with_data(config, **{key: getattr(old.data, key) for key in SETTLED if getattr(config.data, key) is None})


def with_data(config: Config, **values: object) -> Config:
    """`config` with other values in its section `data`."""
    return config.model_copy(update={"data": config.data.model_copy(update=values)})


def changed_setting(old: Config, new: Config) -> str | None:
    """The first key, of those that matter, in which two configs differ; None where there is none."""
    new = take_over(new, old)
    old = take_over(old, old)
    old, new = old.model_dump(mode="json"), new.model_dump(mode="json")
    for section in old:
        if not isinstance(old[section], dict):
            if old[section] != new[section]:
                return section
            continue
        for key in old[section]:
            if (section, key) not in FREE_ON_RESUME and old[section][key] != new[section][key]:
                return f"{section}.{key}"
    return None


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is never seen half-written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, the closing one on test, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            figures = json.loads(line)
        except json.JSONDecodeError:
            continue
        if figures["step"] <= step and figures.get("split") != "test":
            kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))


class Trained(NamedTuple):
    net: Segmenter
    config: Config
    class_names: list[str]
    colours: list[list[int]]
    step: int


def load_trained(folder: str | Path, which: Literal["last", "best"], overrides: Sequence[str] = ()) -> Trained:
    """The evaluated weights of a run: `last` or `best`.

    Raises:
        UserError: no such run or checkpoint, or one of another model.
    """
    run = Run(folder)
    if not run.config.exists():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    config = load_config(run.config, overrides)
    check_sizes(config)
    path = run.last if which == "last" else run.best
    state = checkpoint.load(path)
    state.setdefault("evaluated", load_config(run.config).evaluated_weights)  # older checkpoints do not say
    weights = checkpoint.network_weights(state, path, config.evaluated_weights)
    model = config.model.model_copy(update={"weights": "none", "init_from": None})
    net = build_segmenter(model, len(state["class_names"]), *config.data.normalisation())
    checkpoint.load_into(net, weights, path)
    if config.train.channels_last:  # as in training, because another layout may round differently
        net.to(memory_format=torch.channels_last)
    return Trained(net, config, state["class_names"], state["colours"], state["step"])
