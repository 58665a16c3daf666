"""Files that commands read and write: images in folders and patterns, PNGs that say which command made them, a table."""

import csv
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from cmim.data.files import IMAGE_SUFFIXES
from cmim.errors import UserError

AUTHOR = f"{__name__.partition('.')[0]}.predict"
"""Written into every PNG as its software, to recognise files of `predict`."""
HEAD = ("image", "width", "height")
"""The first columns of the table."""


def write_mask(path: Path, classes: np.ndarray, colours: np.ndarray) -> None:
    """Write class ids as a palette PNG."""
    mask = Image.fromarray(classes, mode="P")
    mask.putpalette(colours.flatten().tolist())
    write_png(path, mask)


def write_png(path: Path, image: Image.Image, author: str = AUTHOR) -> None:
    """Write a PNG atomically, with the command that made it as its software."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = PngInfo()
    said.add_text("Software", author)
    partial = path.with_name(f".{path.name}.partial")
    try:
        image.save(partial, format="PNG", pnginfo=said)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def author_of(path: Path) -> str | None:
    """The software that a PNG names; None for other files."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None


def sign(text: str, mark: str) -> str:
    """A text under a line of `mark` and a digest of the text, by which `is_signed` sees whether it was changed since."""
    return f"{mark}{_digest(text)}\n{text}"


def is_signed(text: str, mark: str) -> bool:
    first, _, rest = text.partition("\n")
    return first == mark + _digest(rest)


def _digest(text):
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class ShareTable:
    """A CSV file with a line for each image: its name, its size and the share of each class, which add up to 1."""

    def __init__(self, path: Path, class_names: Sequence[str]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "w", newline="", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115 - see close
        self.writer = csv.writer(self.file)
        self.classes = len(class_names)
        self.writer.writerow([*HEAD, *class_names])

    def add(self, name: Path, classes: np.ndarray) -> None:
        counts = np.bincount(classes.ravel(), minlength=self.classes)
        height, width = classes.shape
        self.writer.writerow([name.as_posix(), width, height, *(f"{count / classes.size:.6f}" for count in counts)])
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def written_by_predict(path: Path) -> bool:
    """Whether a file is a PNG or a table that `predict` wrote."""
    if path.suffix.lower() not in (".png", ".csv") or path.is_fifo():
        return False
    if path.suffix.lower() == ".png":
        return author_of(path) == AUTHOR
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(100).startswith(",".join(HEAD) + ",")
    except (OSError, ValueError):
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


def refuse_foreign(paths: Iterable[Path]) -> None:
    """Raise a UserError if predict would overwrite a file that it did not write."""
    foreign = [path for path in paths if path.exists() and not written_by_predict(path)]
    if foreign:
        more = f", and {len(foreign) - 1} more files," if len(foreign) > 1 else ""
        raise UserError(f"{foreign[0]}{more} would be overwritten, but predict did not write it; give another --output")


def find_images(given: Sequence[Path]) -> tuple[list[Path], Path, int]:
    """Images in files, folders (at any depth) and patterns such as photos/*.jpg.

    Returns:
        the images, the folder that their names are relative to, and the number of files there that are earlier output.

    Raises:
        UserError: one of them does not exist, or holds no images.
    """
    images, roots, earlier = [], [], 0
    for path in given:
        if not path.exists() and glob.has_magic(str(path)):
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if _is_image(Path(p)))
            if not found:
                raise UserError(f"no image fits the pattern {path}")
            roots.append(Path(os.path.commonpath([os.path.abspath(p.parent) for p in found])))
        elif not path.exists():
            raise UserError(f"{path} does not exist; give an image, a folder of images or a pattern in quotes")
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if _is_image(p))
            roots.append(path)
        else:
            found = [path]
            roots.append(path.parent)
        own = [p for p in found if written_by_predict(p)] if path.is_dir() or not path.exists() else []
        earlier += len(own)
        chosen = [p for p in found if p not in set(own)]
        if not chosen:
            said = f"{len(found)} earlier outputs of predict, but no images" if found else "no images"
            raise UserError(f"{path} holds {said} ({', '.join(sorted(IMAGE_SUFFIXES))})")
        images += chosen
    root = Path(os.path.commonpath([os.path.abspath(r) for r in roots]))
    return list(dict.fromkeys(Path(os.path.abspath(p)) for p in images)), root, earlier


def _is_image(path):
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir()
