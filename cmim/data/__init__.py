"""Images and labels: where they come from, how they are augmented, and the batches made of them."""

from collections.abc import Callable
from pathlib import Path

from cmim.data.benchmarks import Ade20k, Cityscapes, Coco, Voc
from cmim.data.datasets import Splits
from cmim.data.folder import Folder
from cmim.data.shapes import load_shapes
from cmim.data.splits import load_files
from cmim.settings import DataSettings

FORMATS: dict[str, Callable[[DataSettings, Path | None], Splits]] = {
    "shapes": lambda settings, labelled: load_shapes(settings),
    "folder": lambda settings, labelled: load_files(settings, Folder(settings), labelled),
    "voc": lambda settings, labelled: load_files(settings, Voc(settings), labelled),
    "cityscapes": lambda settings, labelled: load_files(settings, Cityscapes(settings), labelled),
    "coco": lambda settings, labelled: load_files(settings, Coco(settings), labelled),
    "ade20k": lambda settings, labelled: load_files(settings, Ade20k(settings), labelled),
}
"""How each `data.format` is loaded."""


def load_splits(settings: DataSettings, labelled: Path | None = None) -> Splits:
    """The `Splits` that `DataSettings` describe.

    Args:
        labelled: a continued run's list of its labelled images, which are then not drawn anew.

    Raises:
        UserError: a file, a folder or a setting is missing or wrong; the message names it and the remedy.
    """
    return FORMATS[settings.format](settings, labelled)
