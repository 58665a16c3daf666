"""report.html of a run: one page made of what is in the run folder, which asks the network for nothing."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from cmim.config import changed_settings, load_config
from cmim.engine.charts import Curve, bar, escape, line_chart, matrix_chart, number, percent, swatch, table
from cmim.engine.records import metric_lines, read_about
from cmim.engine.run import Run, write_text
from cmim.errors import UserError
from cmim.settings import Config

MOST_PICTURES = 12
MOST_BYTES = 2_400_000
"""Of all pictures together, before they are written as text."""
QUALITIES = ((85, 1.0), (70, 1.0), (60, 0.75), (50, 0.5), (40, 0.35))
"""JPEG quality and scale of pictures: the first at which they fit."""
LARGEST_MATRIX = 40
"""Of more classes only the largest confusions are shown."""
CONFUSIONS = 12

ABOUT = {
    "coverage": "share of the unlabelled pixels that are confident enough for a pseudo-label",
    "coverage_foreground": "the same without the background",
    "pix_vs_mean_colour": "error of the pixel decoder relative to the mean colour of a class; below 1 it has learnt more",
    "hidden_accuracy": "share of the hidden pixels whose class is predicted from the masked image",
    "token_purity": "share of the pixels of tokens that have the class of their token",
    "in_reach": "share of the hidden tokens that the pixel decoder reconstructs from a visible token of their class",
    "separation": "distance between the centroids of classes relative to that within a class",
    "images_per_second": "training only, without evaluations and pictures",
    "data_wait": "share of the time of a step spent waiting for images",
    "memory_gib": "peak memory in GiB",
}
"""What some figures of the log mean."""


def write_report(run: Run) -> Path:
    """Write report.html into a run folder, atomically.

    Raises:
        UserError: there is no run.
    """
    write_text(run.report, make_report(run))
    return run.report


def fill_template(title: str, lead: str, parts: Mapping[str, str], foot: str) -> str:
    """The page around its parts, {heading: HTML}; parts without content are left out. The policy of the page lets nothing
    run or be loaded but the script and the style of the template."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    digest = lambda tag: base64.b64encode(  # noqa: E731
        hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", template, re.S)[1].encode()).digest()
    ).decode()
    parts = {heading: content for heading, content in parts.items() if content}
    place = {heading: re.sub(r"[^a-z]+", "-", heading.lower()) for heading in parts}
    values = {
        "title": escape(title),
        "lead": lead,
        "nav": "".join(f'<li><a href="#{place[heading]}">{escape(heading)}</a></li>' for heading in parts),
        "main": "".join(f'<section id="{place[h]}"><h2>{escape(h)}</h2>{content}</section>' for h, content in parts.items()),
        "foot": foot,
        "style_hash": f"sha256-{digest('style')}",
        "script_hash": f"sha256-{digest('script')}",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)  # in one pass: the values are not searched


def make_report(run: Run) -> str:
    """The page of a run.

    Raises:
        UserError: there is no run.
    """
    if not run.config.exists():
        raise UserError(f"{run.folder} is not a run folder: it has no config.yaml")
    config, lines = load_config(run.config), metric_lines(run)
    steps = [line for line in lines if "split" not in line]
    val = [line for line in lines if line.get("split") == "val"]
    last = max((line["step"] for line in lines), default=0)
    result, about = _json(run.result), read_about(run)
    if result.get("step") != last:  # of fewer steps than the run has now
        result = {}
    latest = result or (val[-1] if val else {})
    confusion = _json(run.confusion)
    if confusion.get("step", last + 1) > last:
        confusion = {}
    parts = {
        "Notes": _notes(about.notes),
        "Curves": _curves(steps, val),
        "Classes": _classes(latest, confusion, about.colours, latest.get("split", "val"), latest.get("step", last)),
        "Confusions": _confusions(confusion),
        "Pictures": pictures(run.pictures),
        "Pseudo-labels": _pseudo_labels(steps, val, about.colours),
        "Diagnostics": _diagnostics(steps),
        "Speed": _speed(steps),
        "Settings": _settings(run, config, about.starts),
    }
    title = Path(run.folder.resolve().name).name or "run"
    lead = f"<p class='soft'>{_lead(config, result, last)}</p>{_tiles(config, steps, val, result, last)}"
    return fill_template(title, lead, parts, "Written by cmim from the files of the run folder; it needs no network.")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _lead(config: Config, result: Mapping[str, Any], last: int) -> str:
    data = config.data.format if config.data.root is None else config.data.root.name
    state = "finished" if result else "not finished"
    state = "stopped early, as train.patience says" if result.get("stopped_early") else state
    return f"<b>{escape(config.method.preset)}</b> · {escape(config.model.title)} · {escape(data)} · step {last}, {state}"


