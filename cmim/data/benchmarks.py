"""`voc`, `cityscapes`, `coco`, `ade20k`: the benchmarks of semi-supervised segmentation, in the layouts of their
distributions.

Each is a `Source`: the official training images are divided by `data.labelled`, or `data.split` names one of UniMatch's
split folders. `val` is the official validation set; no benchmark has public labels for a test set. Masks may be the original
ones or those prepared for UniMatch, which the authors of SemiVL provide as a release on GitHub.
"""

from pathlib import Path

import numpy as np

from cmim.data.benchmark_classes import (
    ADE20K_NAMES,
    CITYSCAPES_COLOURS,
    CITYSCAPES_LABEL_IDS,
    CITYSCAPES_NAMES,
    COCO_NAMES,
    VOC_NAMES,
)
from cmim.data.datasets import IGNORED
from cmim.data.files import open_mask
from cmim.data.labels import Encoding, colour_map, table_of
from cmim.data.lists import Listing, read_lines
from cmim.errors import UserError
from cmim.settings import DataSettings

PREPARED = "https://github.com/google-research/semivl/releases/download/checkpoints/ground_truth_{}.zip"
INSPECTED = 32
"""Number of masks of each split that `Ade20k.inspect_masks` opens."""


class Benchmark:
    """Base class of the four benchmarks; a `Source`."""

    def __init__(self, settings: DataSettings):
        self.root = settings.root
        if not self.root.is_dir():
            raise UserError(f"data.root: there is no folder {self.root}")
        for key in ("masks", "image_folder", "mask_folder", "train"):
            if getattr(settings, key) != DataSettings.model_fields[key].default:
                raise UserError(f"data.{key}: {settings.format} has its own names of masks and folders; leave it away")
        for key, default in (("classes", None), ("ignore", IGNORED), ("label_map", {}), ("colours", None)):
            if getattr(settings, key) != default:
                raise UserError(
                    f"data.{key}: {settings.format} has its own classes; for others give data.format folder and data.split"
                )

    more_unlabelled = None
    held_out_remedy = "it is `val`, or a text file of ids or of lines `IMAGE MASK`, two paths under data.root"

    def unlabelled(self) -> list[Path]:
        return []

    def held_out(self, name: str) -> list[tuple[Path, Path]] | None:
        return self.validation() if name == "val" else None

    def known(self) -> list[tuple[Path, Path]]:
        return self.training() + self.validation()

    def find_mask(self, mask: Path, listing: Listing) -> Path:
        return mask

    def encoding(self, mask: Path) -> Encoding:
        return self._encoding

    def inspect_masks(self, masks: dict[str, list[Path]]) -> list[str]:
        return []

    def _images(self, pattern):
        images = sorted((path for path in self.root.glob(pattern) if not path.name.startswith(".")), key=str)
        if not images:
            raise UserError(f"there is no image {self.root / pattern}: {self.layout}")
        return images


