"""Results of runs that are compared: a small JSON file for each run, the table with paired differences, and a plot."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmim.engine.device import processor
from cmim.engine.records import metric_lines
from cmim.engine.run import Run, write_text
from cmim.errors import UserError
from cmim.settings import Config, LoggingSettings

T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 97.5 % quantiles of Student's t distribution with 1 to 30 degrees of freedom."""


class Result(NamedTuple):
    """What is kept of a run."""

    variant: str
    seed: int
    miou: float
    """Of the last step, on `split`."""
    best_miou: float
    """The best of the evaluations on val."""
    split: str
    val: list[tuple[int, float]]
    """(step, mIoU) of each evaluation on val."""
    iou: dict[str, float | None]
    """Of the last step, on `split`."""
    seconds_per_step: float
    """Mean over the run, without evaluations and pictures; other work on the machine makes it larger."""
    machine: str
    config: dict
    """The settings that are not the default, without paths of this machine."""


def portable(config: Config) -> Config:
    """`config` without what differs between machines, or does not change a result; of other paths only the names."""
    name = lambda path: None if path is None else Path(path.name)  # noqa: E731
    data = config.data.model_copy(update={"root": None, "workers": None, "split": name(config.data.split)})
    model = config.model.model_copy(update={"init_from": name(config.model.init_from)})
    teacher = config.teacher.model_copy(update={"run": name(config.teacher.run)})
    train = config.train.model_copy(update={"device": "auto"})
    parts = {"data": data, "model": model, "teacher": teacher, "train": train, "logging": LoggingSettings()}
    return config.model_copy(update=parts)


def load_result(path: Path, config: Config) -> Result | None:
    """The result in a file, if it belongs to these settings; None if there is none.

    Raises:
        UserError: the file is no result, or that of other settings.
    """
    if not path.exists():
        return None
    try:
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
        then = Config.model_validate(result.config)
    except (ValueError, TypeError):
        raise UserError(f"{path} is no result of cmim.compare; remove it, and the run will be made again") from None
    if then.model_dump(mode="json") != portable(config).model_dump(mode="json"):
        raise UserError(f"{path} is the result of other settings; remove it, or give another --results")
    return result


def keep_result(path: Path, variant: str, seed: int, run: Run, config: Config) -> Result:
    """Write the result of a finished run; `config` is that it was started with."""
    summary = read_result(run)
    lines = metric_lines(run)
    train = config.train
    images = train.labelled_batch + train.unlabelled_batch * config.preset.uses_unlabelled
    rates = [line["images_per_second"] for line in lines if line.get("images_per_second")]
    result = Result(
        variant=variant, seed=seed, miou=summary["miou"], best_miou=summary["best_miou"], split=summary["split"],
        val=[(line["step"], line["miou"]) for line in lines if line.get("split") == "val"], iou=summary.get("iou", {}),
        seconds_per_step=round(images * train.accumulate * statistics.mean(1 / r for r in rates), 4) if rates else 0.0,
        machine=f"{processor()}, torch {torch.__version__}",
        config=json.loads(portable(config).model_dump_json(exclude_defaults=True)),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result._asdict(), indent=1) + "\n")
    return result


def read_result(run: Run) -> dict[str, Any]:
    """The content of a run's result.json."""
    try:
        result = json.loads(run.result.read_text(encoding="utf-8"))
        float(result["miou"]), float(result["best_miou"]), int(result["step"]), str(result["split"])
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{run.result} is not a result of cmim.train; remove it, and the run will write it again") from None
    return result


def difference(of: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences, and the half-width of its 95 % interval by Student's t; infinite for one pair."""
    pairs = [a - b for a, b in zip(of, base, strict=True)]
    n = len(pairs)
    if n < 2:
        return pairs[0], math.inf
    if any(map(math.isnan, pairs)):
        return math.nan, math.nan
    quantile = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1]
    return statistics.mean(pairs), quantile * statistics.stdev(pairs) / math.sqrt(n)


def at_equal_time(result: Result, base: Result) -> float:
    """mIoU on val of the last evaluation within the training time of `base`, by the seconds of a step of both."""
    seconds = base.val[-1][0] * base.seconds_per_step
    return next((miou for step, miou in reversed(result.val) if step * result.seconds_per_step <= seconds), math.nan)


def make_table(results: Mapping[str, Sequence[Result]], base: str) -> str:
    """The results as a table in Markdown; those of a variant have the order of the seeds. With the variant `base` the others
    are compared, seed by seed."""
    seeds, split = [result.seed for result in results[base]], results[base][0].split
    paired = len(results) > 1
    rows = [
        ["variant", *(f"seed {seed}" for seed in seeds), f"last on {split}, mean ± sd", "best on val, mean ± sd"]
        + [f"minus {base}", f"val minus {base}", "val at its time"] * paired
        + ["s/step"]
    ]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for variant, runs in results.items():
        rows.append([variant, *(f"{100 * run.miou:.2f}" for run in runs), *summary(results, variant, base)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summary(results: Mapping[str, Sequence[Result]], variant: str, base: str) -> list[str]:
    """What tables say of a variant's runs together: mIoU of the last step, the best on val, the differences to the base if
    there are several variants, and seconds a step."""
    runs = results[variant]
    cells = [mean_and_spread([100 * getattr(run, key) for run in runs]) for key in ("miou", "best_miou")]
    if len(results) > 1:
        cells += ["", "", ""] if variant == base else differences(runs, results[base])
    return [*cells, f"{statistics.median(run.seconds_per_step for run in runs):.2f}"]


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def interval(of: Sequence[float], base: Sequence[float]) -> str:
    """The mean difference, and its 95 % interval if there are several pairs."""
    mean, half = difference(of, base)
    if math.isnan(mean):  # not one evaluation in this time
        return "-"
    return f"{mean:+.2f}" + (f" [{mean - half:+.2f}, {mean + half:+.2f}]" if math.isfinite(half) else "")


def differences(runs: Sequence[Result], base: Sequence[Result]) -> list[str]:
    """The intervals of a variant minus the base: of the result, of the last step on val, and on val when the training time
    of the base is over."""
    last, theirs = ([100 * run.miou for run in of] for of in (runs, base))
    val, their_val = ([100 * run.val[-1][1] for run in of] for of in (runs, base))
    timely = [100 * at_equal_time(run, other) for run, other in zip(runs, base, strict=True)]
    return [interval(last, theirs), interval(val, their_val), interval(timely, their_val)]


def save_plot(results: dict[str, list[Result]], base: str, path: Path) -> None:
    """A point for each run and the mean of each variant; lines join the runs of a seed."""
    names, split = list(results), results[base][0].split
    figure = Figure((1.2 + 1.1 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for runs in zip(*results.values(), strict=True):
        axes.plot(range(len(names)), [100 * run.miou for run in runs], "o-", alpha=0.5, label=f"seed {runs[0].seed}")
    for i, runs in enumerate(results.values()):
        mean = statistics.mean(100 * run.miou for run in runs)
        axes.hlines(mean, i - 0.25, i + 0.25, color="black", linewidth=2)
        axes.annotate(f"{mean:.1f}", (i + 0.27, mean), va="center", fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_xlim(-0.5, len(names) - 0.3)
    axes.set_ylabel(f"mIoU on {split}, %")
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
