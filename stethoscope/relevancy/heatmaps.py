"""Draw heat maps of attention and relevancy over an image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import CapabilityError
from stethoscope.tracing.token_spans import Box, TokenRegions

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.relevancy import Relevancy


RAMP = np.array([(49, 54, 149), (116, 173, 209), (254, 224, 144), (244, 109, 67), (165, 0, 38)], dtype=float)
OPACITY = 0.55
"""Opacity of a heat map where it is largest; elsewhere in proportion, so that the picture stays visible under it."""
"""RGB colours of heat maps from the smallest to the largest value: blue, yellow, red."""


@lru_cache(maxsize=64)  # pictures of one size have the same
def coverage(start: float, stop: float, cells: int, pixels: int) -> np.ndarray:
    """Compute the share of every cell that falls on every pixel along one side of an image.

    The cells divide the stretch from ``start`` to ``stop``, in pixels; pixels have width 1.

    >>> coverage(0, 4, 2, 4)
    array([[0.5, 0.5, 0. , 0. ],
           [0. , 0. , 0.5, 0.5]])

    Returns:
        (cells, pixels), not writable; rows sum to 1, or to less where a cell lies outside the image.
    """
    edges = np.linspace(start, stop, cells + 1)
    left, right = edges[:-1, None], edges[1:, None]
    pixel = np.arange(pixels)
    overlap = np.minimum(right, pixel + 1) - np.maximum(left, pixel)
    shares = overlap.clip(min=0) / (right - left)
    shares.flags.writeable = False
    return shares


def heat(
    values: Sequence[np.ndarray], boxes: Sequence[Box | None], size: tuple[int, int], shape: tuple[int, int]
) -> np.ndarray:
    """Spread the values of tiles over a raster of the image, every cell evenly over its own region.

    Args:
        values: (..., rows, columns) of every tile.
        boxes: region of every tile in the image, in pixels; None for a tile that shows nothing of it.
        size: width and height of the image.
        shape: rows and columns of the raster.

    Returns:
        (..., *shape) float64; its sum is that of the values, less the share on padding.
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
    """Compute the rows and columns of a raster of an image, with ``cells`` cells along its longer side.

    >>> raster((640, 480), 32)
    (24, 32)
    """
    width, height = size
    longest = max(size)
    return max(1, round(cells * height / longest)), max(1, round(cells * width / longest))


def relevancy_tiles(
    relevancy: Relevancy, regions: TokenRegions, raw: bool, chosen: tuple[Any, ...]
) -> tuple[list[np.ndarray], list[Box | None]]:
    """Return the relevancy of every tile and its box in the image.

    Args:
        relevancy: of an answer.
        regions: of the image tokens and patches.
        raw: whether to use the image tokens that the language model reads instead of the vision tower's patches.
        chosen: index of tokens and layers.

    Returns:
        (..., rows, columns) of every tile, and the boxes in pixels.

    Raises:
        CapabilityError: the image tokens, or the patches, form no grid.
    """
    if raw:
        if not regions.grids:
            raise CapabilityError("the image tokens of this model form no grid over the image; use raw=False")
        return image_token_tiles(relevancy.image[chosen].numpy(), regions)
    if relevancy.tiles is None:
        raise CapabilityError("the patches of this model's vision tower form no grid; use raw=True")
    values = relevancy.tiles[chosen].numpy()
    return [values[..., tile, :, :] for tile in range(values.shape[-3])], list(regions.tiles)


