"""Images and labels: where they come from, how they are augmented, and the batches made of them."""

from cmim.data.benchmarks import load_benchmark
from cmim.data.folder import load_folder
from cmim.data.shapes import load_shapes


def load_splits(settings):
    """The `Splits` that `DataSettings` describe.

    Raises:
        UserError: a file, a folder or a setting is missing or wrong; the message names it and the remedy.
    """
    return {"shapes": load_shapes, "folder": load_folder}.get(settings.format, load_benchmark)(settings)
