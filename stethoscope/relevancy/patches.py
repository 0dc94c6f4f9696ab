"""Vision tokens in the order of the pixels, and their grid of patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def pixel_order(owner: Tensor, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Where the tower's tokens go in the order of ``pixel_values``; None where they are in it already.

    Qwen's towers sort patches by window. Their rows of ``pixel_values`` are patches, as many per image token as it
    merges and in the order of the image tokens; a window keeps the patches of one image token together and in order.

    Args:
        owner: (M,) the image token of each vision token; with windows every one has one.

    Returns:
        (M,) the tower's token for every patch.
    """
    return owner.argsort(stable=True) if "image_grid_thw" in inputs else None


def tiled(config: Any, inputs: Mapping[str, Tensor], vision: Tensor) -> Tensor | None:
    """The patches of vision tokens (T, L, M) as (T, L, tiles, rows, columns); None where they are no grid."""
    if "image_grid_thw" in inputs:
        return _of_blocks(config, inputs["image_grid_thw"].tolist(), vision)
    pixels, patch = inputs.get("pixel_values"), _patch_size(config)
    if pixels is None or pixels.dim() < 4 or patch is None:
        return None
    rows, columns = pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1]
    tiles = math.prod(pixels.shape[:-3])
    if vision.shape[-1] % tiles:
        return None
    classes = vision.shape[-1] // tiles - rows * columns
    if not 0 <= classes <= 1:
        return None
    return vision.unflatten(-1, (tiles, -1))[..., classes:].unflatten(-1, (rows, columns))


def _of_blocks(config: Any, grids: list[list[int]], vision: Tensor) -> Tensor | None:
    """Qwen's patches come in blocks of those that are merged into one token."""
    frames, rows, columns = grids[0]
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    if len(grids) != 1 or vision.shape[-1] != frames * rows * columns:
        return None
    blocks = vision.unflatten(-1, (frames, rows // merge, columns // merge, merge, merge))
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)


def _patch_size(config: Any) -> tuple[int, int] | None:
    size = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if size is None:
        return None
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)
