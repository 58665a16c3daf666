"""The state of a run in its checkpoint: writing it, and going on from it."""

import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cmim import checkpoint
from cmim.data.datasets import ImageSet
from cmim.engine.logging import console
from cmim.errors import UserError

if TYPE_CHECKING:
    from cmim.engine.trainer import Trainer


def about(trainer: "Trainer") -> dict[str, Any]:
    """What every checkpoint says about its weights."""
    return {
        "step": trainer.step,
        "class_names": list(trainer.splits.class_names),
        "colours": trainer.splits.colours.tolist(),
        "evaluated": trainer.config.evaluated_weights,
    }


def save(trainer: "Trainer", interval: Sequence = ()) -> None:
    """Write last.pt; `interval`: the figures that the log has not written yet."""
    state = {
        "objective": trainer.objective.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "images": trainer.images,
        "best_miou": trainer.best_miou,
        **about(trainer),
    } | ({"interval": list(interval)} if interval else {})
    checkpoint.save(state, trainer.run.last)
    trainer.saved = trainer.step


def load(trainer: "Trainer") -> None:
    """Continue from last.pt.

    Raises:
        UserError: it is not the last checkpoint of this run.
    """
    state = checkpoint.load(trainer.run.last, trainer.device)
    if "objective" not in state:
        raise UserError(
            f"{trainer.run.last} holds only weights, as best.pt does, and no state to continue from; put the last "
            "checkpoint there, or start a new run from it with --model.init_from"
        )
    if state["class_names"] != list(trainer.splits.class_names):
        raise UserError(f"the classes of the data are not those of {trainer.run.last}; give another --output")
    checkpoint.load_into(trainer.objective, state["objective"], trainer.run.last)
    try:
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scaler.load_state_dict(state["scaler"])
        trainer.step, trainer.best_miou = int(state["step"]), float(state["best_miou"])
    except (LookupError, TypeError, ValueError):
        raise UserError(
            f"{trainer.run.last} is no checkpoint of this run's last step; put that there, or give another --output"
        ) from None
    trainer.saved, trainer.interval = trainer.step, state.get("interval", [])
    for name, images in state.get("images", trainer.images).items():
        if images != trainer.images[name]:
            console.print(
                f"warning: the {name} images changed since the run was stopped ({images[0]} then, "
                f"{trainer.images[name][0]} now): the run continues, but its result will differ"
            )
    if trainer.step > trainer.steps:
        raise UserError(f"the run has {trainer.steps} steps, but {trainer.run.last} is at step {trainer.step}")
    console.print(f"continuing {trainer.run.folder} at step {trainer.step}")


def names_of(image_set: ImageSet) -> list[str]:
    return [image_set.name(i) for i in range(len(image_set))]


def digest(image_set: ImageSet) -> tuple[int, str]:
    """The number of images and a hash of their names, to detect changes when a run is resumed."""
    names = "\n".join(names_of(image_set))
    return len(image_set), hashlib.blake2b(os.fsencode(names), digest_size=8).hexdigest()
