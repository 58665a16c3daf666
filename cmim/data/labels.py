"""What the numbers in a mask stand for, and what classes are called and coloured."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmim.data.colours import IGNORE, NO_CLASS, Colours
from cmim.data.datasets import IGNORED
from cmim.errors import UserError
from cmim.settings import DataSettings


@dataclass(frozen=True)
class Encoding:
    table: np.ndarray
    """(65536 + 1,) int16: for each mask value its class id, IGNORED, or -1 where it is no class; the last entry is -1."""
    remedy: str
    """What to do about a value that is no class."""
    colours: Colours | None = None
    """Of masks in colours; their values are then those of `Colours.values`."""


def label_table(settings: DataSettings, num_classes: int) -> np.ndarray:
    """The table of an `Encoding` from the settings: `label_map` is applied first, `ignore` to the mapped
    value; IGNORED as a target always means no class."""
    targets = np.arange(1 << 16)
    for value, target in settings.label_map.items():
        if not 0 <= value < len(targets):
            raise UserError(f"data.label_map: {value} cannot be a mask value; it must lie from 0 to {len(targets) - 1}")
        if target not in (settings.ignore, IGNORED) and not 0 <= target < num_classes:
            raise UserError(
                f"data.label_map maps {value} to {target}, but the classes are 0 to {num_classes - 1}; "
                f"{IGNORED} stands for no class"
            )
        if target == settings.ignore < num_classes:
            raise UserError(
                f"data.label_map maps {value} to {target}, which data.ignore then leaves out; map values without a class to "
                f"{IGNORED} and leave data.ignore away"
            )
        targets[value] = target
    table = np.where(targets < num_classes, targets, -1)
    table[targets == settings.ignore] = IGNORED
    table[[value for value, target in settings.label_map.items() if target == IGNORED]] = IGNORED
    return np.append(table, -1).astype(np.int16)


def table_of(classes: dict[int, int], ignored: Iterable[int]) -> np.ndarray:
    """The table of an `Encoding` in which `classes` maps mask values to class ids and the others of `ignored` have none."""
    table = np.full((1 << 16) + 1, -1, np.int16)
    table[list(ignored)] = IGNORED
    table[list(classes)] = list(classes.values())
    return table


def encoding_of(settings: DataSettings, colours: Colours | None, num_classes: int) -> Encoding:
    """The `Encoding` that the settings describe; `colours` are those of `data.colours`."""
    if colours is not None:  # pixels beyond a tolerance are ignored; without one they are a mistake
        ignored = [IGNORED, NO_CLASS] if colours.tolerance else [IGNORED]
        return Encoding(table_of({k: k for k in range(num_classes)}, ignored), "", colours)
    return Encoding(
        label_table(settings, num_classes),
        "map it with data.label_map, leave it out with data.ignore, or name more classes in data.classes or classes.txt",
    )


def class_ids(values: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, int | None]:
    """Class ids (H, W) uint8 of the integers of a mask, IGNORED where it has no class; and the smallest value that is no
    class, None if all are."""
    if values.dtype == np.uint8:  # most masks are bytes, and translating bytes is faster than indexing
        stored = bytearray(np.ascontiguousarray(values))
        wrong = stored.translate(None, bytes(np.flatnonzero(table[:256] >= 0).tolist()))
        ids = np.frombuffer(stored.translate(table[:256].astype(np.uint8).tobytes()), np.uint8).reshape(values.shape)
    else:
        values = values.astype(np.int64)
        ids = table[np.where((values >= 0) & (values < len(table)), values, -1)]
        wrong = values[ids < 0]
        ids = ids.astype(np.uint8)
    return ids, int(min(wrong)) if len(wrong) else None


def class_names(settings: DataSettings, root: Path) -> tuple[str, ...]:
    """The names from `data.classes`; else from ROOT/classes.txt, one a line, blank lines skipped; else those of a mapping
    `data.colours`."""
    names, source = settings.classes, "data.classes"
    if isinstance(names, int):
        names = [f"class {k}" for k in range(names)]
    elif names is None:
        source = root / "classes.txt"
        if not source.is_file() and isinstance(settings.colours, dict):
            return _checked([name for name in settings.colours if name.strip() != IGNORE], "data.colours")
        if not source.is_file():
            raise UserError(
                f"the classes are unknown: write {source}, one name a line, or give their number as --data.classes"
            )
        try:
            names = [line for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError):
            raise UserError(f"cannot read {source}: save it as UTF-8 text, one class name a line") from None
    return _checked(names, source)


def _checked(names, source):
    names = tuple(name.strip() for name in names)
    repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if repeated is not None or "" in names:
        what = "an empty name" if "" in names else f"the name {repeated!r} twice"
        raise UserError(f"{source} holds {what}: every class needs a name of its own")
    if not 2 <= len(names) <= 255:
        raise UserError(f"{source} gives {len(names)} classes; there must be 2 to 255, the background counts as one")
    return names


def colour_map(count: int) -> np.ndarray:
    """(count, 3) uint8, the colours of PASCAL VOC: the bits of a class id, three at a time, from the highest bit down."""
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((np.arange(count) >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours
