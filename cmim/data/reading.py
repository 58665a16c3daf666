"""How the masks of a data set are to be read: as class ids, or by colour, decided from what all masks hold."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from math import dist
from pathlib import Path

import numpy as np

from cmim.data.class_files import WITHOUT_CLASS, ClassFile
from cmim.data.colours import IGNORE, JPEG_TOLERANCE, Colours, group_colours
from cmim.data.datasets import IGNORED
from cmim.data.inspection import MaskFacts
from cmim.data.labels import Encoding

FLAT = 64
"""Masks of more colours than this have blurred edges, or are JPEGs."""
MOST = 254
"""Classes at most; masks of more values number objects."""
LEAST_GROUP, LEAST_PEAK = 0.002, 0.05
"""Where colours are blurred: shares from which on a colour, with those near it, counts as a class. A colour that is drawn is
itself frequent among those near it; mixtures at edges are not."""
MIXED = 10
"""How many times as frequent the colours are between which one counts as their mixture."""
DARK = 32
"""Grey values of JPEG masks below this, other than 0, are taken for class ids where they are frequent."""


@dataclass
class Reading:
    data: dict[str, object] = field(default_factory=dict)
    """Values of `DataSettings`: classes, label_map, colours, colour_tolerance."""
    kind: str = ""
    """What the masks are, in words."""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unnamed: bool = False
    """Whether the classes have no names yet."""


def stored(mask: MaskFacts, colours: Colours | None) -> dict[int, int]:
    """{value: pixels} of a mask as `cmim.data.survey` counts them; `colours` where it is read by colour."""
    if colours is None:
        return mask.values or {}
    found = Counter()
    if mask.colours:
        rgb = np.array([_rgb(colour) for colour in mask.colours], np.uint8)
        for value, pixels in zip(colours.values(rgb[None])[0].tolist(), mask.colours.values(), strict=True):
            found[value] += pixels
    return dict(found)


def class_pixels(mask: MaskFacts, encoding: Encoding) -> dict[int, int]:
    """{class id, IGNORED, or -1 for values that are no class: pixels} of a mask."""
    found = Counter()
    for value, pixels in stored(mask, encoding.colours).items():
        found[int(encoding.table[value]) if 0 <= value < len(encoding.table) else -1] += pixels
    return dict(found)


def decide(masks: Mapping[Path, MaskFacts], named: ClassFile | None) -> Reading:
    """How masks are read; those that cannot be opened are left aside.

    Args:
        named: the names of the classes, if a file has them.
    """
    damaged = [path for path, facts in masks.items() if facts.error]
    masks = {path: facts for path, facts in masks.items() if facts.error is None}
    if not masks:
        return Reading(problems=[] if damaged else ["there is no mask"])
    coloured = {path: facts for path, facts in masks.items() if facts.values is None}
    if not coloured:
        return _by_palette(masks, named) or _by_value(masks, named, damaged)
    jpeg = [path for path, facts in coloured.items() if facts.lossy]
    total = _sum(facts.colours for facts in masks.values())
    if jpeg and all(_grey(colour) for colour in total) and _destroyed(total):
        return Reading(
            kind="JPEG masks of class ids",
            problems=[
                f"{jpeg[0]} and {len(jpeg) - 1} more masks are JPEGs of class ids, which JPEG has mixed up: export the "
                "masks as PNG from where they were drawn"
            ],
        )
    ids = [path for path, facts in masks.items() if facts.values is not None and facts.palette is None]
    if ids and len(ids) < len(masks) and any(not _grey(colour) for colour in _sum(f.colours for f in coloured.values())):
        few, many = sorted((ids, list(coloured)), key=len)
        what = ("hold numbers", "colours") if few is ids else ("hold colours", "numbers")
        return Reading(
            kind="masks of several kinds",
            problems=[
                f"{len(few)} masks {what[0]} where {len(many)} hold {what[1]}, such as {few[0]}: export all masks in one way"
            ],
        )
    return _by_colour(masks, total, named, "JPEG masks" if jpeg else "RGB masks")


def _by_palette(masks, named):
    """Palette masks whose indices stand for other colours from mask to mask; None where they agree, or where indices are
    meant."""
    palettes = {path: facts for path, facts in masks.items() if facts.palette is not None}
    of_index, of_colour = {}, {}
    for facts in palettes.values():
        for index, colour in facts.palette.items():
            of_index.setdefault(index, set()).add(colour)
            of_colour.setdefault(colour, set()).add(index)
    if len(palettes) < len(masks) or max(map(len, of_index.values()), default=0) < 2:
        return None
    total = _sum(facts.colours for facts in palettes.values())
    if max(map(len, of_colour.values())) > 1 and len(total) <= MOST:
        reading = _by_colour(palettes, total, named, "palette masks")
        reading.notes.insert(
            0,
            "the palettes differ between masks: the same index stands for several colours, and the same colour has several "
            "indices, so the masks are read by their colours",
        )
        return reading
    return None


def _by_value(masks, named, damaged):
    values = _sum(facts.values for facts in masks.values())
    found = sorted(v for v in values if v != IGNORED)
    modes = Counter(facts.kind for facts in masks.values())
    kind = {"P": "palette", "L": "grey", "RGB": "grey RGB", "RGBA": "grey RGBA", "1": "black-and-white"}
    shown = " and ".join(f"{kind.get(mode, mode)}" for mode, _ in modes.most_common())
    reading = Reading(kind=f"{shown} masks of the values {_range(values)}")
    if named is not None and named.values is not None:
        return _named_values(reading, masks, values, named)
    if len(values) == 1 and not damaged:
        reading.problems.append(
            f"all masks hold the value {next(iter(values))} only, so that there is nothing to learn: export them again"
        )
        return reading
    if (
        0 in values
        and IGNORED in values
        and len(values) > FLAT
        and (values[0] + values[IGNORED]) > 0.9 * sum(values.values())
    ):
        return _by_colour(masks, _sum(f.colours for f in masks.values()), named, "grey masks with blurred edges")
    if len(found) > MOST:
        most = max(masks, key=lambda path: len(masks[path].values))
        reading.problems.append(
            f"the masks hold {len(found)} values, such as {most}: they seem to number objects, not classes; export masks of "
            "classes"
        )
        return reading
    names = list(named.names) if named is not None else None
    spread = found + [IGNORED] * (IGNORED in values)
    if set(values) == {0, IGNORED}:
        if names is not None and len(names) != 2:
            reading.problems.append(
                f"the masks hold 0 and 255, two classes, but {named.path} names {len(names)}: correct it"
            )
        reading.data = {"classes": names or ["background", "object"], "label_map": {IGNORED: 1}}
        reading.unnamed = names is None
        return reading
    even = IGNORED in values and len(spread) > 2 and spread[0] == 0 and spread[1] > 1 and _even(spread)
    if names is None:
        kept = spread if even else found
        reading.unnamed = True
        in_order = kept == list(range(len(kept)))
        reading.data["classes"] = [f"{'class' if in_order else 'value'} {value}" for value in kept]
        if not in_order:
            reading.data["label_map"] = {value: k for k, value in enumerate(kept) if value != k}
        return reading
    reading.data["classes"] = names
    beyond = [value for value in found if value >= len(names)]
    if not beyond:
        return reading
    if len(names) in (len(found), len(spread) * even):
        kept = found if len(found) == len(names) else spread
        reading.data["label_map"] = {value: k for k, value in enumerate(kept) if value != k}
        reading.notes.append(
            f"the values {_range(kept)} are taken in their order for the {len(names)} names of {named.path}"
        )
        return reading
    _beyond(reading, masks, beyond, f"{named.path} names {len(names)} classes, 0 to {len(names) - 1}")
    return reading


def _beyond(reading, masks, beyond, why):
    where = [path for path, facts in masks.items() if set(facts.values) & set(beyond)]
    shown = ", ".join(map(str, beyond[:6])) + f" and {len(beyond) - 6} more" * (len(beyond) > 6)
    one = len(beyond) == 1
    reading.problems.append(
        f"the value{'' if one else 's'} {shown} in {len(where)} mask{'s' * (len(where) > 1)}, such as {where[0]}, "
        f"{'is' if one else 'are'} no class: {why}; add the missing name{'' if one else 's'}, or repair the masks, or map "
        f"{'it' if one else 'them'} to no class: data.label_map {{{beyond[0]}: {IGNORED}}}"
    )


def _named_values(reading, masks, values, named):
    names, labels = [], {}
    for name, value in zip(named.names, named.values, strict=True):
        if name.lower() in WITHOUT_CLASS:
            labels[value] = IGNORED
        else:
            labels[value] = len(names)
            names.append(name)
    reading.data["classes"] = names
    moved = {value: k for value, k in labels.items() if value != k}
    if moved:
        reading.data["label_map"] = moved
    reading.notes.append(f"names and values of the classes are those of {named.path}")
    beyond = sorted(value for value in values if value not in labels and value != IGNORED)
    if beyond:
        _beyond(reading, masks, beyond, f"{named.path} has no such value")
    return reading


def _by_colour(masks, total, named, kind):
    reading = Reading(kind=f"{kind} of {len(total)} colours")
    pixels = sum(total.values())
    if named is not None and named.colours is not None:
        pairs = [(n, c) for n, c in zip(named.names, named.colours, strict=True) if n.lower() not in WITHOUT_CLASS]
        ignored = [c for n, c in zip(named.names, named.colours, strict=True) if n.lower() in WITHOUT_CLASS]
        names, colours = map(list, zip(*pairs, strict=True))
        reading.notes.append(f"names and colours of the classes are those of {named.path}")
    else:
        blurred = len(total) > FLAT or any(facts.lossy for facts in masks.values())
        groups = group_colours(total) if blurred else total.most_common()
        if blurred:
            groups = [(c, n) for c, n in groups if n >= LEAST_GROUP * pixels and total[c] >= LEAST_PEAK * n]
            groups = [(c, n) for c, n in groups if not _is_mixture(c, n, groups)]
        colours, ignored = [c for c, _ in groups], []
        if kind.startswith("JPEG"):  # the most frequent colour may be off by one from the one that was drawn
            colours = [_snapped(colour) for colour in colours]
        two = set(colours) == {"#000000", "#ffffff"}
        colours = ["#000000", "#ffffff"] if two else colours
        names = ["background", "object"] if two else [f"colour {colour[1:]}" for colour in colours]
        if named is not None and two and len(named.names) == 2:
            names = list(named.names)
        else:
            reading.unnamed = True
            if named is not None:
                reading.notes.append(
                    f"{named.path} names {len(named.names)} classes, but not their colours, so the {len(colours)} colours "
                    "have no names yet: write them into data.colours"
                )
    if len(colours) < 2 or len(colours) > MOST:
        what = "one colour only" if len(colours) < 2 else f"{len(colours)} colours, as pictures do"
        reading.problems.append(f"the masks hold {what}: take masks in which a colour stands for a class")
        return reading
    far = {colour: n for colour, n in total.items() if colour not in (*colours, *ignored)}
    if far:
        grey = len(colours) == 2 and all(map(_grey, colours))  # then there is nothing to mix up
        if len(total) > FLAT or any(facts.lossy for facts in masks.values()):
            half = round(dist(_rgb(colours[0]), _rgb(colours[1])) / 2)
            reading.data["colour_tolerance"] = half if grey else JPEG_TOLERANCE
            if reading.unnamed and not grey:
                reading.notes.append(
                    f"the masks have blurred edges: {len(colours)} frequent colours are taken for classes; add one that "
                    "lacks, and take away one that is only a mixture at edges, in data.colours"
                )
        else:
            most = max(far, key=far.get)
            where = next(path for path, facts in masks.items() if most in facts.colours)
            reading.problems.append(
                f"{len(far)} colours of the masks, such as {most} in {where}, are not in {named.path}: add them, or give "
                f"them in data.colours as `{IGNORE}`"
            )
    reading.data = {"classes": names, "colours": dict(zip(names, colours, strict=True)), **reading.data}
    if ignored:
        reading.data["colours"][IGNORE] = ignored[0] if len(ignored) == 1 else ignored
    return reading


def _is_mixture(colour, count, groups):
    """Whether a colour is rare and lies between two that are frequent, as those at the edges of a JPEG do."""
    frequent = [np.array(_rgb(c)) for c, n in groups if n > MIXED * count]
    for a, b in combinations(frequent, 2):
        step = b - a
        t = np.clip(np.dot(np.array(_rgb(colour)) - a, step) / np.dot(step, step), 0, 1)
        if dist(_rgb(colour), a + t * step) < JPEG_TOLERANCE:
            return True
    return False


def _snapped(colour):
    """A colour whose channels are set to 0 or 255 where they are close to it, as JPEG leaves them."""
    channels = [0 if v < 4 else 255 if v > 251 else v for v in _rgb(colour)]
    return f"#{bytes(channels).hex()}"


def _destroyed(total):
    """Whether grey JPEG masks seem to hold class ids: dark grey is frequent, where black and white would leave little."""
    dark = sum(n for colour, n in total.items() if 0 < int(colour[1:3], 16) < DARK)
    return dark > 0.3 * total.get("#000000", 0)


def _sum(counters):
    total = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _grey(colour):
    return colour[1:3] == colour[3:5] == colour[5:7]


def _rgb(colour):
    return tuple(bytes.fromhex(colour[1:]))


def _even(values):
    """Whether values have about equal distances, as grey levels that were chosen to be seen."""
    steps = np.diff(values)
    return steps.max() - steps.min() <= 2


def _range(values):
    """Values as `0 to 4 and 255`."""
    values, runs = sorted(values), []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    shown = [str(a) if a == b else f"{a} to {b}" if b > a + 1 else f"{a}, {b}" for a, b in runs]
    more = f" and {len(shown) - 8} more ranges" if len(shown) > 8 else ""
    return ", ".join(shown[:8]) + more if len(shown) != 2 else " and ".join(shown)
