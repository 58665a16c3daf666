"""Every setting of a run: its type, its default and what it does.

The defaults are those of DeepLabV3+ on photographs; a file in configs/ states only what differs. Where a default
comes from is in the README's table. `check` of a section holds the rules that concern this section alone; rules between
sections are in `cmim.config`.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cmim.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of red, green and blue in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)

MOST_PIXELS = 1 << 28
"""Of an image that is resized or cropped: one with more takes gigabytes, and the system may end the run without a word."""

Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
NonNegative = Annotated[float, Field(ge=0, strict=True)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def check(self) -> None:
        """Raise a UserError where settings of this section contradict each other."""


def as_colour(value: object, name: str) -> str:
    """A colour as `#rrggbb`; `name` is what it belongs to in `data.colours`.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
        return value.lower()
    if _is_rgb(value) and all(0 <= v <= 255 for v in value):
        return f"#{bytes(value).hex()}"
    raise UserError(
        f'data.colours: {name} is {repr(value)[:60]}, expected a colour: "#rrggbb", in quotes, or [red, green, blue] from 0 '
        "to 255"
    )


def _is_rgb(value):
    return isinstance(value, list | tuple) and len(value) == 3 and all(type(v) is int for v in value)


class ShapesSettings(Section):
    labelled: Positive = 48
    """Images with labels."""
    unlabelled: Positive = 400
    """Images without."""
    val: Positive = 100
    """Images that choose best.pt."""
    test: Positive = 200
    """Images of the result."""


