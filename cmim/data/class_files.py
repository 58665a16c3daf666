"""Names of classes, and what stands for them in masks, from the files that data sets and labelling programs put beside
their images."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cmim.data.folder import walk
from cmim.settings import as_colour

NAME_FILES = ("classes.txt", "class_names.txt", "labels.txt", "label_names.txt", "names.txt", "codes.txt")
TABLES = (
    "class_dict.csv", "classes.csv", "_classes.csv", "labels.csv", "label_colors.csv", "label_colors.txt", "labelmap.txt",
    "label_map.txt", "classes.json", "labels.json",
)  # fmt: skip
WITHOUT_CLASS = ("unlabeled", "unlabelled", "ignore", "__ignore__", "void")
"""Names, in small letters, under which such files list pixels that have no class."""
_LARGEST = 1 << 20


@dataclass(frozen=True)
class ClassFile:
    """The names of a file, in its order."""

    path: Path
    names: tuple[str, ...]
    colours: tuple[str, ...] | None = None
    """`#rrggbb` of each, where the file gives colours."""
    values: tuple[int, ...] | None = None
    """Mask value of each, where the file gives values."""


def read_class_file(root: Path) -> ClassFile | None:
    """The first file below `root` (down to two folders) that names the classes: classes.txt and the like, with one name a
    line; tables of names with colours or values (CSV, CVAT's labelmap.txt, CamVid's label_colors.txt, JSON)."""
    paths = [path for path in walk(root) if len(path.relative_to(root).parts) <= 3]
    by_name = {}
    for path in sorted(paths, key=lambda p: len(p.parts)):
        by_name.setdefault(path.name.lower(), path)
    for name in (NAME_FILES[0], *TABLES, *NAME_FILES[1:]):
        path = by_name.get(name)
        if path is None or path.stat().st_size > _LARGEST:
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue
        found = _names(path, text) if name in NAME_FILES else _table(path, text)
        if found is not None and len(found.names) > 1:
            return found
    return None


def _names(path, text):
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if names and all(re.fullmatch(r"\d+\s*[:,\t ]\s*\S.*", name) for name in names):  # `0: building`
        pairs = [re.split(r"\s*[:,\t ]\s*", name, maxsplit=1) for name in names]
        return ClassFile(path, tuple(name for _, name in pairs), values=tuple(int(value) for value, _ in pairs))
    if names and names[0].lower() in WITHOUT_CLASS and path.name == "labels.txt":  # labelme: __ignore__ comes first, as -1
        names = names[1:]
    return ClassFile(path, tuple(names))


def _table(path, text):
    rows = _json_rows(text) if path.suffix.lower() == ".json" else _text_rows(text)
    rows = [(name.strip(), colour, value) for name, colour, value in rows or () if name and name.strip()]
    names = tuple(name for name, _, _ in rows)
    if len(set(names)) < len(names):
        return None
    colours = tuple(colour for _, colour, _ in rows) if rows and all(colour for _, colour, _ in rows) else None
    values = tuple(value for _, _, value in rows) if rows and all(value is not None for _, _, value in rows) else None
    return ClassFile(path, names, colours, values) if colours or values else None


def _text_rows(text):
    """(name, colour, value) of lines such as `road,128,64,128`, `road:128,64,128::`, `128 64 128 road` and `3,road`."""
    for line in text.splitlines():
        line = re.sub(r"^\s*(\d+)\s+(\d+)\s+(\d+)\s", r"\1,\2,\3,", line)
        words = re.split(r"[:,;\t]+", line.replace('"', "").strip(" ,:;#\t"))
        numbers = [int(word) for word in words if re.fullmatch(r"\s*\d{1,5}\s*", word)]
        names = [word.strip() for word in words if re.search(r"[^\W\d]", word) and not word.strip().startswith("#")]
        if len(numbers) == 3 and max(numbers) < 256 and names:
            yield names[0], as_colour(numbers, names[0]), None
        elif len(numbers) == 4 and max(numbers[1:]) < 256 and names:  # a value and a colour
            yield names[0], as_colour(numbers[1:], names[0]), numbers[0]
        elif len(numbers) == 1 and len(names) == 1:
            yield names[0], None, numbers[0]


def _json_rows(text):
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if lists else []
    for entry in found if isinstance(found, list) else ():
        if isinstance(entry, dict):
            name = next((entry[key] for key in ("title", "name", "label") if isinstance(entry.get(key), str)), None)
            colour = next((entry[key] for key in ("color", "colour", "hex") if key in entry), None)
            if isinstance(colour, str) and not re.fullmatch("#[0-9a-fA-F]{6}", colour):
                colour = None
            if isinstance(colour, list) and not (len(colour) == 3 and all(type(c) is int and 0 <= c < 256 for c in colour)):
                colour = None
            value = next((entry[key] for key in ("id", "value") if type(entry.get(key)) is int), None)
            yield name, colour and as_colour(colour, name), value
