"""What the model looked at when it wrote a token, as it came from the picture: columns for ``detection.sight``."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from stethoscope.tracing.trace import Trace

DIMENSIONS = 256
"""Columns at most; wider states are projected onto so many random directions, which keeps their angles to about 6 %."""


@feature("sight", high="depends", needs=["relevancy"], vector=True)
def looked_at(trace: Trace) -> np.ndarray:
    """What was looked at: image tokens as they enter the language model, weighted with the token's relevancy.

    (T, D), or (T, 256) of a random projection (Johnson and Lindenstrauss) where D is larger. The weights of a token are
    its relevancy to the image tokens after the last layer, divided by their L2 norm, so that a small place weighs as
    much as a large one; zero where nothing was looked at. Own; there is no paper.
    """
    relevancy = trace.relevancy.image[:, -1].float().numpy()
    weights = relevancy / np.maximum(np.linalg.norm(relevancy, axis=-1, keepdims=True), 1e-12)
    seen = weights @ trace.relevancy.seen.numpy()
    return seen if seen.shape[-1] <= DIMENSIONS else seen @ _directions(seen.shape[-1])


@lru_cache(maxsize=4)
def _directions(size: int) -> np.ndarray:
    """(size, DIMENSIONS) normal random numbers, always the same."""
    drawn = np.random.default_rng(size).standard_normal((size, DIMENSIONS)) / DIMENSIONS**0.5
    return drawn.astype(np.float32)
