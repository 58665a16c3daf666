"""Every setting of a run: its type, its default and what it does.

The defaults are those of DeepLabV3+ on photographs; a file in configs/ states only what differs. Where a default
comes from is in the README's table.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cmim.models.geometry import geometry

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of red, green and blue in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, strict=True)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ShapesSettings(Section):
    labelled: Positive = 48
    unlabelled: Positive = 400
    val: Positive = 100
    test: Positive = 200


class DataSettings(Section):
    format: Literal["shapes", "folder", "voc", "cityscapes", "coco", "ade20k"] = "folder"
    """`shapes`: drawn on the fly. `folder`: train/, val/, test/ with images/ and masks/, optionally unlabeled/. The others:
    benchmarks as they are distributed."""
    root: Path | None = None
    split: Path | None = None
    """Folder of labeled.txt and unlabeled.txt, lines `IMAGE MASK` under `root` (UniMatch's split files; the mask of an
    unlabelled image may be missing or None). val.txt and test.txt may lie beside them or one folder up. Without it,
    `labelled` divides the training images; with it, `labelled` is not used."""
    classes: list[str] | Positive | None = None
    """Names or number of the classes of `folder`; by default read from ROOT/classes.txt, one name a line. Benchmarks
    have their own, as of the next two."""
    ignore: Annotated[int, Field(ge=0, le=255)] = 255
    """Mask value without a class."""
    label_map: dict[int, int] = {}
    """Mask values to class ids, e.g. {255: 1} for masks of 0 and 255; a value that is not listed stays."""
    background: Annotated[int, Field(ge=0, le=254)] | None = None
    """Class left out of the "foreground" figures of the log; none by default."""
    channels: Positive = 3
    """Of the images; 1 for grey ones, 4 for RGB and one more, any number from .npy files of (H, W, channels) uint8."""
    mean: tuple[Fraction, ...] | None = None
    """Of each channel, of values in [0, 1]; by default ImageNet's (for other than 3 channels the mean of those three)."""
    std: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """Of each channel, on the same scale: numbers meant for 0 to 255 are divided by 255."""
    labelled: Path | Positive | Annotated[float, Field(gt=0, le=1, strict=True)] = 0.125
    """Labelled share of train/ (at most 1), number of labelled images, or a text file of their names; the rest is
    unlabelled."""
    split_seed: int = 0
    """Draws the labelled images; apart from `seed`, so that runs of several seeds share a split."""
    val: str = "val"
    """`val`: val.txt of the split if there is one, else ROOT/val (folder) or the official validation images. Else another
    folder of ROOT, or a text file of lines `IMAGE MASK` (for a benchmark also of ids)."""
    test: str | None = "test"
    """Likewise; where there is no `test`, as for the benchmarks, the result is on val."""
    size: tuple[Positive, Positive] | None = None
    """Images are resized to (height, width) first; evaluation still compares at the original resolution."""
    crop: Positive = 320
    """Side of the training crop in pixels."""
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    """Random resize of the weak augmentation."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Loaders of each process; by default the cores, divided by the processes of the machine, but one, at most 8."""
    shapes: ShapesSettings = ShapesSettings()


class ModelSettings(Section):
    arch: str = "deeplabv3plus"
    """`deeplabv3plus`; `dpt`, on a plain vision transformer; or `smp:ARCH/ENCODER`, a network of
    segmentation_models_pytorch, such as smp:upernet/tu-convnext_tiny."""
    encoder: str = "resnet101s.gluon_in1k"
    """A timm model: for deeplabv3plus one with features at strides 4 and `output_stride`, for dpt a DINOv2 or DINOv3."""
    weights: str = "timm"
    """`timm`: pretrained weights of the encoder, fetched; `none`: random; else a file (.pt or .safetensors)."""
    init_from: Path | None = None
    """Warm start: the folder of a run, or one of its checkpoints (.pt). A head of another number of classes is left as it
    is initialised."""
    freeze_encoder: bool = False
    """The encoder does not learn, and its BatchNorm layers keep their statistics."""
    output_stride: Literal[8, 16] = 16
    """Of deeplabv3plus, like the next two."""
    atrous_rates: tuple[Positive, ...] = (6, 12, 18)
    low_level_width: Positive = 48
    decoder_width: Positive | None = None
    """By default 256 for deeplabv3plus; for dpt 64, 128, 256 or 384, by the width of the encoder, as in UniMatch V2."""


class OhemSettings(Section):
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    min_kept: Positive = 800_000
    """Pixels of the labelled batch (of all processes) that count at least."""


class MethodSettings(Section):
    preset: Literal["supervised", "fixmatch", "unimatch", "unimatch_v2", "mim", "cmim"] = "cmim"
    tau: Fraction = 0.95
    """Confidence from which a pseudo-label trains the strong and the dropped-out view."""
    cutmix: Fraction = 0.5
    """Probability of a CutMix box in a strong view."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Channel dropout of the feature-perturbed view."""
    complementary: bool = True
    """In unimatch_v2: the two strong views of half of the images see complementary halves of the encoder's channels."""
    ohem: OhemSettings | None = None
    """Online hard example mining in the supervised term."""


