"""Every kind of file becomes the picture that a person would see, or an error that says why not."""

import ast
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from stethoscope.core import images
from stethoscope.core.errors import DataError
from stethoscope.core.images import MAX_PIXELS, MAX_RATIO, is_image_file, portable_bytes, read_image, rgb
from stethoscope.core.types import ImageRef, load_picture

RED, WHITE = (220, 30, 40), (255, 255, 255)


def read(path):
    return ImageRef(path.name, path).load()


@pytest.fixture
def photo():
    """Upright, with a different colour in every corner."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:20, :30], pixels[:20, 30:], pixels[20:, :30], pixels[20:, 30:] = 250, RED, (10, 200, 20), (20, 30, 240)
    return Image.fromarray(pixels)


def same(first, other, tolerance=0):
    assert first.mode == other.mode == "RGB"
    assert first.size == other.size
    difference = np.abs(np.asarray(first, dtype=int) - np.asarray(other, dtype=int))
    assert difference.max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_set_upright(photo, tmp_path, orientation):
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # how the camera has stored it
    stored = photo if turned is None else photo.transpose(Image.Transpose(turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    same(read(tmp_path / "a.png"), photo)
    same(rgb(rgb(Image.open(tmp_path / "a.png"))), photo)  # once is enough


def test_a_broken_note_about_the_camera_does_no_harm(photo, tmp_path):
    photo.save(tmp_path / "a.png", exif=b"Exif\x00\x00MM\x00\x00nonsense")
    same(read(tmp_path / "a.png"), photo)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / f"a.{suffix}")
    same(read(tmp_path / f"a.{suffix}"), Image.fromarray(grey.astype(np.uint8)).convert("RGB"))


def test_a_dark_picture_of_sixteen_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 200, dtype=np.uint16)).save(tmp_path / "a.png")
    same(read(tmp_path / "a.png"), Image.new("RGB", (4, 4), (1, 1, 1)))


@pytest.mark.parametrize(
    ("values", "dtype", "seen"),
    [([0, 128, 255], np.int32, [0, 128, 255]), ([0, 257, 65535], np.int32, [0, 1, 255]),
     ([0, 0.2, 1], np.float32, [0, 51, 255]), ([0, 20.4, 255], np.float32, [0, 20, 255])],
)  # fmt: skip
def test_wide_numbers_without_a_range_of_their_own(values, dtype, seen):
    image = rgb(Image.fromarray(np.array([values], dtype=dtype)))
    assert np.asarray(image)[0, :, 0].tolist() == seen


@pytest.mark.parametrize("values", [[-1, 5], [0, 70000], [0, float("nan")]])
def test_numbers_that_are_no_brightness(values):
    with pytest.raises(DataError, match="0 to 65535"):
        rgb(Image.fromarray(np.array([values], dtype=np.float32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_whatever_colour_they_hide(tmp_path, mode):
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    image.paste((*RED, 255), (10, 0, 20, 10))
    image.convert(mode).save(tmp_path / "a.png")
    pixels = read(tmp_path / "a.png")
    grey = Image.new("RGB", (1, 1), RED).convert("L").getpixel((0, 0))
    assert pixels.getpixel((2, 5)) == WHITE
    assert pixels.getpixel((15, 5)) == ((grey,) * 3 if mode == "LA" else RED)


def test_half_transparent_is_half_white():
    assert rgb(Image.new("RGBA", (2, 2), (0, 100, 255, 127))).getpixel((0, 0)) == (128, 178, 255)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("1", "png"), ("CMYK", "tiff"), ("CMYK", "jpg"), ("P", "gif")]
)
def test_other_modes(photo, tmp_path, mode, suffix):
    flat = Image.new("RGB", (16, 16), RED)
    flat.convert(mode).save(tmp_path / f"a.{suffix}")
    expected = flat.convert(mode).convert("RGB")
    same(read(tmp_path / f"a.{suffix}"), expected, tolerance=3)


def test_an_animation_is_its_first_frame(photo, tmp_path):
    frames = [photo, ImageOps.mirror(photo), ImageOps.flip(photo)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    same(read(tmp_path / "a.gif"), photo)
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    same(read(tmp_path / "a.webp"), photo)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "webp", "bmp"])
def test_a_file_that_is_cut_short(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="cannot be read") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_picture_that_fails_while_it_is_made():
    def fails():
        raise OSError("broken row")

    with pytest.raises(DataError, match="'row 7' cannot be read: broken row"):
        ImageRef("row 7", fails).load()


def test_no_pixels():
    with pytest.raises(DataError, match="no pixels: 0 x 5"):
        rgb(Image.new("RGB", (0, 5)))


def test_a_picture_that_needs_nothing_is_not_copied(photo):
    assert rgb(photo) is photo


def png(width, height, extra=b"", data=b"", bits=8, colour=0):
    """A PNG whose header says what it likes; ``data`` are the bytes before compression."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts), chunk


