"""report.html of runs that are compared: variants side by side, paired differences with their intervals, curves."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from cmim.engine.charts import Curve, Row, escape, line_chart, percent, range_chart, table
from cmim.engine.report import fill_template, settings_text
from cmim.engine.study import Result, difference, interval, mean_and_spread, summary


def study_page(results: Mapping[str, Sequence[Result]], base: str, folder: Path) -> str:
    """The page of a comparison.

    Args:
        results: the results of each variant, in the order of the seeds.
        base: the variant that the others are compared with.
        folder: where the page will lie; run folders in it that have a report are linked.
    """
    split = results[base][0].split
    parts = {
        "Results": f"<div class='card'>{_table(results, base)}</div>",
        "Spread and differences": _ranges(results, base, split),
        "Curves": _curves(results),
        "Classes": _classes(results, base, split),
        "Runs": _runs(results, folder),
        "Settings": _settings(results),
    }
    seeds = [str(run.seed) for run in results[base]]
    lead = f"{len(results)} variants, seeds {', '.join(seeds)}; mIoU on {split} after the last step, in per cent"
    lead = f"<p class='soft'>{escape(lead)}; compared with <b>{escape(base)}</b>, seed by seed</p>"
    return fill_template(folder.resolve().name, lead, parts, "Written by cmim.compare; it needs no network.")


def _table(results, base) -> str:
    paired = len(results) > 1
    split = results[base][0].split
    head = ["variant", f"last on {split}, mean ± sd", "best on val, mean ± sd"]
    head += [f"minus {base} [95 %]", f"val minus {base} [95 %]", "val at its time [95 %]"] * paired + ["s/step"]
    rows = [[escape(cell) for cell in (name, *summary(results, name, base))] for name in results]
    said = "An interval that does not contain 0 is a difference beyond the spread of the seeds."
    return table([escape(cell) for cell in head], rows, said if paired and len(results[base]) > 1 else "")


def _percents(runs, key):
    return [100 * getattr(run, key) for run in runs]


def _ranges(results, base, split) -> str:
    rows = []
    for name, runs in results.items():
        values = _percents(runs, "miou")
        mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        points = [(f"seed {run.seed}", value) for run, value in zip(runs, values, strict=True)]
        rows.append(Row(name, mean, mean - spread, mean + spread, points, mean_and_spread(values)))
    charts = [range_chart(f"mIoU on {split}, %", rows, "Points are seeds, the upright line their mean, the bar ± one sd.")]
    if len(results) > 1:
        theirs, rows = _percents(results[base], "miou"), []
        for name, runs in results.items():
            values = _percents(runs, "miou")
            mean, half = (0.0, 0.0) if name == base else difference(values, theirs)
            points = [(f"seed {run.seed}", a - b) for run, a, b in zip(runs, values, theirs, strict=True) if name != base]
            said = "the base" if name == base else interval(values, theirs)
            rows.append(Row(name, mean, mean - half, mean + half, points, said))
        about = "Paired by seed; the bar is the 95 % interval of the mean by Student's t."
        charts.append(range_chart(f"difference to {base}, points of mIoU", rows, about, zero=True))
    return f"<div class='grid'>{''.join(charts)}</div>"


def _curves(results) -> str:
    means, faint = [], []
    for i, (name, runs) in enumerate(results.items()):
        by_step = {}
        for run in runs:
            for step, miou in run.val:
                by_step.setdefault(step, []).append(100 * miou)
        means.append(Curve(name, [(step, statistics.mean(v)) for step, v in sorted(by_step.items())], i))
        faint += [Curve(f"seed {run.seed}", [(x, 100 * y) for x, y in run.val], i, faint=True) for run in runs]
    shared = line_chart("mIoU on val, %, mean over the seeds", [*faint, *means], "Thin lines are single seeds.")
    span = [y for curve in (*faint, *means) for _, y in curve.points if math.isfinite(y)]
    alone = []
    for name, runs in results.items():
        curves = [Curve(f"seed {run.seed}", [(x, 100 * y) for x, y in run.val], k) for k, run in enumerate(runs)]
        alone.append(line_chart(f"{name}: mIoU on val, %", curves, "", (min(span), max(span)) if span else None))
    return f"<div class='grid'>{shared}{''.join(alone) if len(results) > 1 else ''}</div>"


def _classes(results, base, split) -> str:
    names = list(results[base][0].iou)
    if not names:
        return ""
    mean = {
        variant: {
            name: statistics.mean(values)
            if (values := [v for run in runs if (v := run.iou.get(name)) is not None])
            else None
            for name in names
        }
        for variant, runs in results.items()
    }
    order = sorted(names, key=lambda name: (mean[base][name] is None, mean[base][name] or 0))
    rows = []
    for name in order:
        row, reference = [escape(name)], mean[base][name]
        for variant in results:
            value = mean[variant][name]
            cell = percent(value)
            if variant != base and value is not None and reference is not None:
                change = round(100 * (value - reference), 1) + 0.0  # and no -0.0
                cell += f" <small class='{'up' if change >= 0 else 'down'}'>{change:+.1f}</small>"
            row.append(cell)
        rows.append(row)
    caption = f"IoU in per cent on {split}, mean over the seeds, and the difference to {base}; its weakest class first."
    return f"<div class='card'>{table(['class', *map(escape, results)], rows, caption)}</div>"


def _runs(results, folder) -> str:
    rows = []
    for name, runs in results.items():
        for run in runs:
            place = f"{name}-{run.seed}"
            shown = escape(place)
            if (folder / place / "report.html").is_file():
                shown = f'<a href="{escape(quote(place))}/report.html">{shown}</a>'
            rows.append(
                [shown, percent(run.miou), percent(run.best_miou), f"{run.seconds_per_step:.2f}", escape(run.machine)]
            )
    head = ["run", "last %", "best on val %", "s/step", "machine"]
    return f"<div class='card'>{table(head, rows)}</div>"


def _settings(results) -> str:
    cards = []
    for name, runs in results.items():
        text = escape(settings_text(runs[0].config))
        cards.append(f"<details class='card'><summary>{escape(name)}</summary><pre tabindex='0'>{text}</pre></details>")
    return "".join(cards)