class Voc(Benchmark):
    """PASCAL VOC 2012 (Everingham et al. 2015) with the masks of SBD (Hariharan et al. 2011) merged into its own."""

    class_names = VOC_NAMES
    colours = colour_map(len(VOC_NAMES))
    layout = "data.root is the folder VOC2012 of VOCtrainval_11-May-2012.tar, with JPEGImages/ and SegmentationClass/"
    mask_remedy = f"masks merged with SBD's go into SegmentationClass/ or SegmentationClassAug/: {PREPARED.format('voc')}"
    split_example = "git clone https://github.com/LiheYoung/UniMatch, then --data.split UniMatch/splits/pascal/92"
    _encoding = Encoding(
        table_of({k: k for k in range(21)}, [IGNORED]),
        f"VOC's hold 0 to 20 and 255; take the file from {PREPARED.format('voc')}",
    )

    def training(self) -> list[tuple[Path, Path | None]]:
        """trainaug.txt (or train_aug.txt), the list of SBD, if it exists, else train.txt."""
        lists = self.root / "ImageSets" / "Segmentation"
        names = [name for name in ("trainaug.txt", "train_aug.txt") if (lists / name).is_file()] or ["train.txt"]
        return self._listed(lists / names[0])

    def validation(self) -> list[tuple[Path, Path]]:
        return self._listed(self.root / "ImageSets" / "Segmentation" / "val.txt")

    def find_mask(self, mask: Path, listing: Listing) -> Path:
        merged = mask.parent.parent / "SegmentationClassAug" / mask.name
        return merged if mask not in listing and merged in listing else mask

    def inspect_masks(self, masks: dict[str, list[Path]]) -> list[str]:
        counts = {name: sum(mask.parent.name == "SegmentationClassAug" for mask in masks[name]) for name in masks}
        return [f"{count} {name} masks are from SegmentationClassAug/" for name, count in counts.items() if count]

    def _listed(self, path):
        if not path.is_file():
            raise UserError(f"there is no list {path}: {self.layout}, and ImageSets/ where there is no data.split")
        ids = [line.split()[0].rpartition("/")[2].split(".")[0] for line in read_lines(path, "data.root", "ids of images")]
        return [(self.root / "JPEGImages" / f"{name}.jpg", self.root / "SegmentationClass" / f"{name}.png") for name in ids]


class Cityscapes(Benchmark):
    """Cityscapes (Cordts et al. 2016), 19 classes. For each image the mask has train ids if csCreateTrainIdLabelImgs
    wrote that file, else the label ids of gtFine_trainvaltest.zip."""

    class_names = CITYSCAPES_NAMES
    colours = CITYSCAPES_COLOURS
    layout = "data.root holds leftImg8bit/ (leftImg8bit_trainvaltest.zip) and gtFine/ (gtFine_trainvaltest.zip)"
    mask_remedy = "gtFine_trainvaltest.zip of www.cityscapes-dataset.com has *_gtFine_labelIds.png of all of them"
    split_example = "git clone https://github.com/LiheYoung/UniMatch, then --data.split UniMatch/splits/cityscapes/1_16"
    _train_ids = Encoding(
        table_of({k: k for k in range(19)}, [IGNORED]),
        "train ids are 0 to 18 and 255; write the file with csCreateTrainIdLabelImgs, or remove it and have *_labelIds.png",
    )
    _label_ids = Encoding(
        table_of({k: i for i, k in enumerate(CITYSCAPES_LABEL_IDS)}, {*range(34), IGNORED}),
        "label ids are 0 to 33 and 255; take the file from gtFine_trainvaltest.zip again",
    )

    def training(self) -> list[tuple[Path, Path | None]]:
        return self._city("train")

    def validation(self) -> list[tuple[Path, Path]]:
        return self._city("val")

    def unlabelled(self) -> list[Path]:
        """The images of train_extra/, which have only coarse masks."""
        there = (self.root / "leftImg8bit" / "train_extra").is_dir()
        return self._images("leftImg8bit/train_extra/*/*_leftImg8bit.png") if there else []

    def find_mask(self, mask: Path, listing: Listing) -> Path:
        raw = mask.with_name(mask.name.replace("_labelTrainIds.png", "_labelIds.png"))
        return raw if mask not in listing and raw in listing else mask

    def encoding(self, mask: Path) -> Encoding:
        return self._label_ids if mask.name.endswith("_labelIds.png") else self._train_ids

    def inspect_masks(self, masks: dict[str, list[Path]]) -> list[str]:
        raw = sum(self.encoding(mask) is self._label_ids for paths in masks.values() for mask in paths)
        return [f"{raw} masks hold label ids, which are mapped to train ids"] if raw else []

    def _city(self, split):
        images = self._images(f"leftImg8bit/{split}/*/*_leftImg8bit.png")
        masks = (path.name.replace("_leftImg8bit.png", "_gtFine_labelTrainIds.png") for path in images)
        return [(path, self.root / "gtFine" / split / path.parent.name / m) for path, m in zip(images, masks, strict=True)]


