"""Runs of a few seconds for the tests of the trainer and its commands."""

import json

import numpy as np
from PIL import Image

from cmim import train
from cmim.engine.run import Run

TINY = {
    "data.crop": 32, "data.workers": 0,
    "data.shapes.labelled": 6, "data.shapes.unlabelled": 8, "data.shapes.val": 3, "data.shapes.test": 4,
    "model.decoder_width": 16, "model.low_level_width": 8,
    # Every pixel has a pseudo-label and every pair counts, so that no term is empty after a few steps.
    "method.tau": 0, "mim.tau": 0, "mim.start": 0, "mim.ramp": 0, "centroids.min_tokens": 1,
    "reconstruction.width": 16, "reconstruction.depth": 1,
    "train.device": "cpu", "train.steps": 2, "train.log_every": 1, "train.labelled_batch": 2, "train.unlabelled_batch": 2,
    "optimizer.lr_batch": 2,
}  # fmt: skip


def words(settings):
    """Settings as a command line gives them."""
    text = lambda value: value if isinstance(value, str) else json.dumps(value)  # noqa: E731
    return [word for key, value in settings.items() for word in (f"--{key}", text(value))]


def tiny(output, *more, **settings):
    """Command line of a tiny run; settings by their key with __ for the dot."""
    settings = TINY | {key.replace("__", "."): value for key, value in settings.items()}
    return ["--output", str(output), *words(settings), *more]


def run_tiny(output, *more, **settings):
    """Train in this process and return the Run."""
    train.main(tiny(output, *more, **settings))
    return Run(output)


def read_metrics(run):
    """The lines of metrics.jsonl; every one must be strict JSON."""
    lines = run.metrics.read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: 1 / 0) for line in lines]


def write_folder(root, sizes=((40, 48),), train=4, val=2, test=2, channels=3):
    """A data folder of three classes, coloured bands; `sizes` (height, width) are taken in turn. One, three or four channels
    are stored as .png, others as .npy."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    for split, count in (("train", train), ("val", val), ("test", test)):
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            label = np.sort(rng.integers(0, 3, height)).astype(np.uint8)[:, None].repeat(width, 1)
            label[:2, :3] = 255
            pixels = np.array([[90, 130, 200], [110, 110, 110], [40, 140, 50]], np.uint8)[label % 255 % 3]
            pixels = pixels[..., np.arange(channels) % 3]
            pixels = (pixels + rng.integers(0, 40, pixels.shape)).astype(np.uint8)
            image, mask = (root / split / kind / f"{split}{i}" for kind in ("images", "masks"))
            for path in (image, mask):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(label).save(f"{mask}.png")
            if channels in (1, 3, 4):
                Image.fromarray(pixels.squeeze()).save(f"{image}.png")
            else:
                np.save(f"{image}.npy", pixels)
    return root


FOLDER = {"data__format": "folder", "data__labelled": 2, "data__background": None}
"""Settings of a run on `write_folder`; data__root is still to be given."""
