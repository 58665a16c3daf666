"""Masks in colours: which class a colour stands for, and what to say of colours that stand for none."""

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cmim.data.datasets import IGNORED
from cmim.errors import UserError
from cmim.settings import DataSettings

NO_CLASS = 254
"""What `Colours.values` gives a pixel whose colour is that of no class and of no pixel to ignore."""
IGNORE = "ignore"
"""The name of a mapping `data.colours` under which colours without a class stand."""
SHOWN = 12
"""Colours that a message names at most."""
MANY = 256
"""Masks of more colours are taken for blurred ones."""
JPEG_TOLERANCE = 60
"""What the documentation and the messages advise for JPEG masks."""


@dataclass(frozen=True)
class Colours:
    """The colours of the classes, as `#rrggbb`."""

    classes: tuple[tuple[str, ...], ...]
    """Of each class one or several; the first is that of pictures."""
    ignored: tuple[str, ...]
    """Colours of pixels without a class."""
    tolerance: float
    """Distance in RGB up to which a pixel takes the nearest colour."""

    def values(self, pixels: np.ndarray) -> np.ndarray:
        """What a mask in colours says, pixel by pixel.

        Args:
            pixels: (H, W, 3) uint8.

        Returns:
            (H, W) uint8: class ids, IGNORED, or NO_CLASS.
        """
        with _building:
            table = _table(self)
        return table[_codes(pixels)]

    def shown(self) -> np.ndarray:
        """(K, 3) uint8: the colour of each class in pictures."""
        return np.array([_rgb(colours[0]) for colours in self.classes], np.uint8)

    def complaint(self, path: object, pixels: np.ndarray) -> UserError:
        """The error of a mask (H, W, 3) uint8 some of whose colours are no class's."""
        found = count_colours(pixels[self.values(pixels) == NO_CLASS])
        (colour, count), *others = found.most_common()
        share, more = count / pixels[..., 0].size, sum(n for _, n in others) / pixels[..., 0].size
        also = f", and {len(others)} more ({_percent(more)})" if others else ""
        return UserError(
            f"{path} has the colour {colour} in {_percent(share)} of its pixels{also}, which is no class: add it to "
            f"data.colours, under `{IGNORE}` if it stands for no class; for edges that are blurred give "
            f"--data.colour_tolerance {JPEG_TOLERANCE}"
        )


_building = threading.Lock()


@lru_cache(maxsize=2)
def _table(colours):
    """(2^24,) uint8: what each colour stands for."""
    table = np.full((256, 256, 256), NO_CLASS, np.uint8)
    nearest = np.full(table.shape, np.inf, np.float32) if colours.tolerance else None
    entries = [(c, k) for k, names in enumerate(colours.classes) for c in names] + [(c, IGNORED) for c in colours.ignored]
    for colour, value in entries:
        rgb = _rgb(colour)
        if nearest is None:
            table[rgb] = value
            continue
        reach = int(colours.tolerance)
        box = tuple(slice(max(0, c - reach), c + reach + 1) for c in rgb)
        r, g, b = (np.square(np.arange(256, dtype=np.float32)[part] - c) for part, c in zip(box, rgb, strict=True))
        distance = r[:, None, None] + g[:, None] + b
        closer = (distance <= colours.tolerance**2) & (distance < nearest[box])
        nearest[box][closer] = distance[closer]
        table[box][closer] = value
    return table.reshape(-1)


