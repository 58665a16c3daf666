"""`folder`: ROOT/{train,val,test}/{images,masks}/NAME.*, optionally ROOT/unlabeled/NAME.* and ROOT/classes.txt.

A mask has the name of its image with another suffix. In train/ an image without a mask is unlabelled.
"""

from pathlib import Path

from cmim.data.files import IMAGE_SUFFIXES, MASK_SUFFIXES
from cmim.data.labels import Encoding, class_names, colour_map, label_table
from cmim.data.lists import Listing
from cmim.errors import UserError
from cmim.settings import DataSettings


class Folder:
    """A `Source`. The unlabelled images are the rest of train/ and those of unlabeled/ (or unlabelled/, each with or without
    images/ inside); its held-out images lie in the folder of that name."""

    layout = "data.split names paths under data.root"
    mask_remedy = "add it, or take its line away"
    held_out_remedy = (
        "a folder of data.root holds images/ and masks/, a text file lines `IMAGE MASK`, two paths under data.root"
    )
    known = None
    split_example = "data.split is a folder of labeled.txt and unlabeled.txt, lines `IMAGE MASK`, two paths under data.root"

    def __init__(self, settings: DataSettings):
        self.root = settings.root
        if not self.root.is_dir():
            raise UserError(f"data.root: there is no folder {self.root}")
        self.class_names = class_names(settings, self.root)
        self.colours = colour_map(len(self.class_names))
        self._encoding = Encoding(
            label_table(settings, len(self.class_names)),
            "map it with data.label_map, leave it out with data.ignore, or name more classes in data.classes or classes.txt",
        )

    def training(self) -> list[tuple[Path, Path | None]]:
        return _pairs(self.root / "train")

    def unlabelled(self) -> list[Path]:
        folders = [self.root / name for name in ("unlabeled", "unlabelled") if (self.root / name).is_dir()]
        return [path for folder in folders for path in _images(folder)]

    def held_out(self, name: str) -> list[tuple[Path, Path]] | None:
        folder = self.root / name
        if not folder.is_dir():
            return None
        pairs = _pairs(folder)
        for image, mask in pairs:
            if mask is None:
                raise UserError(f"{image} has no mask: put {image.stem}.png into {folder / 'masks'}, or take the image away")
        return pairs

    def find_mask(self, mask: Path, listing: Listing) -> Path:
        return mask

    def encoding(self, mask: Path) -> Encoding:
        return self._encoding

    def inspect_masks(self, masks: dict[str, list[Path]]) -> list[str]:
        return []


def _pairs(folder):
    """The images of a split, sorted by name, and the mask of each (None without one)."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; it holds images/ and masks/")
    if not (folder / "images").is_dir():
        raise UserError(
            f"there is no folder {folder / 'images'}: put the images of {folder.name} there, their masks in masks/"
        )
    images = _files(folder / "images", IMAGE_SUFFIXES)
    masks = _files(folder / "masks", MASK_SUFFIXES) if (folder / "masks").is_dir() else {}
    if not images:
        raise UserError(f"{folder / 'images'} holds no image; expected {', '.join(IMAGE_SUFFIXES)}")
    return [(path, masks.get(stem)) for stem, path in images.items()]


def _images(folder):
    return _files(folder / "images" if (folder / "images").is_dir() else folder, IMAGE_SUFFIXES).values()


def _files(folder, suffixes):
    """Paths of a folder by stem, sorted; hidden files are left out."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in files:
            raise UserError(
                f"{folder} holds {files[path.stem].name} and {path.name}: rename one, files are known by their stem"
            )
        files[path.stem] = path
    return files
