"""What a run folder keeps of the training: metrics.jsonl, confusion.json, and about.json with what each start said."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cmim.engine.run import Run, read_text, write_text
from cmim.errors import UserError


def write_confusion(run: Run, step: int, split: str, class_names: Sequence[str], pixels: Sequence[Sequence[int]]) -> None:
    """The confusion matrix of the last evaluation: rows are the truth, columns the prediction."""
    rows = ",\n  ".join(json.dumps(list(row)) for row in pixels)
    head = {"step": step, "split": split, "classes": list(class_names)}
    write_text(run.confusion, json.dumps(head)[:-1] + f', "pixels": [\n  {rows}\n]}}\n')


class About(NamedTuple):
    """What about.json keeps for the report."""

    starts: list[dict[str, str]]
    """Versions and machine at each start of the run."""
    notes: list[str]
    """Notes and warnings, each once."""
    colours: dict[str, str]
    """The colour of each class, `#rrggbb`."""


def note_start(
    run: Run,
    environment: Mapping[str, str],
    notes: Iterable[str],
    class_names: Sequence[str],
    colours: Iterable[Sequence[int]],
) -> None:
    """Keep what a start of the run, the first or a later one, said."""
    about = read_about(run)
    shown = {name: f"#{bytes(map(int, colour)).hex()}" for name, colour in zip(class_names, colours, strict=False)}
    _write_about(run, About([*about.starts, dict(environment)], about.notes, shown))
    add_notes(run, notes)


def add_notes(run: Run, notes: Iterable[str]) -> None:
    """Keep warnings and notes."""
    about = read_about(run)
    new = [note for note in dict.fromkeys(notes) if note not in about.notes]
    if new:
        _write_about(run, about._replace(notes=[*about.notes, *new]))


def _write_about(run, about):
    write_text(run.about, json.dumps(about._asdict(), indent=1) + "\n")


def read_about(run: Run) -> About:
    """What was kept; nothing if there is no such file, as in runs of earlier versions, or it is damaged."""
    try:
        found = About(**json.loads(read_text(run.about)))
        starts = [{str(k): str(v) for k, v in start.items()} for start in found.starts]
        colours = {name: c for name, c in found.colours.items() if re.fullmatch("#[0-9a-f]{6}", c)}
        return About(starts, list(map(str, found.notes)), colours)
    except (OSError, ValueError, TypeError, AttributeError):
        return About([], [], {})


def metric_lines(run: Run) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that is not complete is left out, and without the file there are none."""
    try:
        text = run.metrics.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            figures = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(figures, dict) and isinstance(figures.get("step"), int):
            found.append(figures)
    return found


def scores_of(run: Run, step: int) -> dict[str, Any] | None:
    """The scores that metrics.jsonl has of a step, on test or else on val; None if it has none."""
    found = {line["split"]: line for line in metric_lines(run) if "split" in line and line["step"] == step}
    return found.get("test") or found.get("val")


def cut_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove from metrics.jsonl the lines after `step`, the last line with the test result, and an incomplete last line.

    Returns:
        The figures of each line that is kept.

    Raises:
        UserError: the file has lines that a run did not write.
    """
    if not path.exists():
        return []
    kept, lines = [], read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            figures = json.loads(line)
            keep = figures["step"] <= step and figures.get("split") != "test"
            if figures.get("split") == "val":
                float(figures["miou"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if number == len(lines) and line.startswith("{"):
                continue
            raise UserError(
                f"{path}: line {number} was not written by a run; move the file away, or give another --output"
            ) from None
        if keep:
            kept.append((line, figures))
    write_text(path, "".join(line + "\n" for line, _ in kept))
    return [figures for _, figures in kept]
