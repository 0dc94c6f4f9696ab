"""Uncertainty: the distribution that the token was taken from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.catalogue import feature
from stethoscope.features.reduce import entropy_of, token_logprob

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.trace import Trace


@feature("uncertainty", high="hallucinated")
def nll(trace: Trace) -> Tensor:
    """Negative log-probability of the token, in nats (LURE, Zhou et al. 2024)."""
    return -token_logprob(trace.logits, trace)


@feature("uncertainty", high="hallucinated")
def entropy(trace: Trace) -> Tensor:
    """Entropy of the predicted distribution, in nats (Malinin & Gales 2021)."""
    return entropy_of(trace.logits)


@feature("uncertainty", high="grounded")
def max_prob(trace: Trace) -> Tensor:
    """Largest probability, in [0, 1]; the token's own under greedy decoding."""
    return trace.logits.softmax(-1).amax(-1)


@feature("uncertainty", high="grounded")
def margin(trace: Trace) -> Tensor:
    """Largest minus second largest probability, in [0, 1]."""
    top = trace.logits.softmax(-1).topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]
