"""CADMP's masked pass: a token is predicted again from a picture whose most attended places are grey.

Source: CADMP (2026): the attention of the layer before the one whose attention over the image drifts most from that of
the layer before it; what has at least its 70th percentile is painted grey (128).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.core.errors import CapabilityError
from stethoscope.relevancy.heatmaps import places

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.adapter import Adapter
    from stethoscope.trace import Spans

PERCENTILE, GREY = 70, (128, 128, 128)


def drift(attention: np.ndarray) -> np.ndarray:
    """(L - 1,) KL divergence of every layer's attention over image tokens from that of the layer before, in nats.

    Args:
        attention: (L, N) of one row.
    """
    share = np.maximum(attention / np.maximum(attention.sum(-1, keepdims=True), 1e-12), 1e-12)
    return (share[1:] * np.log(share[1:] / share[:-1])).sum(-1)


def hidden_tokens(attention: np.ndarray) -> np.ndarray:
    """(N,) bool, the image tokens that are hidden, of the (L, N) attention of one row.

    >>> hidden_tokens(np.array([[4.0, 3, 2, 1], [1, 2, 3, 4], [1, 2, 3, 4.1]])).tolist()
    [True, False, False, False]
    """
    layer = int(drift(attention).argmax()) if len(attention) > 1 else 0  # K_1 is the first: the layer before it
    return attention[layer] >= np.percentile(attention[layer], PERCENTILE)


def grey(adapter: Adapter, picture: Image, spans: Spans, hidden: np.ndarray) -> Image:
    """The picture with the places of some image tokens painted grey.

    Args:
        adapter: the model.
        picture: as it was asked about.
        spans: of the prompt with it.
        hidden: (N,) bool. Where tiles overlap, what is hidden in one of them is hidden.

    Raises:
        CapabilityError: the image tokens of this model lie on no grid.
    """
    from PIL import ImageDraw

    if not spans.grids:
        raise CapabilityError(
            "features 'masked_prob' and 'masked_drop' need image tokens that lie on a grid, which those of this model "
            "(queries of a Q-Former or the like) do not; add features.without=[masked]"
        )
    where = places(adapter, picture.size, spans)
    painted, cells = picture.copy(), iter(where.cells)
    draw = ImageDraw.Draw(painted)
    for (rows, columns), box in where.grids:
        for row in range(rows):
            for column in range(columns):
                if hidden[next(cells)] and box is not None:
                    left, right = _part(box[0], box[2], column, columns)
                    top, bottom = _part(box[1], box[3], row, rows)
                    if left <= right and top <= bottom:
                        draw.rectangle((left, top, right, bottom), fill=GREY)
    return painted


def _part(start: float, end: float, index: int, count: int) -> tuple[int, int]:
    """First and last pixel of one of several equal parts of a side."""
    step = (end - start) / count
    return round(start + index * step), round(start + (index + 1) * step) - 1


def masked_pictures(
    adapter: Adapter, picture: Image, spans: Spans, attention: np.ndarray, tokens: Sequence[int]
) -> list[Image]:
    """For some answer tokens the picture without what their (T, L, N) rows attended to."""
    return [grey(adapter, picture, spans, hidden_tokens(attention[token])) for token in tokens]
