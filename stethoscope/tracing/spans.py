"""Where image and question sit in the expanded prompt, measured from what the processor returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Grids = tuple[tuple[int, int], ...]


def image_positions(ids: Sequence[int], image_token_id: int) -> tuple[int, ...]:
    """Positions of the image tokens.

    >>> image_positions([1, 9, 9, 4], 9)
    (1, 2)
    """
    return tuple(position for position, token in enumerate(ids) if token == image_token_id)


def question_positions(
    ids: Sequence[int],
    offsets: Sequence[Sequence[int]],
    replacements: Sequence[Mapping[str, Any]],
    span: tuple[int, int],
    image_token_id: int,
    decodes: Callable[[Sequence[int]], bool],
    inserted: Sequence[int] = (0,),
) -> tuple[int, ...]:
    """Positions of the question's tokens.

    Args:
        ids: the expanded prompt.
        offsets: the characters of every token in the expanded text.
        replacements: which characters of the prompt the processor replaced, each with ``span`` and ``replacement``.
        span: the question's characters in the prompt.
        image_token_id: placeholder; some processors give its tokens offsets that start again at 0.
        decodes: whether ids decode to the question.
        inserted: numbers of characters that the processor may have put before the question without reporting them
            (PaliGemma inserts a beginning-of-sequence token); the first that decodes is taken.
    """
    start, end = span
    grown = sum(
        len(part["replacement"]) - (part["span"][1] - part["span"][0])
        for part in replacements
        if part["span"][1] <= start
    )
    first_try: tuple[int, ...] | None = None
    for more in inserted:
        first, last = start + grown + more, end + grown + more
        found = tuple(
            position
            for position, (left, right) in enumerate(offsets)
            if left < last and right > first and right > left and ids[position] != image_token_id
        )
        if decodes([ids[position] for position in found]):
            return found
        first_try = found if first_try is None else first_try
    return first_try or ()


def image_layout(config: Any, inputs: Mapping[str, Tensor], count: int) -> tuple[Grids, tuple[int, ...]]:
    """``tile_grids``, also of LLaVA-NeXT and LLaVA-OneVision, whose image tokens hold separators.

    There the first grid is the whole picture in one tile, the second the picture put together from all other tiles,
    their padding cut off, with a newline token behind each row.

    Returns:
        The grids, and which of the N image tokens are separators, counted from 0.
    """
    shapes, vision = getattr(config, "image_grid_pinpoints", None), getattr(config, "vision_config", None)
    if not shapes or "image_sizes" not in inputs:
        return tile_grids(config, inputs, count), ()
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side, size = vision.image_size // vision.patch_size, inputs["image_sizes"][0].tolist()
    tiles = get_anyres_image_grid_shape(size, shapes, vision.image_size)
    rows, columns = unpad_image(torch.empty(1, tiles[0] * side, tiles[1] * side), size).shape[1:]
    most = getattr(config, "vision_aspect_ratio", "")
    if most.startswith("anyres_max_"):  # OneVision scales down what is well above as many tiles
        ratio = math.sqrt(rows * columns / int(most.removeprefix("anyres_max_"))) / side
        rows, columns = (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
    if side * side + rows * (columns + 1) != count:
        return (), ()
    newlines = tuple(side * side + row * (columns + 1) + columns for row in range(rows))
    return ((side, side), (rows, columns)), newlines


def tile_grids(config: Any, inputs: Mapping[str, Tensor], count: int) -> Grids:
    """Rows and columns of every tile of image tokens; empty where they are not all in a grid or it is not known.

    Args:
        config: the model's config.
        inputs: the processor's output for one image.
        count: number of image tokens N; a grid that does not account for exactly N is not given.
    """
    vision = getattr(config, "vision_config", None)
    if "image_grid_thw" in inputs:
        merge = getattr(vision, "spatial_merge_size", 1)
        grids = [(h // merge, w // merge) for t, h, w in inputs["image_grid_thw"].tolist() for _ in range(t)]
        return tuple(grids) if sum(h * w for h, w in grids) == count else ()
    queries = getattr(config, "qformer_config", None) is not None
    padded = "image_sizes" in inputs  # LLaVA-NeXT and OneVision cut the padding off and add a token per row
    pixels, patch = inputs.get("pixel_values"), getattr(vision, "patch_size", None)
    if queries or padded or pixels is None or pixels.dim() < 4 or not patch or not count:
        return ()
    patch_rows, patch_columns = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    tiles = math.prod(pixels.shape[:-3])
    rows, columns = pixels.shape[-2] // patch_rows, pixels.shape[-1] // patch_columns
    merge = math.isqrt(max(rows * columns * tiles // count, 1))  # patches merged into a token, along each side
    grid = (rows // merge, columns // merge)
    return (grid,) * tiles if grid[0] * grid[1] * tiles == count else ()
