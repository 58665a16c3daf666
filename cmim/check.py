"""Look at your images and masks before you train: what is wrong, and a config that fits.

    python -m cmim.check PATH                                   # PATH is a folder of images and masks, or a config file
    python -m cmim.check PATH --output my.yaml                  # by default NAME.yaml, NAME being that of the folder
    python -m cmim.check PATH --convert OUT                     # polygons of COCO, LabelMe or CVAT to masks in OUT first

Every file is opened once. Folders may be called otherwise than images/ and masks/, be nested, or hold images and masks side
by side; no file has to be moved. Beside the config, NAME.png shows images with their masks drawn over them: look at it. The
config says why each value was chosen and is for `python -m cmim.train NAME.yaml`; `python -m cmim.train PATH` does both. For
a config file, only the data are checked, as it reads them.

The exit code is 1 if something is wrong that ends a training or spoils its result; every such line says what to do.
"""

from cmim import early

if __name__ == "__main__":
    early.begin("check", __doc__)

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cmim.command_line import parser_of
from cmim.config import check_counts, load_config, override
from cmim.data.examination import Examination, encoding_at, examine, numbers_of_images
from cmim.data.file_set import FileSet
from cmim.data.files import SIDEWAYS
from cmim.data.polygons import convert
from cmim.distributed import world
from cmim.engine.logging import Progress, console
from cmim.engine.outputs import author_of, is_signed, sign, write_png
from cmim.engine.run import write_text
from cmim.engine.sheet import choose, sheet
from cmim.errors import UserError, run_command
from cmim.models.build import check_sizes
from cmim.settings import Config, DataSettings
from cmim.suggest import Choice, DataFacts, as_yaml, config_of, suggest, values_of

MARK = "# Written by cmim.check; digest "
"""Begins the first line of a config, with a digest of what follows, so that what a user changed is not overwritten."""
AUTHOR = "cmim.check"
READING = (
    "image_folder", "mask_folder", "masks", "train", "val", "test", "classes", "label_map", "colours", "colour_tolerance",
    "channels", "range", "exif",
)  # fmt: skip
"""Settings of `data` that say how files are read."""
MODES = {"L": "grey", "LA": "grey with alpha", "P": "palette", "1": "black and white"}
"""What Pillow's names of kinds of pixels mean, where they do not say it themselves."""
PICTURES = 6
"""Of each split on the sheet."""


def main(arguments: Sequence[str]) -> int:
    given, overrides = parser_of("check", __doc__).parse(arguments)
    path = Path(given.path) if given.convert is None else given.convert
    of_config = path.is_file()
    if overrides and not of_config:
        raise UserError(f"{overrides[0]} is a setting, which goes with a config file; {path} is none")
    config = load_config(path, overrides) if of_config else None
    if config is not None and config.data.format == "shapes":
        raise UserError(f"{path} has data.format shapes, whose images are drawn: there is nothing to check")
    if of_config and given.output is not None:
        raise UserError(f"{path} is a config already, so that none is written: leave --output away")
    output = given.output or default_output(path)
    picture = Path(path.name if of_config else output).with_suffix(".png")
    for target in (picture,) if of_config else (output, picture):
        refuse_foreign(target)
    if given.convert is not None:
        with bars("drawing masks") as begin:
            lines = convert(Path(given.path), given.convert, begin)
        console.print("\n".join([*lines, ""]))
    found = look_at(config.data.root if of_config else path, config.data if of_config else None)
    made = None if of_config else suggestion(found)
    for line in report(found):
        console.print(line)
    written = []
    if made is not None:
        write_config(output, made.text)
        written.append(str(output))
    if write_sheet(found, picture):
        written.append(str(picture))
    if written:
        console.print(f"\nwritten: {', '.join(written)}")
    if found.problems:
        console.print(
            f"\n{len(found.problems)} problem{'s' * (len(found.problems) > 1)}: training would fail or mislead; see above"
        )
        return 1
    if made is not None:
        console.print(f"no problem found. Look at {picture}, then: python -m cmim.train {output}")
    elif of_config:
        console.print("no problem found")
    return 0


