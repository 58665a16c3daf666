"""Train a segmentation network from a few labelled and many unlabelled images.

    python -m cmim.train                                              # the built-in `shapes` set
    python -m cmim.train configs/camvid.yaml --data.root CamVid       # a config file and overrides
    python -m cmim.train --method.preset supervised --output runs/s   # another method, a folder of your choice
    python -m cmim.train --output runs/s --resume                     # continue after an interruption

Any setting of cmim/settings.py is an override: --section.key VALUE. The run folder gets config.yaml, labelled.txt,
metrics.jsonl, result.json, checkpoints/, pictures/ and TensorBoard's files.
"""

import json
import sys
import time
import warnings

import torch

from cmim.config import default_config_path, load_config
from cmim.data import load_splits
from cmim.data.batches import TrainBatches, default_workers, train_loader
from cmim.diagnostics import gradient_norms
from cmim.engine import checkpoint
from cmim.engine.command import CommandLine
from cmim.engine.device import autocast, choose_device, choose_precision, to_device
from cmim.engine.evaluation import evaluate
from cmim.engine.logging import RunLog, by_class, console, print_table
from cmim.engine.optimizer import build_optimizer, set_learning_rate
from cmim.engine.pictures import save_picture
from cmim.engine.run import Run, cut_metrics, default_folder, open_run, start_run, write_text
from cmim.engine.schedule import poly, ramp, total_steps
from cmim.errors import UserError, run_command
from cmim.models.reconstruction import receptive_warning
from cmim.objective import Objective
from cmim.settings import uses_masking, uses_unlabelled


class Trainer:
    """Everything a run needs, built from its config; `train` is the loop."""

    def __init__(self, config, splits, run):
        self.config, self.splits, self.run = config, splits, run
        self.steps = total_steps(config.train, len(splits.unlabelled))
        self.device = choose_device(config.train.device)
        self.dtype = choose_precision(config.train.precision, self.device)
        torch.manual_seed(config.seed)
        self.objective = Objective(config, len(splits.class_names)).to(self.device)
        if config.train.channels_last:
            self.objective.to(memory_format=torch.channels_last)
        compiles = self.device.type == "cuda" if config.train.compile is None else config.train.compile
        self.compiled = torch.compile(self.objective, fullgraph=True) if compiles else self.objective
        self.optimizer = build_optimizer(config.optimizer, self.objective)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step, self.best_miou = 0, 0.0
        if run.last.exists():
            self.load()
        cut_metrics(run.metrics, self.step)

    def train(self):
        config, settings = self.config, self.config.train
        batches, micro = TrainBatches(self.splits, config), settings.accumulate
        loader = iter(train_loader(batches, self.step * micro, self.steps * micro, self.workers()))
        images = settings.labelled_batch + settings.unlabelled_batch * uses_unlabelled(config)
        log = RunLog(self.run, self.step, self.steps, images, self.device)
        while self.step < self.steps:
            evaluate, picture, save = self.due("evaluate_every"), self.due("picture_every"), self.due("checkpoint_every")
            # Reported before each checkpoint, so that a loss that is not finite stops the run by its name.
            report = self.due("log_every") or picture or save or evaluate
            weight = ramp(self.step, self.steps, config.mim.start, config.mim.ramp)
            weight = None if weight is None else torch.full((), weight, device=self.device)
            factor = poly(self.step, self.steps, config.optimizer.poly_power)
            set_learning_rate(self.optimizer, factor)
            norms = {}

            self.objective.train()
            torch.backends.cudnn.benchmark = True  # crops have one size; evaluation turns it off
            for _ in range(micro):
                batch = to_device(self.wait(loader, log), self.device, settings.channels_last)
                compute = self.objective if picture else self.compiled
                with autocast(self.device, self.dtype):
                    output = compute(batch, weight, diagnostics=report)
                norms = gradient_norms(output) if picture else norms
                self.scaler.scale(output.loss / micro).backward()
                log.add({"loss": output.loss} | {f"loss_{k}": v for k, v in output.terms.items()} | output.figures)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            if config.teacher.kind == "ema":
                self.objective.update_teacher(self.step)
            self.step += 1

            if report:
                log.write(self.step, config.optimizer.lr * factor, norms)
            if save or evaluate:
                self.refuse_broken_weights()
            if evaluate:
                self.evaluate(log)
            if picture:
                self.picture()
            if save:
                self.save()
        self.finish(log)
        log.close()

    def due(self, every):
        """Whether the coming step ends an interval of this setting; the last step ends all."""
        return (self.step + 1) % getattr(self.config.train, every) == 0 or self.step + 1 == self.steps

    def workers(self):
        return default_workers() if self.config.data.workers is None else self.config.data.workers

    def wait(self, loader, log):
        start = time.perf_counter()
        batch = next(loader)
        log.data_wait += time.perf_counter() - start
        return batch

    def evaluate(self, log):
        """On data.val; keeps the best weights."""
        result = self.measure(self.splits.val, "val")
        log.evaluation(self.step, result, "val", self.splits.class_names)
        console.print(f"step {self.step}  val mIoU {100 * result.scores.miou:.2f}")
        if result.scores.miou >= self.best_miou:
            self.best_miou = result.scores.miou
            checkpoint.save({"net": self.objective.evaluated().state_dict(), **self.about()}, self.run.best)

    def measure(self, image_set, name):
        net = self.objective.evaluated()
        return evaluate(net, image_set, self.config, len(self.splits.class_names), self.device, self.dtype, name)

    def finish(self, log):
        """The last step's weights on data.test (data.val where there is none) are the result."""
        split, image_set = ("test", self.splits.test) if self.splits.test is not None else ("val", self.splits.val)
        result = self.measure(image_set, split)
        if split == "test":  # val has been logged
            log.evaluation(self.step, result, split, self.splits.class_names)
        summary = {
            "miou": result.scores.miou,
            "best_miou": self.best_miou,
            "iou": by_class(result.scores, self.splits.class_names),
            "split": split,
            "step": self.step,
            "pixel_accuracy": result.scores.pixel_accuracy,
            "mean_accuracy": result.scores.mean_accuracy,
        }
        write_text(self.run.result, json.dumps(summary, indent=2) + "\n")
        print_table(result.scores, self.splits.class_names, f"{self.config.method.preset}, step {self.step}, {split}")
        console.print(f"{self.run.folder}: result.json, metrics.jsonl, checkpoints/, pictures/")

    def picture(self):
        path = self.run.pictures / f"step_{self.step:06d}.png"
        names, colours = self.splits.class_names, self.splits.colours
        save_picture(path, self.objective, self.splits.val, self.config, names, colours, self.device)

    def refuse_broken_weights(self):
        """The last update may have broken weights whose loss was finite: no checkpoint is written of them."""
        values = [v for v in self.objective.state_dict().values() if v.is_floating_point()]
        if not torch.stack([v.isfinite().all() for v in values]).all():
            raise UserError(
                f"the weights are not finite after step {self.step}; lower optimizer.lr, or use --train.precision fp32; "
                "the last checkpoint is from before"
            )

    def about(self):
        return {"step": self.step, "class_names": list(self.splits.class_names), "colours": self.splits.colours.tolist()}

    def save(self):
        state = {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "best_miou": self.best_miou,
            **self.about(),
        }
        checkpoint.save(state, self.run.last)

    def load(self):
        state = checkpoint.load(self.run.last, self.device)
        if state["class_names"] != list(self.splits.class_names):
            raise UserError(f"the classes of the data are not those of {self.run.last}; give another --output")
        checkpoint.load_into(self.objective, state["objective"], self.run.last)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"].cpu())
        if self.device.type == "cuda" and state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.device)
        self.step, self.best_miou = state["step"], state["best_miou"]
        if self.step > self.steps:
            raise UserError(f"the run has {self.steps} steps, but {self.run.last} is at step {self.step}")
        console.print(f"continuing {self.run.folder} at step {self.step}")


