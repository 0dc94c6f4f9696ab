"""Memoised intermediate quantities (log-probabilities, entropies) that several features share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

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
