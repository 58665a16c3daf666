"""The run folder: config.yaml, labelled.txt, metrics.jsonl, result.json, confusion.json, about.json, report.html,
checkpoints/, pictures/, tensorboard/; val.txt where val images are drawn from the training images; class_weights.txt where
the classes have weights from the data; tracker.txt where a tracker has the figures too; export/."""

import errno
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from cmim.config import dump_config, load_config
from cmim.errors import UserError
from cmim.settings import NAMED_WEIGHTS, Config

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None

# Settings that may change when a run is resumed: they affect how long or where it runs, not what it computes.
FREE_ON_RESUME = (
    ("train", "steps"), ("train", "epochs"), ("train", "device"), ("data", "workers"), ("data", "strict"),
    ("train", "patience"), ("evaluation", "table"), ("logging", "tracker"), ("logging", "project"),
)  # fmt: skip

SETTLED = ("exif", "mean", "std", "labelled")
"""Settings of `data` that a new run decides if they are not given, and that a resumed run takes over."""


class Run:
    """Paths of a run folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = self.folder / "config.yaml"
        self.labelled = self.folder / "labelled.txt"
        self.val = self.folder / "val.txt"
        self.class_weights = self.folder / "class_weights.txt"
        self.metrics = self.folder / "metrics.jsonl"
        self.result = self.folder / "result.json"
        self.last = self.folder / "checkpoints" / "last.pt"
        self.best = self.folder / "checkpoints" / "best.pt"
        self.pictures = self.folder / "pictures"
        self.export = self.folder / "export"
        self.confusion = self.folder / "confusion.json"
        self.about = self.folder / "about.json"
        self.report = self.folder / "report.html"
        self.tensorboard = self.folder / "tensorboard"
        self.tracker = self.folder / "tracker.txt"
        self.lock = self.folder / ".lock"

    def has_results(self) -> bool:
        """Whether there is anything to continue or to lose. A run that stopped before its first checkpoint has no
        results."""
        return any(path.exists() for path in (self.last, self.best, self.result))


def default_folder(config_path: str | Path) -> Path:
    """runs/<config>-<time>."""
    return Path("runs") / f"{Path(config_path).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def open_run(folder: str | Path, config: Config, resume: bool) -> Run:
    """The run of a folder, which is new or will be continued; nothing is written yet.

    Raises:
        UserError: the folder holds a run with a checkpoint and `resume` is false; or the settings of that run differ.
    """
    run = Run(folder)
    if run.config.exists():
        if not run.has_results():
            return run
        if not resume:
            raise UserError(f"{run.folder} holds a run; continue it with --resume, or give another --output")
        if (
            run.result.exists() and not run.last.exists()
        ):  # it would start again and overwrite the best weights and the figures
            raise UserError(f"{run.folder} has a result, but {run.last} is gone; put it back, or give another --output")
        key = changed_setting(load_config(run.config), config)
        if key is not None:
            raise UserError(f"{key} differs from {run.config}; resume with the same settings, or give another --output")
    elif run.folder.exists() and (not run.folder.is_dir() or any(map(_is_foreign, run.folder.iterdir()))):
        raise UserError(f"{run.folder} exists and is not a run folder; give another --output")
    return run


def _is_foreign(path):
    return path.suffix != ".partial" and path.name != ".lock"


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Inside the `with` block no other process can train in the run folder. The operating system releases the lock of a
    process that is killed. On systems without such locks, nothing is locked.

    Raises:
        UserError: another process trains in the folder.
    """
    if fcntl is None:
        yield
        return
    made = [folder for folder in (run.folder, *run.folder.parents) if not folder.exists()]
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # as in /proc
        raise UserError(f"{run.folder} cannot be made; give another --output") from None
    file = _take_lock(run)
    try:
        yield
    finally:
        run.lock.unlink(missing_ok=True)  # before it is released, so that no other process can hold the unlinked file
        file.close()
        for folder in made:  # after an error before anything was written, leave no empty folder
            with suppress(OSError):
                folder.rmdir()


