"""The model card that lies beside exported files: data, classes, scores, settings, limits and how to load them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cmim.config import changed_settings
from cmim.engine.export import FORMATS, Written
from cmim.engine.outputs import is_signed, sign
from cmim.engine.run import Run
from cmim.settings import Config

MARK = "# Written by cmim.export; digest "
"""Begins the second line, with a digest of what follows: a card that was changed is not overwritten."""
_COLUMNS = {"iou": "IoU", "dice": "Dice", "precision": "precision", "recall": "recall"}
_FRONT = "---\n"

PROGRAM = """\
import json

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("model.onnx")
about = json.loads(session.get_modelmeta().custom_metadata_map["cmim"])
image = np.asarray(Image.open("photo.jpg").convert("RGB"), np.float32)  # values from 0 to 255
(logits,) = session.run(None, {"images": image.transpose(2, 0, 1)[None]})
mask = Image.fromarray(logits[0].argmax(0).astype(np.uint8))
mask.putpalette(b"".join(bytes.fromhex(colour[1:]) for colour in about["colours"]))
mask.save("mask.png")
"""


def is_own(path: Path) -> bool:
    """Whether a file is a card that nobody changed since it was written."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return text.startswith(_FRONT) and is_signed(text.removeprefix(_FRONT), MARK)


def make_card(run: Run, config: Config, about: Mapping[str, Any], written: Sequence[Written]) -> str:
    """The card as Markdown, with the front matter of model hubs.

    Args:
        run: the run folder.
        config: its settings without paths.
        about: the description in the files.
        written: the files.
    """
    head = ["library_name: cmim", "pipeline_tag: image-segmentation", "tags: [semantic-segmentation]", _FRONT.strip(), ""]
    parts = [
        _title(config, about),
        _data(run, config, about),
        _classes(about),
        _files(about, written),
        _loading(about, written),
        _limits(config, about, written),
        _settings(config),
    ]
    return _FRONT + sign("\n".join(head) + "\n" + "\n\n".join(parts) + "\n", MARK)


def _title(config, about):
    what = "semi-supervised" if config.preset.uses_unlabelled else "supervised"
    return (
        f"# Semantic segmentation, {len(about['classes'])} classes\n\n"
        f"{_plain(config.model.title)}, trained with cmim {about['cmim']} ({what}, preset `{config.method.preset}`); the "
        f"weights are those of step {about['step']} (`{about['checkpoint']}.pt`)."
    )


def _data(run, config, about):
    try:
        labelled = len(run.labelled.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
    except OSError:
        labelled = None
    lines = ["## Data", ""]
    drawn = config.data.format == "shapes"
    unknown = "Describe the data here: what they show, where they are from, and under which licence."
    lines.append("The built-in set of drawn shapes." if drawn else unknown)
    if labelled is not None:
        lines.append(
            f"Trained with {labelled} labelled images{' and others without labels' * config.preset.uses_unlabelled},"
        )
        lines.append(f"in crops of {config.data.crop} x {config.data.crop} pixels.")
    return "\n".join(lines)


def _classes(about):
    scores = about["scores"] or {}
    columns = [key for key in _COLUMNS if isinstance(scores.get(key), dict)]
    lines = [
        "## Classes and scores",
        "",
        f"| id | class | colour | {' | '.join(f'{_COLUMNS[key]} %' for key in columns)} |".replace("|  |", "|"),
        f"| ---: | --- | --- | {' | '.join('---:' for _ in columns)} |".replace("|  |", "|"),
    ]
    for k, (name, colour) in enumerate(zip(about["classes"], about["colours"], strict=True)):
        cells = [str(k), _plain(name), colour, *(_percent(scores[key].get(name)) for key in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    if scores:
        lines += [
            "",
            f"On `{scores['split']}`, at the original resolution: mIoU {_percent(scores['miou'])} %,",
        ]
        lines[-1] += f" pixel accuracy {_percent(scores['pixel_accuracy'])} %."
    else:
        lines += ["", "The run holds no scores of this step."]
    return "\n".join(lines)


def _files(about, written):
    lines = ["## Files", "", "| file | takes images | largest difference | same class |", "| --- | --- | ---: | ---: |"]
    for file in written:
        shape = " x ".join(map(str, file.shape))
        lines.append(f"| `{file.path.name}` | {shape} | {file.difference:.1e} | {file.equal:.3%} |")
    values = about["input"]["values"]
    lines += [
        "",
        "Each file was compared with the network in cmim (float32, CPU) on images of "
        + ", ".join("x".join(map(str, size)) for size in written[0].sizes)
        + " (batch x height x width).",
        f"Images are float32 (batch, channels, height, width): {values}.",
    ]
    if about["range"] is not None:
        low, high = about["range"]
        lines.append(f"Stored values {low:g} to {high:g} become 0 to 255, linearly; those beyond are clipped.")
    what = (
        "classes (batch, height, width), uint8" if _has_argmax(about) else "logits (batch, classes, height, width), float32"
    )
    lines.append(f"Programs (.pt2, .onnx) return {what}, at the resolution of the images.")
    lines.append("The description in JSON is `model.json`, and inside each file (`cmim`).")
    return "\n".join(lines)


def _loading(about, written):
    suffixes = {file.path.suffix[1:] for file in written}
    parts = ["## How to load"]
    if "onnx" in suffixes and about["input"]["shape"][1] == 3:
        program = PROGRAM
        if _has_argmax(about):
            program = program.replace("(logits,)", "(classes,)").replace(
                "logits[0].argmax(0).astype(np.uint8)", "classes[0]"
            )
        parts += ["With NumPy, Pillow and onnxruntime alone:", f"```python\n{program}```"]
    if "pt2" in suffixes:
        name = about["output"]["name"]
        parts += [
            "With PyTorch alone:",
            f'```python\nimport torch\n\nprogram = torch.export.load("model.pt2").module()\n{name} = program(images)\n```',
        ]
    best = next((name for name in FORMATS if name in suffixes), "onnx")
    parts += [
        "With cmim, for files and folders, in tiles where images are large:",
        f"```bash\npython -m cmim.predict model.{best} IMAGES -o OUT\n```",
    ]
    return "\n\n".join(parts)


def _limits(config, about, written):
    lines = ["## Limits", ""]
    lines.append("- Only what resembles the training images is segmented well; every pixel gets one of the classes.")
    fixed = [file for file in written if not all(isinstance(n, str) for n in (file.shape[0], *file.shape[2:]))]
    for file in fixed:
        lines.append(f"- `{file.path.name}` takes images of {' x '.join(map(str, file.shape))} only.")
    if config.data.size is not None:
        height, width = config.data.size
        lines.append(f"- Trained on images resized to {width} x {height} pixels: resize yours likewise first.")
    if about["size_multiple"] > 1:
        lines.append(f"- Inside, images are resized to sides that are multiples of {about['size_multiple']} pixels.")
    lines.append("- Objects much larger or smaller than in training, and other cameras or seasons, may be missed.")
    if about["scores"] and about["scores"]["split"] == "val":
        lines.append("- The scores are those of val, which may have been used to choose settings or the checkpoint.")
    return "\n".join(lines)


def _settings(config):
    text = yaml.safe_dump(changed_settings(config), sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"## Settings\n\nThose that are not the defaults of cmim:\n\n{fence}yaml\n{text}{fence}"


def _has_argmax(about):
    return about["output"]["name"] == "classes"


def _percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def _plain(text):
    """Text of the data as Markdown shows it literally."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&!])", r"\\\1", " ".join(str(text).split()))
