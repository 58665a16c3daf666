"""Semi-supervised semantic segmentation with class-wise masked image modelling.

`load(RUN)` gives a trained network that predicts images, `fit(CONFIG)` trains one: see `cmim.api`. The commands are modules:
`python -m cmim` lists them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmim.api import fit, load
    from cmim.engine.prediction import Prediction, TrainedSegmenter
    from cmim.errors import UserError
    from cmim_kernels import __version__

__all__ = ["Prediction", "TrainedSegmenter", "UserError", "__version__", "fit", "load"]

# Imported when they are used: PyTorch takes seconds, and a command answers --help before.
_PLACES = {
    "fit": "cmim.api", "load": "cmim.api", "Prediction": "cmim.engine.prediction",
    "TrainedSegmenter": "cmim.engine.prediction", "UserError": "cmim.errors", "__version__": "cmim_kernels",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
