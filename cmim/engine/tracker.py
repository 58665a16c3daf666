"""The figures of a run in a tracker beside TensorBoard, by `logging.tracker`. Its package is imported only when it is named.

The run folder keeps the tracker's id of the run in tracker.txt, by which a resumed run continues the same one there.
"""

import importlib
import importlib.util
import uuid
from typing import Protocol

from cmim import distributed
from cmim.engine.run import Run, write_text
from cmim.errors import UserError
from cmim.settings import Config, LoggingSettings


class Tracker(Protocol):
    where: str
    """Where the figures go, for the user."""

    def log(self, figures: dict[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


def check_tracker(settings: LoggingSettings) -> None:
    """Raise a UserError if the tracker cannot be used: it is not installed, or nobody is logged in to wandb, which asks for
    that on a terminal."""
    name = settings.tracker
    if name == "none":
        return
    if importlib.util.find_spec(name) is None:
        raise UserError(f"logging.tracker: {name} is not installed: pip install {name}, or pip install 'cmim[trackers]'")
    if name == "wandb" and distributed.world().rank == 0:
        import wandb

        try:
            ready = wandb.setup().settings.mode != "online" or wandb.login()
        except wandb.errors.Error:
            ready = False
        if not ready:
            raise UserError("logging.tracker: wandb has no API key: run `wandb login`, or set WANDB_MODE=offline")


def open_tracker(config: Config, run: Run, first_step: int) -> Tracker | None:
    """The tracker of a run that begins or, after `first_step` > 0 steps, continues; None if the settings name none.

    Raises:
        UserError: it cannot be opened.
    """
    name = config.logging.tracker
    if name == "none":
        return None
    if first_step == 0 or not run.tracker.exists():
        write_text(run.tracker, f"{uuid.uuid4().hex[:8]}\n")
    try:
        return {"wandb": _Wandb, "trackio": _Trackio}[name](config, run, run.tracker.read_text().strip())
    except Exception as error:  # the network, the service and the disk each raise exceptions of their own
        problem = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"logging.tracker: {name} cannot be opened ({problem[0]}); --logging.tracker none does without"
        ) from error


class _Wandb:
    def __init__(self, config: Config, run: Run, identifier: str):
        import wandb

        self.run = wandb.init(
            project=config.logging.project, name=run.folder.name, id=identifier, resume="allow", dir=run.folder,
            config=config.model_dump(mode="json"), settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        self.where = f"{run.folder}/wandb, for `wandb sync`" if self.run.offline else self.run.url

    def log(self, figures: dict[str, float], step: int) -> None:
        self.run.log(figures, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, config: Config, run: Run, identifier: str):
        import trackio

        name = f"{run.folder.name}-{identifier}"
        self.run = trackio.init(config.logging.project, name, resume="allow", config=config.model_dump(mode="json"))
        self.where = f"{name} in the project {config.logging.project}"

    def log(self, figures: dict[str, float], step: int) -> None:
        self.run.log(figures, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish()