class Coco(Benchmark):
    """COCO 2017 (Lin et al. 2014) as semantic segmentation: the 80 thing classes, and a background that counts as a
    class."""

    class_names = COCO_NAMES
    colours = colour_map(len(COCO_NAMES))
    layout = "data.root holds train2017/, val2017/ and masks/"
    mask_remedy = f"COCO comes without masks of classes; prepared ones go into masks/: {PREPARED.format('coco')}"
    split_example = "git clone https://github.com/LiheYoung/UniMatch, then --data.split UniMatch/splits/coco/1_512"
    _encoding = Encoding(
        table_of({k: k for k in range(81)}, [IGNORED]),
        f"0 is the background, 1 to 80 are the things in order (no category ids), 255 is none: {PREPARED.format('coco')}",
    )

    def training(self) -> list[tuple[Path, Path | None]]:
        return self._year("train2017")

    def validation(self) -> list[tuple[Path, Path]]:
        return self._year("val2017")

    def _year(self, folder):
        masks = self.root / "masks"
        return [(path, masks / f"{path.stem}.png") for path in self._images(f"{folder}/*.jpg")]


class Ade20k(Benchmark):
    """ADE20K's scene parsing benchmark (Zhou et al. 2017), 150 classes. In the original masks 0 is no class and k is class k
    - 1; in those of UniMatch V2 classes start at 0 and 255 is no class. `inspect_masks` tells them apart."""

    class_names = ADE20K_NAMES
    colours = colour_map(len(ADE20K_NAMES))
    layout = "data.root is the folder ADEChallengeData2016, with images/ and annotations/, each training/ and validation/"
    mask_remedy = "annotations/ of http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip has all of them"
    split_example = "git clone https://github.com/LiheYoung/UniMatch-V2, then --data.split UniMatch-V2/splits/ade20k/1_64"
    _original = Encoding(
        table_of({k + 1: k for k in range(150)}, [0]),
        "others hold 0 to 150, as ADE20K distributes them; take masks of one encoding",
    )
    _prepared = Encoding(
        table_of({k: k for k in range(150)}, [IGNORED]),
        "others hold 0 to 149 and 255, as UniMatch V2's; take masks of one encoding",
    )

    def training(self) -> list[tuple[Path, Path | None]]:
        return self._half("training")

    def validation(self) -> list[tuple[Path, Path]]:
        return self._half("validation")

    def inspect_masks(self, masks: dict[str, list[Path]]) -> list[str]:
        """Find out which kind the masks are: only prepared masks contain 255, and most of them do; only original masks
        contain 150. If `INSPECTED` masks of a split have no 255, the split counts as original: perhaps only one split was
        prepared."""
        prepared, original = [], []  # (a mask, the evidence)
        for split, paths in masks.items():
            chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(INSPECTED, len(paths))).astype(int)]
            values = [np.unique(open_mask(path)) for path in chosen]
            has_255 = [path for path, v in zip(chosen, values, strict=True) if IGNORED in v]
            has_150 = [path for path, v in zip(chosen, values, strict=True) if 150 in v]
            prepared += [(path, "holds 255") for path in has_255[:1]]
            original += [(path, "holds 150") for path in has_150[:1]]
            if not has_255 and not has_150 and len(chosen) == INSPECTED:
                original.append((chosen[0], f"and {INSPECTED - 1} others of {split} hold no 255"))
        if prepared and original:
            (a, why_a), (b, why_b) = prepared[0], original[0]
            raise UserError(
                f"{a} {why_a}, so its classes count from 0; {b} {why_b}, so its classes count from 1, as ADE20K "
                "distributes them: take all masks of one encoding"
            )
        self._encoding = self._prepared if prepared else self._original
        if prepared:
            return [f"masks hold classes from 0, as UniMatch V2 prepares them: {prepared[0][0].name} holds 255"]
        why = f"{original[0][0].name} {original[0][1]}" if original else "none of those that were opened holds 255"
        return [f"masks hold classes from 1 and 0 for none, as ADE20K distributes them: {why}"]

    def _half(self, name):
        masks = self.root / "annotations" / name
        return [(path, masks / f"{path.stem}.png") for path in self._images(f"images/{name}/*.jpg")]
