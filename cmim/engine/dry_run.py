"""What a run would do, how long it would take and in how much memory: a few of its steps, of which nothing is kept."""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cmim import distributed
from cmim.config import changed_settings
from cmim.data.datasets import ImageSet, Splits
from cmim.engine.device import choose_precision
from cmim.engine.evaluation import evaluate
from cmim.engine.graph import WARM_UP
from cmim.engine.logging import clock, console, peak_memory
from cmim.engine.run import Run
from cmim.engine.schedule import total_steps
from cmim.method.objective import Objective
from cmim.settings import Config

MOST_SHOWN = 8
"""Values of a setting that are printed."""
TIMED = 5
"""Steps that are timed in each phase of the training."""


@contextmanager
def scratch() -> Iterator[None]:
    """Inside the `with` block, compilers keep their files in a folder that is removed at its end."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= dict.fromkeys(names, folder)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def untrained(config: Config) -> Config:
    """`config` without pretrained weights, which change neither time nor memory and would be downloaded."""
    return config.model_copy(update={"model": config.model.untrained()})


def _short(value):
    """Long lists and tables, such as the names of many classes, by their first values and their length."""
    if not isinstance(value, list | dict) or len(value) <= MOST_SHOWN:
        return value
    first = list(value.items() if isinstance(value, dict) else value)[: MOST_SHOWN - 2]
    shown = str(dict(first) if isinstance(value, dict) else first)
    return f"{shown[:-1]}, ...{shown[-1]}, {len(value)} in all"


def dry_run(
    config: Config,
    splits: Splits,
    run: Run,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    time_steps: Callable[[int, int], list[float]],
    device: torch.device,
) -> None:
    """Print what a run with these settings would do.

    Args:
        config, splits: of the run.
        run: its folder; nothing is written there.
        objective, optimizer: on the device; their weights and state are changed.
        time_steps: takes the number of a step (from 0) and a count, trains these steps, and returns the seconds of each.
        device: of this process.
    """
    console.print("settings that are not the defaults:")
    for key, value in changed_settings(config).items():
        console.print(f"  {key}: {_short(value)}")
    _describe_network(objective)

    total = total_steps(config.train, len(splits.unlabelled))
    phases, graph = _phases(config, total), config.train.graph
    training = sum(count * _seconds(time_steps, first, total, graph) for first, count in phases)
    evaluations = -(-total // config.train.evaluate_every)
    evaluating = evaluations * _evaluation(objective, splits.val, config, device, "val")
    if splits.test is not None:
        evaluating += _evaluation(objective, splits.test, config, device, "test")
    memory = peak_memory(device)
    console.print(
        f"time: {total} steps of {training / total:.3g} s are {clock(training)}; {evaluations} evaluations on val"
        f"{' and one on test' * (splits.test is not None)} {clock(evaluating)}; together {clock(training + evaluating)}"
    )
    if memory is not None:
        what = "of GPU memory" if device.type == "cuda" else "of memory, without the processes that load images"
        console.print(f"memory: at its peak {memory:.2f} GiB {what}" + ", in each process" * (distributed.size() > 1))

    last = _bytes(objective.state_dict()) + _bytes(optimizer.state_dict())
    best = _bytes(objective.evaluated().state_dict())
    pictures = -(-total // config.train.picture_every)
    lists = ["labelled.txt"]
    lists += [] if isinstance(config.data.val, str) else ["val.txt"]
    lists += ["class_weights.txt"] if config.method.class_weights in ("inverse", "median") else []
    lists += ["tracker.txt"] if config.logging.tracker != "none" else []
    lists = ", ".join(lists)
    console.print(
        f"it would write {run.folder}: checkpoints/last.pt ({last / 2**20:.1f} MiB) and best.pt ({best / 2**20:.1f} MiB), "
        f"{pictures} picture{'s' * (pictures != 1)}, config.yaml, {lists}, metrics.jsonl, result.json, tensorboard/"
    )
    console.print("dry run: nothing was written, and masks and images were not checked")


def _describe_network(objective):
    millions = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    net = objective.net
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad) / 1e6
    more = (
        f", and {millions(objective.reconstruction):.2f} M that reconstruct" if hasattr(objective, "reconstruction") else ""
    )
    console.print(
        f"network: {millions(net):.2f} M parameters, {millions(net.encoder):.2f} M of them in the encoder{more}; "
        f"{trained:.2f} M are trained"
    )


def _phases(config, total):
    """(first step, number of steps) of each part of the training with other terms: unlabelled images and masked views may
    begin later."""
    method, preset = config.method, config.preset
    starts = {0.0}
    if preset.uses_unlabelled:
        starts.add(method.start)
    if preset.masked:
        starts.add(max(config.mim.start, method.start if preset.uses_unlabelled else 0))
    firsts = sorted({math.ceil(start * total - 1e-6) for start in starts})
    return [(first, last - first) for first, last in zip(firsts, [*firsts[1:], total], strict=True) if first < last]


def _seconds(time_steps, first, total, graph):
    """The median time of a step after one to warm up and, with `graph`, those before its replays; near the end of the
    training, the steps before it are timed."""
    untimed = 1 + (WARM_UP + 1) * graph
    seconds = time_steps(first, min(untimed + TIMED, total - first))
    return statistics.median(seconds[untimed:] or seconds[1:] or seconds)


class _First:
    """The first images of an `ImageSet`."""

    def __init__(self, image_set: ImageSet, count: int):
        self.count, self.label, self.image, self.name = count, image_set.label, image_set.image, image_set.name

    def __len__(self) -> int:
        return self.count


def _evaluation(objective, image_set, config, device, title):
    """Estimated seconds of an evaluation: those of a few images, and what each further image adds."""
    dtype = choose_precision(config.train.precision, device)

    def seconds(count):
        start = time.perf_counter()
        images = _First(image_set, count)
        evaluate(objective.evaluated(), images, config, objective.num_classes, device, dtype, title)  # its result is read
        return time.perf_counter() - start

    few = 2 * config.evaluation.batch * distributed.size()
    if len(image_set) <= 2 * few:
        return seconds(len(image_set))
    begin, more = seconds(few), seconds(2 * few)
    return begin + max(0.0, more - begin) / few * (len(image_set) - few)


def _bytes(state):
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(_bytes, values))
