"""What a run says: a line per log interval, metrics.jsonl, TensorBoard, and the final table."""

import json
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from cmim.errors import UserError

console = Console(highlight=False, soft_wrap=True)


class RunLog:
    """Collects figures on the device and reads them once per interval, so that no other step waits for it."""

    def __init__(self, run, first_step, steps, images, device):
        """`images`: how many each call of `add` stands for."""
        self.file = open(run.metrics, "a", buffering=1)  # noqa: SIM115 - open as long as the run
        self.board = SummaryWriter(run.tensorboard, purge_step=first_step)
        self.device, self.steps, self.images = device, steps, images
        self.started, self.first_step = time.perf_counter(), first_step
        self._begin_interval()

    def _begin_interval(self):
        self.sums, self.count, self.data_wait, self.interval_start = {}, 0, 0.0, time.perf_counter()

    def add(self, figures):
        """Add a micro-batch's figures, a dict of scalar tensors."""
        names = tuple(figures)
        vector = torch.stack([v.detach().float() for v in figures.values()])
        total, times = self.sums.get(names, (0, 0))
        self.sums[names] = (total + vector, times + 1)
        self.count += 1

    def write(self, step, lr, extra):
        """Close the interval at `step` (counted from 1): print and store the means of its figures.

        Raises:
            UserError: a loss term is not finite (the message names it).
        """
        sums = {}
        for names, (total, times) in self.sums.items():
            for name, value in zip(names, total.tolist(), strict=True):
                before, count = sums.get(name, (0.0, 0))
                sums[name] = (before + value, count + times)
        figures = {name: total / times for name, (total, times) in sums.items()}
        figures |= {name: float(value) for name, value in extra.items()}
        elapsed = time.perf_counter() - self.interval_start
        line = {"step": step, "lr": lr, **figures}
        speed = {
            "images_per_second": self.count * self.images / elapsed,
            "data_wait": self.data_wait / elapsed,
            "seconds": round(time.perf_counter() - self.started, 1),
        }
        if self.device.type == "cuda":
            speed["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._store({**line, **speed})
        left = (time.perf_counter() - self.started) / (step - self.first_step) * (self.steps - step)
        shown = "  ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in figures.items() if k.startswith("loss"))
        console.print(
            f"step {step}/{self.steps}  {shown}"
            + (f"  coverage {figures['coverage']:.0%}" if "coverage" in figures else "")
            + f"  {speed['images_per_second']:.1f} images/s  data wait {speed['data_wait']:.0%}"
            + (f"  {speed['memory_gib']:.1f} GiB" if "memory_gib" in speed else "")
            + f"  {clock(left)} left"
        )
        broken = [k.removeprefix("loss_") for k, v in figures.items() if k.startswith("loss_") and v - v != 0]
        if broken or figures["loss"] - figures["loss"] != 0:
            raise UserError(
                f"the loss term {broken[0] if broken else 'sum'} is not finite at or before step {step}; "
                "lower optimizer.lr, or use --train.precision fp32; the last checkpoint is from before"
            )
        self._begin_interval()

    def evaluation(self, step, evaluation, split, class_names):
        """Store an evaluation."""
        result = {"step": step, "split": split, "miou": evaluation.scores.miou}
        result |= {"pixel_accuracy": evaluation.scores.pixel_accuracy, "mean_accuracy": evaluation.scores.mean_accuracy}
        self._store({**result, **evaluation.pseudo_labels, "iou": by_class(evaluation.scores, class_names)})

    def _store(self, line):
        self.file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self.board.add_scalar(f"{line['split']}/{name}" if "split" in line else name, value, line["step"])

    def close(self):
        self.file.close()
        self.board.close()


def by_class(scores, class_names):
    return dict(zip(class_names, scores.iou, strict=True))


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def print_table(scores, class_names, title):
    """IoU of every class and their mean."""
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column("class")
    table.add_column("IoU %", justify="right")
    for name, iou in by_class(scores, class_names).items():
        table.add_row(name, "-" if iou is None else f"{100 * iou:.2f}")
    table.add_section()
    table.add_row("mIoU", f"{100 * scores.miou:.2f}")
    console.print(table)
