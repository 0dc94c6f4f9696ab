"""Pictures that LLaVA-OneVision scales down between its tower and its language model.

A picture of many tiles is put together from the tiles' features, its padding is cut off, and what is still well above
the model's limit is made smaller by bilinear interpolation, so that an image token is a weighted mean of up to four
vision tokens (Li et al. 2024, arXiv 2408.03326; ``pack_image_features`` of transformers).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stethoscope.tracing.spans import image_layout


def scaled(config: Any, inputs: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Links between vision tokens and image tokens of such a picture.

    Args:
        config: the model's config.
        inputs: the processor's output for one picture.
        count: number of image tokens.

    Returns:
        Vision tokens, image tokens and the weights of their means, (E,) each; None for any other kind of model.
    """
    grids, separators = image_layout(config, inputs, count)
    if len(grids) != 2 or not separators:
        return None
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    (side, _), (rows, columns) = grids
    size = inputs["image_sizes"][0].tolist()
    tiles = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    whole = torch.arange(side * side)  # the first crop is the whole picture, as it is
    cut = side * side + torch.arange(tiles[0] * tiles[1] * side * side).view(*tiles, side, side)
    together = unpad_image(cut.transpose(1, 2).reshape(1, tiles[0] * side, tiles[1] * side), size)[0]
    down, across = _bilinear(together.shape[0], rows), _bilinear(together.shape[1], columns)
    row, y = down.nonzero().T[:, :, None]
    column, x = across.nonzero().T[:, None]
    vision = together[y, x]
    image = side * side + row * (columns + 1) + column  # a newline token ends each row
    weight = down[row, y] * across[column, x]
    return (
        torch.cat([whole, vision.flatten()]),
        torch.cat([whole, image.flatten()]),
        torch.cat([torch.ones(len(whole)), weight.flatten()]),
    )


def _bilinear(before: int, after: int) -> Tensor:
    """(after, before) weights of interpolation along one side; rows sum to 1."""
    return torch.nn.functional.interpolate(torch.eye(before)[None], size=after, mode="linear")[0].T
