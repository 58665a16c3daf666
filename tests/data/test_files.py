import io
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image

from cmim.data.file_set import FileSet
from cmim.data.files import image_size, open_image, open_mask
from cmim.data.labels import Encoding, class_ids, colour_map, label_table, table_of
from cmim.errors import UserError

VALUES = np.array([[0, 1, 2, 255], [2, 2, 1, 0]])


def three_classes(mask):
    return Encoding(table_of({0: 0, 1: 1, 2: 2}, [255]), "save it anew")


@pytest.mark.parametrize(
    ("suffix", "make"),
    [
        (".png", lambda v: Image.fromarray(v.astype(np.uint8))),
        (".bmp", lambda v: Image.fromarray(v.astype(np.uint8))),
        (".tif", lambda v: Image.fromarray(v.astype(np.uint8))),
        (".GIF", lambda v: indexed(v)),
        (".png", lambda v: indexed(v)),
        (".png", lambda v: Image.fromarray(v.astype(np.uint16))),
        (".tiff", lambda v: Image.fromarray(v.astype(np.uint16))),
        (".tif", lambda v: Image.fromarray(v.astype(np.int32))),
        (".png", lambda v: Image.fromarray(np.stack([v] * 3, -1).astype(np.uint8))),
        (".png", lambda v: Image.fromarray(np.stack([v] * 3 + [v * 0 + 9], -1).astype(np.uint8))),
        (".png", lambda v: Image.merge("LA", [Image.fromarray(v.astype(np.uint8))] * 2)),
    ],
)
def test_kinds_of_masks(tmp_path, suffix, make):
    image, mask = tmp_path / "image.png", tmp_path / f"mask{suffix}"
    Image.new("RGB", (4, 2)).save(image)
    make(VALUES).save(mask, optimize=False)
    label = FileSet([image], [mask], three_classes, 3).label(0)
    assert label.dtype == np.uint8 and label.flags.writeable and (label == VALUES).all()


def indexed(values):
    """Palette indices whose colours say something else."""
    image = Image.fromarray(values.astype(np.uint8), mode="P")
    image.putpalette([(37 * i + c * 91) % 256 for i in range(256) for c in range(3)])
    return image


def test_one_bit_masks(tmp_path):
    bits = np.array([[True, False], [False, True]])
    Image.fromarray(bits).save(tmp_path / "m.png")
    assert Image.open(tmp_path / "m.png").mode == "1" and (open_mask(tmp_path / "m.png") == bits).all()


@given(
    values=st_numpy.arrays(st.sampled_from([np.uint8, np.uint16, np.int32]), (3, 4), elements=st.integers(0, 255)),
    far=st.sampled_from([None, -1, 65535, 65536, 70000]),
    classes=st.integers(2, 200),
    ignore=st.integers(0, 255),
    label_map=st.dictionaries(st.integers(0, 255), st.integers(0, 1)),
)
def test_class_ids(values, far, classes, ignore, label_map):
    """Pixel by pixel, as the settings describe it."""
    if far is not None and values.dtype == np.int32:
        values[1, 2] = far
    if ignore in label_map.values():
        ignore = 255
    table = label_table(SimpleNamespace(ignore=ignore, label_map=label_map), classes)
    expected, unknown = [], []
    for value in values.ravel().tolist():
        target = label_map.get(value, value)
        expected.append(255 if target == ignore else target)
        if target != ignore and not 0 <= target < classes:
            unknown.append(value)
    ids, wrong = class_ids(values, table)
    assert wrong == (min(unknown) if unknown else None)
    assert unknown or ids.ravel().tolist() == expected