@contextmanager
def bars(title: str) -> Iterator[Callable[[int], Callable[[], None]]]:
    """A function that begins a progress of so many images and returns what counts one of them."""
    with ExitStack() as stack:
        yield lambda total: stack.enter_context(Progress(title, total, "images")).advance


def look_at(root: Path, settings: DataSettings | None = None) -> Examination:
    """`examine` with the progress on the screen."""
    with bars("opening images and masks") as begin:
        return examine(root, begin, settings)


@dataclass(frozen=True)
class Suggestion:
    """A config that is ready to train with."""

    found: Examination
    choices: Sequence[Choice]
    text: str
    """YAML with the reasons."""

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """The settings, with overrides as `load_config` takes them."""
        return override(values_of(self.choices), f"the config for {self.found.settings.root}", overrides)

    def write(self, folder: Path) -> None:
        """suggested.yaml and images.png, into the folder of a run."""
        write_text(folder / "suggested.yaml", self.text)
        write_sheet(self.found, folder / "images.png")


def for_training(folder: Path) -> Suggestion:
    """The config of `python -m cmim.train FOLDER`; what was found is said in a few lines.

    Raises:
        UserError: something would spoil the training.
    """
    found = look_at(folder)
    made = None if found.problems else suggestion(found)
    if made is None:
        more = f"; and {len(found.problems) - 1} more" if len(found.problems) > 1 else ""
        raise UserError(f"{found.problems[0]}{more}; all that was found: python -m cmim.check {folder}")
    for line in report(found)[:3]:
        console.print(line)
    if found.notes:
        console.print(
            f"{found.notes[0]}"
            + f"; python -m cmim.check {folder} lists {len(found.notes) - 1} more" * (len(found.notes) > 1)
        )
    return made


def report(found: Examination) -> list[str]:
    """What was found, for the screen."""
    lines = [f"images   {_images(found)}", f"masks    {_masks(found)}"]
    settings = found.settings
    if settings is not None:
        lines.append(f"reading  {_reading(settings)}")
    if found.counts:
        lines += ["", *class_table(found)]
    if found.notes:
        lines += ["", "worth knowing:", *(f"  - {note}" for note in found.notes)]
    if found.problems:
        lines += ["", "to repair:", *(f"  {i}. {problem}" for i, problem in enumerate(found.problems, 1))]
    return lines


def _images(found):
    counts = ", ".join(f"{len(pairs)} {split}" for split, pairs in found.sets.items() if pairs) or "none that can be used"
    facts = [f for f in found.images.values() if not f.error]
    if not facts:
        return counts
    sizes = Counter(f.size for f in facts)
    areas = sorted(sizes, key=lambda size: size[0] * size[1])
    shown = lambda size: f"{size[1]} x {size[0]}"  # noqa: E731
    size = (
        f"all {shown(areas[0])}" if len(sizes) == 1 else f"{len(sizes)} sizes from {shown(areas[0])} to {shown(areas[-1])}"
    )
    words = lambda f: "grey with more than 8 bits" if f.deep and f.kind[0] in "IF" else MODES.get(f.kind, f.kind)  # noqa: E731
    modes = Counter(map(words, facts))
    kinds = ", ".join(f"{mode}{f' ({n})' if len(modes) > 1 else ''}" for mode, n in modes.most_common(4))
    turned = sum(f.orientation != 1 for f in facts)
    return f"{counts}; {size}; {kinds}" + (f"; {turned} with an EXIF orientation" if turned else "")


def _masks(found):
    count = sum(len(found.labelled(split)) for split in found.sets)
    return f"{count}; {found.reading.kind or 'not looked at'}"


