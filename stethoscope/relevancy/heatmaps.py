"""Heat maps of attention and relevancy in the pixels of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.core.errors import CapabilityError
from stethoscope.tracing.token_spans import Box, TokenRegions

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.relevancy import Relevancy


RAMP = np.array([(49, 54, 149), (116, 173, 209), (254, 224, 144), (244, 109, 67), (165, 0, 38)], dtype=float)
"""Red, green and blue of heat maps from the smallest to the largest value: blue, yellow, red."""


def coverage(start: float, stop: float, cells: int, pixels: int) -> np.ndarray:
    """Share of every cell that falls on every pixel, where cells divide a stretch of a line of pixels of width 1.

    >>> coverage(0, 4, 2, 4)
    array([[0.5, 0.5, 0. , 0. ],
           [0. , 0. , 0.5, 0.5]])

    Returns:
        (cells, pixels); rows sum to 1, or to less where a cell lies beyond the line.
    """
    edges = np.linspace(start, stop, cells + 1)
    left, right = edges[:-1, None], edges[1:, None]
    at = np.arange(pixels)
    overlap = np.minimum(right, at + 1) - np.maximum(left, at)
    return overlap.clip(min=0) / (right - left)


def heat(values: Sequence[np.ndarray], boxes: Sequence[Box | None], size: tuple[int, int], shape: tuple[int, int]):
    """Spreads what tiles hold over a raster of the picture, every cell evenly over its own place.

    Args:
        values: (..., rows, columns) of every tile. ``boxes``: where it lies.
        size: width and height of the picture.
        shape: rows and columns of the raster.

    Returns:
        (..., *shape) float64; it sums to the sum of the values, less what lies on padding.
    """
    (width, height), (rows, columns) = size, shape
    total = np.zeros((*values[0].shape[:-2], rows, columns))
    for tile, box in zip(values, boxes, strict=True):
        if box is not None:
            down = coverage(box[1] / height * rows, box[3] / height * rows, tile.shape[-2], rows)
            across = coverage(box[0] / width * columns, box[2] / width * columns, tile.shape[-1], columns)
            total += down.T @ tile @ across
    return total


def raster(size: tuple[int, int], cells: int) -> tuple[int, int]:
    """Rows and columns of a raster of a picture, with so many cells along its longer side.

    >>> raster((640, 480), 32)
    (24, 32)
    """
    width, height = size
    longest = max(size)
    return max(1, round(cells * height / longest)), max(1, round(cells * width / longest))


def relevancy_tiles(
    relevancy: Relevancy, where: TokenRegions, raw: bool, chosen: tuple
) -> tuple[list[np.ndarray], list[Box | None]]:
    """What every tile holds, and its box.

    Args:
        raw: of image tokens as the language model reads them; False for the vision tower's patches.
        chosen: index of tokens and layers.

    Raises:
        CapabilityError: the image tokens, or the patches, are no grid.
    """
    if raw:
        if not where.grids:
            raise CapabilityError("image tokens of this model stand for no place in the picture; take raw=False")
        image = relevancy.image[chosen].numpy()[..., list(where.cells)]
        tiles, at = [], 0
        for (rows, columns), _ in where.grids:
            tiles.append(image[..., at : at + rows * columns].reshape(*image.shape[:-1], rows, columns))
            at += rows * columns
        return tiles, [box for _, box in where.grids]
    if relevancy.tiles is None:
        raise CapabilityError("the patches of this model's vision tower are no grid; take raw=True")
    values = relevancy.tiles[chosen].numpy()
    return [values[..., tile, :, :] for tile in range(values.shape[-3])], list(where.tiles)


def colours(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as uint8 RGB (..., 3), on ``RAMP``."""
    at = np.asarray(values).clip(0, 1) * (len(RAMP) - 1)
    steps = np.arange(len(RAMP))
    return np.stack([np.interp(at, steps, RAMP[:, part]) for part in range(3)], -1).round().astype(np.uint8)


def overlay(image: Image, map: np.ndarray, opacity: float = 0.6, width: int = 480) -> Image:
    """The picture under a heat map, at least ``width`` pixels wide, the map scaled to its own largest value.

    Args:
        map: (height, width) of the picture, or any raster of it, at least 0.
        opacity: of the map where it is largest, in [0, 1].
    """
    from PIL import Image

    scale = max(1, -(-width // image.width))
    size = (image.width * scale, image.height * scale)
    top = float(map.max()) if map.size else 0.0
    strength = map / top if top > 0 else np.zeros_like(map)
    below = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    alpha = np.uint8(255 * opacity * strength**0.5)
    above = Image.fromarray(np.dstack([colours(strength), alpha])).resize(size, Image.Resampling.NEAREST)
    return Image.alpha_composite(below.convert("RGBA"), above).convert("RGB")
