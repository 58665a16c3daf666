"""Settings of training and evaluation: `optimizer`, `train`, `evaluation`, `logging`."""

from typing import Annotated, Literal

from pydantic import Field

from cmim.errors import UserError
from cmim.settings.section import Fraction, NonNegative, Positive, Section


class OptimizerSettings(Section):
    name: str = "sgd"
    """`sgd` (with momentum) and `adamw` are PyTorch's, fused. Any other name is one of timm.optim.list_optimizers(): lamb,
    lars, lion, muon, adopt, ...; fusedlamb, fusednovograd, fusedadamw and fusedsgd are those of NVIDIA's apex, on CUDA."""
    lr: Annotated[float, Field(gt=0, strict=True)] = 0.001
    """Learning rate of the encoder."""
    lr_batch: Positive = 8
    """Number of labelled images a step that `lr` is meant for; for other batch sizes, `lr` is scaled in proportion."""
    head_lr_factor: Annotated[float, Field(gt=0, strict=True)] = 10.0
    """The learning rate of everything but the encoder is `lr` times this."""
    layer_decay: Annotated[float, Field(gt=0, le=1, strict=True)] = 1.0
    """Layer-wise decay for the transformers of `dpt`: the learning rate of each block is this times that of the layer above
    it, up to the final norm, which has `lr`; the embeddings come below the first block. 1: all have `lr`."""
    momentum: Fraction = 0.9
    """Momentum of SGD, and of those others of timm that have one number for it, such as lars and muon."""
    weight_decay: NonNegative = 1e-4
    """L2 penalty for SGD, decoupled weight decay for AdamW; for others as timm says. It applies to every parameter."""
    warmup: Fraction = 0.0
    """Share of the steps over which the learning rate first grows linearly, from almost 0 to all of it."""
    poly_power: NonNegative = 0.9
    """Power of the polynomial schedule: the learning rate is multiplied by (1 - step / steps) to this power; both are
    counted from the end of `warmup`."""


class TrainSettings(Section):
    steps: Positive | None = None
    """Number of optimiser steps; 40,000 if neither `steps` nor `epochs` is given."""
    epochs: Annotated[float, Field(gt=0, strict=True)] | None = None
    """Instead of `steps`: number of passes over the unlabelled images, each rounded down to whole batches. Presets without
    unlabelled images get the same number of steps."""
    labelled_batch: Positive = 8
    """Labelled images a step, of all processes together."""
    unlabelled_batch: Positive = 8
    """Unlabelled images a step, of all processes together."""
    accumulate: Positive = 1
    """Number of micro-batches of these sizes for each optimiser step (gradient accumulation); the loss is normalised
    within each micro-batch."""
    clip_grad: Annotated[float, Field(gt=0, strict=True)] | None = None
    """Largest L2 norm of the gradients of a step, of all parameters together: larger ones are scaled down to it. The log
    then has their norm before that, `grad_norm`. None: gradients stay as they are."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU."""
    compile: bool | None = None
    """Whether to use torch.compile; by default on CUDA only, and not with model.checkpointing."""
    graph: bool = False
    """Replay training steps from a CUDA graph, which saves the time that the host needs for each kernel. Steps whose figures
    are logged run as without it, in memory of their own, so that activations take up to twice as much. For one process, with
    sgd or adamw. It has not run on a GPU yet."""
    channels_last: bool = True
    """Whether images and features use the channels-last memory layout."""
    log_every: Positive = 20
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Positive = 1000
    """Steps between evaluations on data.val."""
    patience: Positive | None = None
    """Stop early after so many evaluations on data.val in a row without a better mIoU; none: train all steps. The schedules
    remain those of all steps."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    picture_every: Positive = 1000
    """Steps between pictures."""

    def check(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UserError(
                "train.steps and train.epochs are both given; unset one: --train.epochs null or --train.steps null"
            )


class EvaluationSettings(Section):
    weights: Literal["teacher", "student"] = "teacher"
    """With an EMA teacher: whose weights are evaluated, and saved as best.pt."""
    batch: Positive = 8
    """Number of images of equal size, or of windows, that are evaluated together."""
    mode: Literal["whole", "slide"] = "whole"
    """`whole`: the whole image at once; `slide`: a sliding window of `window` pixels, moved by `stride` pixels, with class
    probabilities averaged where windows overlap."""
    window: Positive | None = None
    """Side length of a window in pixels; by default data.crop."""
    stride: Positive | None = None
    """Distance between windows in pixels; by default two thirds of the window."""
    flip: bool = False
    """Average with the prediction for the horizontally flipped image."""
    scales: tuple[Annotated[float, Field(gt=0, strict=True)], ...] = (1.0,)
    """Average the predictions for the image resized by these factors."""
    table: list[Literal["iou", "dice", "precision", "recall", "image_miou"]] = ["iou"]
    """Scores in the printed table: columns iou, dice (F1), precision and recall for each class, and the line image_miou (the
    mean over images of the mean IoU of an image). result.json always has all of them."""

    def check(self) -> None:
        if not self.scales:
            raise UserError("evaluation.scales is empty: name at least one scale, 1.0 is the image as it is")
        if not set(self.table) - {"image_miou"} or len(set(self.table)) < len(self.table):
            raise UserError(
                f"evaluation.table is [{', '.join(self.table)}]: name at least one of iou, dice, precision and recall, each "
                "once"
            )


class LoggingSettings(Section):
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Where the figures of TensorBoard also go: `wandb` (Weights & Biases) or `trackio`, which keeps them on this machine.
    The extra `trackers` brings both. They have environment variables of their own, such as WANDB_MODE=offline."""
    project: str = "cmim"
    """Project of the tracker in which the run appears."""

    def check(self) -> None:
        if not self.project.strip():
            raise UserError("logging.project is empty; give a name, such as cmim")
