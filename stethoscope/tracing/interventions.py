"""Intervene on the image: noise it (VCD), hide its tokens from attention, or paint parts of it grey.

Source of the noise: Leng et al., "Visual Contrastive Decoding", arXiv 2311.16922.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stethoscope.core.errors import CapabilityError
from stethoscope.tracing.hooks import AttentionCall, AttentionRecorder, additive_mask
from stethoscope.tracing.token_spans import token_regions
from stethoscope.tracing.trace import Spans, of_depth

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.adapters.base import Adapter

STEPS, STEP = 1000, 500
"""Steps of the diffusion schedule, and the one that the published scripts noise to."""


def noised(pixels: Tensor, step: int = STEP, seed: int = 0) -> Tensor:
    """Noise pixels by ``step`` steps of forward diffusion: sqrt(a) x + sqrt(1 - a) e, a = product of (1 - beta).

    The betas are sigmoid(linspace(-6, 6, 1000)) * (5e-3 - 1e-5) + 1e-5. The noise e is the same for every image of one
    shape, so that a trace can be repeated.

    Args:
        pixels: normalised pixel values of any shape.
        step: index of the step, 0 to 999.
        seed: seed of the noise.

    Returns:
        The same shape and dtype.
    """
    betas = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = float((1 - betas).cumprod(0)[step])
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).to(pixels)
    return kept**0.5 * pixels + (1 - kept) ** 0.5 * noise


CORE_SHARE = 0.4
"""Share of the image tokens that VAUQ masks (arXiv 2602.21054, LLaVA on MM-Vet)."""
CORE_LAYERS = (10, 25)
"""Layers of 32 whose attention chooses them."""


class Knockout(AttentionRecorder):
    """Hides prompt tokens from all queries but image tokens, in the attention of the language model.

    In an encoder-decoder model they are hidden in the encoder and from the cross-attention.

    Args:
        hidden: B lists of prompt positions.
        spans: B spans of the prompts.
        length: length of the sequence that the prompts are in.
        encoder: whether the language model has an encoder.
        queries: number of queries of a pass that begins behind the images; None for a pass over the whole prompts.
    """

    def __init__(
        self,
        hidden: Sequence[Sequence[int]],
        spans: Sequence[Spans],
        length: int,
        encoder: bool,
        queries: int | None = None,
    ) -> None:
        self.roles = ("encoder", "cross") if encoder else ("language",)
        self._keys = torch.zeros(len(spans), length, dtype=torch.bool)
        self._queries = torch.ones(len(spans), length if queries is None else queries, dtype=torch.bool)
        for index, (positions, span) in enumerate(zip(hidden, spans, strict=True)):
            self._keys[index, list(positions)] = True
            if queries is None:
                self._queries[index, list(span.image)] = False

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        query, key, mask = call.query, call.key, call.mask
        blocked = self._keys[:, None, None].to(query.device)
        if call.site.role != "cross":
            blocked = blocked & self._queries[:, None, :, None].to(query.device)
        mask = additive_mask(call.module, query, key, mask, call.options.get("is_causal"))
        mask = query.new_zeros(()) if mask is None else mask
        size = (len(blocked), 1, query.shape[2], key.shape[2])
        mask = mask.expand(torch.broadcast_shapes(mask.shape, size)).masked_fill(blocked, torch.finfo(query.dtype).min)
        return call._replace(mask=mask).sdpa()[0], None


def core(image_attention: Tensor, spans: Spans) -> list[int]:
    """Choose the image tokens that an answer attends to most (VAUQ, arXiv 2602.21054).

    Args:
        image_attention: (T, L, N) attention of the predicting rows to image tokens, mean over heads.
        spans: spans of the prompt.

    Returns:
        Positions of 40 % of the image tokens, by mean attention in layers 10 to 25 of 32 over all answer tokens.
    """
    layers, count = image_attention.shape[1:]
    first, last = (of_depth(layer, layers) for layer in CORE_LAYERS)
    mean = image_attention[:, first : last + 1].sum((0, 1))
    chosen = mean.topk(max(1, round(CORE_SHARE * count))).indices
    return [spans.image[index] for index in chosen.tolist()]


PERCENTILE, GREY = 70, (128, 128, 128)


def drift(attention: np.ndarray) -> np.ndarray:
    """Compute the (L - 1,) KL divergence of each layer's attention over image tokens from the layer before, in nats.

    Args:
        attention: (L, N) attention of one row to image tokens.
    """
    share = np.maximum(attention / np.maximum(attention.sum(-1, keepdims=True), 1e-12), 1e-12)
    return (share[1:] * np.log(share[1:] / share[:-1])).sum(-1)


def hidden_tokens(attention: np.ndarray) -> np.ndarray:
    """Choose the (N,) bool image tokens to hide, from the (L, N) attention of one row.

    >>> hidden_tokens(np.array([[4.0, 3, 2, 1], [1, 2, 3, 4], [1, 2, 3, 4.1]])).tolist()
    [True, False, False, False]
    """
    layer = int(drift(attention).argmax()) if len(attention) > 1 else 0  # K_1 is the first: the layer before it
    return attention[layer] >= np.percentile(attention[layer], PERCENTILE)


def grey(adapter: Adapter, picture: Image, spans: Spans, hidden: np.ndarray) -> Image:
    """Paint the image regions of some image tokens grey.

    Args:
        adapter: the model.
        picture: the image.
        spans: spans of a prompt with this image.
        hidden: (N,) bool. Where tiles overlap, a region hidden in one tile is hidden.

    Raises:
        CapabilityError: the image tokens of this model lie on no grid.
    """
    from PIL import ImageDraw

    if not spans.grids:
        raise CapabilityError(
            "features 'masked_prob' and 'masked_drop' need image tokens that lie on a grid, which those of this model "
            "(queries of a Q-Former or the like) do not; add features.exclude=[masked]"
        )
    regions = token_regions(adapter, picture.size, spans)
    painted, cells = picture.copy(), iter(regions.cells)
    draw = ImageDraw.Draw(painted)
    for (rows, columns), box in regions.grids:
        for row in range(rows):
            for column in range(columns):
                if hidden[next(cells)] and box is not None:
                    left, right = _part(box[0], box[2], column, columns)
                    top, bottom = _part(box[1], box[3], row, rows)
                    if left <= right and top <= bottom:
                        draw.rectangle((left, top, right, bottom), fill=GREY)
    return painted


def _part(start: float, end: float, index: int, count: int) -> tuple[int, int]:
    """Return first and last pixel of one of several equal parts of a side."""
    step = (end - start) / count
    return round(start + index * step), round(start + (index + 1) * step) - 1


def masked_pictures(
    adapter: Adapter, picture: Image, spans: Spans, attention: np.ndarray, tokens: Sequence[int]
) -> list[Image]:
    """Paint the regions that the (T, L, N) rows of some answer tokens attended to grey, one image per token."""
    return [grey(adapter, picture, spans, hidden_tokens(attention[token])) for token in tokens]
