"""Image evidence that a token attended to, as columns for ``detection.visual_consistency``."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from stethoscope.tracing.trace import Trace

DIMENSIONS = 256
"""Largest number of columns. Wider states are projected onto random directions, which keeps angles to about 6 %."""


@feature("visual_evidence", higher_means="depends", requires=["relevancy"], vector=True)
def attended_embedding(trace: Trace) -> np.ndarray:
    """Image embeddings at the input of the language model, weighted with the token's relevancy, unit-free.

    (T, D), or (T, 256) after a random projection (Johnson and Lindenstrauss) where D is larger. The weights of a token
    are its relevancy to the image tokens after the last layer, divided by their L2 norm, so that a small region counts
    as much as a large one; zero where it has no relevancy to the image. Source: this project; there is no paper.

    Either direction can mean hallucinated; it depends on the model.
    """
    relevancy = trace.require("relevancy")
    last = relevancy.image[:, -1].float().numpy()
    weights = last / np.maximum(np.linalg.norm(last, axis=-1, keepdims=True), 1e-12)
    evidence = weights @ relevancy.require_image_embeds().numpy()
    return evidence if evidence.shape[-1] <= DIMENSIONS else evidence @ _directions(evidence.shape[-1])


@lru_cache(maxsize=4)
def _directions(size: int) -> np.ndarray:
    """Draw the (size, DIMENSIONS) normal random directions, float32, the same on every call."""
    directions = np.random.default_rng(size).standard_normal((size, DIMENSIONS)) / DIMENSIONS**0.5
    return directions.astype(np.float32)
