"""The training loop."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import torch
from torch.nn.parallel import DistributedDataParallel

from cmim import checkpoint, distributed
from cmim.data.batches import TrainBatches, train_loader
from cmim.data.datasets import ImageSet, Splits
from cmim.engine import state
from cmim.engine.device import autocast, choose_precision, eager_if, to_device
from cmim.engine.evaluation import Evaluation, evaluate
from cmim.engine.graph import StepGraph
from cmim.engine.logging import RunLog, console, named, print_table
from cmim.engine.optimizer import build_optimizer, scaled_lr, set_learning_rate
from cmim.engine.pictures import save_picture
from cmim.engine.records import cut_metrics
from cmim.engine.report import write_report
from cmim.engine.run import Run, write_text
from cmim.engine.schedule import lr_factor, ramp, total_steps
from cmim.engine.stop import Interrupted, StopSignals, continuing_command
from cmim.engine.tracker import open_tracker
from cmim.errors import Stopped, UserError
from cmim.method.objective import Objective
from cmim.models.batch_norm import explain_single_values, synchronise_batch_norm
from cmim.randomness import key
from cmim.settings import Config

RAMPS = ("ramp of mim", "ramp of method")
"""Names of the ramps r(t) and s(t) beside the entries of a batch."""
LEAST_COVERAGE = 0.05
"""Share of confident pixels below which a run says that unlabelled images hardly count."""


class Trainer:
    """The state of a run; `train` runs it to its end."""

    def __init__(self, config: Config, splits: Splits, run: Run, objective: Objective, device: torch.device):
        self.config, self.splits, self.run, self.device = config, splits, run, device
        self.rank, self.ranks = distributed.rank(), distributed.size()
        self.steps = total_steps(config.train, len(splits.unlabelled))
        self.lr = scaled_lr(config.optimizer, config.train)
        self.dtype = choose_precision(config.train.precision, device)
        self.objective = objective.to(device)
        objective.ranks = self.ranks
        if self.ranks > 1:
            synchronise_batch_norm(objective.net)
        if config.train.channels_last:
            objective.to(memory_format=torch.channels_last)
        compiles = config.train.compile
        if compiles is None:
            compiles = device.type == "cuda" and not config.model.checkpointing and config.attention != "xformers"
        self.compute = torch.compile(objective, fullgraph=True) if compiles else objective
        if self.ranks > 1:
            self.compute = DistributedDataParallel(
                self.compute,
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,  # synchronised BatchNorm keeps buffers identical across ranks
                gradient_as_bucket_view=True,
                # Parameters that get their first gradient later are unused until then.
                find_unused_parameters=config.gains_parameters,
            )
        self.optimizer = build_optimizer(config.optimizer, objective, self.lr, capturable=config.train.graph)
        self.graph = StepGraph(self.compute_step, device) if config.train.graph else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.step, self.best_miou, self.val_result, self.unreadable = 0, 0.0, None, set()
        self.saved, self.interval, self.stop, self.between_steps = None, [], StopSignals(), True
        self.warned, self.report_failed = False, False
        self.images = {name: state.digest(getattr(splits, name)) for name in ("unlabelled", "val")}
        if run.last.exists():
            state.load(self)
        if distributed.sum_over_ranks(torch.tensor(self.step, device=device)) != self.step * self.ranks:
            raise UserError(f"not every process sees {run.last}; put the run folder where all machines can read it")
        kept = cut_metrics(run.metrics, self.step) if self.rank == 0 else []
        evaluations = distributed.from_rank0({line["step"]: line["miou"] for line in kept if line.get("split") == "val"})
        self.val_mious = list(evaluations.values())
        self.best_miou = max([self.best_miou, *self.val_mious])
        # The checkpoint of a step is written before its evaluation, which may have been interrupted.
        due = self.step > 0 and (self.step % config.train.evaluate_every == 0 or self.step == self.steps)
        self.evaluation_is_due = due and self.step not in evaluations

    def train(self) -> None:
        train = self.config.train
        images = train.labelled_batch + train.unlabelled_batch * self.config.preset.uses_unlabelled
        tracker = open_tracker(self.config, self.run, self.step) if self.rank == 0 else None
        log = RunLog(self.run, self.step, self.steps, images, self.device, train.accumulate, tracker)
        with log, self.stop, self.stream():
            log.continue_interval(self.interval)
            try:
                self.train_steps(log)
                self.report_result(log)
            except Interrupted:
                self.leave(log)
            self.report_unreadable()

    def train_steps(self, log: RunLog) -> None:
        """The training loop."""
        config = self.config
        loader = self.loader(self.step, self.steps)
        if self.evaluation_is_due:
            self.evaluate(log)
            self.write_report(log)
        while self.step < self.steps and not self.is_out_of_patience():
            evaluate, picture, save = self.due("evaluate_every"), self.due("picture_every"), self.due("checkpoint_every")
            # Report before each checkpoint: a loss term that is not finite stops the run, with its name.
            report = self.due("log_every") or picture or save or evaluate
            factor = self.train_step(lambda: self.wait(loader, log), log.add, report, picture)
            if report:
                self.warn_of_coverage(log.write(self.step, self.lr * factor), log)
            with log.paused():
                asked = self.stop.asked()
                if save or evaluate or asked:
                    self.refuse_broken_weights()
                self.between_steps = True
                if asked:
                    self.leave(log)
                if save and self.rank == 0:
                    state.save(self)
                if evaluate:
                    self.evaluate(log)
                stops = evaluate and self.is_out_of_patience()
                if stops and self.rank == 0 and self.saved != self.step:
                    state.save(self)
                if (picture or stops) and self.rank == 0:
                    self.picture()
                if evaluate:
                    self.write_report(log)
        if self.step < self.steps:
            console.print(
                f"stopped early after step {self.step} of {self.steps}: no better val mIoU within train.patience "
                f"{config.train.patience}"
            )

    def loader(self, first: int, last: int) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of the steps `first` to `last` - 1."""
        micro, workers = self.config.train.accumulate, distributed.loader_workers(self.config.data.workers)
        batches = TrainBatches(self.splits, self.config, self.rank, self.ranks)
        return iter(train_loader(batches, first * micro, last * micro, workers))

    def train_step(
        self,
        next_batch: Callable[[], dict[str, torch.Tensor]],
        add: Callable[[dict[str, torch.Tensor]], None],
        report: bool = False,
        picture: bool = False,
    ) -> float:
        """One optimiser step; `add` gets the figures of each micro-batch.

        Returns:
            The factor of the learning rate.
        """
        config, micro = self.config, self.config.train.accumulate
        ramps = self.ramps()
        kind = None if report or picture else self.kind_of_step(ramps)
        factor = lr_factor(self.step, self.steps, config.optimizer.poly_power, config.optimizer.warmup)
        set_learning_rate(self.optimizer, factor)

        self.objective.train()
        torch.backends.cudnn.benchmark = True  # all crops have one size; evaluation turns this off
        for i in range(micro):
            self.between_steps = i == 0
            batch = to_device(next_batch(), self.device, config.train.channels_last)
            # Dropout layers of the network, if any, use this generator; all other draws are keyed by sample.
            torch.manual_seed(key(config.seed, (self.step * micro + i) * self.ranks + self.rank, "layers"))
            inputs = batch | ramps
            if kind is not None:
                add(self.graph(kind, inputs))
            else:
                add(self.compute_step(inputs, i + 1 == micro, report, picture))
        self.step += 1
        return factor

    def compute_step(
        self, inputs: dict[str, torch.Tensor], last: bool = True, report: bool = False, picture: bool = False
    ) -> dict[str, torch.Tensor]:
        """Forward and backward of a micro-batch and, after the last one, the update of weights and teacher; returns figures
        for the log. A CUDA graph of it holds all Python numbers as they are when it is captured: see `kind_of_step`.

        Args:
            inputs: a batch and the `ramps`.
        """
        with self.no_sync_if(not last), eager_if(picture):
            with autocast(self.device, self.dtype), explain_single_values():
                output = self.compute(inputs, *map(inputs.get, RAMPS), diagnostics=report, gradients=picture)
            self.scaler.scale(output.loss / self.config.train.accumulate).backward()
        figures = {"loss": output.loss.detach()} | {f"loss_{k}": v for k, v in output.terms.items()} | output.figures
        if last:
            figures |= self.update()
            if self.config.has_teacher:
                self.objective.update_teacher(self.step)
        return figures

    def kind_of_step(self, ramps: dict[str, torch.Tensor]) -> tuple[str, ...] | None:
        """What the computation of the coming step depends on beside the values of tensors: which terms have begun. None if
        it must run eagerly: without `train.graph`, and as long as the decay of the teacher changes."""
        config = self.config
        if self.graph is None:
            return None
        if config.has_teacher and self.objective.teacher_decay(self.step) < config.teacher.decay:
            return None
        return tuple(ramps)

    def update(self) -> dict[str, torch.Tensor]:
        """Update the weights by the gradients of all micro-batches and processes; returns figures of these gradients."""
        figures, most = {}, self.config.train.clip_grad
        if most is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            figures["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, most)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return figures

    def time_steps(self, first: int, count: int) -> list[float]:
        """Seconds of each of `count` real training steps from step number `first`, for a dry run. The first also computes
        what the log and a picture need, which takes the most memory."""
        self.step, seconds = first, []
        loader = self.loader(first, first + count)

        def next_batch():
            batch = next(loader)
            batch.pop("replaced", None)
            return batch

        with self.stream():
            for i in range(count):
                start = time.perf_counter()
                self.train_step(next_batch, self.wait_for_device, report=i == 0, picture=i == 0)
                seconds.append(time.perf_counter() - start)
        return seconds

    def wait_for_device(self, figures: dict[str, torch.Tensor]) -> None:
        """Wait until the loss has been computed."""
        figures["loss"].item()

    def is_out_of_patience(self) -> bool:
        """Whether the last `train.patience` evaluations did not find a better mIoU."""
        patience, mious = self.config.train.patience, self.val_mious
        return patience is not None and len(mious) > patience and max(mious[-patience:]) <= max(mious[:-patience])

    def leave(self, log: RunLog) -> NoReturn:
        """Stop: write a checkpoint if the step is complete, and print the command that continues the run."""
        if self.between_steps:  # else the loader processes ended in the middle of a step with several micro-batches
            interval = log.interval()
            if self.rank == 0 and self.saved != self.step:
                state.save(self, interval)
            distributed.from_rank0(None)  # no process ends before the checkpoint is written
        command = continuing_command(self.run.folder)
        console.print(f"stopped after step {self.saved or self.step}; continue with: {command}")
        raise Stopped(self.stop.number or signal.SIGTERM)

    def no_sync_if(self, more_follow: bool) -> AbstractContextManager:
        """While more micro-batches of the step follow, each process accumulates its own gradients without averaging them."""
        return self.compute.no_sync() if more_follow and self.ranks > 1 else nullcontext()

    def stream(self) -> AbstractContextManager:
        """The `with` block in which steps are trained."""
        return nullcontext() if self.graph is None else self.graph.stream()

    def ramps(self) -> dict[str, torch.Tensor]:
        """The factors of the coming step by `start` and `ramp` of the sections, by their names in RAMPS; not of those that
        have not begun."""
        sections = zip(RAMPS, (self.config.mim, self.config.method), strict=True)
        factors = {name: ramp(self.step, self.steps, section.start, section.ramp) for name, section in sections}
        return {name: torch.full((), f, device=self.device) for name, f in factors.items() if f is not None}

    def warn_of_coverage(self, figures: dict[str, float], log: RunLog) -> None:
        """Say once, in the second half of the run, that unlabelled images hardly train anything."""
        method = self.config.method
        if self.rank or self.warned or 2 * self.step < self.steps or figures.get("coverage", 1) >= LEAST_COVERAGE:
            return
        self.warned = True
        log.warn(
            f"after step {self.step} only {figures['coverage']:.1%} of the unlabelled pixels are as confident as method.tau "
            f"{method.tau}, so that unlabelled images hardly train: lower method.tau (and mim.tau)"
            + (", or do without method.ohem, which keeps confidences low" if method.ohem else "")
        )

    def due(self, every: str) -> bool:
        """Whether the current step ends an interval of the setting `every`; the last step ends all intervals."""
        return (self.step + 1) % getattr(self.config.train, every) == 0 or self.step + 1 == self.steps

    def wait(self, loader: Iterator[dict[str, torch.Tensor]], log: RunLog) -> dict[str, torch.Tensor]:
        """The next batch; the time spent waiting for it is logged."""
        start = time.perf_counter()
        try:
            batch = next(loader)
        except RuntimeError as error:
            if not self.stop.number or "DataLoader worker" not in str(error):
                raise
            self.between_steps &= self.ranks == 1  # other processes may be in the middle of a step
            raise Interrupted from None  # the loader processes got the signal too
        log.data_wait += time.perf_counter() - start
        for i in batch.pop("replaced", torch.empty(0)).tolist():
            if not self.unreadable:
                log.warn(
                    f"the unlabelled image {self.splits.unlabelled.name(i)} cannot be read; another one replaces it, now "
                    "and whenever this happens again (with data.strict the run stops instead)"
                )
            self.unreadable.add(i)
        return batch

    def evaluate(self, log: RunLog) -> None:
        """Evaluate on data.val and keep the best weights. The line in metrics.jsonl comes last, as a sign that all is
        done."""
        self.val_result = result = self.measure(self.splits.val, "val")
        self.val_mious.append(result.scores.miou)
        console.print(f"step {self.step}  val mIoU {100 * result.scores.miou:.2f}")
        if result.scores.miou >= self.best_miou:
            self.best_miou = result.scores.miou
            if self.rank == 0:
                checkpoint.save({"net": self.objective.evaluated().state_dict(), **state.about(self)}, self.run.best)
        log.evaluation(self.step, result, "val", self.splits.class_names)

    def measure(self, image_set: ImageSet, name: str) -> Evaluation:
        net, classes = self.objective.evaluated(), len(self.splits.class_names)
        with self.stop.at_once():
            return evaluate(net, image_set, self.config, classes, self.device, self.dtype, name)

    def report_result(self, log: RunLog) -> None:
        """Evaluate the weights of the last step on data.test (data.val if there is none) and write the result."""
        if self.splits.test is not None:
            split, result = "test", self.measure(self.splits.test, "test")
            log.evaluation(self.step, result, split, self.splits.class_names)
        else:  # the last step was evaluated, unless this process only resumed a finished run
            split, result = "val", self.val_result or self.measure(self.splits.val, "val")
        names = self.splits.class_names
        summary = {
            **named(result.scores, names),
            "best_miou": self.best_miou,
            "split": split,
            "step": self.step,
            "epochs": self.config.train.epochs,
            "stopped_early": self.step < self.steps,
            "patience": self.config.train.patience,
        }
        if self.rank == 0:
            write_text(self.run.result, json.dumps(summary, indent=2) + "\n")
        self.write_report(log)
        title = f"{self.config.method.preset}, step {self.step}, {split}"
        print_table(result.scores, names, title, self.config.evaluation.table)
        console.print(f"best on val: mIoU {100 * self.best_miou:.2f}, checkpoints/best.pt")
        console.print(f"{self.run.folder}: result.json, report.html, metrics.jsonl, checkpoints/, pictures/")

    def write_report(self, log: RunLog) -> None:
        """Write report.html; whatever prevents that is only worth a warning, for `python -m cmim.report` writes it too."""
        if self.rank or self.report_failed:
            return
        try:
            write_report(self.run)
        except Exception as error:
            self.report_failed = True
            log.warn(f"report.html is not written ({type(error).__name__}: {error!s:.200}); the training goes on without it")

    def report_unreadable(self) -> None:
        mask = torch.zeros(len(self.splits.unlabelled), device=self.device)
        mask[list(self.unreadable)] = 1
        count = int((distributed.sum_over_ranks(mask) > 0).sum())
        if count:
            console.print(
                f"warning: {count} unlabelled images could not be read and were replaced by others; repair or remove them"
            )

    def picture(self) -> None:
        path = self.run.pictures / f"step_{self.step:06d}.png"
        names, colours = self.splits.class_names, self.splits.colours
        save_picture(path, self.objective, self.splits.val, self.config, names, colours, self.device)

    def refuse_broken_weights(self) -> None:
        """Raise a UserError if the last update made weights that are not finite, so that no checkpoint of them is
        written."""
        values = [v for v in self.objective.state_dict().values() if v.is_floating_point()]
        if not torch.stack([v.isfinite().all() for v in values]).all():
            raise UserError(
                f"the weights are not finite after step {self.step}; lower optimizer.lr, or use --train.precision fp32; "
                "the last checkpoint is from an earlier step"
            )
