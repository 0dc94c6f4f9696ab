"""Contrast: what the token would have been without the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.catalogue import feature
from stethoscope.features.reduce import entropy_of, token_logprob

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.trace import Trace


@feature("blank", high="grounded", needs=["blank"])
def pmi(trace: Trace) -> Tensor:
    """log p(token | image) - log p(token | blank image), in nats: what the picture adds to the token."""
    return token_logprob(trace.logits, trace) - token_logprob(trace.blank_logits, trace)


@feature("blank", high="grounded", needs=["blank"])
def blank_entropy_difference(trace: Trace) -> Tensor:
    """Entropy with a blank image minus entropy with the image, in nats (IS_blank of VAUQ, 2026)."""
    return entropy_of(trace.blank_logits) - entropy_of(trace.logits)


@feature("blank", high="grounded", needs=["blank"])
def blank_divergence(trace: Trace) -> Tensor:
    """Kullback-Leibler divergence from the blank-image distribution to the one with the image, in nats, at least 0."""
    logprob, blank = trace.logits.log_softmax(-1), trace.blank_logits.log_softmax(-1)
    return (logprob.exp() * (logprob - blank)).sum(-1).clamp(min=0)