def _take_lock(run):
    while True:
        file = open(run.lock, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the lock is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            who = file.read().strip()
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return open(os.devnull, encoding="utf-8")  # a file system without locks
            raise UserError(
                f"another process{f' ({who})' * bool(who)} is training in {run.folder}; wait until it ends, or give another "
                "--output"
            ) from None
        try:
            same = os.stat(run.lock).st_ino == os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            same = False
        if same:  # else the previous holder has just unlinked it
            file.truncate(0)
            file.write(f"number {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()


def start_run(
    run: Run,
    config: Config,
    labelled: Iterable[str],
    val: Iterable[str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> None:
    """Write the settings, the names of the labelled images and, if they are drawn, of the val images, which must be the same
    when the run is resumed; and `weights`, those of the classes by their names, if they are from the data."""
    lists = {run.labelled: "".join(f"{name}\n" for name in labelled)}
    if val is not None:
        lists[run.val] = "".join(f"{name}\n" for name in val)
    for path, names in lists.items():
        if path.exists() and run.has_results() and read_text(path) != names:
            raise UserError(f"the {path.stem} images are not those of {path}; restore the data, or give another --output")
    run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.config, dump_config(absolute(config)))  # first, because this file marks the folder as a run
    for path, names in lists.items():
        write_text(path, names)
    if weights is not None:
        write_text(run.class_weights, "".join(f"{weight!r} {name}\n" for name, weight in weights.items()))
    for path, content in ((run.val, val), (run.class_weights, weights)):
        if content is None:  # of a run that stopped before its first checkpoint and is started anew
            path.unlink(missing_ok=True)


def read_class_weights(run: Run, class_names: Sequence[str]) -> dict[str, float] | None:
    """The weights of the classes that `start_run` wrote; None if there are none.

    Raises:
        UserError: they are not those of the classes.
    """
    if not run.class_weights.exists():
        return None
    try:
        lines = [line.split(" ", 1) for line in read_text(run.class_weights).splitlines()]
        weights = {name: float(weight) for weight, name in lines}
    except ValueError:
        weights = {}
    if list(weights) != list(class_names) or not all(0 < w < math.inf for w in weights.values()):
        raise UserError(f"{run.class_weights} has not one weight for each class; restore it, or give another --output")
    return weights


def take_over(config: Config, old: Config) -> Config:
    """`config`, where settings that are not given are those that an earlier run with the config `old` decided."""
    if old.data.exif is None and old.data.format != "shapes":  # older runs, without this setting, ignored orientations
        old = with_data(old, exif="ignore")
    return with_data(config, **{key: getattr(old.data, key) for key in SETTLED if getattr(config.data, key) is None})


def absolute(config: Config) -> Config:
    """`config` with absolute paths, so that it can be used from any working directory."""
    data, model = config.data, config.model
    paths = {key: Path(os.path.abspath(path)) for key in ("root", "split") if (path := getattr(data, key)) is not None}
    if isinstance(data.labelled, Path):
        paths["labelled"] = Path(os.path.abspath(data.labelled))
    for key in ("val", "test"):  # a folder of the data set takes precedence
        name = getattr(data, key)
        if isinstance(name, str) and Path(name).is_file() and not (data.root is not None and (data.root / name).is_dir()):
            paths[key] = os.path.abspath(name)
    weights = {}
    teacher = config.teacher
    if teacher.run is not None:
        teacher = teacher.model_copy(update={"run": Path(os.path.abspath(teacher.run))})
        config = config.model_copy(update={"teacher": teacher})
    if model.init_from is not None:
        weights["init_from"] = Path(os.path.abspath(model.init_from))
    if model.weights not in NAMED_WEIGHTS:
        weights["weights"] = os.path.abspath(model.weights)
    return with_data(config.model_copy(update={"model": model.model_copy(update=weights)}), **paths)


def with_data(config: Config, **values: object) -> Config:
    """`config` with changed values in the section `data`."""
    return config.model_copy(update={"data": config.data.model_copy(update=values)})


def changed_setting(old: Config, new: Config) -> str | None:
    """The first setting in which two configs differ, ignoring FREE_ON_RESUME; None if there is none."""
    new = absolute(take_over(new, old))
    old = absolute(take_over(old, old))
    old, new = old.model_dump(mode="json"), new.model_dump(mode="json")
    for section in old:
        if not isinstance(old[section], dict):
            if old[section] != new[section]:
                return section
            continue
        for key in old[section]:
            if (section, key) not in FREE_ON_RESUME and old[section][key] != new[section][key]:
                return f"{section}.{key}"
    return None


def write_text(path: Path, text: str) -> None:
    """Write a file atomically. It is UTF-8 in every locale; file names that are not valid UTF-8 are kept unchanged."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def read_text(path: Path) -> str:
    """What `write_text` wrote."""
    return path.read_text(encoding="utf-8", errors="surrogateescape")
