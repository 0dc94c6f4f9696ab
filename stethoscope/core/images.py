"""Decode any image file to the RGB image that a person would see.

:func:`read_image` is the only place of the product that decodes image files: formats are allowed by name, and pixels
are counted before they are decoded.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.core.errors import DataError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

BACKGROUND = (255, 255, 255)
"""Colour behind transparent pixels: white, as on a page.

Dropping the transparency, as ``convert("RGB")`` does, would show colours that nobody sees, mostly black."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Formats that are decoded, by Pillow's names.

Left out are formats that start a program (EPS), that only point to other data, and old ones with untested decoders."""
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".avifs",
    ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm",
)  # fmt: skip
"""File name suffixes of these formats, in lower case."""
MAX_PIXELS = 2**26
"""Largest image that is decoded, 8192 x 8192 pixels: 256 MiB in memory, more than any model makes use of."""
MAX_RATIO = 300
"""Largest ratio of the longer side to the shorter.

Image processors scale the *shorter* side to some 336 pixels, so a thin strip would become gigabytes."""
MAX_BYTES = 2**30
"""Largest file: some decoders read all of it before the size in pixels is known."""

_BAND = 2**22  # pixels that are converted at once
_WIDE = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow clips these at 255
_ORIENTATION, _TILE_WIDTH, _TILE_HEIGHT = 0x0112, 322, 323  # tags of EXIF and TIFF
_BROKEN_EXIF = (struct.error, SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError)


def read_image(
    source: Path | bytes, name: str, formats: Sequence[str] = FORMATS, max_pixels: int = MAX_PIXELS
) -> Image:
    """Decode an image file, or the bytes of one, to RGB; of an animation the first frame.

    Args:
        source: path of a regular file, or the file's bytes.
        name: of the picture in messages, such as ``image a/b.png``.
        formats: allowed ones of ``FORMATS``.
        max_pixels: largest allowed picture.

    Raises:
        DataError: the file is missing, is of no allowed format, is cut short or otherwise broken, or its picture is
            larger than ``max_pixels``, ``MAX_RATIO`` or ``MAX_BYTES`` allow.
    """
    with _opened(source, name, formats) as image:
        check_size(image, name, max_pixels)
        _check_tiles(image, name, max_pixels)
        with _decoder_errors(name):
            image.load()  # every pixel is decoded, so that a file cut short is noticed here
        return rgb(image, name)


def file_format(path: Path) -> str:
    """Return the format of an image file, as ``JPEG``, by its first bytes.

    Raises:
        DataError: the file is missing or of no allowed format.
    """
    with _opened(path, f"image {path.name}", FORMATS) as image:
        return image.format or ""


def portable_bytes(image: Image, source: Path | None = None) -> tuple[bytes, str]:
    """Encode an image so that any decoder shows the same pixels.

    The bytes of a JPEG or PNG file are taken unchanged where :func:`rgb` changes nothing that another program might
    not: upright, opaque, 8 bits of grey or RGB, one frame. Everything else becomes a PNG of the pixels.

    Args:
        image: RGB, as :func:`read_image` returns it.
        source: its file, if it has one.

    Returns:
        The bytes, and their format: ``jpeg`` or ``png``.
    """
    if source is not None:
        kind = _plain_kind(source)
        if kind:
            return source.read_bytes(), kind
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # speed counts more than size on the way to a server
    return file.getvalue(), "png"


def _plain_kind(path: Path) -> str:
    """Return ``jpeg`` or ``png`` for a file whose bytes show the same everywhere, else an empty text."""
    try:
        with _opened(path, "image", ("JPEG", "PNG")) as image:
            upright = image.getexif().get(_ORIENTATION, 1) == 1
            plain = image.mode in ("L", "RGB") and not image.has_transparency_data
            single = image.format in ("JPEG", "PNG") and getattr(image, "n_frames", 1) == 1
            return str(image.format).lower() if upright and plain and single else ""
    except (DataError, *_BROKEN_EXIF):
        return ""


def is_image_file(path: Path) -> bool:
    """Return whether a file is of one of ``FORMATS``, by its suffix or else by its first bytes."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with _opened(path, "image", FORMATS):
            return True
    except DataError:
        return False


