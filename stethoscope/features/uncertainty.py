"""Uncertainty: the distribution that the token was taken from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.common import entropy_of, logprobs, probabilities, token_logprob
from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace


@feature("uncertainty", high="hallucinated")
def nll(trace: Trace) -> Tensor:
    """Negative log-probability of the token, in nats (LURE, Zhou et al. 2024)."""
    return -token_logprob(trace)


@feature("uncertainty", high="hallucinated")
def entropy(trace: Trace) -> Tensor:
    """Entropy of the predicted distribution, in nats (Malinin & Gales 2021)."""
    return entropy_of(trace)


@feature("uncertainty", high="grounded")
def max_prob(trace: Trace) -> Tensor:
    """Largest probability, in [0, 1]; the token's own under greedy decoding."""
    return probabilities(trace).amax(-1)


@feature("uncertainty", high="grounded")
def margin(trace: Trace) -> Tensor:
    """Largest minus second largest probability, in [0, 1]."""
    top = probabilities(trace).topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


# --- more of the same, for the price of nothing ---------------------------------------------------------------------

TOP = 100
"""Logits that HaloProbe reads."""


@feature("logits", high="hallucinated")
def top100_entropy(trace: Trace) -> Tensor:
    """Entropy of the softmax over the 100 largest logits, in nats (HaloProbe, arXiv 2604.06165)."""
    top = trace.logits.topk(min(TOP, trace.logits.shape[-1]), dim=-1).values.log_softmax(-1)
    return -(top.exp() * top).sum(-1)


@feature("logits", high="grounded")
def max_logit(trace: Trace) -> Tensor:
    """Largest logit (HaloProbe, arXiv 2604.06165)."""
    return trace.logits.amax(-1)


@feature("logits", high="grounded")
def token_prob(trace: Trace) -> Tensor:
    """Probability of the token, in [0, 1] (P_orig of CADMP, 2026)."""
    return token_logprob(trace).exp()


@feature("logits", high="hallucinated")
def logprob_gap(trace: Trace) -> Tensor:
    """Largest log-probability minus the token's own, in nats; 0 under greedy decoding (MetaToken, arXiv 2405.19186)."""
    return logprobs(trace).amax(-1) - token_logprob(trace)


@feature("logits", high="grounded")
def sequence_logprob(trace: Trace) -> Tensor:
    """Mean log-probability of the answer up to and with the token, in nats (after MetaToken, arXiv 2405.19186)."""
    logprob = token_logprob(trace)
    return logprob.cumsum(0) / logprob.new_tensor([index + 1.0 for index in range(len(logprob))])
