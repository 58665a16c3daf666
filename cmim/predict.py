"""Predict masks of your own images with a trained run.

    python -m cmim.predict runs/shapes-20260101-120000 IMAGES -o OUT

IMAGES is a folder (searched for images at any depth) or one image. OUT/masks gets a palette PNG of class ids for
each image, at its original resolution; OUT/overlays gets the classes laid over the image. Settings of `evaluation`
(windows, mirrored images, several scales) are those of the run, or given anew: --evaluation.flip true.
"""

from cmim import early

if __name__ == "__main__":
    early.begin("predict", __doc__)

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cmim.command_line import parser_of
from cmim.data.augmentation import resize
from cmim.data.files import IMAGE_SUFFIXES, open_image
from cmim.engine.device import autocast, choose_device, choose_precision
from cmim.engine.inference import probabilities
from cmim.engine.logging import Progress, console
from cmim.engine.pictures import overlay
from cmim.engine.run import load_trained
from cmim.errors import UserError, run_command
from cmim.models.segmenter import Segmenter
from cmim.settings import Config


def main(arguments: Sequence[str]) -> None:
    given, overrides = parser_of("predict", __doc__).parse(arguments)
    paths = find_images(given.images)
    trained = load_trained(given.run, given.checkpoint, overrides)
    config = trained.config
    device = choose_device(config.train.device)
    dtype = choose_precision(config.train.precision, device)
    torch.backends.cudnn.benchmark = False  # it would be tuned anew for every image size
    net = trained.net.to(device).eval()
    colours = np.asarray(trained.colours, np.uint8)
    root = given.images if given.images.is_dir() else given.images.parent
    stems = Counter(path.with_suffix("") for path in paths)
    with Progress("predict", len(paths), "images") as progress:
        for path in paths:
            image = open_image(path, config.data.channels)
            classes = predict(net, image, config, device, dtype)
            name = path.relative_to(root)
            # Where a.jpg and a.png lie in one folder, they keep their suffixes: two images, two masks.
            name = name.with_name(name.name + ".png") if stems[path.with_suffix("")] > 1 else name.with_suffix(".png")
            write_mask(given.output / "masks" / name, classes, colours)
            target = given.output / "overlays" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            overlay(image, classes, colours).save(target)
            progress.advance()
    console.print(f"{len(paths)} images: {given.output / 'masks'}, {given.output / 'overlays'}")


@torch.inference_mode()
def predict(
    net: Segmenter, image: np.ndarray, config: Config, device: torch.device, dtype: torch.dtype | None
) -> np.ndarray:
    """Class ids (H, W) uint8 of an image (H, W, channels) uint8 at its own resolution."""
    shown = resize(image, config.data.size) if config.data.size else image
    shown = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None].to(device)
    with autocast(device, dtype):
        (prediction,) = probabilities(net, shown, [image.shape[:2]], config)
    return prediction.argmax(0).to(torch.uint8).cpu().numpy()


def write_mask(path: Path, classes: np.ndarray, colours: np.ndarray) -> None:
    """A palette PNG."""
    mask = Image.fromarray(classes, mode="P")
    mask.putpalette(colours.flatten().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path)


def find_images(path: Path) -> list[Path]:
    """The image of that path, or those of the folder at any depth."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give an image or a folder of images")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _is_image(p))
    if not found:
        raise UserError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def _is_image(path):
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
