"""Settings of the data: `data`."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from cmim.errors import UserError
from cmim.settings.section import Fraction, Positive, Section

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue, for values in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)

MOST_PIXELS = 1 << 28
"""Upper limit for an image that is resized or cropped: a larger one takes gigabytes, and the operating system may kill the
run without a message."""


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
    colour_jitter: Fraction = 1.0
    """Strength of the colour distortions of strong views, relative to UniMatch's: a factor of the ranges of brightness,
    contrast, saturation and hue, and of the probability of grey. Less where classes differ by their colour; 0: none."""
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
