"""Predict masks of your own images with a trained run.

    python -m cmim.predict runs/shapes-20260101-120000 IMAGES -o OUT
    python -m cmim.predict RUN "photos/*.jpg" more/ -o OUT --clear background --legend --confidence
    python -m cmim.predict model.onnx IMAGES -o OUT             # or .pt2, .safetensors: a file that cmim.export wrote

IMAGES are images, folders, which are searched at any depth, and patterns. For each image, OUT/masks gets a palette PNG of
class ids at the original resolution, and OUT/overlays gets the image with the classes drawn over it; OUT/classes.csv says
which share of each image each class has. --confidence adds OUT/confidence, grey images of the probability of the predicted
class (255 is 1). --clear CLASS leaves one class out of the overlay, and --legend adds the class names below it. A file that
cannot be read is skipped and named at the end.

Images of equal size are predicted together, and images of more than 4 million pixels in overlapping tiles. The settings of
`evaluation` (sliding window, flip, scales) are those of the run unless they are overridden: --evaluation.flip true. predict
overwrites only files that it wrote itself, and does not take its own output as input.
"""

from cmim import early

if __name__ == "__main__":
    early.begin("predict", __doc__)

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cmim.command_line import parser_of
from cmim.data.files import open_image, orientation
from cmim.engine.exported import load_model
from cmim.engine.logging import Progress, console
from cmim.engine.outputs import ShareTable, find_images, name_targets, refuse_foreign, write_mask, write_png
from cmim.engine.pictures import overlay, with_legend
from cmim.engine.prediction import Prediction, TrainedSegmenter
from cmim.errors import UserError, run_command


def main(arguments: Sequence[str]) -> None:
    given, overrides = parser_of("predict", __doc__).parse(arguments)
    paths, root, earlier = find_images([Path(path) for path in given.images])  # `.` is a folder, and no empty path
    if earlier:
        console.print(f"note: {earlier} files in {root} are earlier output of predict and are skipped")
    targets = name_targets(paths, root)
    folders = ["masks", "overlays", *(["confidence"] if given.confidence else [])]
    table = given.output / "classes.csv"
    refuse_foreign([table, *(given.output / folder / name for name in targets.values() for folder in folders)])
    segmenter = TrainedSegmenter(load_model(given.run, given.checkpoint, overrides))
    clear = find_class(given.clear, segmenter.classes)
    turned, unreadable = [], []
    shares = ShareTable(table, segmenter.classes)
    try:
        with Progress("predict", len(paths), "images") as progress:
            images = read(segmenter, paths, turned, unreadable, progress)
            for group in segmenter.groups(images, lambda pair: pair[1]):
                predictions = segmenter.predict([image for _, image in group])
                for (path, image), prediction in zip(group, predictions, strict=True):
                    write(given, segmenter, targets[path], image, prediction, clear)
                    shares.add(path.relative_to(root), prediction.classes)
    finally:
        shares.close()
    if turned:
        console.print(
            f"note: {len(turned)} images have an EXIF orientation (such as {turned[0].name}), which was ignored, as the run "
            "did; --data.exif apply turns them"
        )
    if unreadable and len(unreadable) == len(paths):
        table.unlink()
        if len(paths) == 1:
            raise unreadable[0]
        _list(unreadable)
        raise UserError(f"none of {len(paths)} images can be used: the reasons are listed above")
    written = ", ".join(str(given.output / name) for name in (*folders, "classes.csv"))
    console.print(f"{len(paths) - len(unreadable)} images: {written}")
    if unreadable:
        _list(unreadable)
        raise UserError(f"{len(unreadable)} of {len(paths)} images got no mask: they are listed above")


def _list(unreadable):
    for error in unreadable:
        console.print(f"skipped: {error}")


def read(
    segmenter: TrainedSegmenter, paths: Sequence[Path], turned: list[Path], unreadable: list[UserError], progress: Progress
) -> Iterator[tuple[Path, np.ndarray]]:
    """Each image that can be read, (H, W, channels) uint8; the others are added to `unreadable`."""
    data = segmenter.config.data
    for path in paths:
        progress.advance()
        try:
            image = open_image(path, data.channels, data.exif == "apply", data.range)
        except UserError as error:
            unreadable.append(error)
            continue
        if data.exif != "apply" and orientation(path) != 1:
            turned.append(path)
        yield path, image


def write(
    given: Namespace, segmenter: TrainedSegmenter, name: Path, image: np.ndarray, prediction: Prediction, clear: int | None
) -> None:
    classes, colours = prediction.classes, segmenter.colours
    write_mask(given.output / "masks" / name, classes, colours)
    picture = overlay(image, classes, colours, clear=clear)
    if given.legend:
        present = [k for k in np.unique(classes).tolist() if k != clear]
        picture = with_legend(picture, segmenter.classes, colours, present)
    write_png(given.output / "overlays" / name, picture)
    if given.confidence:
        write_png(
            given.output / "confidence" / name, Image.fromarray((prediction.confidence * 255).round().astype(np.uint8))
        )


def find_class(name: str | None, class_names: Sequence[str]) -> int | None:
    """The id of the class that --clear gives by name or by number."""
    if name is None:
        return None
    if name in class_names:
        return class_names.index(name)
    if name.isdecimal() and int(name) < len(class_names):
        return int(name)
    raise UserError(f"--clear {name}: the run has no such class; it has {', '.join(class_names[:20])}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
