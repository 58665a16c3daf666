"""Files of images and of masks.

The EXIF orientation of images is applied or ignored, depending on which fits the masks of the data set: `cmim.data.survey`
decides. For a TIFF it is always applied, because there the orientation is part of the format.
"""

import re
import struct
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np
from PIL import ExifTags, Image, ImageOps

from cmim.data.colours import JPEG_TOLERANCE, colour_picture, count_colours
from cmim.errors import UserError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pnm", ".tif", ".tiff", ".npy",
)  # fmt: skip
MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")
LOSSY_MASK_SUFFIXES = (".jpg", ".jpeg", ".jfif")
"""Also allowed for masks in colours, which are read by the nearest colour."""
RANGE_NEEDED = (
    "give --data.range '[LOWEST, HIGHEST]', the values that become black and white; python -m cmim.check suggests them"
)
# Exceptions of Pillow and NumPy for files that are truncated, damaged, too large or not images.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error,
    TokenError, BadZipFile, Image.DecompressionBombError,
)  # fmt: skip
# Formats, and compressions of TIFF, that change the values of a mask.
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")


def open_image(path: str | Path, channels: int, turn: bool = False, limits: tuple[float, float] | None = None) -> np.ndarray:
    """An image file as (H, W, channels) uint8.

    With 3 channels the file is converted to RGB, with 1 to grey. With 4, the file must store four bands (RGBA, CMYK). A .npy
    file of (H, W, channels) may have any number of channels; other numbers must come from such files. With `turn` the
    image is rotated and mirrored according to its EXIF orientation. Of several pages or frames the first is used.

    Images with more than 8 bits (grey PNG and TIFF, .npy of numbers) need `limits`, the values that become 0 and 255; those
    between are scaled linearly, those beyond are clipped, and NaN, which satellite data have where nothing was seen, is 0.

    Raises:
        UserError: the file cannot be read, has another number of channels, has more than 8 bits without `limits`, or 8 bits
            with them.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return _open_array(path, channels, limits)
    if channels not in (1, 3, 4):
        raise UserError(
            f"{path}: data.channels is {channels}, but pictures have 1, 3 or 4: save it as .npy (H, W, {channels})"
        )
    image = open_header(path)
    if is_deep(image):
        return _open_deep(path, image, channels, turn, limits)
    if limits is not None:
        raise UserError(
            f"{path} has 8 bits per channel, which data.range does not change: leave it away, or save all with more"
        )
    if channels == 4 and len(image.getbands()) != 4:
        raise UserError(f"{path} has channels {' '.join(image.getbands())}, but data.channels is 4: store 4, or change it")
    mode = {1: "L", 3: "RGB", 4: image.mode}[channels]
    if image.format == "BMP" and (indices := _open_bmp(path, image)) is not None:
        image = Image.fromarray(indices * np.uint8(255 if image.mode == "1" else 1))
    try:
        if turn and orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    return pixels.reshape(*pixels.shape[:2], channels)


class ColourPicture(UserError):
    """A mask in colours where one of class ids is expected."""


def open_colours(path: str | Path, tolerance: float) -> np.ndarray:
    """A mask in colours as (H, W, 3) uint8, palettes as their colours, an alpha channel left aside.

    Args:
        path: PNG, BMP, GIF or TIFF; with a `tolerance` above 0 also JPEG.

    Raises:
        UserError: the file cannot be read, is no mask, has several pages, or is stored in a way that changes its colours.
    """
    with open_header(path) as mask:
        kind = lossy(mask)
        if kind and not tolerance:
            raise UserError(
                f"{path} is {kind}, which changes colours: give --data.colour_tolerance {JPEG_TOLERANCE}, or save it as PNG"
            )
        _refuse_pages(path, mask)
        if mask.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise UserError(f"{path} has pixels of type {mask.mode}: save it as an RGB or indexed PNG")
    return open_image(path, 3)


def open_mask(path: str | Path) -> np.ndarray:
    """The stored values of a mask, (H, W) integers: palette indices, not the colours of the palette.

    Raises:
        UserError: the file cannot be read, is not a mask, has several pages, or is stored in a way that changes values.
    """
    mask = open_header(path)
    stored = _stored(mask)
    _refuse_lossy(path, mask)
    _refuse_pages(path, mask)
    if mask.format == "BMP" and (indices := _open_bmp(path, mask)) is not None:
        return indices
    if "16" in stored and len(mask.getbands()) > 1:
        raise UserError(f"{path} has 16 bits per channel: save it as an indexed or grey PNG of class ids")
    try:
        mask.load()
        if mask.mode in ("RGB", "RGBA", "LA"):
            channels = np.asarray(mask)
            grey = channels[..., :1]
            if mask.mode != "LA" and (channels[..., :3] != grey).any():
                raise ColourPicture(colour_picture(path, count_colours(channels)))
            return grey[..., 0]
        if mask.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            raise UserError(f"{path} has pixels of type {mask.mode}: save it as an indexed or grey PNG of class ids")
        return _as_stored(np.asarray(mask), mask.mode, stored)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def _refuse_lossy(path, mask):
    """Refuse masks with lossy compression. The suffix does not tell, because a JPEG may be called .png."""
    kind = lossy(mask)
    if kind:
        raise UserError(
            f"{path} is {kind}, which changes class ids: save it as an indexed or grey PNG of class ids, or, if it holds "
            f"colours, give data.colours and --data.colour_tolerance {JPEG_TOLERANCE}"
        )


def lossy(mask: Image.Image) -> str | None:
    """How a file is compressed, in words; None if the compression is lossless."""
    compression = mask.info.get("compression")
    if mask.format == "TIFF":
        return f"a TIFF with {compression} compression" if compression in _LOSSY_TIFF else None
    return f"stored as {mask.format}" if mask.format in _LOSSY else None


def _refuse_pages(path, mask):
    """Refuse masks with several pages, of which only one would be read. Thumbnails and transparency masks do not count."""
    try:
        several = getattr(mask, "is_animated", False)
        if several and mask.format == "TIFF":
            size = mask.size
            mask.seek(1)
            several = mask.size == size and not mask.tag_v2.get(254, 0) & 0b101
            mask.seek(0)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    if several:
        raise UserError(f"{path} holds several pages: a mask is one, with the class of each pixel; save it as a PNG")


def _as_stored(values, mode, stored):
    """Undo how Pillow changes grey pixels: it scales 1, 2 and 4 bits to 0 to 255, and inverts white-is-zero TIFFs."""
    form = re.fullmatch(r"(?:1|L)(?:;([24])?(I)?R?)?", stored) if mode in ("1", "L") else None
    bits, inverted = form.groups() if form else (None, None)
    if mode == "1":
        values, highest = values.astype(np.uint8), 1
    elif bits:
        highest = (1 << int(bits)) - 1
        values = values // (255 // highest)
    else:
        highest = 255
    return highest - values if inverted else values


def _open_bmp(path, image):
    """The stored values of a BMP with at most 8 bits per pixel whose palette Pillow takes for grey: it then reads as many
    bits as the palette has colours. None if Pillow reads the file correctly."""
    with open(path, "rb") as file:
        head = file.read(34)
    if len(head) < 34 or image.mode not in ("1", "L"):
        return None
    old = int.from_bytes(head[14:18], "little") == 12
    bits = int.from_bytes(head[24:26] if old else head[28:30], "little")
    compressed = not old and int.from_bytes(head[30:34], "little") != 0
    if bits not in (1, 4, 8) or (image.mode, bits) in (("1", 1), ("L", 8)):
        return None
    if compressed:
        raise UserError(f"{path} is a compressed BMP with a grey palette: save it as a PNG")
    width, height = image.size
    stride = (width * bits + 31) // 32 * 4
    with open(path, "rb") as file:
        file.seek(image.tile[0][2])
        raw = file.read(stride * height)
    if len(raw) < stride * height:
        raise _unreadable(path, OSError(0, "the file is truncated"))
    digits = np.unpackbits(np.frombuffer(raw, np.uint8).reshape(height, stride), axis=1)
    digits = digits[:, : width * bits].reshape(height, width, bits)
    values = np.packbits(digits, axis=2)[:, :, 0] >> (8 - bits)
    upwards = image.tile[0][3][-1] == -1
    return values[::-1] if upwards else values


def _stored(image):
    """How the file of an image that is not loaded yet stores its pixels, as a raw mode of Pillow: L;4 or RGB;16B."""
    arguments = image.tile[0][3] if image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def is_deep(image: Image.Image) -> bool:
    """Whether an opened file that is not loaded yet has more than 8 bits for each channel."""
    return image.mode in ("F", "I") or "16" in (image.mode + _stored(image))


def _open_deep(path, image, channels, turn, limits):
    if len(image.getbands()) > 1 or channels not in (1, 3):  # of these Pillow keeps 8 bits
        raise UserError(f"{path} has 16 bits per channel and several channels: save it as .npy (H, W, channels) of uint16")
    if limits is None:
        raise UserError(f"{path} has more than 8 bits per channel (type {image.mode}): {RANGE_NEEDED}")
    try:
        if turn and orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        grey = scaled(np.asarray(image), limits)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    return np.repeat(grey[..., None], channels, axis=2)


def scaled(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Numbers of any type as uint8: linearly, so that `limits` become 0 and 255."""
    low, high = limits
    values = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.nan_to_num(values, nan=0, posinf=255, neginf=0).clip(0, 255).round().astype(np.uint8)