def test_colours_become_those_that_are_asked_for(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (8, 6)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg", 3).shape == (6, 8, 3)
    rng = np.random.default_rng(0)
    for mode in ("L", "P", "RGB", "RGBA", "CMYK", "1"):
        path = tmp_path / (mode + ".tif")
        stored = Image.fromarray(rng.integers(0, 256, (2, 3, 4), np.uint8), mode="RGBA").convert(mode)
        stored.save(path)
        rgb, grey = open_image(path, 3), open_image(path, 1)
        assert rgb.shape == (2, 3, 3) and grey.shape == (2, 3, 1) and rgb.dtype == grey.dtype == np.uint8
        assert (rgb == np.asarray(stored.convert("RGB"))).all() and (grey[..., 0] == np.asarray(stored.convert("L"))).all()


def test_four_bands_are_taken_as_stored(tmp_path):
    bands = np.random.default_rng(0).integers(0, 256, (5, 4, 4), np.uint8)
    for mode, name in (("RGBA", "a.png"), ("RGBA", "a.tif"), ("CMYK", "b.tif")):
        Image.fromarray(bands, mode=mode).save(tmp_path / name)
        assert (open_image(tmp_path / name, 4) == bands).all()
    Image.fromarray(bands[..., :3]).save(tmp_path / "c.png")
    with pytest.raises(UserError, match=r"c.png has channels R G B, but data.channels is 4"):
        open_image(tmp_path / "c.png", 4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_arrays(tmp_path, channels):
    array = np.random.default_rng(0).integers(0, 256, (5, 6, channels), np.uint8)
    for i, stored in enumerate((array, np.asfortranarray(array))):
        np.save(tmp_path / f"{i}.npy", stored)
        got = open_image(tmp_path / f"{i}.npy", channels)
        assert got.flags.c_contiguous and got.flags.writeable and (got == array).all()
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(tmp_path / "mask.png")
    files = FileSet([tmp_path / "0.npy"], [tmp_path / "mask.png"], three_classes, channels)
    assert files.label(0).shape == (5, 6) and files.name(0) == "0"
    Image.fromarray(np.zeros((6, 5), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png is 5 x 6 pixels, its image 0.npy is 6 x 5"):
        files.label(0)


@pytest.mark.parametrize(
    ("array", "channels", "message"),
    [
        (np.zeros((5, 6, 7), np.uint8), 4, r"holds uint8 of shape \(5, 6, 7\), expected uint8 of \(H, W, 4\)"),
        (np.zeros((5, 6), np.uint8), 1, r"holds uint8 of shape \(5, 6\)"),
        (np.zeros((5, 6, 3), np.float32), 3, "holds float32"),
        (np.zeros((2, 2, 1, 1), np.uint8), 1, r"shape \(2, 2, 1, 1\)"),
        (np.array([[[None]]]), 1, "cannot read .*x.npy: .*replace the file"),
    ],
)
def test_arrays_of_another_kind(tmp_path, array, channels, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        open_image(tmp_path / "x.npy", channels)


def test_an_archive_that_is_called_npy(tmp_path):
    with open(tmp_path / "x.npy", "wb") as file:
        np.savez(file, a=np.zeros(3))
    with pytest.raises(UserError, match=r"cannot read .*x\.npy"):
        open_image(tmp_path / "x.npy", 3)


@pytest.mark.parametrize("content", [b"PK\x03\x04cut", b"", b"\x93NUMPY", None])
def test_an_array_that_is_damaged_or_empty(content, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((0, 4, 3), np.uint8))
    if content is not None:
        (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*x\.npy: .*replace the file"):
        open_image(tmp_path / "x.npy", 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("m.png", {"format": "JPEG"}),
        ("m.png", {"format": "WEBP"}),
        ("m.png", {"format": "JPEG2000"}),
        ("m.tif", {"format": "JPEG"}),
        ("m.tif", {"compression": "jpeg"}),
    ],
)
def test_a_mask_whose_numbers_were_changed_by_its_compression(name, options, tmp_path):
    """Whatever its suffix says: a JPEG of 0, 1 and 2 may hold these numbers only, in the wrong places."""
    Image.fromarray(np.tile(VALUES.astype(np.uint8) % 3, (8, 8))).save(tmp_path / name, **options)
    with pytest.raises(UserError, match=r"m\.(png|tif) is .* which changes class ids: save it as an indexed or grey PNG"):
        open_mask(tmp_path / name)


@pytest.mark.parametrize("name", ["m.tif", "m.gif", "m.png"])
def test_a_mask_of_several_pages(name, tmp_path):
    pages = [indexed(VALUES), indexed(VALUES[::-1].copy())]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match=rf"{name} holds several pages"):
        open_mask(tmp_path / name)


def test_smaller_copies_in_a_mask_are_no_pages_of_it(tmp_path):
    page = indexed(VALUES)
    page.save(tmp_path / "m.tif", save_all=True, append_images=[page.resize((2, 1))])
    assert (open_mask(tmp_path / "m.tif") == VALUES).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_oriented_tiff_keeps_its_pixels(mode, orientation, tmp_path):
    """Turned sideways too, where Pillow would map pixels that are not compressed in rows of the wrong length."""
    path, exif = tmp_path / "x.tif", Image.Exif()
    exif[0x112] = orientation
    size = {"RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1)
    stored = np.random.default_rng(0).integers(0, 256, (5, 9, size), np.uint8)
    array = stored.squeeze().astype(np.uint16 if mode == "I;16" else np.uint8)
    image = Image.frombytes(mode, (9, 5), array.tobytes())
    if mode == "P":
        image.putpalette([value for value in range(256) for _ in range(3)])
    image.save(path, exif=exif)
    upright = (np.fliplr(stored), np.rot90(stored, 2), np.flipud(stored), stored.swapaxes(0, 1), np.rot90(stored, -1),
               np.rot90(stored, 2).swapaxes(0, 1), np.rot90(stored))  # fmt: skip
    expected = (stored, *upright)[orientation - 1]
    assert image_size(path) == expected.shape[:2]
    if size == 1:
        assert (open_mask(path) == expected[..., 0]).all()
    if mode != "I;16":
        channels = size if mode != "P" else 1
        assert (open_image(path, channels) == expected).all()


def test_a_tiff_without_its_size(tmp_path):
    Image.new("L", (5, 4)).save(tmp_path / "x.tif")
    content = bytearray((tmp_path / "x.tif").read_bytes())
    entries = content.index(struct.pack("<HH", 256, 4))
    content[entries : entries + 2] = struct.pack("<H", 300)
    (tmp_path / "x.tif").write_bytes(content)
    for read in (open_mask, lambda path: open_image(path, 3), image_size):
        with pytest.raises(UserError, match=r"cannot read .*x\.tif"):
            read(tmp_path / "x.tif")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", ["x.png", "x.npy"])
def test_a_pipe_among_the_images(name, tmp_path):
    os.mkfifo(tmp_path / name)
    for read in (lambda path: open_image(path, 3), image_size):
        with pytest.raises(UserError, match=r"cannot read .*x\.(png|npy): a pipe, not a file"):
            read(tmp_path / name)


def test_pictures_that_do_not_fit(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.full((2, 3), 3000, np.uint16)).save(path)
    for channels, message in (
        (1, r"x.tif has more than 8 bits"),
        (3, "more than 8 bits"),
        (7, r"save it as .npy \(H, W, 7\)"),
    ):
        with pytest.raises(UserError, match=message):
            open_image(path, channels)


def test_an_image_beyond_pillows_limit(tmp_path, monkeypatch):
    Image.new("RGB", (8, 6)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UserError, match=r"x\.png: "):
        open_image(tmp_path / "x.png", 3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "npy"]))
def test_damaged_files_are_read_or_refused(tmp_path, data, kind):
    noise, file = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8), io.BytesIO()
    if kind == "npy":
        np.save(file, noise)
    else:
        Image.fromarray(noise).convert("L" if kind == "GIF" else "RGB").save(file, kind)
    path, content = tmp_path / ("file.npy" if kind == "npy" else "file.png"), bytearray(file.getvalue())
    last = 130 if kind == "npy" else len(content) - 1  # an array's header
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, last))]
    else:
        content[data.draw(st.integers(0, last))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    for read in (lambda p: open_image(p, 3), open_mask):
        try:
            assert read(path) is not None
        except UserError as error:
            assert str(path) in str(error)


def test_colour_map():
    colours = colour_map(255)
    assert colours[[0, 1, 2, 15, 20]].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128]]
    assert len(np.unique(colours, axis=0)) == 255