class DataSettings(Section):
    format: Literal["shapes", "folder", "voc", "cityscapes", "coco", "ade20k"] = "folder"
    """`shapes`: drawn on the fly. `folder`: train/, val/, test/ with images/ and masks/, optionally unlabeled/. The others:
    benchmarks as they are distributed."""
    root: Path | None = None
    """Folder of the data; needed for every format but shapes."""
    split: Path | None = None
    """Folder of labeled.txt and unlabeled.txt, lines `IMAGE MASK` under `root` (UniMatch's split files; the mask of an
    unlabelled image may be missing or None). val.txt and test.txt may lie beside them or one folder up. Without it,
    `labelled` divides the training images; with it, `labelled` is not used."""
    classes: list[str] | Positive | None = None
    """Names or number of the classes of `folder`; by default read from ROOT/classes.txt, one name a line. Benchmarks
    have their own, as of the next two."""
    ignore: Annotated[int, Field(ge=0, le=255, strict=True)] = 255
    """Mask value without a class."""
    label_map: dict[int, int] = {}
    """Mask values to class ids, e.g. {255: 1} for masks of 0 and 255; a value that is not listed stays."""
    colours: dict[str, str | list[str]] | list[str] | None = None
    """For masks in colours: {class: "#rrggbb" or [red, green, blue]}, or a list of colours in the order of the classes. In a
    mapping `ignore` is the colour of pixels without a class, and several colours may stand in a list; its names are the
    classes where neither `classes` nor classes.txt gives them. Masks are then read by their colours, palettes too."""
    colour_tolerance: Annotated[float, Field(ge=0, le=442, strict=True)] = 0
    """Distance in RGB up to which a pixel takes the nearest of `colours`; those beyond are ignored. 0: every pixel has
    one of the colours exactly. About 60 suits JPEG masks, which need it."""
    masks: str = "{stem}"
    """File name of a mask of `folder`, in the folder below masks/ as its image below images/; {stem} is the image's without
    suffix: "{stem}_mask.png", "{stem}_L.png". Without a suffix any of masks is taken."""
    background: Annotated[int, Field(ge=0, le=254, strict=True)] | None = None
    """Class left out of the "foreground" figures of the log; none by default."""
    channels: Positive = 3
    """Of the images; 1 for grey ones, 4 for RGB and one more, any number from .npy files of (H, W, channels) uint8."""
    mean: tuple[Fraction, ...] | None = None
    """Of each channel, of values in [0, 1]; by default that of the pretrained weights, else ImageNet's (for other than 3
    channels the mean of those three)."""
    std: tuple[Annotated[float, Field(gt=0, le=1, strict=True)], ...] | None = None
    """Of each channel, on the same scale: numbers meant for 0 to 255 are divided by 255."""
    exif: Literal["apply", "ignore"] | None = None
    """Whether images are turned as their EXIF orientation says. By default whichever fits the sizes of the masks, decided at
    the start; `ignore` where they cannot tell."""
    strict: bool = False
    """Stop at an unlabelled image that cannot be read, instead of taking another one in its place."""
    labelled: Path | Positive | Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    """Labelled share of train/ (at most 1), number of labelled images, or a text file of their names; the rest is
    unlabelled. By default all images of `folder` that have a mask, and an eighth of a benchmark's."""
    split_seed: Annotated[int, Field(strict=True)] = 0
    """Draws the labelled images, and those of `val` where it is a share or a number; apart from `seed`, so that runs of
    several seeds share a split."""
    val: str | Positive | Annotated[float, Field(gt=0, lt=1, strict=True)] = "val"
    """`val`: val.txt of the split if there is one, else ROOT/val (folder) or the official validation images. Else another
    folder of ROOT, or a text file of lines `IMAGE MASK` (for a benchmark also of ids). A share below 1, such as 0.1, or a
    number: so many of the training images that have a mask, which are then neither labelled nor unlabelled."""
    test: str | None = "test"
    """A name as of `val`; where there is no `test`, as for the benchmarks, the result is on val."""
    size: tuple[Positive, Positive] | None = None
    """Images are resized to (height, width) first; evaluation still compares at the original resolution."""
    crop: Positive = 320
    """Side of the training crop in pixels."""
    scale: tuple[Annotated[float, Field(gt=0, strict=True)], Annotated[float, Field(gt=0, strict=True)]] = (0.5, 2.0)
    """Random resize of the weak augmentation."""
    workers: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Loaders of each process; by default the cores, divided by the processes of the machine, but one, at most 8."""
    shapes: ShapesSettings = ShapesSettings()

    @field_validator("colours", mode="before")
    @classmethod
    def _as_colours(cls, value: object) -> object:
        """Every colour as `#rrggbb`, whichever way it is written."""
        if value is None:
            return None
        if isinstance(value, list):
            return [as_colour(colour, f"entry {i}") for i, colour in enumerate(value)]
        if not isinstance(value, dict) or not all(type(name) in (str, int) for name in value):
            raise UserError(
                f'data.colours is {repr(value)[:60]}, expected {{class: "#rrggbb" or [red, green, blue]}}, or a list of '
                "colours"
            )
        several = {name: isinstance(c, list) and not _is_rgb(c) and len(c) > 0 for name, c in value.items()}
        return {
            str(name): [as_colour(one, name) for one in c] if several[name] else as_colour(c, name)
            for name, c in value.items()
        }

    def check(self) -> None:
        if self.format != "shapes" and self.root is None:
            raise UserError("data.root is missing: give the data folder as --data.root PATH")
        if self.format == "shapes" and not isinstance(self.val, str):
            raise UserError(f"data.val is {self.val}, but data.format shapes draws its own; give data.shapes.val")
        if self.split is not None and not isinstance(self.val, str):
            raise UserError(
                f"data.val is {self.val}, but data.split names the training images; list those of val in "
                f"{self.split}/val.txt"
            )
        if self.masks.count("{stem}") != 1 or any(c in self.masks.replace("{stem}", "") for c in "{}/\\"):
            raise UserError(
                f"data.masks is {self.masks!r}, expected a file name with {{stem}} once, such as '{{stem}}_mask.png'; it "
                "stands for the image's name without suffix"
            )
        if self.colours is None and self.colour_tolerance:
            raise UserError("data.colour_tolerance is given without data.colours; give these too, or leave it away")
        if self.colours is not None and self.label_map:
            raise UserError("data.label_map maps numbers, but with data.colours masks hold colours; leave one of them away")
        if self.colours is not None and self.ignore != 255:
            raise UserError(
                "data.ignore is a number, but with data.colours masks hold colours; use its name `ignore` instead"
            )
        for key, size in (("size", self.size), ("crop", (self.crop, self.crop))):
            if size is not None and size[0] * size[1] > MOST_PIXELS:
                raise UserError(
                    f"data.{key} is {list(size) if key == 'size' else size[0]}, too large for an image; it is in pixels"
                )
        if self.format == "shapes" and self.split is not None:
            raise UserError("data.split is given, but data.format shapes has no files; leave it away")
        if self.format == "shapes" and self.channels != 3:
            raise UserError(f"data.channels is {self.channels}, but data.format shapes has 3")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise UserError(
                    f"data.{key} has {len(values)} numbers, but data.channels is {self.channels}; give one for each"
                )
        if self.scale[0] > self.scale[1]:
            raise UserError(f"data.scale: the lower bound {self.scale[0]} is above the upper bound {self.scale[1]}")

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of values in [0, 1]."""
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if self.channels != 3:
            mean, std = ((sum(values) / 3,) * self.channels for values in (mean, std))
        return self.mean or mean, self.std or std


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
    """Dilations of the pyramid's 3 x 3 branches."""
    low_level_width: Positive = 48
    """Channels to which the map at stride 4 is reduced."""
    decoder_width: Positive | None = None
    """By default 256 for deeplabv3plus; for dpt 64, 128, 256 or 384, by the width of the encoder, as in UniMatch V2."""


