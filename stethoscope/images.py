"""Any picture as the RGB picture that a person would see."""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels: white, as on a page. Dropping the transparency, as ``convert("RGB")`` does,
would show colours that nobody sees, black more often than not."""

_WIDE = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow clips these at 255
_ORIENTATION = 0x0112
_BROKEN_EXIF = (struct.error, SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; read once for all questions about a picture, and again when it has been written to.

    Raises:
        OSError: it cannot be read.
    """
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8192)
def _file_digest(path: Path, size: int, written: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
        DataError: it is no picture, has no pixels, or values that are no brightness.
    """
    if not hasattr(image, "getexif"):
        raise DataError(f"{name} should be a PIL image, got {type(image).__name__}")
    if 0 in image.size:
        raise DataError(f"{name} has no pixels: {image.size[0]} x {image.size[1]}")
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

    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):  # not a number either
        raise DataError(f"{name} holds values from {low:g} to {high:g}; brightness should be within 0 to 65535")
    if image.mode.startswith("I;16"):
        top = 65535
    elif image.mode == "F" and high <= 1:
        top = 1
    else:
        top = 255 if high <= 255 else 65535
    return Images.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _over_background(image: Image) -> Image:
    from PIL import Image as Images

    image = image.convert("RGBA")
    return Images.alpha_composite(Images.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