def _reading(settings):
    data = _of_reading(settings)
    data |= {"colours": f"of {len(settings.colours)} names"} if settings.colours else {}
    shown = [f"data.{key} {value}" for key, value in data.items() if key != "classes"]
    return ", ".join(shown) or "with the default names of folders"


def _of_reading(settings):
    """The settings that say how files are read, as far as they are not the default ones."""
    data = settings.model_dump(mode="json", exclude_defaults=True, include=set(READING))
    return {key: data[key] for key in READING if key in data} | (
        {"label_map": settings.label_map} if settings.label_map else {}
    )


def class_table(found: Examination) -> list[str]:
    """Pixels of each class, and images that have it, by split."""
    width = max(10, *(len(name) for name in found.names))
    splits = list(found.counts)
    lines = [f"{'class':<{width + 4}}" + "".join(f"{split + ' pixels':>14}{'images':>8}" for split in splits)]
    total = {split: max(1, int(c.pixels.sum())) for split, c in found.counts.items()}
    for k, name in enumerate(found.names):
        cells = ((c.pixels[k] / total[split], c.images[k]) for split, c in found.counts.items())
        lines.append(f"{k:>3} {name:<{width}}" + "".join(f"{share:>14.2%}{images:>8}" for share, images in cells))
    every = {split: max(1, total[split] + c.ignored + c.unknown) for split, c in found.counts.items()}
    cells = (f"{c.ignored / every[split]:.2%}" for split, c in found.counts.items())
    lines.append(f"{'no class (ignored)':<{width + 4}}" + "".join(f"{cell:>14}{'':>8}" for cell in cells))
    if any(c.unknown for c in found.counts.values()):
        cells = (f"{c.unknown} pixels" for c in found.counts.values())
        lines.append(f"{'unknown values':<{width + 4}}" + "".join(f"{cell:>14}{'':>8}" for cell in cells))
    return [line.rstrip() for line in lines]


def suggestion(found: Examination) -> Suggestion | None:
    """A config; None where it cannot be said how the masks are read."""
    if found.settings is None or not found.names:
        return None
    labelled, unlabelled = numbers_of_images(found)
    used = [facts for facts in found.images.values() if not facts.error]
    if not used:
        return None
    turn = found.settings.exif == "apply"
    sizes = np.array([facts.size[::-1] if turn and facts.orientation in SIDEWAYS else facts.size for facts in used])
    classes, channels = len(found.names), found.settings.channels
    facts = DataFacts(sizes, labelled, unlabelled, classes, channels, _data_choices(found))
    try:
        choices = suggest(facts, torch.cuda.is_available())
        config = config_of(choices)
        check_sizes(config)
        if not found.problems:
            check_counts(config, labelled, unlabelled or labelled, world().size)
    except UserError as error:
        found.problems.append(str(error))
        return None
    head = [f"For {config.data.root}, suggested by python -m cmim.check. Every setting: python -m cmim.train --help."]
    head.append("Change what you like: the command does not overwrite a file that was changed.")
    if found.problems:
        head.append(f"It was found that {len(found.problems)} things are to be repaired first: run cmim.check again.")
    return Suggestion(found, choices, as_yaml(choices, head, _about_classes(found)))


