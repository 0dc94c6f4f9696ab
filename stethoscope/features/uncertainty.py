"""Uncertainty features: statistics of the distribution that the token was sampled from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.common import entropy_of, largest_logprobs, logprobs, probabilities, token_logprob
from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace


@feature("uncertainty", higher_means="hallucinated", by_row=True)
def nll(trace: Trace) -> Tensor:
    """Negative log-probability of the token, in nats, >= 0 (LURE, Zhou et al. 2024).

    Higher means hallucinated.
    """
    return -token_logprob(trace)


@feature("uncertainty", higher_means="hallucinated", by_row=True)
def entropy(trace: Trace) -> Tensor:
    """Entropy of the predicted distribution, in nats, >= 0 (Malinin & Gales 2021).

    Higher means hallucinated.
    """
    return entropy_of(trace)


@feature("uncertainty", higher_means="grounded", by_row=True)
def max_prob(trace: Trace) -> Tensor:
    """Largest predicted probability, in [0, 1]; that of the token itself under greedy decoding.

    Lower means hallucinated.
    """
    return probabilities(trace).amax(-1)


@feature("uncertainty", higher_means="grounded", by_row=True)
def margin(trace: Trace) -> Tensor:
    """Largest minus second largest predicted probability, in [0, 1].

    Lower means hallucinated.
    """
    top = probabilities(trace).topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


# --- further statistics of the logits ---------------------------------------------------------------------

TOP = 100
"""Number of logits that HaloProbe reads."""


@feature("logits", higher_means="hallucinated", by_row=True)
def top100_entropy(trace: Trace) -> Tensor:
    """Entropy of the softmax over the 100 largest logits, in nats, >= 0 (HaloProbe, arXiv 2604.06165).

    Higher means hallucinated.
    """
    top = largest_logprobs(trace)[:, :TOP].log_softmax(-1)
    return -(top.exp() * top).sum(-1)


@feature("logits", higher_means="grounded", by_row=True)
def max_logit(trace: Trace) -> Tensor:
    """Largest logit, unnormalised (HaloProbe, arXiv 2604.06165).

    Lower means hallucinated.
    """
    return trace.logits.amax(-1)


@feature("logits", higher_means="grounded", by_row=True)
def token_prob(trace: Trace) -> Tensor:
    """Probability of the token, in [0, 1] (P_orig of CADMP, 2026).

    Lower means hallucinated.
    """
    return token_logprob(trace).exp()


@feature("logits", higher_means="hallucinated", by_row=True)
def logprob_gap(trace: Trace) -> Tensor:
    """Largest log-probability minus that of the token, in nats; 0 under greedy decoding (MetaToken).

    Source: arXiv 2405.19186.

    Higher means hallucinated.
    """
    return logprobs(trace).amax(-1) - token_logprob(trace)


@feature("logits", higher_means="grounded")
def sequence_logprob(trace: Trace) -> Tensor:
    """Mean log-probability of the answer up to and including the token, in nats (after MetaToken).

    Source: arXiv 2405.19186.

    Lower means hallucinated.
    """
    logprob = token_logprob(trace)
    return logprob.cumsum(0) / logprob.new_tensor([index + 1.0 for index in range(len(logprob))])
