"""Runs a model as if some image tokens were not there: nothing behind them may attend to them.

Positions stay as they are, so every family can be run so, whatever it makes of a prompt without an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stethoscope.trace import Spans, of_depth
from stethoscope.tracing.capture import Listener, Site, additive_mask, plain_attention

CORE_SHARE = 0.4
"""Share of the image tokens that VAUQ masks (arXiv 2602.21054, LLaVA on MM-Vet)."""
CORE_LAYERS = (10, 25)
"""Layers of 32 whose attention chooses them."""


class Knockout(Listener):
    """Hides prompt tokens from all queries but image tokens, in the language model's own attention.

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
        self._roles = ("encoder", "cross") if encoder else ("language",)
        self._keys = torch.zeros(len(spans), length, dtype=torch.bool)
        self._queries = torch.ones(len(spans), length if queries is None else queries, dtype=torch.bool)
        for index, (positions, span) in enumerate(zip(hidden, spans, strict=True)):
            self._keys[index, list(positions)] = True
            if queries is None:
                self._queries[index, list(span.image)] = False

    def wants(self, site: Site) -> bool:
        return site.role in self._roles

    def attend(
        self,
        site: Site,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        blocked = self._keys[:, None, None].to(query.device)
        if site.role != "cross":
            blocked = blocked & self._queries[:, None, :, None].to(query.device)
        mask = additive_mask(module, query, key, mask, kwargs.get("is_causal"))
        mask = query.new_zeros(()) if mask is None else mask
        size = (len(blocked), 1, query.shape[2], key.shape[2])
        mask = mask.expand(torch.broadcast_shapes(mask.shape, size)).masked_fill(blocked, torch.finfo(query.dtype).min)
        return plain_attention(module, query, key, value, mask, **kwargs)[0], None


def core(image_attention: Tensor, spans: Spans) -> list[int]:
    """Positions of the image tokens that an answer attends to most (VAUQ, arXiv 2602.21054).

    Args:
        image_attention: (T, L, N) attention of the predicting rows to image tokens, mean over heads.

    Returns:
        40 % of the image tokens, by attention in layers 10 to 25 of 32, mean over layers and answer tokens.
    """
    layers, count = image_attention.shape[1:]
    first, last = (of_depth(layer, layers) for layer in CORE_LAYERS)
    mean = image_attention[:, first : last + 1].sum((0, 1))
    chosen = mean.topk(max(1, round(CORE_SHARE * count))).indices
    return [spans.image[index] for index in chosen.tolist()]