class OhemSettings(Section):
    threshold: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.7
    """Pixels whose true class has at most this probability count."""
    min_kept: Positive = 800_000
    """Pixels of the labelled batch (of all processes) that count at least."""


class Preset(NamedTuple):
    """What a preset trains on: the views that it has, its terms and their weights. The terms are defined in
    `cmim.method.objective`."""

    sup: float
    """Weight of the supervised term."""
    strong: float = 0
    """Weight of the term of each strong view."""
    strong_views: int = 0
    """Strong views of each unlabelled image; without one, no unlabelled image is used."""
    fp: float = 0
    """Weight of the feature perturbation: the weak view with channels of its features dropped. Without it there is no
    such view."""
    weak_pass: bool = True
    """Whether the student's training pass contains the weak views even where a teacher labels them."""
    complementary: bool = False
    """Whether the two strong views may lose complementary halves of the channels."""
    masked: tuple[Literal["pix", "feat", "sem"], ...] = ()
    """Terms of the masked views; their weights are settings, `mim.w_*`."""
    class_wise: bool = False
    """Whether the terms of the masked views keep classes apart."""
    base: str | None = None
    """The preset whose views and weights a preset with masked terms takes over."""

    @property
    def uses_unlabelled(self) -> bool:
        return self.strong_views > 0


PRESETS: dict[str, Preset] = {
    "supervised": Preset(sup=1),
    "fixmatch": Preset(sup=1 / 2, strong=1 / 2, strong_views=1),
    "fixmatch_fp": Preset(sup=1 / 2, strong=1 / 4, strong_views=1, fp=1 / 4),
    "unimatch": Preset(sup=1 / 2, strong=1 / 8, strong_views=2, fp=1 / 4),
    "unimatch_v2": Preset(sup=1 / 2, strong=1 / 4, strong_views=2, weak_pass=False, complementary=True),
}
"""Everything that depends on the preset reads its row. Masked terms can stand on any row above: add a row below."""


def standing_on(base: str, *masked: str, class_wise: bool = False) -> Preset:
    """The row of a preset that adds the terms `masked` to those of the preset `base`."""
    return PRESETS[base]._replace(masked=masked, class_wise=class_wise, base=base)


PRESETS["semantic"] = standing_on("fixmatch_fp", "sem")
PRESETS["mim"] = standing_on("fixmatch_fp", "pix", "feat", "sem")
PRESETS["cmim"] = standing_on("fixmatch_fp", "pix", "feat", "sem", class_wise=True)


class MethodSettings(Section):
    preset: Literal[*PRESETS] = "cmim"
    """Which views and terms are trained: a row of PRESETS; docs/method.md has the formulas."""
    tau: Fraction = 0.95
    """Confidence from which a pseudo-label trains the strong and the dropped-out view."""
    cutmix: Fraction = 0.5
    """Probability of a CutMix box in a strong view."""
    dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.5
    """Channel dropout of the feature-perturbed view."""
    complementary: bool = True
    """In unimatch_v2: the two strong views of half of the images see complementary halves of the encoder's channels."""
    ohem: OhemSettings | None = None
    """Online hard example mining in the supervised term."""


class MimSettings(Section):
    views: list[Literal["labelled", "weak", "strong"]] = ["labelled", "weak", "strong"]
    """Which views are masked, of labelled, weak and strong."""
    tau: Fraction = 0.95
    """Confidence from which a pixel of an unlabelled view has a class in the masked terms."""
    start: Fraction = 0.0
    """Fraction of the training after which the masked terms begin."""
    ramp: Fraction = 0.05
    """Fraction of the training over which they then grow linearly to their full weight."""
    w_pix: NonNegative = 0.5
    """Weight of the reconstruction of pixels."""
    w_feat: NonNegative = 0.1
    """Weight of the distance between centroids of hidden and visible tokens."""
    w_sem: NonNegative = 1.0
    """Weight of the cross-entropy on masked views."""
    isolate: Literal["none", "input"] = "none"
    """`input`: before the encoder, hide every class but one drawn for each image."""
    batch_norm: Literal["batch", "shared", "running"] = "batch"
    """Masked pass: batch statistics without updating the running ones; with updating; or running statistics."""

    def check(self) -> None:
        if not self.views:
            raise UserError("mim.views is empty: name at least one of labelled, weak, strong")
        if len(set(self.views)) < len(self.views):
            raise UserError(f"mim.views names a view twice: {', '.join(self.views)}")


