"""Images and labels: where they come from, how they are augmented, and the batches made of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from cmim.data.benchmarks import Ade20k, Cityscapes, Coco, Voc
from cmim.data.datasets import ImageSet, Splits
from cmim.data.folder import Folder
from cmim.data.shapes import load_shapes
from cmim.data.splits import Source, held_out_set, load_files
from cmim.errors import UserError
from cmim.settings import DataSettings

FORMATS: dict[str, Callable[[DataSettings], Source] | None] = {
    "shapes": None,  # drawn
    "folder": Folder,
    "voc": Voc,
    "cityscapes": Cityscapes,
    "coco": Coco,
    "ade20k": Ade20k,
}
"""The `Source` of each `data.format`."""


PLACES = ("image_folder", "mask_folder", "masks", "train")
"""Settings of `folder` alone."""
UNUSED = {"shapes": ("root", "classes", "label_map", "colours", *PLACES, "labelled", "exif", "range")}
"""Settings that a format has no use for. Benchmarks, which have their own classes, say so themselves."""


def _source(settings: DataSettings) -> Source | None:
    """The `Source`; None where the images are drawn. A setting that would count for nothing is a mistake."""
    for key in UNUSED.get(settings.format, ()):
        if getattr(settings, key) != DataSettings.model_fields[key].default:
            raise UserError(
                f"data.{key} is given, but data.format {settings.format} does not use it; leave it away, or give another "
                "data.format, such as that of configs/camvid.yaml"
            )
    made = FORMATS[settings.format]
    return None if made is None else made(settings)


def load_splits(settings: DataSettings, labelled: Path | None = None, val: Path | None = None) -> Splits:
    """The `Splits` that `DataSettings` describe.

    Args:
        labelled: a continued run's list of its labelled images, which are then not drawn anew.
        val: its list of the val images, where `settings.val` is a share or a number; likewise.

    Raises:
        UserError: a file, a folder or a setting is missing or wrong; the message names it and the remedy.
    """
    source = _source(settings)
    return load_shapes(settings) if source is None else load_files(settings, source, labelled, val)


def load_held_out(
    settings: DataSettings, name: Literal["val", "test"], val: Path | None = None
) -> tuple[ImageSet | None, tuple[str, ...]]:
    """The val or test images alone, whatever else of the data is there, and the names of the classes; None where there is
    no test. `val` is the list of the val images of a run whose `settings.val` is a share or a number.

    Raises:
        UserError: as `load_splits`.
    """
    source = _source(settings)
    if source is None:
        splits = load_shapes(settings)
        return getattr(splits, name), splits.class_names
    return held_out_set(settings, source, name, val), source.class_names