def _data_choices(found):
    """The settings that say how the files are read."""
    settings, reading = found.settings, found.reading
    why = {
        "image_folder": "where the images are, below root",
        "mask_folder": "where their masks are",
        "masks": "how a mask is called; {stem} is the name of its image",
        "train": "the folder that stands for {split} in training",
        "val": "where the val images are",
        "classes": "rename them as you like" if reading.unnamed else "",
        "label_map": "values of the masks to class ids (the place in the list of classes)",
        "colours": reading.kind
        + "; write the names of your classes here, and `ignore` for pixels without a class" * reading.unnamed,
        "colour_tolerance": "a pixel takes the nearest colour within this distance, because edges are blurred",
        "channels": "of the images",
        "range": "the images have more than 8 bits: these values, 99% of the pixels lie between, become black and white",
        "exif": "the masks fit the images so",
        "test": "its images have no masks",
    }
    root = os.path.abspath(settings.root)
    choices = [Choice("data", "format", settings.format), Choice("data", "root", root)]
    data = _of_reading(settings)
    if not isinstance(settings.val, str):
        why["val"] = (
            "there is no val set: so many training images are held out, drawn at random; where neighbouring frames or tiles "
            "are nearly the same, make a folder of others"
        )
    if found.names[0].lower() == "background":
        data["background"], why["background"] = 0, "left out of the figures of the foreground in the log"
    if "colours" in data and not (settings.root / "classes.txt").is_file():
        del data["classes"]  # data.colours names them
    choices += [Choice("data", key, value, why[key]) for key, value in data.items()]
    labelled, _ = numbers_of_images(found)
    if settings.format != "folder":
        choices.append(Choice("data", "labelled", 1.0, "all masks; a smaller share makes the others unlabelled images"))
    else:
        choices.append(Choice("data", "labelled", 1.0, f"all masks, which are {labelled}; a smaller share uses fewer"))
    return choices


def _about_classes(found):
    """A comment on each class: how frequent it is."""
    if not found.counts:
        return {}
    pixels = sum(c.pixels for c in found.counts.values())
    said = {}
    for k, name in enumerate(found.names):
        images = ", ".join(f"{c.images[k]} {split}" for split, c in found.counts.items())
        said[name] = f"{k}: {pixels[k] / max(1, pixels.sum()):.2%} of the pixels; in {images} images"
    return {"classes": said, "colours": said}


def default_output(folder: Path) -> Path:
    """NAME.yaml in the current folder; beside `folder` if that is the current folder or above it, so that no picture comes
    among the images."""
    folder = folder.resolve()
    name = f"{folder.name or 'data'}.yaml"
    return folder.parent / name if Path.cwd().is_relative_to(folder) else Path(name)


def write_config(path: Path, text: str) -> None:
    write_text(path, sign(text, MARK))


def refuse_foreign(path: Path) -> None:
    """Raise a UserError if a file is there that cmim.check did not write, or that was changed since."""
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise UserError(f"--output {path}: there is no folder {path.absolute().parent}; make it, or give another")
        return
    if path.suffix.lower() == ".png":
        if author_of(path) != AUTHOR:
            raise UserError(f"{path} is there, and not written by cmim.check: give another --output")
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if not is_signed(text, MARK):
        raise UserError(f"{path} was changed, or is not written by cmim.check: give another --output, or remove it")


def write_sheet(found: Examination, path: Path) -> bool:
    """Write the sheet of pictures; False where no mask can be read."""
    encode = encoding_at(found) if found.counts else None
    if encode is None:
        return False
    settings, parts, pixels = found.settings, {}, sum(c.pixels for c in found.counts.values())
    how = {"turn": settings.exif == "apply", "limits": settings.range}
    for split, counts in found.counts.items():
        pairs = [pair for pair in found.labelled(split) if pair[1] in counts.present]
        image_set = FileSet(*zip(*pairs, strict=True), encode, settings.channels, **how)
        shown = []
        for i in choose([counts.present[mask] for _, mask in pairs], PICTURES):
            with suppress(UserError):  # it is among the problems
                shown.append((image_set.name(i), image_set.image(i), image_set.label(i)))
        if shown:
            parts[f"{split}: {len(shown)} of {len(pairs)} images, chosen so that many classes are seen"] = shown
    if not parts:
        return False
    made = sheet(parts, found.names, found.colours, (pixels / max(1, pixels.sum())).tolist())
    write_png(path, made, AUTHOR)
    return True


if __name__ == "__main__":
    run_command(lambda: sys.exit(main(sys.argv[1:])))