def tiff(tags, data):
    """A TIFF with one directory of whole numbers behind its data."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    header = b"II*\0" + struct.pack("<I", 8 + len(data))
    return header + data + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


@pytest.mark.parametrize("size", [(1, 150_000_000), (150_000_000, 1), (13_300, 13_300), (8193, 8192)], ids=str)
def test_pixels_are_counted_before_any_is_decoded(size, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match=rf"is {size[0]} x {size[1]}, .* pixels; at most {MAX_PIXELS:,} are read"):
        read_image(png(*size)[0], "image a")


@pytest.mark.parametrize("size", [(20_000, 20_000), (65_535, 65_535)], ids=str)
def test_a_header_beyond_pillows_own_limit(size):
    with pytest.raises(DataError, match="image a has too many pixels"):
        read_image(png(*size)[0], "image a")


def test_the_first_frame_of_an_animation_counts_even_where_it_leaves_the_screen(photo):
    file = io.BytesIO()
    photo.convert("P").save(file, "GIF")
    data = bytearray(file.getvalue())
    frame = data.index(b"\x2c")
    data[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(DataError, match="too many pixels"):
        read_image(bytes(data), "image a")


def test_a_canvas_counts_as_its_picture(photo):
    file = io.BytesIO()
    photo.save(file, "WEBP", lossless=True)
    sizes = struct.pack("<I", 9_999)[:3] * 2
    frame = struct.pack("<I", 59)[:3] + struct.pack("<I", 39)[:3]
    body = file.getvalue()[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + sizes + b"ANIM" + struct.pack("<I", 6) + bytes(6) + (
        b"ANMF" + struct.pack("<I", 16 + len(body)) + bytes(6) + frame + bytes(4) + body
    )  # fmt: skip
    with pytest.raises(DataError, match="pixels"):
        read_image(b"RIFF" + struct.pack("<I", len(body)) + body, "image a")


def test_tiles_of_a_tiff_are_counted_too():
    data = zlib.compress(bytes(1000))
    tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: 60_000, 323: 30_000, 324: 8, 325: len(data)}
    with pytest.raises(DataError, match="tiles of 60000 x 30000 pixels"):
        read_image(tiff(tags, data), "image a")


def test_strips_that_scaling_would_blow_up_are_refused_and_made_pictures_too():
    assert rgb(Image.new("RGB", (MAX_RATIO, 1))).size == (MAX_RATIO, 1)
    for size in ((MAX_RATIO + 1, 1), (2, 2 * MAX_RATIO + 1)):
        with pytest.raises(DataError, match="300 times the shorter"):
            rgb(Image.new("L", size))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_texts_and_profiles_that_unpack_to_gigabytes(kind):
    _, chunk = png(1, 1)
    packed = zlib.compressobj(9)
    body = b"".join(packed.compress(bytes(2**20)) for _ in range(100)) + packed.flush()
    data, _ = png(1, 1, chunk(kind, b"k\0\0" + body), b"\0\0")
    with pytest.raises(DataError, match=r"image a cannot be read: .*large"):
        read_image(data, "image a")


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "a.webp").open("wb") as file:
        file.write(b"RIFF\xf0\xff\xff\xffWEBPVP8 ")
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(DataError, match="bytes; at most"):
        read(tmp_path / "a.webp")


def test_a_postscript_file_starts_nothing_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    for name in ("a.eps", "a.png", "a"):
        (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
        with pytest.raises(DataError, match=r"not an intact file of") as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
        assert is_image_file(tmp_path / name) == (name == "a.png")


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI", "PDF"])
def test_formats_that_are_not_named_are_refused(photo, kind):
    file = io.BytesIO()
    photo.save(file, kind)
    with pytest.raises(DataError, match="not an intact file of"):
        read_image(file.getvalue(), "image a")


@pytest.mark.parametrize(
    "suffix", ["jpg", "jfif", "jpe", "png", "webp", "gif", "bmp", "tiff", "avif", "jp2", "ppm", ""]
)
def test_every_named_format_is_read_from_files_and_from_bytes(photo, tmp_path, suffix):
    path = tmp_path / f"000123.{suffix}".rstrip(".")
    photo.save(path, format={"jfif": "JPEG", "jpe": "JPEG", "": "PNG"}.get(suffix))
    assert read_image(path, "image a").size == read_image(path.read_bytes(), "image a").size == photo.size
    assert is_image_file(path)


def test_endings_are_those_that_pillow_knows_of_the_named_formats():
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in images.FORMATS}
    assert set(images.SUFFIXES) >= known - {".jps"}
    assert set(images.SUFFIXES) <= {*Image.registered_extensions()}


def test_a_decoder_may_raise_anything(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: {}["quantisation\ntable"])
    with pytest.raises(DataError, match=r"cannot be read: 'quantisation\\ntable'"):
        read_image(png(1, 1, b"", b"\0\0")[0], "image a")


def test_nothing_else_of_the_product_opens_pictures():
    root = Path(images.__file__).parents[2]
    doors = set()
    for path in (path for folder in ("stethoscope", "tasks", "adapters") for path in (root / folder).rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        pillow = {
            name.asname or name.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "PIL"
            for name in node.names
            if name.name == "Image"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "open" and getattr(node.value, "id", None) in pillow:
                doors.add(path.name)
    assert doors == {"images.py"}


@pytest.mark.parametrize(
    ("name", "mode", "settings", "kept"),
    [
        ("a.jpg", "RGB", {}, "jpeg"),
        ("a.png", "RGB", {}, "png"),
        ("a.png", "L", {}, "png"),
        ("turned.jpg", "RGB", {"orientation": 6}, ""),
        ("clear.png", "RGBA", {}, ""),
        ("a.png", "P", {}, ""),
        ("a.gif", "P", {}, ""),
    ],
)
def test_what_every_decoder_shows_alike_is_passed_as_it_is(photo, tmp_path, name, mode, settings, kept):
    path, exif = tmp_path / name, Image.Exif()
    if settings:
        exif[0x0112] = settings["orientation"]
    photo.convert(mode).save(path, **({"exif": exif} if settings else {}))
    data, kind = portable_bytes(read(path), path)
    assert (kind, data == path.read_bytes()) == (kept or "png", bool(kept))
    same(read_image(data, "sent"), read(path))
    assert portable_bytes(photo)[1] == "png"


@pytest.mark.parametrize(
    ("image", "message"), [("data:image/png;base64,AAAA", "is a data URI"), ("a" * 9000, "is no path, it has 9,000")]
)
def test_texts_that_are_no_path_give_one_short_line(image, message):
    with pytest.raises(DataError, match=message) as error:
        load_picture(image)
    assert len(str(error.value)) <= 1000
