"""Predict masks of your own images with a trained run.

    python -m cmim.predict runs/shapes-20260101-120000 IMAGES -o OUT

IMAGES is one image or a folder, which is searched at any depth. For each image, OUT/masks gets a palette PNG of class ids at
the original resolution, and OUT/overlays gets the image with the classes drawn over it. --clear CLASS leaves one class out
of the overlay, and --legend adds the class names below it. The settings of `evaluation` (sliding window, flip, scales) are
those of the run unless they are overridden: --evaluation.flip true.

predict overwrites only files that it wrote itself, and does not take its own output as input.
"""

from cmim import early

if __name__ == "__main__":
    early.begin("predict", __doc__)

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from cmim.command_line import parser_of
from cmim.data.augmentation import resize
from cmim.data.files import IMAGE_SUFFIXES, open_image, orientation
from cmim.engine.device import autocast, choose_device, choose_precision
from cmim.engine.inference import NOT_FINITE, probabilities
from cmim.engine.logging import Progress, console
from cmim.engine.pictures import overlay, with_legend
from cmim.engine.run import load_trained
from cmim.errors import UserError, run_command
from cmim.models.segmenter import Segmenter
from cmim.settings import Config

AUTHOR = "cmim.predict"
"""Written into every PNG as its software, to recognise files of `predict`."""


def main(arguments: Sequence[str]) -> None:
    given, overrides = parser_of("predict", __doc__).parse(arguments)
    paths, earlier = find_images(given.images)
    if earlier:
        console.print(f"note: {earlier} files in {given.images} are earlier output of predict and are skipped")
    root = given.images if given.images.is_dir() else given.images.parent
    targets = name_targets(paths, root)
    refuse_foreign(given.output, targets.values())
    trained = load_trained(given.run, given.checkpoint, overrides)
    config = trained.config
    device = choose_device(config.train.device)
    dtype = choose_precision(config.train.precision, device)
    torch.backends.cudnn.benchmark = False  # it would search for the fastest algorithms again for every image size
    net = trained.net.to(device).eval()
    colours = np.asarray(trained.colours, np.uint8)
    clear = find_class(given.clear, trained.class_names)
    turn, turned, unreadable = config.data.exif == "apply", [], []
    with Progress("predict", len(paths), "images") as progress:
        for path in paths:
            progress.advance()
            try:
                image = open_image(path, config.data.channels, turn, config.data.range)
            except UserError as error:
                unreadable.append(error)
                continue
            if not turn and orientation(path) != 1:
                turned.append(path)
            classes = predict(net, image, config, device, dtype)
            write_mask(given.output / "masks" / targets[path], classes, colours)
            picture = overlay(image, classes, colours, clear=clear)
            if given.legend:
                present = [k for k in np.unique(classes).tolist() if k != clear]
                picture = with_legend(picture, trained.class_names, colours, present)
            write_png(given.output / "overlays" / targets[path], picture)
    if turned:
        console.print(
            f"note: {len(turned)} images have an EXIF orientation (such as {turned[0].name}), which was ignored, as the run "
            "did; --data.exif apply turns them"
        )
    if unreadable and len(unreadable) == len(paths):
        raise UserError(str(unreadable[0]) + (f"; nor the other {len(paths) - 1} images" if len(paths) > 1 else ""))
    console.print(f"{len(paths) - len(unreadable)} images: {given.output / 'masks'}, {given.output / 'overlays'}")
    if unreadable:
        for error in unreadable:
            console.print(f"skipped: {error}")
        raise UserError(f"{len(unreadable)} of {len(paths)} images have no mask: they are listed above")


def find_class(name: str | None, class_names: Sequence[str]) -> int | None:
    """The id of the class that --clear gives by name or by number."""
    if name is None:
        return None
    if name in class_names:
        return class_names.index(name)
    if name.isdecimal() and int(name) < len(class_names):
        return int(name)
    raise UserError(f"--clear {name}: the run has no such class; it has {', '.join(class_names[:20])}")


@torch.inference_mode()
def predict(
    net: Segmenter, image: np.ndarray, config: Config, device: torch.device, dtype: torch.dtype | None
) -> np.ndarray:
    """Class ids (H, W) uint8 of an image (H, W, channels) uint8, at the resolution of the image."""
    shown = resize(image, config.data.size) if config.data.size else image
    shown = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None].to(device)
    with autocast(device, dtype):
        (prediction,) = probabilities(net, shown, [image.shape[:2]], config)
    if prediction.isnan().any():
        raise UserError(NOT_FINITE)
    return prediction.argmax(0).to(torch.uint8).cpu().numpy()


def write_mask(path: Path, classes: np.ndarray, colours: np.ndarray) -> None:
    """Write class ids as a palette PNG."""
    mask = Image.fromarray(classes, mode="P")
    mask.putpalette(colours.flatten().tolist())
    write_png(path, mask)


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG atomically, marked as written by `predict`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = PngInfo()
    said.add_text("Software", AUTHOR)
    partial = path.with_name(f".{path.name}.partial")
    try:
        image.save(partial, format="PNG", pnginfo=said)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def written_by_predict(path: Path) -> bool:
    """Whether a file is a PNG that `write_png` wrote."""
    if path.suffix.lower() != ".png" or path.is_fifo():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == AUTHOR
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return False


def name_targets(paths: Sequence[Path], root: Path) -> dict[Path, Path]:
    """The path of each image's mask below OUT/masks: the image's path below `root` with the suffix .png. Images whose masks
    would have the same path, such as a.jpg and a.png, keep their suffixes: a.jpg.png."""
    whole = set()
    while True:
        names = {path: path.relative_to(root) for path in paths}
        names = {p: n.with_name(n.name + ".png") if p in whole else n.with_suffix(".png") for p, n in names.items()}
        uses = Counter(names.values())
        shared = {path for path, name in names.items() if uses[name] > 1} - whole
        if not shared:
            return names
        whole |= shared


def refuse_foreign(output: Path, names: Iterable[Path]) -> None:
    """Raise a UserError if predict would overwrite a file that it did not write."""
    foreign = [
        path for name in names for path in (output / "masks" / name, output / "overlays" / name)
        if path.exists() and not written_by_predict(path)
    ]  # fmt: skip
    if foreign:
        more = f", and {len(foreign) - 1} more files," if len(foreign) > 1 else ""
        raise UserError(f"{foreign[0]}{more} would be overwritten, but predict did not write it; give another --output")


def find_images(path: Path) -> tuple[list[Path], int]:
    """The image at a path, or all images below a folder; and the number of files there that are earlier output."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give an image or a folder of images")
    if path.is_file():
        return [path], 0
    found = sorted(p for p in path.rglob("*") if _is_image(p))
    images = [p for p in found if not written_by_predict(p)]
    if not images:
        said = f"{len(found)} earlier outputs of predict, but no images" if found else "no images"
        raise UserError(f"{path} holds {said} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return images, len(found) - len(images)


def _is_image(path):
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir()


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