def one_grid(
    tiles: Sequence[np.ndarray], boxes: Sequence[Box | None], size: tuple[int, int], cells: int
) -> tuple[np.ndarray, Box]:
    """Put tiles together as one grid over the image: a single tile as it is, several resampled to a raster.

    Args:
        tiles: (..., rows, columns) of every tile.
        boxes: region of every tile in the image, in pixels; None for a tile that shows nothing of it.
        size: width and height of the image.
        cells: of the raster along the longer side of the image.

    Returns:
        (..., rows, columns), 0 in cells that show nothing of the image but padding, and the box of the grid.
    """
    if len(tiles) == 1 and boxes[0] is not None:
        shown = [
            coverage(start, stop, count, side).sum(1) > 0.01  # boxes are measured, to a fraction of a pixel
            for start, stop, count, side in zip(
                boxes[0][1::-1], boxes[0][3:1:-1], tiles[0].shape[-2:], size[::-1], strict=True
            )
        ]
        return tiles[0] * np.outer(*shown), boxes[0]
    return heat(tiles, boxes, size, raster(size, cells)), (0.0, 0.0, float(size[0]), float(size[1]))


def name_attention(attention: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Compute where names in an answer attend in the image, from raw attention alone.

    Read in the row at the name's own position, which has read it and does not only predict it, as the excess over the
    mean of the answer's rows, which takes away what draws attention whatever is said (sinks); of the layer with the
    largest excess on one image token, as others look elsewhere. ``docs/relevancy.md`` has how often it points at the
    object. Source: this project; there is no paper.

    Args:
        attention: (T, L, N) of the rows that predict the answer's tokens to the image tokens, mean over heads.
        tokens: K answer tokens, the last ones of names. The last token of an answer has no row of its own here; that
            which predicts it is read.

    Returns:
        (K, N), at least 0.
    """
    own = np.minimum(np.asarray(tokens, dtype=int) + 1, len(attention) - 1)
    excess = (attention[own] - attention.mean(0)).clip(min=0)
    return np.stack([layers[layers.max(-1).argmax()] for layers in excess])


def image_token_tiles(values: np.ndarray, regions: TokenRegions) -> tuple[list[np.ndarray], list[Box | None]]:
    """Arrange values of image tokens as tiles.

    Args:
        values: (..., N) of the image tokens.
        regions: of the image tokens; without grids there are no tiles.

    Returns:
        (..., rows, columns) of every tile, and the boxes in pixels.
    """
    values, tiles, start = values[..., list(regions.cells)], [], 0
    for (rows, columns), _ in regions.grids:
        tiles.append(values[..., start : start + rows * columns].reshape(*values.shape[:-1], rows, columns))
        start += rows * columns
    return tiles, [box for _, box in regions.grids]


def in_bytes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale (..., rows, columns) maps to uint8, each to its own maximum; return them and the (...) maxima."""
    peaks = values.max((-2, -1), initial=0)
    scale = np.where(peaks > 0, peaks, 1)[..., None, None]
    return np.rint(255 * values / scale).astype(np.uint8), peaks


def colours(values: np.ndarray) -> np.ndarray:
    """Convert values in [0, 1] to uint8 RGB (..., 3) colours of ``RAMP``."""
    position = np.asarray(values).clip(0, 1) * (len(RAMP) - 1)
    steps = np.arange(len(RAMP))
    return np.stack([np.interp(position, steps, RAMP[:, part]) for part in range(3)], -1).round().astype(np.uint8)


def overlay(image: Image, map: np.ndarray, opacity: float = OPACITY, width: int = 480) -> Image:
    """Draw a heat map over an image; the map is scaled to its own largest value.

    Args:
        image: the image.
        map: (height, width) of the image, or any raster of it, at least 0.
        opacity: of the map where it is largest, in [0, 1].
        width: least width of the result in pixels.
    """
    from PIL import Image  # keeps the import of this module light

    scale = max(1, -(-width // image.width))
    size = (image.width * scale, image.height * scale)
    top = float(map.max()) if map.size else 0.0
    strength = map / top if top > 0 else np.zeros_like(map)
    below = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    alpha = np.uint8(255 * opacity * strength)
    above = Image.fromarray(np.dstack([colours(strength), alpha])).resize(size, Image.Resampling.NEAREST)
    return Image.alpha_composite(below.convert("RGBA"), above).convert("RGB")