def class_colours(settings: DataSettings, names: Sequence[str]) -> Colours | None:
    """`data.colours` in the order of the classes `names`; None where it is not given.

    Raises:
        UserError: classes without a colour, colours of no class, or two classes of one colour.
    """
    given = settings.colours
    if given is None:
        return None
    if len(names) > NO_CLASS:
        raise UserError(f"data.colours serves {NO_CLASS} classes at most, here are {len(names)}: save masks of class ids")
    if isinstance(given, list):
        if len(given) != len(names):
            raise UserError(
                f"data.colours lists {len(given)} colours, but there are {len(names)} classes: give one for each in their "
                f"order, or a mapping, in which `{IGNORE}` names colours without a class"
            )
        classes, ignored = [(colour,) for colour in given], ()
    else:
        several = {name.strip(): (c,) if isinstance(c, str) else tuple(c) for name, c in given.items()}
        if IGNORE in names:
            raise UserError(f"a class is called {IGNORE}, which in data.colours stands for no class: rename it")
        ignored = several.pop(IGNORE, ())
        lacking, foreign = [n for n in names if n not in several], [n for n in several if n not in names]
        if lacking or foreign:
            what = f"has no colour for {lacking[0]}" if lacking else f"has a colour for {foreign[0]}, which is no class"
            raise UserError(f"data.colours {what}: the classes are {', '.join(names[:SHOWN])} (data.classes or classes.txt)")
        classes = [several[name] for name in names]
    uses = Counter(colour for colours in (*classes, ignored) for colour in colours)
    twice = [colour for colour, count in uses.items() if count > 1]
    if twice:
        raise UserError(f"data.colours gives {twice[0]} twice: a colour stands for one class")
    return Colours(tuple(classes), ignored, settings.colour_tolerance)


def count_colours(pixels: np.ndarray) -> Counter[str]:
    """How many of the pixels (..., 3) uint8 have each colour, `#rrggbb`."""
    codes, counts = np.unique(_codes(pixels), return_counts=True)
    return Counter({f"#{code:06x}": count for code, count in zip(codes.tolist(), counts.tolist(), strict=True)})


def colour_picture(path: object, found: Counter[str]) -> str:
    """What to say of a mask in colours where `data.colours` is not given; `found` are the colours of this mask, or of
    several."""
    total, blurred = sum(found.values()), len(found) > MANY
    most = group_colours(found) if blurred else found.most_common(SHOWN)
    value = ", ".join(f'name{i}: "{colour}"' for i, (colour, _) in enumerate(most))
    more = f", and {len(found) - SHOWN} more colours" if SHOWN < len(found) <= MANY else ""
    tolerance = f", with --data.colour_tolerance {JPEG_TOLERANCE} for its blurred edges" if blurred else ""
    return (
        f"{path} is a colour picture: give its colours with the names of your classes, `{IGNORE}` for none, as "
        f"--data.colours '{{{value}}}' ({', '.join(_percent(count / total) for _, count in most)}{more}){tolerance}; "
        "or save class ids as an indexed or grey PNG"
    )


def disagreeing_palettes(palettes: Iterable[Mapping[int, str]]) -> str | None:
    """A line on masks that are read by their indices where one of these has several colours; {index: colour} of each."""
    of_index = {}
    for palette in palettes:
        for index, colour in palette.items():
            of_index.setdefault(index, set()).add(colour)
    index = next((k for k, colours in sorted(of_index.items()) if len(colours) > 1), None)
    if index is None:
        return None
    colours = " or ".join(sorted(of_index[index])[:4])
    return (
        f"the palettes differ between masks: index {index} is {colours}; the indices are read, so look at the pictures, and "
        "if the colours are right, give data.colours"
    )


def group_colours(found: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent colours, each with those near it that are rarer: JPEG and blurred edges scatter a colour."""
    names, counts = zip(*found.most_common(1 << 14), strict=True)
    colours, counts, groups = np.array([_rgb(name) for name in names], np.int32), np.array(counts), []
    while len(colours) and len(groups) < SHOWN:
        near = np.square(colours - colours[0]).sum(1) <= JPEG_TOLERANCE**2
        groups.append((f"#{bytes(colours[0].tolist()).hex()}", int(counts[near].sum())))
        colours, counts = colours[~near], counts[~near]
    return sorted(groups, key=lambda group: -group[1])


def _codes(pixels):
    """Colours (..., 3) uint8 as integers 0xrrggbb, (...) int32."""
    codes = pixels[..., 0].astype(np.int32)
    for channel in (1, 2):
        codes <<= 8
        codes |= pixels[..., channel]
    return codes


def _rgb(colour):
    return tuple(bytes.fromhex(colour[1:]))


def _percent(share):
    return f"{100 * share:.1f}%" if share >= 0.001 else "under 0.1%"
