"""Where image tokens and patches lie in the picture, and heat maps of their relevancy in its pixels.

Image processors crop, pad, squash and tile. What they do is measured and not told from their settings: a picture whose
red says how far right a pixel is, and whose green how far down, goes through the processor, and is read off again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from stethoscope.core.errors import CapabilityError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from stethoscope.adapter import Adapter
    from stethoscope.relevancy import Relevancy
    from stethoscope.trace import Spans

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the picture; beyond its edges where the picture was padded."""

_QUESTION = "Where?"  # any will do: pixels do not depend on it
RAMP = np.array([(49, 54, 149), (116, 173, 209), (254, 224, 144), (244, 109, 67), (165, 0, 38)], dtype=float)
"""Red, green and blue of heat maps from the smallest to the largest value: blue, yellow, red."""

_measured: WeakKeyDictionary[Adapter, dict[tuple[int, int], tuple[Box | None, ...] | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Places:
    """Where the model's view of a picture lies in it.

    Attributes:
        size: width and height of the picture.
        grids: (rows, columns) and box of every tile of image tokens, in order; empty where they are no grid.
        cells: index among the N image tokens of every cell of the grids, tile by tile, row by row.
        tiles: box of every tile of ``Relevancy.tiles``; None for a tile that shows nothing of the picture.
    """

    size: tuple[int, int]
    grids: tuple[tuple[tuple[int, int], Box | None], ...]
    cells: tuple[int, ...]
    tiles: tuple[Box | None, ...]


def places(adapter: Adapter, size: tuple[int, int], spans: Spans, tiles: int = 0) -> Places:
    """Measures where image tokens and patches lie in pictures of a size; three prompts are encoded the first time.

    Args:
        adapter: the model.
        size: width and height of the picture.
        spans: of a prompt with such a picture.
        tiles: number of tiles of the vision tower's patches, as in ``Relevancy.tiles``; 0 where there are none.
    """
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    known = _measured.setdefault(adapter, {})
    if size not in known:
        known[size] = _tile_boxes(adapter, size)
    boxes = known[size]
    # with separators the padding is cut off, and what is left of the tiles is the whole picture again
    own = boxes if boxes is not None and not spans.separators and len(boxes) == len(spans.grids) else None
    grids = tuple(zip(spans.grids, own or [whole] * len(spans.grids), strict=True))
    separators = set(spans.separators)
    cells = tuple(index for index, position in enumerate(spans.image) if position not in separators)
    patches = boxes if boxes is not None and len(boxes) == tiles else (whole,) * tiles
    return Places(size, grids, cells, patches)


def _coordinates(width: int, height: int) -> Image:
    from PIL import Image

    pixels = np.full((height, width, 3), 200, dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None].round()
    pixels[..., 1] = np.linspace(0, 255, height)[:, None].round()
    return Image.fromarray(pixels)


def _tile_boxes(adapter: Adapter, size: tuple[int, int]) -> tuple[Box | None, ...] | None:
    """Box of every tile of ``pixel_values``; None where they are no tiles but rows of patches."""
    from PIL import Image

    pictures = [_coordinates(*size), *(Image.new("RGB", size, shade) for shade in ("black", "white"))]
    shown, black, white = (adapter.encode(picture, _QUESTION).inputs["pixel_values"].float() for picture in pictures)
    if shown.dim() < 4 or shown.shape != black.shape:
        return None
    readings = ((shown - black) / (white - black)).flatten(0, -4)  # not a number where the picture is padded
    return tuple(_box(tile, size) for tile in readings)


def _box(tile: Tensor, size: tuple[int, int]) -> Box | None:
    across, down = (
        _ends(values, side)
        for values, side in zip((tile[0].nanmean(0), tile[1].nanmean(1)), size, strict=True)
    )  # fmt: skip
    return None if across is None or down is None else (across[0], down[0], across[1], down[1])


def _ends(values: Tensor, side: int) -> tuple[float, float] | None:
    """Where a line of pixels begins and ends, from where the middles of some of them are: a straight line through them.

    The outermost are left out: at an edge, resizing repeats pixels.
    """
    known = values.isfinite().nonzero()[:, 0].numpy()
    if not len(known):
        return None
    if len(known) == 1 or side == 1:
        return 0.0, float(side)
    inset = (len(known) - 1) // 8
    known = known[inset : len(known) - inset]
    middles = values.numpy()[known] * (side - 1) + 0.5  # a level of 0 is the middle of the first pixel
    step, start = np.polyfit(known + 0.5, middles, 1)
    return float(start), float(start + step * len(values))


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
    relevancy: Relevancy, where: Places, raw: bool, chosen: tuple
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
