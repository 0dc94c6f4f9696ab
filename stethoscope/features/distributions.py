"""Features without a look inside the model: the distributions that tokens were sampled from, and positions.

What several features share is computed once per trace: ``cached_on_trace``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from stethoscope.features.registry import feature
from stethoscope.tracing.trace import largest

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import TensorPart, Trace

Result = TypeVar("Result")

LARGEST = 201
"""Number of words of a distribution that features read in order: no more have a probability above half a percent."""


def cached_on_trace(function: Callable[..., Result]) -> Callable[..., Result]:
    """Cache the results of a function on the trace that it is called with.

    Features that share a result then compute it once. ``FeatureSet.compute`` clears the cache.

    Args:
        function: of a trace, and of further arguments that can be hashed.
    """

    @wraps(function)
    def cached(trace: Trace, *arguments: Any) -> Result:
        key = (function.__module__, function.__qualname__, arguments)
        if key not in trace.cache:
            trace.cache[key] = function(trace, *arguments)
        return trace.cache[key]

    return cached


@cached_on_trace
def logprobs(trace: Trace, part: TensorPart = "logits") -> Tensor:
    """Return the (T, V) log-probabilities in nats of logits of the trace, chosen by name."""
    return trace.require(part).log_softmax(-1)


@cached_on_trace
def probabilities(trace: Trace, part: TensorPart = "logits") -> Tensor:
    """Return the (T, V) probabilities of logits of the trace, chosen by name."""
    return logprobs(trace, part).exp()


@cached_on_trace
def largest_logprobs(trace: Trace) -> Tensor:
    """Return the (T, ``LARGEST``) largest log-probabilities in nats, in descending order; fewer of a small model."""
    return largest(logprobs(trace), LARGEST)


@cached_on_trace
def token_logprob(trace: Trace, part: TensorPart = "logits") -> Tensor:
    """Return the (T,) log-probability in nats of the answer's own tokens."""
    return select_tokens(logprobs(trace, part), trace)


@cached_on_trace
def entropy_of(trace: Trace, part: TensorPart = "logits") -> Tensor:
    """Return the (T,) Shannon entropy of the predicted distributions, in nats."""
    return -(probabilities(trace, part) * logprobs(trace, part)).sum(-1)


def select_tokens(values: Tensor, trace: Trace) -> Tensor:
    """Select from (T, V) values those of the answer's own tokens, (T,)."""
    ids = values.new_tensor(trace.answer.token_ids).long()
    return values.gather(-1, ids[:, None])[:, 0]


def normalised_entropy(values: Tensor) -> Tensor:
    """Compute the entropy of (..., N) values >= 0, normalised to sum 1, over log N: (...) in [0, 1]."""
    share = values / values.sum(-1, keepdim=True).clamp(min=1e-12)
    return -(share * share.clamp(min=1e-12).log()).sum(-1) / math.log(max(values.shape[-1], 2))


# --- uncertainty ------------------------------------------------------------------------------------------------------


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


# --- positions: the prior that every detector must be compared with ---------------------------------------------------


@feature("position", higher_means="hallucinated", by_row=True)
def position(trace: Trace) -> np.ndarray:
    """Index of the token in the answer, from 0.

    Higher means hallucinated.
    """
    return trace.positions


@feature("position", higher_means="hallucinated", by_row=True)
def log_position(trace: Trace) -> np.ndarray:
    """Natural log of 1 + index of the token in the answer, from 0.

    Higher means hallucinated.
    """
    return np.log1p(position(trace))


@feature("position", higher_means="grounded")
def repetition(trace: Trace) -> np.ndarray:
    """Count of earlier occurrences of the token id in the answer, from 0.

    Lower means hallucinated.
    """
    counts: dict[int, int] = {}
    earlier = []
    for token in trace.answer.token_ids:
        earlier.append(counts.get(token, 0))
        counts[token] = earlier[-1] + 1
    return np.array(earlier)
