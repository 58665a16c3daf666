"""What a run decides, checks and prints before its first step."""

from collections.abc import Sequence

import torch

from cmim import distributed
from cmim.config import load_config
from cmim.data import load_splits
from cmim.data.class_weights import class_weights
from cmim.data.datasets import Splits
from cmim.data.loading import transport_note
from cmim.data.survey import count_labels, decide_exif, survey, surveyed
from cmim.engine.graph import check_graph
from cmim.engine.logging import Progress, console
from cmim.engine.optimizer import check_optimizer, scaled_lr
from cmim.engine.run import Run, read_class_weights, with_data
from cmim.engine.schedule import total_steps
from cmim.engine.tracker import check_tracker
from cmim.engine.trained import load_trained
from cmim.errors import UserError
from cmim.method.objective import Objective
from cmim.models.attention import check_attention
from cmim.models.build import check_sizes, normalisation, token_stride
from cmim.models.reconstruction import receptive_warning
from cmim.models.segmenter import Segmenter
from cmim.settings import Config, LoggingSettings


def check_parts(config: Config) -> None:
    """Raise a UserError if the network does not fit the sizes, or if the optimiser, the attention, the tracker or the graphs
    that the settings ask for cannot be used here."""
    on_cuda = config.train.device != "cpu" and torch.cuda.is_available()
    check_sizes(config)
    check_optimizer(config, on_cuda)
    check_attention(config, on_cuda)
    check_graph(config, on_cuda)
    check_tracker(config.logging)


def settle(config: Config, splits: Splits) -> tuple[Config, Splits, list[str]]:
    """Decide settings of a new run that are not given, so that its config.yaml has them: whether EXIF orientations are
    applied, and the mean and standard deviation of the images.

    Returns:
        config and splits according to the decisions, and lines about them for the user.
    """
    notes = []
    if config.data.exif is None:
        exif, note = decide_exif(splits)
        notes += [note] if note else []
        config = with_data(config, exif=exif)
        splits = load_splits(config.data) if exif == "apply" else splits
    if config.data.mean is None or config.data.std is None:
        config, note = settle_normalisation(config)
        notes += [note] if note else []
    return config, splits, notes


def settle_normalisation(config: Config) -> tuple[Config, str | None]:
    """Set `data.mean` and `data.std`, if not given, to those of the weights that training starts from."""
    model, data = config.model, config.data
    if model.init_from is not None:
        folder = model.init_from if model.init_from.is_dir() else model.init_from.parent.parent
        source = folder / "config.yaml"
        found = load_config(source).data.normalisation() if source.is_file() else None
        found = found if found and len(found[0]) == data.channels else None
    else:
        source, found = (
            model.encoder if not model.arch.startswith("smp:") else model.arch,
            normalisation(model, data.channels),
        )
    mean, std = data.normalisation()
    if found is None or found == (mean, std):
        return config, None
    values = {key: v for key, v in zip(("mean", "std"), found, strict=True) if getattr(data, key) is None}
    shown = " and ".join(f"data.{key} [{', '.join(f'{v:.4g}' for v in values[key])}]" for key in values)
    return with_data(config, **values), f"{shown} are those of the weights of {source}"


def open_files(config: Config, splits: Splits) -> list[str]:
    """Open every image and mask that must be readable, and warn about classes that do not occur; returns the warnings."""
    with Progress("opening images and masks", sum(map(len, surveyed(splits).values())), "images") as progress:
        lines = list(survey(splits, config.data, progress.advance))
    for line in lines:
        console.print(f"warning: {line}")
    return lines


def settle_class_weights(config: Config, splits: Splits, earlier: Run | None) -> dict[str, float] | None:
    """Weights of the classes, by their names, from the pixels of the labelled images, or those that an `earlier` run of the
    folder used; they are printed. None if `method.class_weights` does not ask for weights from the data."""
    kind = config.method.class_weights
    if kind not in ("inverse", "median"):
        return None
    weights = None if earlier is None else read_class_weights(earlier, splits.class_names)
    if weights is None:
        counts = count_labels(splits.labelled, len(splits.class_names))
        weights = dict(zip(splits.class_names, class_weights(kind, counts).tolist(), strict=True))
    shown = ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
    console.print(f"class weights ({kind}): {shown}")
    return weights


