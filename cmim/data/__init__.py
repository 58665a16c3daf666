"""Images and labels: where they come from, how they are augmented, and the batches made of them."""

from collections.abc import Callable

from cmim.data.benchmarks import Ade20k, Cityscapes, Coco, Voc
from cmim.data.datasets import Splits
from cmim.data.folder import Folder
from cmim.data.shapes import load_shapes
from cmim.data.splits import load_files
from cmim.settings import DataSettings

FORMATS: dict[str, Callable[[DataSettings], Splits]] = {
    "shapes": load_shapes,
    "folder": lambda settings: load_files(settings, Folder(settings)),
    "voc": lambda settings: load_files(settings, Voc(settings)),
    "cityscapes": lambda settings: load_files(settings, Cityscapes(settings)),
    "coco": lambda settings: load_files(settings, Coco(settings)),
    "ade20k": lambda settings: load_files(settings, Ade20k(settings)),
}
"""How each `data.format` is loaded."""


def load_splits(settings: DataSettings) -> Splits:
    """The `Splits` that `DataSettings` describe.

    Raises:
        UserError: a file, a folder or a setting is missing or wrong; the message names it and the remedy.
    """
    return FORMATS[settings.format](settings)
