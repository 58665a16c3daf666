"""The run folder: config.yaml, labelled.txt, metrics.jsonl, result.json, checkpoints/, pictures/, tensorboard/."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from cmim.config import Config, dump_config, load_config
from cmim.engine import checkpoint
from cmim.engine.errors import UserError
from cmim.models.segmenter import Segmenter, build_segmenter

# Keys that may differ when a run is resumed: they change how long or where it runs, not what it computes.
FREE_ON_RESUME = (("train", "steps"), ("train", "device"), ("data", "workers"))


class Run:
    """Paths of a run folder."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.config = self.folder / "config.yaml"
        self.metrics = self.folder / "metrics.jsonl"
        self.result = self.folder / "result.json"
        self.last = self.folder / "checkpoints" / "last.pt"
        self.best = self.folder / "checkpoints" / "best.pt"
        self.pictures = self.folder / "pictures"
        self.tensorboard = self.folder / "tensorboard"


def default_folder(config_path):
    return Path("runs") / f"{Path(config_path).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def open_run(folder, config, resume):
    """Create the folder, or continue what it holds.

    Raises:
        UserError: the folder holds a run and `resume` is false; or the run had another config.
    """
    run = Run(folder)
    if run.config.exists():
        if not resume:
            raise UserError(f"{run.folder} holds a run; continue it with --resume, or give another --output")
        _refuse_other_config(load_config(run.config), config, run.config)
    elif run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
        raise UserError(f"{run.folder} exists and is not a run folder; give another --output")
    run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.config, dump_config(config))
    return run


def _refuse_other_config(old, new, path):
    old, new = old.model_dump(mode="json"), new.model_dump(mode="json")
    for values in (old, new):
        for section, key in FREE_ON_RESUME:
            values[section].pop(key)
    for section in old:
        if isinstance(old[section], dict):
            changed = [f"{section}.{key}" for key in old[section] if old[section][key] != new[section][key]]
        else:
            changed = [section] if old[section] != new[section] else []
        if changed:
            raise UserError(f"{changed[0]} differs from {path}; resume with the same settings, or give another --output")


def write_text(path, text):
    """Write a file so that it is never seen half-written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def cut_metrics(path, step):
    """Drop the lines of metrics.jsonl after `step`, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    write_text(path, "".join(line + "\n" for line in kept))


class Trained(NamedTuple):
    net: Segmenter
    config: Config
    class_names: list[str]
    colours: list[list[int]]
    step: int


def load_trained(folder, which, overrides=()):
    """The evaluated weights of a run: `last` or `best`.

    Raises:
        UserError: no such run or checkpoint, or one of another model.
    """
    run = Run(folder)
    if not run.config.exists():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    config = load_config(run.config, overrides)
    path = run.last if which == "last" else run.best
    state = checkpoint.load(path)
    if which == "last":
        ema = config.teacher.kind == "ema" and config.evaluation.weights == "teacher"
        prefix = "teacher." if ema else "net."
        weights = {k.removeprefix(prefix): v for k, v in state["objective"].items() if k.startswith(prefix)}
    else:
        weights = state["net"]
    net = build_segmenter(config.model.model_copy(update={"weights": "none"}), len(state["class_names"]))
    checkpoint.load_into(net, weights, path)
    return Trained(net, config, state["class_names"], state["colours"], state["step"])
