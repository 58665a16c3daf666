"""Files of annotations: COCO JSON, LabelMe JSON and CVAT XML (for images), as shapes in pixels."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

import numpy as np
from PIL import Image

from cmim.errors import UserError

Point = tuple[float, float]


@dataclass
class Shape:
    """An object, or a part of one."""

    label: str
    polygons: Sequence[Sequence[Point]] = ()
    """Outlines in pixels (x, y)."""
    ellipse: tuple[float, float, float, float] | None = None
    """(left, top, right, bottom)."""
    part: tuple[int, int, np.ndarray] | None = None
    """Left, top and (h, w) bool."""
    order: float = 0
    """Shapes are drawn in ascending order."""

    @property
    def drawn(self) -> bool:
        """False for lines and points, whose label is a zero byte and their kind."""
        return not self.label.startswith("\0")


@dataclass
class Annotated:
    """An image as a file of annotations names it."""

    name: str
    size: tuple[int, int] | None
    """(height, width) as the file says."""
    source: Path
    shapes: list[Shape] = field(default_factory=list)


def read_annotations(path: Path) -> tuple[list[Annotated], list[str]] | None:
    """The annotated images of a file and the labels that it lists; None for other files.

    Raises:
        UserError: the file is damaged, or needs a library that is not installed.
    """
    if path.suffix.lower() == ".xml":
        return _read_cvat(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; repair it or take it away") from None
    if not isinstance(found, dict):
        return None
    try:
        if {"images", "annotations", "categories"} <= found.keys():
            return _read_coco(path, found)
        if {"shapes", "imagePath"} <= found.keys():
            return _read_labelme(path, found)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): export it again") from None
    return None


def _read_coco(path, found):
    categories = {entry["id"]: str(entry["name"]) for entry in found["categories"]}
    used = {entry["category_id"] for entry in found["annotations"]}
    images = {}
    for entry in found["images"]:
        size = (int(entry["height"]), int(entry["width"])) if "height" in entry and "width" in entry else None
        images[entry["id"]] = Annotated(str(entry["file_name"]), size, path)
    for entry in found["annotations"]:
        item, outline = images[entry["image_id"]], entry.get("segmentation") or []
        label = categories[entry["category_id"]]
        if isinstance(outline, dict):
            shape = Shape(label, part=(0, 0, _decode_rle(outline, path)))
            area = float(shape.part[2].sum())
        else:
            shape = Shape(label, [list(zip(flat[::2], flat[1::2], strict=True)) for flat in outline])
            area = float(entry.get("area") or sum(_box_area(polygon) for polygon in shape.polygons))
        shape.order = -area  # small objects lie on large ones
        item.shapes.append(shape)
    # Roboflow lists a category above the others, which no object has.
    return list(images.values()), [name for key, name in categories.items() if key in used or len(categories) == 1]


def _box_area(polygon):
    x, y = zip(*polygon, strict=True)
    return (max(x) - min(x)) * (max(y) - min(y))


def _decode_rle(outline, path):
    try:
        from pycocotools import mask as coco
    except ModuleNotFoundError:
        raise UserError(f"{path} holds run lengths, which pycocotools decodes: pip install pycocotools") from None
    height, width = outline["size"]
    if isinstance(outline["counts"], list):
        outline = coco.frPyObjects(outline, height, width)
    return coco.decode(outline).astype(bool)


def _read_labelme(path, found):
    height, width = found.get("imageHeight"), found.get("imageWidth")
    item = Annotated(str(found["imagePath"]), (height, width) if height and width else None, path)
    for order, entry in enumerate(found["shapes"]):
        points = [(float(x), float(y)) for x, y in entry["points"]]
        kind, shape = entry.get("shape_type") or "polygon", Shape(str(entry["label"]), order=order)
        if kind == "polygon" and len(points) > 2:
            shape.polygons = [points]
        elif kind == "rectangle" and len(points) > 1:
            shape.polygons = [_rectangle(*points[0], *(points[1] if len(points) == 2 else points[2]))]
        elif kind == "circle":
            (x, y), (a, b) = points
            r = float(np.hypot(a - x, b - y))
            shape.ellipse = (x - r, y - r, x + r, y + r)
        elif kind == "mask":
            with Image.open(io.BytesIO(base64.b64decode(entry["mask"]))) as image:
                shape.part = (round(points[0][0]), round(points[0][1]), np.asarray(image.convert("L")) > 0)
        else:
            shape.label = f"\0{kind}"  # counted, and left out
        item.shapes.append(shape)
    return [item], []


def _rectangle(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _read_cvat(path):
    """CVAT for images 1.1. The parser knows no entities: a file that declares some is refused."""
    images, labels, state = [], [], {"path": [], "text": ""}

    def refuse(*_):
        raise UserError(f"{path} declares entities or a document type, which CVAT does not write: export it again")

    def start(name, attributes):
        state["path"].append(name)
        state["text"] = ""
        if name == "image" and "name" in attributes:
            images.append(Annotated(attributes["name"], (int(attributes["height"]), int(attributes["width"])), path))
        elif images and state["path"][-2:-1] == ["image"]:
            shape = _cvat_shape(name, attributes)
            if shape is not None:
                images[-1].shapes.append(shape)

    def end(name):
        if state["path"][-2:] == ["label", "name"]:
            labels.append(state["text"].strip())
        state["path"].pop()

    def text(words):
        state["text"] += words

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    try:
        with open(path, "rb") as file:
            parser.ParseFile(file)
    except (expat.ExpatError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no CVAT XML, or damaged ({error}): export it again as CVAT for images 1.1") from None
    return (images, labels) if images else None


def _cvat_shape(name, attributes):
    order = float(attributes.get("z_order", 0))
    label = attributes.get("label", "")
    if name == "polygon":
        points = [tuple(map(float, pair.split(","))) for pair in attributes["points"].split(";") if pair]
        return Shape(label, [points], order=order)
    if name == "box":
        return Shape(label, [_rectangle(*(float(attributes[key]) for key in ("xtl", "ytl", "xbr", "ybr")))], order=order)
    if name == "ellipse":
        x, y, a, b = (float(attributes[key]) for key in ("cx", "cy", "rx", "ry"))
        return Shape(label, ellipse=(x - a, y - b, x + a, y + b), order=order)
    if name == "mask":
        left, top, width, height = (int(attributes[key]) for key in ("left", "top", "width", "height"))
        runs = [int(run) for run in attributes["rle"].split(",")]  # of 0 and 1 in turn, row by row
        part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
        return Shape(label, part=(left, top, part), order=order)
    return Shape(f"\0{name}") if name in ("polyline", "points", "skeleton", "cuboid") else None