def main(arguments):
    parser = CommandLine("cmim.train", __doc__)
    parser.add_argument("config", nargs="?", help="a file of configs/; without one, configs/shapes.yaml")
    parser.add_argument("--output", help="run folder; by default runs/<config>-<time>")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, or start it")
    given, overrides = parser.parse(arguments)
    if given.resume and given.output is None:
        raise UserError("--resume needs --output RUN")
    config_path = given.config or default_config_path()
    if given.resume and given.config is None and Run(given.output).config.exists():
        config_path = Run(given.output).config
    config = load_config(config_path, overrides)
    splits = load_splits(config.data)
    check_counts(config, splits)
    run = open_run(given.output or default_folder(config_path), config, given.resume)
    describe(config, splits, run)
    trainer = Trainer(config, splits, run)
    start_run(run, config, map(splits.labelled.name, range(len(splits.labelled))))
    trainer.train()


def check_counts(config, splits):
    if len(splits.labelled) < config.train.labelled_batch:
        raise UserError(
            f"{len(splits.labelled)} labelled images are fewer than train.labelled_batch {config.train.labelled_batch}; "
            "lower it, or raise data.labelled"
        )
    if uses_unlabelled(config) and len(splits.unlabelled) < config.train.unlabelled_batch:
        raise UserError(
            f"{len(splits.unlabelled)} unlabelled images are fewer than train.unlabelled_batch "
            f"{config.train.unlabelled_batch}; lower it, add images to unlabeled/, or lower data.labelled"
        )


def describe(config, splits, run):
    test = f", {len(splits.test)} test" if splits.test is not None else ", no test images: the result is on val"
    console.print(
        f"{config.method.preset}: {len(splits.labelled)} labelled and {len(splits.unlabelled)} unlabelled images, "
        f"{len(splits.val)} val{test}, {len(splits.class_names)} classes; {run.folder}"
    )
    reconstruction = config.reconstruction
    if uses_masking(config) and reconstruction.decoder == "conv":
        stride = 4 if reconstruction.tokens == "decoder" else config.model.output_stride
        note = receptive_warning(reconstruction.depth, reconstruction.kernel_size, config.mask.block, stride)
        if note:
            console.print(f"note: {note}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    run_command(lambda: main(sys.argv[1:]))
