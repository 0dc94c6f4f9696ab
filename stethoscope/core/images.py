"""Any picture as the RGB picture that a person would see.

:func:`read_image` is the only place of the product that decodes image files: formats are allowed by name, and pixels
are counted before they are decoded.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope.core.errors import DataError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels: white, as on a page. Dropping the transparency, as ``convert("RGB")`` does,
would show colours that nobody sees, black more often than not."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is decoded, by Pillow's names. Not among them: formats that start a program (EPS), that only point to other
data, and old ones whose decoders hardly anyone tests."""
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".avifs",
    ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm",
)  # fmt: skip
"""Endings of files of these formats, in lower case."""
MAX_PIXELS = 2**26
"""Pixels of the largest picture that is decoded, 8192 x 8192: 256 MiB in memory, above any photograph that a model
tells from a smaller copy."""
MAX_RATIO = 300
"""Of the longer side to the shorter. Image processors scale the *shorter* side to some 336 pixels, so that a strip of
few pixels would become gigabytes."""
MAX_BYTES = 2**30
"""Of the largest file: some decoders read all of it before its size in pixels is known."""

_BAND = 2**22  # pixels that are converted at a time
_WIDE = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow clips these at 255
_ORIENTATION, _TILE_WIDTH, _TILE_HEIGHT = 0x0112, 322, 323  # tags of EXIF and TIFF
_BROKEN_EXIF = (struct.error, SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError)


def read_image(
    source: Path | bytes, name: str, formats: Sequence[str] = FORMATS, max_pixels: int = MAX_PIXELS
) -> Image:
    """Decode an image file, or the bytes of one, to RGB (see :func:`rgb`); of an animation the first frame.

    Args:
        source: path of a regular file, or the file's bytes.
        name: how to call the picture in messages, such as ``image a/b.png``.
        formats: those of ``FORMATS`` that are allowed here.
        max_pixels: pixels of the largest picture that is allowed here.

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


def is_image_file(path: Path) -> bool:
    """Whether a file is of one of ``FORMATS``, by its ending or else by its first bytes."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with _opened(path, "image", FORMATS):
            return True
    except DataError:
        return False


def check_size(image: Image, name: str = "image", max_pixels: int = MAX_PIXELS) -> None:
    """Refuse a picture, decoded or not yet, that has no pixels or too many.

    Raises:
        DataError: it has none, more than ``max_pixels``, or is longer than ``MAX_RATIO`` times its shorter side.
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
    """Refuse a TIFF whose tiles, each of which is decoded as a whole, are larger than any picture may be."""
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
    if isinstance(width, int) and isinstance(height, int) and width * height > max_pixels:
        raise DataError(f"{name} has tiles of {width} x {height} pixels; at most {max_pixels:,} are read")


@contextmanager
def _opened(source: Path | bytes, name: str, formats: Sequence[str]) -> Iterator[Image]:
    """An image whose header is read and whose pixels are not decoded yet; the file is closed at the end.

    Raises:
        DataError: see :func:`read_image`.
    """
    from PIL import Image as Images
    from PIL import UnidentifiedImageError

    if isinstance(source, Path) and not source.is_file():
        reason = f"{source} is a folder, not a file" if source.is_dir() else f"no file {source}"
        raise DataError(f"{name} is missing: {reason}")
    with _decoder_errors(name):
        size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size > MAX_BYTES:
        raise DataError(f"{name} has {size:,} bytes; at most {MAX_BYTES:,} are read")
    Images.init()  # otherwise Pillow before 11.3 raises KeyError for AVIF
    known = [kind for kind in formats if kind in Images.OPEN]
    try:
        with _decoder_errors(name), warnings.catch_warnings():
            warnings.simplefilter("ignore", Images.DecompressionBombWarning)  # check_size has the last word
            image = Images.open(source if isinstance(source, Path) else io.BytesIO(source), formats=known)
    except Images.DecompressionBombError:
        raise DataError(f"{name} has too many pixels; at most {MAX_PIXELS:,} are read: scale it down") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} cannot be read: it is no intact file of {', '.join(known)}") from None
    with image:
        yield image


@contextmanager
def _decoder_errors(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises about a broken file into one line.

    Decoders raise nearly anything (``struct.error``, ``KeyError``, ``zlib.error``, ``AssertionError``, ...), so only
    what is no fault of the file passes: too little memory, and what the caller words better.
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
    """SHA-256 of a file's bytes; read once for all questions about a picture, and again when it has been written to.

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
    """SHA-256 of a picture's size and pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def rgb(image: Image, name: str = "image") -> Image:
    """The picture turned as its EXIF orientation says, over white where it is transparent, 8 bits per colour.

    Sixteen bits are scaled (65535 becomes 255), of an animation this is the frame that the image stands at, the first
    after opening. A picture that is RGB and upright already comes back as it is.

    Args:
        name: how to call the picture in messages.

    Raises:
        DataError: it is no picture, has no pixels or too many (:func:`check_size`), or values that are no brightness.
    """
    if not hasattr(image, "getexif"):
        raise DataError(f"{name} should be a PIL image, got {type(image).__name__}")
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
    except _BROKEN_EXIF:  # the pixels are whole, only the note about the camera is not
        return image


def _eight_bits(image: Image, name: str) -> Image:
    """Greyscale with 8 bits from 16 or 32, whose range is told by the largest value where the format leaves it open."""
    import numpy as np
    from PIL import Image as Images

    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):  # not a number either
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
    """First and last row (exclusive) of parts of a picture, so that a large one is never held several times."""
    step = max(1, _BAND // columns)
    for first in range(0, rows, step):
        yield first, min(rows, first + step)