def _open_array(path, channels, limits):
    array = map_array(path)
    if array.ndim != 3 or array.shape[2] != channels or array.dtype.kind not in "uif":
        raise UserError(
            f"{path} holds {array.dtype} of shape {array.shape}, expected uint8 of (H, W, {channels}): "
            "save it so, or change data.channels"
        )
    if (array.dtype == np.uint8) == (limits is not None):
        remedy = "leave data.range away, or save all as uint16" if limits else f"save it as uint8, or {RANGE_NEEDED}"
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}: {remedy}")
    return np.array(array, order="C") if limits is None else scaled(array, limits)


def map_array(path: Path) -> np.ndarray:
    """Open a .npy file as a memory map, so that a damaged header cannot request more memory than the file has."""
    _refuse_pipe(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("no .npy file")
        if not array.size:
            raise ValueError("an array without pixels")
        return array
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def palette(path: Path) -> dict[int, str] | None:
    """The colours `#rrggbb` of the indices of a palette mask; None for other masks."""
    with open_header(path) as mask:
        if mask.mode != "P":
            return None
        colours = bytes(mask.getpalette("RGB"))
    return {i: f"#{colours[3 * i : 3 * i + 3].hex()}" for i in range(len(colours) // 3)}


def image_size(path: Path, turn: bool = False) -> tuple[int, int]:
    """(height, width) of an image file, from its header; with `turn` after applying its EXIF orientation."""
    if path.suffix.lower() == ".npy":
        array = map_array(path)
        if array.ndim != 3:
            raise UserError(f"{path} holds an array of shape {array.shape}, expected (H, W, channels): save it so")
        return array.shape[:2]
    with open_header(path) as image:
        width, height = image.size
        return (width, height) if turn and orientation(image) in SIDEWAYS else (height, width)


SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def orientation(image: Image.Image | Path) -> int:
    """The EXIF orientation of an opened image or of a file, 1 (upright) to 8; 1 if there is none, and for a TIFF, whose
    orientation is always applied."""
    if isinstance(image, Path):
        if image.suffix.lower() == ".npy":
            return 1
        with open_header(image) as opened:
            return orientation(opened)
    # For a PNG, Pillow would decode all pixels to find EXIF data after them.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data raises exceptions of many types
        return 1
    return found if found in range(1, 9) else 1


def open_header(path: Path) -> Image.Image:
    """An image file of which nothing but the header is read yet.

    Raises:
        UserError: it is no image.
    """
    _refuse_pipe(path)
    try:
        image = Image.open(path)
        if image.format == "TIFF":
            image.filename = ""  # else Pillow may map the file into memory, which mixes up the pixels of a rotated one
        return image
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def _refuse_pipe(path):
    """Refuse named pipes: opening one that has no writer would wait for ever."""
    if Path(path).is_fifo():
        raise _unreadable(path, OSError(0, "a pipe, not a file"))


def _unreadable(path, error):
    reason = getattr(error, "strerror", None) or ("no image, or damaged" if str(path) in str(error) else str(error))
    if isinstance(error, FileNotFoundError) and Path(path).is_symlink():
        reason = "a link to a file that is not there"
    return UserError(f"cannot read {path}: {reason}; replace the file or take it away")