class MaskSettings(Section):
    ratio: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.6
    """Share of the blocks that is hidden."""
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
    """`conv`: ConvNeXt blocks whose convolutions see one class at a time; `attention`: blocks that attend within a class."""
    width: Positive = 128
    """Channels of the decoder."""
    depth: Positive = 4
    """Blocks of the decoder."""
    kernel_size: Positive = 7
    """Of the conv decoder; odd."""
    num_heads: Positive = 8
    """Of the attention decoder."""
    mask_token: bool = True
    """Replace the features of hidden tokens by a learned token before decoding."""
    distance: Literal["l1", "mse", "smooth_l1"] = "l1"
    """Between predicted and true pixels; smooth_l1 turns from square to linear at 1."""
    normalize: bool = False
    """Compare with patches normalised by their own mean and variance."""
    balance: Literal["token", "class"] = "token"
    """Mean over tokens, or mean over the classes of their means."""
    min_share: Fraction = 0.5
    """Share of a patch's pixels that its class must hold; a patch below it is ignored."""

    def check(self) -> None:
        if self.kernel_size % 2 == 0:
            raise UserError(f"reconstruction.kernel_size is {self.kernel_size}, expected an odd number")
        if self.decoder == "attention" and self.width % (4 * self.num_heads):
            raise UserError("reconstruction.width must be a multiple of 4 x reconstruction.num_heads")


class CentroidSettings(Section):
    distance: Literal["cosine", "l2"] = "cosine"
    """Between centroids: 1 - cosine, or the mean of squared differences."""
    detach: Literal["visible", "masked", "none"] = "visible"
    """Side that gets no gradient."""
    min_tokens: Positive = 4
    """Tokens of each kind that a class needs in an image."""


class TeacherSettings(Section):
    kind: Literal["student", "ema"] = "student"
    """`student`: pseudo-labels of the training pass itself; `ema`: of a moving average of the weights, in eval mode."""
    decay: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.996
    """Of the moving average, reached step by step: min(1 - 1 / (step + 1), decay)."""


class OptimizerSettings(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: Annotated[float, Field(gt=0, strict=True)] = 0.001
    """Of the encoder."""
    lr_batch: Positive = 8
    """Labelled images of a step that `lr` is meant for; with another number of them it is scaled in proportion."""
    head_lr_factor: Annotated[float, Field(gt=0, strict=True)] = 10.0
    """Everything but the encoder learns at lr x this."""
    momentum: Fraction = 0.9
    """Of SGD."""
    weight_decay: NonNegative = 1e-4
    """L2 penalty of SGD, decoupled in AdamW."""
    poly_power: NonNegative = 0.9
    """Learning rate times (1 - step / steps) to this power."""


class TrainSettings(Section):
    steps: Positive | None = None
    """Optimiser steps; 40,000 where `epochs` is not given either."""
    epochs: Annotated[float, Field(gt=0, strict=True)] | None = None
    """Length in passes over the unlabelled images, each of whole batches, instead of `steps`; the same number of steps
    for every preset."""
    labelled_batch: Positive = 8
    """Labelled images of a step over all processes; each takes its part."""
    unlabelled_batch: Positive = 8
    """Unlabelled images of a step, likewise."""
    accumulate: Positive = 1
    """Micro-batches of the above sizes per optimiser step; every micro-batch has its own denominators."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU."""
    compile: bool | None = None
    """torch.compile; by default on CUDA only."""
    channels_last: bool = True
    """Memory layout of images and features."""
    log_every: Positive = 20
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Positive = 1000
    """Steps between evaluations on data.val."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    picture_every: Positive = 1000
    """Steps between pictures."""

    def check(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UserError(
                "train.steps and train.epochs are both given; leave one away: --train.epochs null or --train.steps null"
            )


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
    scales: tuple[Annotated[float, Field(gt=0, strict=True)], ...] = (1.0,)
    """Average the predictions of the image at these scales."""

    def check(self) -> None:
        if not self.scales:
            raise UserError("evaluation.scales is empty: name at least one scale, 1.0 is the image as it is")


class Config(Section):
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)] = 0
    """Of everything that is drawn at random, but for the choice of labelled images."""
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

    @property
    def preset(self) -> Preset:
        """The row of `PRESETS`."""
        return PRESETS[self.method.preset]

    @property
    def has_teacher(self) -> bool:
        return self.teacher.kind == "ema"

    @property
    def evaluated_weights(self) -> Literal["teacher", "student"]:
        """Which weights are evaluated, and kept as the best."""
        return "teacher" if self.has_teacher and self.evaluation.weights == "teacher" else "student"
