"""Encode raw attention for the viewer: maps by layer and head, their sums, and the mean as a matrix."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.relevancy.heatmaps import image_token_tiles, one_grid

if TYPE_CHECKING:
    from stethoscope.diagnosis.diagnosis import Diagnosis
    from stethoscope.tracing.attention_maps import AttentionMaps
    from stethoscope.tracing.token_spans import Box, TokenRegions

RASTER = 32  # cells along the longer side of a map that is assembled from several tiles


def attention_payload(diagnosis: Diagnosis, limit: int) -> dict[str, Any] | None:
    """Convert raw attention for the payload of the viewer; None where there is none.

    Half of the bytes are for the means over heads and the largest heads of all tokens, of which layers are dropped
    evenly where they do not fit; what is left is for the single heads of tokens, first of those that name objects.

    Args:
        diagnosis: of an answer of T tokens; K of them get the maps of their single heads.
        limit: bytes of all maps, before base64.

    Returns:
        ``data`` are a byte per cell in base64, each map scaled to its own maximum (``peaks``, float32 in base64):
        ``maps`` has for ``mean`` and ``largest`` (T, layers + 1) maps, the last the mean over all layers;
        ``single`` are the (K, L, H) maps of the tokens ``kept``. ``mass`` (T, L, H) and ``matrix`` (T, columns) are
        uint16 in base64, in 32767ths. A model whose image tokens are no grid has ``box`` None.
    """
    attention = diagnosis.attention
    if attention is None:
        return None
    count, layers, heads = attention.image_mass.shape
    means = np.stack([part.numpy() for part in (attention.mean, attention.largest)])  # (2, T, L, N)
    regions, size = diagnosis.token_regions, diagnosis.image.size
    cells = gridded(means[0, 0, 0], regions, size)[0].size
    fit = max(limit // 2 // (2 * count * cells) - 1, 1)
    chosen = sorted({round(value) for value in np.linspace(0, layers - 1, min(layers, fit))})
    means = np.concatenate([means[:, :, chosen], means.mean(2, keepdims=True)], 2)
    named = [token for mention in diagnosis.mentions for token in mention.tokens]
    order = [token for token in dict.fromkeys([*named, *range(count)]) if token in attention.tokens]
    left = limit - 2 * count * (len(chosen) + 1) * cells
    maps: dict[str, Any] = {}
    for name, values in zip(("mean", "largest"), means, strict=True):
        grid, box = gridded(values, regions, size)
        maps[name] = _encoded_maps(grid)
    return {
        "shape": list(grid.shape[-2:]),
        "box": None if box is None else [round(edge, 2) for edge in box],
        "layers": layers,
        "heads": heads,
        "crosses": attention.crosses,
        "tiles": 0 if regions is None else len(regions.grids),
        "chosen": chosen,
        "maps": maps,
        **heads_payload(attention, regions, size, order[: max(left, 0) // (layers * heads * cells)]),
        "mass": _shares(attention.image_mass.numpy()),
        "matrix": _shares(attention.matrix.numpy()),
    }


def heads_payload(
    attention: AttentionMaps, regions: TokenRegions | None, size: tuple[int, int], tokens: Sequence[int]
) -> dict[str, Any]:
    """Convert the single heads of some tokens for the payload.

    Args:
        attention: of the answer.
        regions: of the image tokens; None where they are not known.
        size: width and height of the picture.
        tokens: indices in the answer, of those whose single heads are held.

    Returns:
        ``kept``, the tokens in ascending order, and their maps ``single``.
    """
    kept = sorted(tokens)
    values = attention.heads[[attention.tokens.index(token) for token in kept]].numpy()
    return {"kept": kept, "single": _encoded_maps(gridded(values, regions, size)[0])}


def gridded(values: np.ndarray, regions: TokenRegions | None, size: tuple[int, int]) -> tuple[np.ndarray, Box | None]:
    """Arrange (..., N) values of image tokens as (..., rows, columns) with a box, or as a row without where no grid."""
    if regions is None or not regions.grids:
        return values[..., None, :], None
    return one_grid(*image_token_tiles(values, regions), size, RASTER)


def in_bytes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale (..., rows, columns) maps to uint8, each to its own maximum; return them and the (...) maxima."""
    peaks = values.max((-2, -1), initial=0)
    scale = np.where(peaks > 0, peaks, 1)[..., None, None]
    return np.rint(255 * values / scale).astype(np.uint8), peaks


def _encoded_maps(values: np.ndarray) -> dict[str, str]:
    scaled, peaks = in_bytes(values)
    return {"data": _base64(scaled), "peaks": _base64(peaks.astype("<f4"))}


def _shares(values: np.ndarray) -> str:
    return _base64(np.rint(32767 * values.clip(0, 1)).astype("<u2"))


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