def describe(config: Config, splits: Splits, run: Run, notes: Sequence[str] = ()) -> list[str]:
    """Print the preset, the data and notes about the run, which are returned."""
    test = f", {len(splits.test)} test" if splits.test is not None else ", no test images: the result is on val"
    processes = distributed.world().size
    unused = "" if config.preset.uses_unlabelled else " (not used)"
    console.print(
        f"{config.method.preset}: {len(splits.labelled)} labelled and {len(splits.unlabelled)} unlabelled images"
        f"{unused}, {len(splits.val)} val{test}, {len(splits.class_names)} classes; {run.folder}"
        + (f"; {processes} processes" if processes > 1 else "")
    )
    way = transport_note(config.data.workers)
    notes = [*splits.notes, *notes, *([way] if way else [])]
    if config.logging.tracker == "none" and config.logging.project != LoggingSettings().project:
        notes.append(f"logging.project {config.logging.project} has no effect without logging.tracker")
    train, optimizer = config.train, config.optimizer
    if train.labelled_batch > len(splits.labelled):
        notes.append(
            f"train.labelled_batch is {train.labelled_batch}, but labelled images are {len(splits.labelled)}: the "
            "same image is in a batch several times, in different crops"
        )
    if train.epochs is not None:
        steps = total_steps(train, len(splits.unlabelled))
        notes.append(f"{train.epochs:g} epochs of the unlabelled images: {steps} steps")
    lr = scaled_lr(optimizer, train)
    if lr != optimizer.lr:
        notes.append(
            f"the learning rate is {lr:g}: optimizer.lr {optimizer.lr:g} is meant for {optimizer.lr_batch} labelled "
            f"images a step (optimizer.lr_batch), here are {train.labelled_batch * train.accumulate}"
        )
    reconstruction = config.reconstruction
    if "pix" in config.preset.masked and reconstruction.decoder == "conv":
        stride = token_stride(config)
        note = receptive_warning(reconstruction.depth, reconstruction.kernel_size, config.mask.block, stride)
        if note:
            notes.append(note)
    for note in notes:
        console.print(f"note: {note}")
    return notes


def build_objective(config: Config, num_classes: int, run: Run) -> Objective:
    """The `Objective` with its initial weights; a resumed run loads its weights from the checkpoint later."""
    torch.manual_seed(config.seed)
    if run.last.exists():
        config = config.model_copy(update={"model": config.model.untrained()})
    if config.model.init_from is not None:
        console.print(f"starting with the weights of {config.model.init_from}")
    elif config.model.weights != "none":  # loading may take some seconds
        name = config.model.arch if config.model.arch.startswith("smp:") else config.model.encoder
        where = {"timm": "fetched, or from the cache", "package": "from its package"}
        where = where.get(config.model.weights, config.model.weights)
        console.print(f"loading the pretrained weights of {name} ({where})")
    objective = Objective(config, num_classes, load_judge(config, num_classes))
    if objective.note:
        console.print(f"note: {objective.note}")
    return objective


def load_judge(config: Config, num_classes: int) -> Segmenter | None:
    """The network of `teacher.run`; None if the preset uses no unlabelled images, or there is none.

    Raises:
        UserError: there is no such run, or it has other classes, channels or sizes.
    """
    if config.teacher.run is None or not config.preset.uses_unlabelled:
        return None
    trained = load_trained(config.teacher.run, "last")
    if len(trained.class_names) != num_classes:
        raise UserError(
            f"teacher.run: {config.teacher.run} has {len(trained.class_names)} classes, the data have {num_classes}; give a "
            "run of the same data"
        )
    if trained.config.data.channels != config.data.channels:
        raise UserError(
            f"teacher.run: {config.teacher.run} has images of {trained.config.data.channels} channels, the data "
            f"{config.data.channels}; give a run of the same data"
        )
    if config.data.crop % trained.net.size_multiple:
        raise UserError(
            f"teacher.run: its network takes multiples of {trained.net.size_multiple} pixels, but data.crop is "
            f"{config.data.crop}; change it"
        )
    return trained.net
