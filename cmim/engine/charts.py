"""Charts of the reports as plain SVG in HTML. Every text from outside goes through `escape`."""

import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MOST_POINTS = 240
"""Of a curve: more are thinned out, so that a long run's page stays small."""
COLOURS = 8
"""Of the template, for curves in one chart."""
WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 156


class Curve(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    """(step, value) by step."""
    colour: int = 0
    faint: bool = False
    """A thin line in the background."""


def escape(text: object) -> str:
    """A text as HTML shows it literally, also within quotes; what a page must not hold becomes a question mark."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return html.escape(shown.encode("utf-8", "replace").decode())


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points, with the lowest and the highest of every part of the curve, and both ends."""
    if len(points) <= MOST_POINTS:
        return list(points)
    inner, parts = points[1:-1], MOST_POINTS // 2 - 1
    kept = [points[0]]
    for i in range(parts):
        part = inner[len(inner) * i // parts : len(inner) * (i + 1) // parts]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]


def number(value: float | None) -> str:
    """At most four significant digits."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    return f"{value:.2e}" if abs(value) >= 1e5 or abs(value) < 1e-3 else f"{value:.4g}"


def percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def line_chart(title: str, curves: Sequence[Curve], about: str = "", span: tuple[float, float] | None = None) -> str:
    """Values over the steps.

    Args:
        title: stands above.
        curves: those with points are drawn; those that are not faint are listed, if there are several.
        about: a line below.
        span: the values that the axis shows at least.
    """
    curves = [curve._replace(points=thinned(curve.points)) for curve in curves if curve.points]
    if not curves:
        return ""
    named = [curve for curve in curves if not curve.faint]
    steps = [x for curve in curves for x, _ in curve.points]
    values = [y for curve in curves for _, y in curve.points] + list(span or ())
    first, last = min(steps), max(steps)
    marks = ticks(min(values), max(values))
    low, high = min(marks[0], *values), max(marks[-1], *values)
    across = lambda x: LEFT + (RIGHT - LEFT) * ((x - first) / (last - first) if last > first else 0.5)  # noqa: E731
    up = lambda y: BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low)  # noqa: E731
    parts = []
    for mark in marks:
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{up(mark):.1f}" y2="{up(mark):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(mark) + 4:.1f}" text-anchor="end">{_short(mark)}</text>')
    places = ((first, "start"), ((first + last) / 2, "middle"), (last, "end")) if last > first else ((first, "middle"),)
    for x, anchor in places:
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{_short(round(x))}</text>')
    for curve in curves:
        kind, colour = f"line{' faint' * curve.faint}", curve.colour % COLOURS
        if len(curve.points) < 16 and not curve.faint:
            dots = (f'<circle class="f{colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.6"/>' for x, y in curve.points)
            parts += dots
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curve.points)
        parts.append(f'<polyline class="{kind} c{colour}" points="{path}"/>')
    shown = [
        {"n": curve.name, "x": [x for x, _ in curve.points], "y": [float(f"{y:.5g}") for _, y in curve.points]}
        for curve in named
    ]
    final = named[0].points[-1] if len(named) == 1 else None
    said = f"last {number(final[1])}" if final else ""
    lowest, highest = (f(y for c in named for _, y in c.points) for f in (min, max))
    label = (
        f"{title}: {'; '.join(f'{c.name} ends at {number(c.points[-1][1])}' for c in named)}; between {number(lowest)} and"
    )
    label += f" {number(highest)}. Arrow keys read values."
    return (
        f'<figure class="chart" tabindex="0" aria-label="{escape(label)}"><figcaption><b>{escape(title)}</b>'
        f'<output aria-live="polite">{said}</output></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true" data-frame="{LEFT} {RIGHT} {first} {last}" '
        f'data-series="{escape(json.dumps(shown, separators=(",", ":")))}">{"".join(parts)}'
        f'<line class="cross" x1="0" x2="0" y1="{TOP}" y2="{BOTTOM}"/></svg>'
        + (_key([(c.name, c.colour) for c in named]) if len(named) > 1 else "")
        + (f"<p>{escape(about)}</p>" if about else "")
        + "</figure>"
    )


def _key(entries: Iterable[tuple[str, int]]) -> str:
    square = '<svg viewBox="0 0 12 12" aria-hidden="true"><rect class="f{}" width="12" height="12" rx="2"/></svg>'
    return f'<ul class="key">{"".join(f"<li>{square.format(c % COLOURS)}{escape(name)}</li>" for name, c in entries)}</ul>'


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose a range."""
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        around = abs(low) * 0.1 or 1.0
        low, high = low - around, high + around
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    marks = [step * i for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
    return [float(f"{mark:.10g}") for mark in marks]


def _short(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")


def swatch(colour: str) -> str:
    """A square of the colour `#rrggbb` of a class."""
    square = f'<rect width="12" height="12" rx="2" fill="{escape(colour)}"/>'
    return f'<svg class="swatch" viewBox="0 0 12 12" aria-hidden="true">{square}</svg>'


_BAR = '<svg viewBox="0 0 100 12"'


def bar(share: float | None) -> str:
    """A share from 0 to 1."""
    level = f'<rect class="level" width="{100 * share:.1f}" height="12"/>' if share else ""
    track = '<rect class="track" width="100" height="12"/>'
    return f'{_BAR} preserveAspectRatio="none" aria-hidden="true">{track}{level}</svg>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", wide: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; columns `wide` are left out on a narrow screen."""

    def kind(i, cell=""):
        names = " ".join(["bar"] * cell.startswith(_BAR) + ["wide"] * (i in wide))
        return f' class="{names}"' if names else ""

    heads = "".join(f'<th scope="col"{kind(i)}>{cell}</th>' for i, cell in enumerate(head))
    cells = ("".join(f"<td{kind(i, cell)}>{cell}</td>" for i, cell in enumerate(row)) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    title = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    label = f' aria-label="{escape(caption)}"' if caption else ""
    content = f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
    return f'{title}<div class="scroll" tabindex="0"><table{label}>{content}</table></div>'


def matrix_chart(names: Sequence[str], pixels: Sequence[Sequence[int]]) -> str:
    """A confusion matrix, each row divided by its sum: rows are the truth, columns the prediction."""
    count = len(names)
    side, head, most = max(15, min(46, 460 // count)), 96, max((len(n) for n in names), default=1)
    left = min(130, 10 + 7 * min(18, most))
    width, height = left + side * count + 40, head + side * count + 4
    cut = lambda name: name if len(name) <= 17 else name[:16] + "…"  # noqa: E731
    parts = []
    for i, (name, row) in enumerate(zip(names, pixels, strict=True)):
        y, total = head + side * i, sum(row)
        parts.append(
            f'<text class="name" x="{left - 6}" y="{y + side / 2 + 4:.0f}" text-anchor="end">{escape(cut(name))}</text>'
        )
        x = left + side * i + side / 2 + 3
        parts.append(f'<text class="name" transform="translate({x:.0f} {head - 6}) rotate(-50)">{escape(cut(name))}</text>')
        for k, n in enumerate(row):
            share = n / total if total else 0
            x = left + side * k
            said = f"{name} taken for {names[k]}" if i != k else f"{name} right"
            parts.append(
                f"<g><title>{escape(said)}: {percent(share)} %, {n} pixels</title>"
                f'<rect class="frame" x="{x}" y="{y}" width="{side}" height="{side}"/>'
                f'<rect class="cell" x="{x}" y="{y}" width="{side}" height="{side}" fill-opacity="{share:.3f}"/></g>'
            )
            if side >= 26 and share >= 0.005:
                kind, place = "high" if share > 0.55 else "low", f'x="{x + side / 2}" y="{y + side / 2 + 4:.0f}"'
                parts.append(f'<text class="{kind}" {place} text-anchor="middle">{100 * share:.0f}</text>')
        parts.append(f'<rect class="own" x="{left + side * i}" y="{y}" width="{side}" height="{side}"/>')
    return (
        '<div class="scroll" tabindex="0" role="img" aria-label="confusion matrix; the table beside it lists the largest">'
        f'<svg class="matrix" viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(parts)}</svg></div>'
    )


class Row(NamedTuple):
    """A row of `range_chart`."""

    name: str
    middle: float
    low: float
    high: float
    points: Sequence[tuple[str, float]] = ()
    """Single values with what they are."""
    said: str = ""
    """Stands at the end of the row."""


def range_chart(title: str, rows: Sequence[Row], about: str = "", zero: bool = False) -> str:
    """Means with ranges side by side, and single values; with a line at zero by option."""
    values = [v for row in rows for v in (row.low, row.high, row.middle, *(v for _, v in row.points)) if math.isfinite(v)]
    marks = ticks(min([*values, *([0.0] * zero)]), max([*values, *([0.0] * zero)]))
    low, high, line = marks[0], marks[-1], 44
    bottom = 8 + line * len(rows)
    across = lambda v: 12 + (WIDTH - 24) * (min(max(v, low), high) - low) / (high - low)  # noqa: E731
    parts = []
    for mark in marks:
        kind = "zero" if zero and mark == 0 else "axis"
        parts.append(f'<line class="{kind}" x1="{across(mark):.1f}" x2="{across(mark):.1f}" y1="4" y2="{bottom}"/>')
        parts.append(f'<text x="{across(mark):.1f}" y="{bottom + 15}" text-anchor="middle">{_short(mark)}</text>')
    for i, row in enumerate(rows):
        y, colour = 8 + line * i, i % COLOURS
        parts.append(f'<text class="name" x="4" y="{y + 13}">{escape(row.name[:34])}</text>')
        parts.append(f'<text x="{WIDTH - 4}" y="{y + 13}" text-anchor="end">{escape(row.said)}</text>')
        middle = y + 28
        if math.isfinite(row.low) and math.isfinite(row.high):
            parts.append(
                f'<line class="range c{colour}" x1="{across(row.low):.1f}" x2="{across(row.high):.1f}" '
                f'y1="{middle}" y2="{middle}"/>'
            )
        for said, value in row.points:
            parts.append(
                f'<circle class="dot f{colour}" cx="{across(value):.1f}" cy="{middle}" r="4">'
                f"<title>{escape(said)}: {value:.2f}</title></circle>"
            )
        x = across(row.middle)
        parts.append(
            f'<line class="c{colour}" stroke-width="3" x1="{x:.1f}" x2="{x:.1f}" y1="{middle - 8}" y2="{middle + 8}"/>'
        )
    label = f"{title}: " + "; ".join(f"{row.name} {row.said}" for row in rows)
    return (
        f'<figure aria-label="{escape(label)}"><figcaption><b>{escape(title)}</b></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {bottom + 20}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        + (f"<p>{escape(about)}</p>" if about else "")
        + "</figure>"
    )
