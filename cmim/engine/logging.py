"""Output of a run: progress, a line per log interval, metrics.jsonl, TensorBoard, and the final table."""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from cmim import distributed
from cmim.engine.metrics import Scores
from cmim.engine.records import add_notes, write_confusion
from cmim.engine.run import Run
from cmim.engine.tracker import Tracker
from cmim.errors import UserError

if TYPE_CHECKING:  # evaluation imports this module
    from cmim.engine.evaluation import Evaluation

try:
    import resource
except ModuleNotFoundError:  # on Windows
    resource = None


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let `cmim.errors.run_command` end the command; rich would use another exit code."""
        raise BrokenPipeError


console = _Console(highlight=False, soft_wrap=True, markup=False)

# One display for all loops. The loops draw it themselves, because a thread would be forked into the loader processes.
_bars = Bars(
    TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[status]}", markup=False),
    console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
)  # fmt: skip


class Progress:
    """The progress of a loop, as a `with` block: on a terminal a bar that disappears when the loop ends, elsewhere a line
    every 30 seconds. Only the first process shows it; the bars of nested loops are shown together.

    Args:
        title: what the loop does.
        total: number of iterations, counted in `unit`s, a plural.
        done: how many were done before.
        lines: whether to print lines if there is no terminal.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0, lines: bool = True):
        self.title, self.total, self.unit, self.done, self.lines = title, total, unit, done, lines
        self.first, self.started = done, time.perf_counter()
        self.shown, self.bar = self.started, None
        if console.is_interactive and distributed.rank() == 0:
            self.bar = _bars.add_task(title, total=total, completed=done, status=self._status())
            _bars.start()

    def advance(self, count: int = 1) -> None:
        """Count `count` more iterations as done, up to the total."""
        self.done = min(self.total, self.done + count)
        now = time.perf_counter()
        due = now - self.shown >= (30 if self.bar is None else 0.5)
        self.shown = now if due else self.shown
        if self.bar is not None:
            _bars.update(self.bar, completed=self.done, status=self._status(), refresh=due)
        elif due and self.lines and distributed.rank() == 0:
            console.print(f"{self.title}  {self._status()}")

    def _status(self):
        count, elapsed = self.done - self.first, time.perf_counter() - self.started
        text = f"{self.done}/{self.total} {self.unit}"
        if not count or not elapsed:
            return text
        return f"{text}  {count / elapsed:.1f} {self.unit}/s  {clock(elapsed / count * (self.total - self.done))} left"

    def close(self) -> None:
        if self.bar is not None:
            if len(_bars.tasks) == 1:
                _bars.stop()
            _bars.remove_task(self.bar)
            _bars.refresh()
            self.bar = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class RunLog:
    """Collects figures on the device and reads them once per interval, so that other steps do not synchronise with it.

    Every process makes the same calls; rank 0 prints and stores the means over all processes. Used as a `with` block, it
    removes the bar before an error message is printed.
    """

    def __init__(
        self,
        run: Run,
        first_step: int,
        steps: int,
        images: int,
        device: torch.device,
        micro: int = 1,
        tracker: Tracker | None = None,
    ):
        """`images`: number of images, over all processes, of each call of `add`; `micro`: calls of `add` per step;
        `tracker`: gets what TensorBoard gets."""
        self.run, self.is_rank0 = run, distributed.rank() == 0
        if self.is_rank0:
            self.file = open(run.metrics, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - open as long as the run
            try:
                self.board = SummaryWriter(run.tensorboard, purge_step=first_step)
            except UnicodeEncodeError:
                self.board = None
                self.warn("TensorBoard writes no files, because it needs a path in UTF-8; give another --output")
        self.tracker = tracker
        if tracker is not None:
            console.print(f"figures also go to {tracker.where}")
        self.device, self.steps, self.images, self.micro = device, steps, images, micro
        self.started, self.first_step = time.perf_counter(), first_step
        self.progress = Progress("train", steps, "steps", first_step, lines=False)
        self._begin_interval()

    def _begin_interval(self):
        self.sums, self.count, self.data_wait, self.interval_start = {}, 0, 0.0, time.perf_counter()

    def interval(self) -> list[tuple[tuple[str, ...], torch.Tensor, int]]:
        """Figures added since the last line, over all processes: names, sums, number of additions."""
        return [(names, distributed.sum_over_ranks(sums.clone()).cpu(), times) for names, (sums, times) in self.sums.items()]

    def continue_interval(self, interval: list[tuple[tuple[str, ...], torch.Tensor, int]]) -> None:
        """Begin with the interval of a run that was stopped; process 0 takes the sums of all its processes."""
        for names, sums, times in interval:
            sums = sums.to(self.device) * self.is_rank0
            self.sums[tuple(names)] = (sums, times)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time in the `with` block, for example of an evaluation, does not count for the speed of training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.interval_start += time.perf_counter() - start

    def add(self, figures: dict[str, torch.Tensor]) -> None:
        """Add the figures of a micro-batch, a dict of scalar tensors."""
        names = tuple(figures)
        vector = torch.stack([v.detach().float() for v in figures.values()])
        total, times = self.sums.get(names, (0, 0))
        self.sums[names] = (total + vector, times + 1)
        self.count += 1
        if self.count % self.micro == 0:
            self.progress.advance()

    def write(self, step: int, lr: float) -> dict[str, float]:
        """Close the interval at `step` (counted from 1): print, store and return the means of its figures.

        Raises:
            UserError: a loss term is not finite (the message names it).
        """
        figures, data_wait = self._means()
        if self.is_rank0:
            self._report(step, lr, figures, data_wait)
        broken = [k.removeprefix("loss_") for k, v in figures.items() if k.startswith("loss_") and not math.isfinite(v)]
        if broken or not math.isfinite(figures["loss"]):
            raise UserError(
                f"the loss term {broken[0] if broken else 'sum'} is not finite at or before step {step}; "
                "lower optimizer.lr, or use --train.precision fp32; the last checkpoint is from an earlier step"
            )
        self._begin_interval()
        return figures

    def _means(self):
        """Means over the interval and all processes, of each figure and of the seconds waited for data, with one
        all-reduce."""
        wait = torch.tensor([self.data_wait], device=self.device)
        vector = distributed.sum_over_ranks(torch.cat([*(total for total, _ in self.sums.values()), wait]))
        *values, wait = (vector / distributed.size()).tolist()
        each = ((name, times) for names, (_, times) in self.sums.items() for name in names)
        sums = {}
        for (name, times), value in zip(each, values, strict=True):
            before, count = sums.get(name, (0.0, 0))
            sums[name] = (before + value, count + times)
        return {name: total / times for name, (total, times) in sums.items()}, wait

    def _report(self, step, lr, figures, data_wait):
        now = time.perf_counter()
        elapsed = now - self.interval_start
        speed = {
            "images_per_second": self.count * self.images / elapsed,
            "data_wait": data_wait / elapsed,
            "seconds": round(now - self.started, 1),
        }
        memory = peak_memory(self.device)
        if memory is not None:
            speed["memory_gib"] = memory
        self._store({"step": step, "lr": lr, **figures, **speed})
        left = (now - self.started) / (step - self.first_step) * (self.steps - step)
        terms = "".join(f"  {k.removeprefix('loss_')} {v:.3f}" for k, v in figures.items() if k.startswith("loss_"))
        line = [
            f"step {step}/{self.steps}  loss {figures['loss']:.3f}",
            terms,
            f"  coverage {figures['coverage']:.0%}" if "coverage" in figures else "",
            f"  {speed['images_per_second']:.1f} images/s",
            f"  data wait {speed['data_wait']:.0%}",
            f"  {memory:.1f} GiB" if memory is not None else "",
            f"  {clock(left)} left",
        ]
        # On a terminal, parts that do not fit into the line are left out; they are in metrics.jsonl.
        for i in (5, 1, 4, 2, 3):
            if console.is_terminal and len("".join(line)) > console.width:
                line[i] = ""
        console.print("".join(line))

    def warn(self, text: str) -> None:
        """Print a warning, from any process; the first one keeps it for the report."""
        rank = distributed.rank()
        if rank == 0:
            with suppress(OSError):  # what a full disk prevents is reported where it matters
                add_notes(self.run, [text])
        quiet, console.quiet = console.quiet, False
        console.print(f"warning: {text}" if rank == 0 else f"warning of process {rank}: {text}")
        console.quiet = quiet

    def evaluation(self, step: int, evaluation: "Evaluation", split: str, class_names: Sequence[str]) -> None:
        """Store an evaluation."""
        if self.is_rank0:
            figures = named(evaluation.scores, class_names)
            classes = {k: dict(zip(class_names, v, strict=True)) for k, v in evaluation.pseudo_label_classes.items()}
            self._store({"step": step, "split": split, **figures, **evaluation.pseudo_labels, **classes})
            write_confusion(self.run, step, split, class_names, evaluation.confusion)

    def _store(self, line):
        # JSON has no NaN and no infinity: write null instead.
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        split = f"{line['split']}/" if "split" in line else ""
        scalars = {split + k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, line["step"])
        self._track(lambda tracker: tracker.log(scalars, line["step"]))

    def _track(self, call):
        """Call the tracker, if there is one; a run does not end because it fails, with an exception of any type."""
        if self.tracker is not None:
            try:
                call(self.tracker)
            except Exception as error:
                self.warn(f"the tracker gets no more figures, metrics.jsonl has them all: {type(error).__name__}: {error}")
                self.tracker = None

    def close(self, failed: bool = False) -> None:
        self.progress.close()
        if self.is_rank0:
            self.file.close()
            if self.board is not None:
                self.board.close()
        self._track(lambda tracker: tracker.close(failed))

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        self.close(failed=kind is not None)


def peak_memory(device: torch.device) -> float | None:
    """Peak memory in GiB: of the CUDA device or, on the CPU, of the process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def named(scores: Scores, class_names: Sequence[str]) -> dict[str, float | dict[str, float | None]]:
    """The scores as they are stored: {name: value}, with the scores of the classes by the name of the class."""
    figures = scores._asdict()
    return {k: dict(zip(class_names, v, strict=True)) if isinstance(v, list) else v for k, v in figures.items()}


def clock(seconds: float) -> str:
    """The time as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


_COLUMNS = {"iou": ("IoU %", "miou"), "dice": ("Dice %", "mean_dice"), "precision": ("precision %", "mean_precision"),
            "recall": ("recall %", "mean_accuracy")}  # fmt: skip
"""Per-class scores -> the head of their column, and their mean over the classes."""


def print_table(scores: Scores, class_names: Sequence[str], title: str, columns: Sequence[str] = ("iou",)) -> None:
    """Print `columns` (of `evaluation.table`) of every class and their means, and the scores of all classes together."""
    per_class = [name for name in columns if name in _COLUMNS]
    rest = [""] * (len(per_class) - 1)
    percent = lambda value: "-" if value is None else f"{100 * value:.2f}"  # noqa: E731
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column("class")
    for name in per_class:
        table.add_column(_COLUMNS[name][0], justify="right")
    for name, *values in zip(class_names, *(getattr(scores, name) for name in per_class), strict=True):
        table.add_row(name, *map(percent, values))
    table.add_section()
    label = "mIoU" if per_class == ["iou"] else "mean"
    table.add_row(label, *(percent(getattr(scores, _COLUMNS[name][1])) for name in per_class))
    if "image_miou" in columns:
        table.add_row("mIoU per image", percent(scores.image_miou), *rest)
    if "recall" not in columns:  # whose mean it is
        table.add_row("mean accuracy", percent(scores.mean_accuracy), *rest)
    table.add_row("pixel accuracy", percent(scores.pixel_accuracy), *rest)
    console.print(table)