def check_size(image: Image, name: str = "image", max_pixels: int = MAX_PIXELS) -> None:
    """Reject an image, decoded or not, that has no pixels or too many.

    Raises:
        DataError: it has no pixels, more than ``max_pixels``, or sides of a ratio above ``MAX_RATIO``.
    """
    width, height = image.size
    if not width or not height:
        raise DataError(f"{name} has no pixels: {width} x {height}")
    if width * height > max_pixels:
        raise DataError(
            f"{name} is {width} x {height}, {width * height:,} pixels; at most {max_pixels:,} are read: scale it down"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(
            f"{name} is {width} x {height}; the longer side may be {MAX_RATIO} times the shorter: cut it into parts"
        )


def _check_tiles(image: Image, name: str, max_pixels: int) -> None:
    """Reject a TIFF with tiles, each decoded as a whole, larger than an image may be."""
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
    if isinstance(width, int) and isinstance(height, int) and width * height > max_pixels:
        raise DataError(f"{name} has tiles of {width} x {height} pixels; at most {max_pixels:,} are read")


@contextmanager
def _opened(source: Path | bytes, name: str, formats: Sequence[str]) -> Iterator[Image]:
    """Open an image, of which only the header is read yet, and close its file at the end of the block.

    Raises:
        DataError: see :func:`read_image`.
    """
    from PIL import Image as Images
    from PIL import UnidentifiedImageError

    if isinstance(source, Path) and not os.path.isfile(source):  # which raises nothing, whatever the path
        reason = f"{source} is a folder, not a file" if os.path.isdir(source) else f"no file {source}"
        raise DataError(f"{name} is missing: {reason}")
    with _decoder_errors(name):
        size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size > MAX_BYTES:
        raise DataError(f"{name} has {size:,} bytes; at most {MAX_BYTES:,} are read")
    Images.init()  # otherwise Pillow before 11.3 raises KeyError for AVIF
    known = [kind for kind in formats if kind in Images.OPEN]
    try:
        with _decoder_errors(name), warnings.catch_warnings():
            warnings.simplefilter("ignore", Images.DecompressionBombWarning)  # check_size decides
            image = Images.open(source if isinstance(source, Path) else io.BytesIO(source), formats=known)
    except Images.DecompressionBombError:
        raise DataError(f"{name} has too many pixels; at most {MAX_PIXELS:,} are read: scale it down") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} cannot be read: it is not an intact file of {', '.join(known)}") from None
    with image:
        yield image


@contextmanager
def _decoder_errors(name: str) -> Iterator[None]:
    """Turn any error of a decoder about a broken file into a ``DataError`` of one line.

    Decoders raise nearly anything (``struct.error``, ``KeyError``, ``zlib.error``, ``AssertionError``, ...), so all
    errors are translated but lack of memory and those for which the caller has a better message.
    """
    from PIL import Image as Images
    from PIL import UnidentifiedImageError

    try:
        yield
    except (MemoryError, UnidentifiedImageError, Images.DecompressionBombError):
        raise
    except Exception as error:
        raise DataError(f"{name} cannot be read: {first_line(error)}") from None


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file's bytes, cached until the file is written to.

    Raises:
        OSError: it cannot be read.
    """
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8192)
def _file_digest(path: Path, size: int, written: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pixel_digest(image: Image) -> str:
    """Compute the SHA-256 of an image's size and pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def rgb(image: Image, name: str = "image") -> Image:
    """Convert an image to upright RGB of 8 bits, over white where it is transparent.

    Sixteen bits are scaled (65535 becomes 255); of an animation the current frame is taken, the first after opening.
    An image that is RGB and upright already is returned unchanged.

    Args:
        image: of any mode.
        name: of the picture in messages.

    Raises:
        DataError: it is not an image, has no pixels or too many (:func:`check_size`), or values outside 0 to 65535.
    """
    if not hasattr(image, "getexif"):
        raise DataError(f"{name} should be a PIL image, a path or the bytes of a file, got {type(image).__name__}")
    check_size(image, name)
    image = _upright(image)
    if image.mode in _WIDE:
        image = _eight_bits(image, name)
    if image.has_transparency_data:
        image = _over_background(image)
    if image.mode == "RGB":
        return image
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(f"{name} has the colours {image.mode}, which cannot be read as RGB: {error}") from None


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    except _BROKEN_EXIF:  # the pixels are intact
        return image


def _eight_bits(image: Image, name: str) -> Image:
    """Scale greyscale of 16 or 32 bits to 8.

    Where the format leaves the range open, the largest value decides it.
    """
    from PIL import Image as Images

    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):  # NaN fails too
        raise DataError(f"{name} holds values from {low:g} to {high:g}; brightness should be within 0 to 65535")
    if image.mode.startswith("I;16"):
        top = 65535
    elif image.mode == "F" and high <= 1:
        top = 1
    else:
        top = 255 if high <= 255 else 65535
    scaled = np.empty(values.shape, np.uint8)
    for first, last in _bands(*values.shape):
        scaled[first:last] = np.rint(values[first:last].astype(np.float64) * (255 / top))
    return Images.fromarray(scaled)


def _over_background(image: Image) -> Image:
    from PIL import Image as Images

    whole = Images.new("RGB", image.size)
    for top, bottom in _bands(image.height, image.width):
        part = image.crop((0, top, image.width, bottom)).convert("RGBA")
        below = Images.new("RGBA", part.size, (*BACKGROUND, 255))
        whole.paste(Images.alpha_composite(below, part).convert("RGB"), (0, top))
    return whole


def _bands(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield first and last row (exclusive) of bands of an image.

    Large images are thus never copied as a whole.
    """
    step = max(1, _BAND // columns)
    for first in range(0, rows, step):
        yield first, min(rows, first + step)