def _tiles(config, steps, val, result, last) -> str:
    tiles = {}
    if result:
        tiles[f"mIoU on {result.get('split', 'val')}, %"] = percent(result.get("miou"))
    mious = points(val, "miou")
    if mious:
        step, best = max(mious, key=lambda point: point[::-1])
        tiles["best mIoU on val, %"] = f"{percent(best)} <small>step {step}</small>"
        tiles["last mIoU on val, %"] = percent(mious[-1][1])
    rates, waits, memory = ([v for _, v in points(steps, key)] for key in ("images_per_second", "data_wait", "memory_gib"))
    if rates:
        tiles["images/s, median"] = number(sorted(rates)[len(rates) // 2])
    if waits:
        tiles["waiting for data, %"] = percent(sum(waits) / len(waits))
    if memory:
        tiles["peak memory, GiB"] = number(max(memory))
    return f"<dl class='tiles'>{''.join(f'<div><dt>{escape(k)}</dt><dd>{v}</dd></div>' for k, v in tiles.items())}</dl>"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of a figure where it is logged."""
    return [(line["step"], line[key]) for line in lines if _is_number(line.get(key))]


def _keys(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for line in lines for key in line))


def _grid(charts: Sequence[str]) -> str:
    charts = [chart for chart in charts if chart]
    return f"<div class='grid'>{''.join(charts)}</div>" if charts else ""


def _curves(steps, val) -> str:
    charts = [line_chart("mIoU on val, %", [Curve("mIoU", [(x, 100 * y) for x, y in points(val, "miou")])])]
    charts.append(line_chart("loss", [Curve("loss", points(steps, "loss"), 1)], "the sum of all terms"))
    terms = [key for key in _keys(steps) if key.startswith("loss_")]
    charts += [line_chart(key, [Curve(key, points(steps, key), 1)]) for key in terms]
    charts.append(line_chart("learning rate", [Curve("lr", points(steps, "lr"), 2)]))
    return _grid(charts)


def _classes(latest, confusion, colours, split, step) -> str:
    iou = latest.get("iou")
    if not isinstance(iou, dict):
        return ""
    pixels, names = confusion.get("pixels"), confusion.get("classes")
    total = sum(map(sum, pixels)) if pixels else 0
    share = {name: sum(row) / total for name, row in zip(names, pixels, strict=True)} if total else {}
    order = sorted(iou, key=lambda name: (iou[name] is None, iou[name] or 0))
    of = lambda key, name: percent((latest.get(key) or {}).get(name))  # noqa: E731
    rows = [
        [
            _named(name, colours), bar(iou[name]), f"<b>{percent(iou[name])}</b>",
            of("precision", name), of("recall", name), of("dice", name), percent(share.get(name)),
        ]
        for name in order
    ]  # fmt: skip
    head = ["class", "", "IoU %", "precision %", "recall %", "Dice %", "of pixels %"]
    caption = f"On {split} after step {step}, weakest class first. A dash: the class does not occur."
    return f"<div class='card'>{table(head, rows, caption, wide=(5, 6))}</div>"


def _named(name, colours):
    return (swatch(colours[name]) if name in colours else "") + escape(name)


def _confusions(confusion) -> str:
    names, pixels = confusion.get("classes"), confusion.get("pixels")
    if not names or not pixels or not sum(map(sum, pixels)):
        return ""
    found = sorted(
        ((n, n / sum(row), names[i], names[k]) for i, row in enumerate(pixels) for k, n in enumerate(row) if n and i != k),
        reverse=True,
    )[:CONFUSIONS]
    total = sum(map(sum, pixels))
    rows = [[escape(a), escape(b), percent(share), percent(n / total)] for n, share, a, b in found]
    listed = table(["truth", "taken for", "% of the truth", "% of all"], rows, "The most pixels that got another class.")
    place = f"On {escape(confusion.get('split', 'val'))} after step {escape(confusion.get('step'))}"
    said = f"<p class='soft'>{place}; each row, a class of the truth, adds up to 100 %.</p>"
    if len(names) > LARGEST_MATRIX:
        return f"{said}<div class='card'>{listed}</div>"
    return (
        f"{said}<div class='two'><div class='card'>{matrix_chart(names, pixels)}</div><div class='card'>{listed}</div></div>"
    )


def pictures(folder: Path) -> str:
    """The pictures of a run over its steps, with a slider; at most `MOST_PICTURES`, evenly chosen."""
    found = sorted((int(m[1]), path) for path in folder.glob("step_*.png") if (m := re.fullmatch(r"step_(\d+)", path.stem)))
    if len(found) > MOST_PICTURES:
        found = [found[round(i * (len(found) - 1) / (MOST_PICTURES - 1))] for i in range(MOST_PICTURES)]
    for quality, scale in QUALITIES:
        encoded = [(step, data) for step, path in found if (data := _encode(path, path.stat().st_mtime_ns, quality, scale))]
        if sum(len(data) for _, data in encoded) <= MOST_BYTES:
            break
    if not encoded:
        return ""
    images = "".join(
        f'<img src="data:image/jpeg;base64,{base64.b64encode(data).decode()}" data-step="{step}"'
        f' alt="images, pseudo-labels, predictions and truth after step {step}"{" hidden" * (i < len(encoded) - 1)}>'
        for i, (step, data) in enumerate(encoded)
    )
    last = len(encoded) - 1
    return (
        '<div class="card pictures"><div class="slider"><button class="earlier" aria-label="earlier picture">‹</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step of the picture">'
        '<button class="later" aria-label="later picture">›</button><output aria-live="polite"></output></div>'
        f'<div class="scroll" tabindex="0">{images}</div></div>'
    )


@lru_cache(maxsize=4 * MOST_PICTURES)
def _encode(path: Path, changed: int, quality: int, scale: float) -> bytes | None:
    """A picture as JPEG, kept while its file does not change; None if it cannot be read."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            image = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _pseudo_labels(steps, val, colours) -> str:
    at = lambda lines, key: [(x, 100 * y) for x, y in points(lines, key)]  # noqa: E731
    training = [Curve(key, at(steps, key), i) for i, key in enumerate(("coverage", "coverage_foreground"))]
    charts = [line_chart("coverage in training, %", training, ABOUT["coverage"], (0, 100))]
    kinds = ("coverage", "accuracy", "coverage_foreground", "accuracy_foreground")
    on_val = [Curve(kind.replace("_", ", "), at(val, f"pseudo_label_{kind}"), i) for i, kind in enumerate(kinds)]
    said = "of the pseudo-labels that the evaluated weights would give on val"
    charts.append(line_chart("coverage and accuracy on val, %", on_val, said, (0, 100)))
    grid = _grid(charts)
    if not val or not isinstance(val[-1].get("pseudo_label_class_coverage"), dict):
        return grid
    coverage, accuracy = (val[-1].get(f"pseudo_label_class_{kind}") or {} for kind in ("coverage", "accuracy"))
    order = sorted(coverage, key=lambda name: (coverage[name] is None, coverage[name] or 0))
    rows = [
        [
            _named(name, colours), bar(coverage[name]), percent(coverage[name]),
            bar(accuracy.get(name)), percent(accuracy.get(name)),
        ]
        for name in order
    ]  # fmt: skip
    caption = (
        f"Pixels of val predicted as a class, after step {val[-1]['step']}: the share that is confident, and of these the "
        "share that is right. Least covered first."
    )
    return f"{grid}<div class='card'>{table(['class', '', 'coverage %', '', 'accuracy %'], rows, caption, wide=(3,))}</div>"


_ELSEWHERE = (
    "step", "lr", "loss", "seconds", "images_per_second", "data_wait", "memory_gib", "coverage", "coverage_foreground",
)  # fmt: skip


def _diagnostics(steps) -> str:
    keys = [key for key in _keys(steps) if key not in _ELSEWHERE and not key.startswith("loss_")]
    return _grid([line_chart(key, [Curve(key, points(steps, key), 3)], ABOUT.get(key, "")) for key in keys])


def _speed(steps) -> str:
    names = {"images_per_second": "images/s", "data_wait": "data wait, %", "memory_gib": "memory, GiB"}
    charts = []
    for key, title in names.items():
        found = [(x, 100 * y if key == "data_wait" else y) for x, y in points(steps, key)]
        charts.append(line_chart(title, [Curve(key, found, 5)], ABOUT[key], (0, 0)))
    return _grid(charts)


def _notes(notes: Sequence[str]) -> str:
    return f"<div class='card notes'><ul>{''.join(f'<li>{escape(n)}</li>' for n in notes)}</ul></div>" if notes else ""


def settings_text(settings: Mapping[str, object]) -> str:
    return (
        yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=100) if settings else "all as by default"
    )


def _settings(run: Run, config: Config, starts: Sequence[Mapping[str, str]]) -> str:
    changed = escape(settings_text(changed_settings(config)))
    every = escape(run.config.read_text(encoding="utf-8", errors="replace"))
    last = starts[-1] if starts else {}
    versions = table(
        ["", ""], [[escape(k), escape(v)] for k, v in last.items()], f"Started {len(starts)} times." * (len(starts) > 1)
    )
    where = f"<div class='card'>{versions}</div>" if last else "<p class='soft'>The run keeps no versions.</p>"
    return (
        "<div class='two'><div class='card'><p class='soft'>Those that are not the default:</p>"
        f"<pre tabindex='0'>{changed}</pre>"
        f"<details><summary>every setting</summary><pre tabindex='0'>{every}</pre></details></div>{where}</div>"
    )