def write_png(path, rows, bits, colour=0, width=4):
    """A PNG of raw rows: what Pillow itself does not write."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(
    "bits, row, values",
    [
        (1, bytes([0b01010000]), [0, 1, 0, 1]),
        (2, bytes([0b00011011]), [0, 1, 2, 3]),
        (4, bytes([0x01, 0x2F]), [0, 1, 2, 15]),
        (16, bytes([0, 1, 0, 2, 1, 0, 0, 3]), [1, 2, 256, 3]),
    ],
)
def test_a_grey_mask_holds_the_stored_numbers_whatever_its_depth(bits, row, values, tmp_path):
    assert open_mask(write_png(tmp_path / "mask.png", [row, row], bits)).tolist() == [values, values]


def test_sixteen_bits_a_channel_are_refused(tmp_path):
    path = write_png(tmp_path / "deep.png", [bytes(24)] * 2, 16, colour=2)
    for read in (open_mask, lambda path: open_image(path, 3)):
        with pytest.raises(UserError, match=r"deep.png has (more than 8|16) bits per channel"):
            read(path)


def test_an_array_of_one_dimension_is_refused(tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros(50, np.uint8))
    Image.fromarray(np.zeros((5, 10), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"flat.npy holds an array of shape \(50,\)"):
        FileSet([tmp_path / "flat.npy"], [tmp_path / "mask.png"], three_classes, 1).label(0)


def packed(values, bits, reverse=False):
    """Rows of `bits` a value, from the highest bit down, each padded to whole bytes; `reverse` turns every byte round."""
    digits = (np.asarray(values)[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(digits.reshape(len(values), -1).astype(np.uint8), axis=1)
    return np.packbits(np.unpackbits(rows[..., None], axis=2)[..., ::-1], axis=2)[..., 0] if reverse else rows


def write_bmp(path, values, bits, palette, upwards=True, colours=None):
    height, width = np.shape(values)
    rows = packed(values, bits)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))
    rows = rows[::-1] if upwards else rows
    table = b"".join(bytes([v, v, v, 0]) if isinstance(v, int) else bytes([*v[::-1], 0]) for v in palette)
    start = 54 + len(table)
    sizes = (40, width, height if upwards else -height, 1, bits, 0, rows.size, 2835, 2835, len(palette), 0)
    header = b"BM" + struct.pack("<IHHI", start + rows.size, 0, 0, start) + struct.pack("<IiiHHIIiiII", *sizes)
    path.write_bytes(header + table + rows.tobytes())
    return path


def write_tiff(path, values, bits, photometric, compressed=False, fill=1, palette=None, order="<"):
    height, width = np.shape(values)
    if bits == 16:
        body = np.asarray(values).astype(f"{order}u2").view(np.uint8)
        body = (np.packbits(np.unpackbits(body[..., None], axis=2)[..., ::-1], axis=2) if fill == 2 else body).tobytes()
    else:
        body = packed(values, bits, reverse=fill == 2).tobytes()
    body = zlib.compress(body) if compressed else body
    tags = [
        (256, 3, [width]), (257, 3, [height]), (258, 3, [bits]), (259, 3, [8 if compressed else 1]), (262, 3, [photometric]),
        (266, 3, [fill]), (273, 4, [8]), (277, 3, [1]), (278, 3, [height]), (279, 4, [len(body)]),
    ]  # fmt: skip
    body += b"\0" * (len(body) % 2)
    if palette is not None:
        tags.append((320, 3, [c * 257 for channel in zip(*palette, strict=True) for c in channel]))
        extra = struct.pack(f"{order}{len(tags[-1][2])}H", *tags[-1][2])
    else:
        extra = b""
    entries = b""
    for tag, kind, data in tags:
        value = struct.pack(f"{order}I", 8 + len(body)) if tag == 320 else (
            struct.pack(f"{order}{'H' if kind == 3 else 'I'}", *data).ljust(4, b"\0")
        )  # fmt: skip
        entries += struct.pack(f"{order}HHI", tag, kind, len(data)) + value
    start = 8 + len(body) + len(extra)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(
        mark + struct.pack(f"{order}I", start) + body + extra + struct.pack(f"{order}H", len(tags)) + entries + b"\0" * 4
    )
    return path


PALETTES = {
    "black and white": lambda n: [0, 255] + [0] * (n - 2),
    "two": lambda n: [0, 255],
    "white and black": lambda n: [255, 0],
    "greys": lambda n: list(range(n)),
    "few greys": lambda n: list(range(min(n, 3))),
    "colours": lambda n: [(k, 255 - k, 7) for k in range(n)],
}


@pytest.mark.parametrize("upwards", [True, False])
@pytest.mark.parametrize("palette", PALETTES)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_bmp_holds_its_stored_numbers_whatever_its_palette(bits, palette, upwards, tmp_path):
    colours = PALETTES[palette](1 << bits)
    values = np.random.default_rng(bits).integers(0, min(len(colours), 1 << bits), (6, 17))
    path = write_bmp(tmp_path / "m.bmp", values, bits, colours, upwards)
    np.testing.assert_array_equal(open_mask(path), values)
    shown = np.array([(v, v, v) if isinstance(v, int) else v for v in colours], np.uint8)[values]
    np.testing.assert_array_equal(open_image(path, 3), shown)  # as a picture it has the palette's colours


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("fill", [1, 2])
@pytest.mark.parametrize("photometric", [0, 1, 3])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_tiff_holds_its_stored_numbers(bits, photometric, fill, compressed, order, tmp_path):
    values = np.random.default_rng(bits).integers(0, 1 << min(bits, 9), (6, 17))
    palette = [(k % 256, 255 - k % 256, 9) for k in range(1 << bits)] if photometric == 3 else None
    path = write_tiff(tmp_path / "m.tif", values, bits, photometric, compressed, fill, palette, order)
    try:
        stored = open_mask(path)
    except UserError as error:  # a form that Pillow does not read
        assert str(path) in str(error) and (bits, fill) != (8, 1)
    else:
        np.testing.assert_array_equal(stored, values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_an_indexed_png_holds_its_stored_numbers(bits, tmp_path):
    values = np.random.default_rng(bits).integers(0, 1 << bits, (6, 17))
    image = Image.fromarray(values.astype(np.uint8), mode="P")
    for palette in ([0, 0, 0, 255, 255, 255], [255, 255, 255, 0, 0, 0], list(range(3 << min(bits, 6)))):
        image.putpalette(palette + [5] * (3 * (1 << bits) - len(palette)))
        for suffix in (".png", ".gif"):
            image.save(tmp_path / f"m{suffix}", **({"bits": bits} if suffix == ".png" else {"optimize": False}))
            np.testing.assert_array_equal(open_mask(tmp_path / f"m{suffix}"), values)
