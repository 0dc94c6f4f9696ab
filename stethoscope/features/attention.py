"""Attention of the predicting row, head means by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.catalogue import feature
from stethoscope.features.reduce import normalised_entropy
from stethoscope.trace import SEGMENTS, Trace

if TYPE_CHECKING:
    from torch import Tensor


def _mass(trace: Trace, segment: str) -> Tensor:
    """(T, L) head-mean attention mass on a segment, in [0, 1]."""
    return trace.mean_mass[..., SEGMENTS.index(segment)]


@feature("attention", high="grounded", needs=["attention"])
def attn_image(trace: Trace) -> Tensor:
    """Attention mass on the image tokens, mean over heads, by layer (VAR, Jiang et al. 2025)."""
    return _mass(trace, "image")


@feature("attention", high="depends", needs=["attention"])
def attn_question(trace: Trace) -> Tensor:
    """Attention mass on the question, mean over heads, by layer."""
    return _mass(trace, "question")


@feature("attention", high="hallucinated", needs=["attention"])
def attn_previous(trace: Trace) -> Tensor:
    """Attention mass on the earlier answer tokens, mean over heads, by layer (layer 0: PAS, Hoang-Xuan et al. 2026)."""
    return _mass(trace, "previous")


@feature("attention", high="depends", needs=["attention"])
def attn_first(trace: Trace) -> Tensor:
    """Attention mass on the first token of the sequence, mean over heads, by layer."""
    return _mass(trace, "first")


def middle(layers: int) -> slice:
    """The layers that SVAR sums over.

    >>> middle(32)
    slice(5, 19, None)
    """
    return slice(round(0.15 * layers), round(0.55 * layers) + 1)


@feature("attention", high="grounded", needs=["attention"])
def svar(trace: Trace) -> Tensor:
    """Summed visual attention ratio: ``attn_image`` summed over the middle layers (SVAR, Jiang et al. 2025).

    Layers at 15 % to 55 % of the depth, which are the published 5 to 18 for 32 layers.
    """
    return _mass(trace, "image")[:, middle(trace.mass.shape[1])].sum(-1)


@feature("attention", high="depends", needs=["attention"])
def attn_entropy(trace: Trace) -> Tensor:
    """Entropy of the head-mean attention over image tokens divided by log N, in [0, 1], by layer."""
    return normalised_entropy(trace.image_attention)