class MimSettings(Section):
    views: list[Literal["labelled", "weak", "strong"]] = ["labelled", "weak", "strong"]
    tau: Fraction = 0.95
    """Confidence from which a pixel of an unlabelled view has a class in the masked terms."""
    start: Fraction = 0.0
    ramp: Fraction = 0.05
    """The masked terms begin at `start` and grow linearly over `ramp`, both fractions of the training."""
    w_pix: NonNegative = 0.5
    w_feat: NonNegative = 0.1
    w_sem: NonNegative = 1.0
    isolate: Literal["none", "input"] = "none"
    """`input`: before the encoder, hide every class but one drawn for each image."""
    batch_norm: Literal["batch", "shared", "running"] = "batch"
    """Masked pass: batch statistics without updating the running ones; with updating; or running statistics."""


class MaskSettings(Section):
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    block: Positive = 32
    """Side of a mask block in pixels."""
    fill: Literal["mean", "black", "learned"] = "mean"
    """Colour of hidden pixels: the mean colour of the data (zero after normalisation), black, or a learned colour."""
    per_class: bool = False
    """Mask the ratio inside each class of each image instead of over the whole image."""


class ReconstructionSettings(Section):
    tokens: Literal["decoder", "encoder"] = "decoder"
    """Feature map that is decoded and whose centroids are compared: the segmenter's decoder or its encoder."""
    decoder: Literal["conv", "attention"] = "conv"
    width: Positive = 128
    depth: Positive = 4
    kernel_size: Positive = 7
    """Of the conv decoder; odd."""
    num_heads: Positive = 8
    """Of the attention decoder."""
    mask_token: bool = True
    """Replace the features of hidden tokens by a learned token before decoding."""
    distance: Literal["l1", "mse", "smooth_l1"] = "l1"
    normalize: bool = False
    """Compare with patches normalised by their own mean and variance."""
    balance: Literal["token", "class"] = "token"
    """Mean over tokens, or mean over the classes of their means."""
    min_share: Fraction = 0.5
    """Share of a patch's pixels that its class must hold; a patch below it is ignored."""


class CentroidSettings(Section):
    distance: Literal["cosine", "l2"] = "cosine"
    detach: Literal["visible", "masked", "none"] = "visible"
    min_tokens: Positive = 4


class TeacherSettings(Section):
    kind: Literal["student", "ema"] = "student"
    """`student`: pseudo-labels of the training pass itself; `ema`: of a moving average of the weights, in eval mode."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.996


class OptimizerSettings(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.001
    """Of the encoder."""
    lr_batch: Positive = 8
    """Labelled images of a step that `lr` is meant for; with another number of them it is scaled in proportion."""
    head_lr_factor: Annotated[float, Field(gt=0)] = 10.0
    """Everything but the encoder learns at lr x this."""
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 1e-4
    poly_power: NonNegative = 0.9


class TrainSettings(Section):
    steps: Positive | None = None
    """Optimiser steps; 40,000 where `epochs` is not given either."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length in passes over the unlabelled images, each of whole batches, instead of `steps`; the same number of steps
    for every preset."""
    labelled_batch: Positive = 8
    """Labelled images of a step over all processes; each takes its part."""
    unlabelled_batch: Positive = 8
    accumulate: Positive = 1
    """Micro-batches of the above sizes per optimiser step; every micro-batch has its own denominators."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU."""
    compile: bool | None = None
    """torch.compile; by default on CUDA only."""
    channels_last: bool = True
    log_every: Positive = 20
    evaluate_every: Positive = 1000
    checkpoint_every: Positive = 500
    picture_every: Positive = 1000


class EvaluationSettings(Section):
    weights: Literal["teacher", "student"] = "teacher"
    """Which weights are evaluated and chosen where the teacher is an EMA."""
    batch: Positive = 8
    """Images of equal size, or windows, that are evaluated together."""
    mode: Literal["whole", "slide"] = "whole"
    """`slide`: windows of `window` pixels every `stride` pixels, their class probabilities averaged."""
    window: Positive | None = None
    """Side of a window; by default data.crop."""
    stride: Positive | None = None
    """By default two thirds of the window."""
    flip: bool = False
    """Average with the prediction of the mirrored image."""
    scales: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    """Average the predictions of the image at these scales."""


class Config(Section):
    seed: int = 0
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    method: MethodSettings = MethodSettings()
    mim: MimSettings = MimSettings()
    mask: MaskSettings = MaskSettings()
    reconstruction: ReconstructionSettings = ReconstructionSettings()
    centroids: CentroidSettings = CentroidSettings()
    teacher: TeacherSettings = TeacherSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    evaluation: EvaluationSettings = EvaluationSettings()


def normalisation(data):
    """Mean and standard deviation of each channel, of values in [0, 1], of a `DataSettings`."""
    if data.channels == 3:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        mean, std = ((sum(v) / 3,) * data.channels for v in (IMAGENET_MEAN, IMAGENET_STD))
    return data.mean or mean, data.std or std


def token_stride(config):
    """Pixels per side of a token, which is also the patch that is reconstructed from it."""
    form = geometry(config.model)
    return form.feature_stride if config.reconstruction.tokens == "decoder" else form.encoder_stride


def uses_unlabelled(config):
    return config.method.preset != "supervised"


def uses_masking(config):
    return config.method.preset in ("mim", "cmim")
