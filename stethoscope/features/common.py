"""What several features make of a trace, and of distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace

Result = TypeVar("Result")


def once(function: Callable[..., Result]) -> Callable[..., Result]:
    """Lets a function of a trace (and of values that can be hashed) run once for all features that share its result."""

    @wraps(function)
    def remembered(trace: Trace, *arguments: Any) -> Result:
        key = (function.__module__, function.__qualname__, arguments)
        if key not in trace.found:
            trace.found[key] = function(trace, *arguments)
        return trace.found[key]

    return remembered


@once
def logprobs(trace: Trace, part: str = "logits") -> Tensor:
    """(T, V) log-probabilities of some logits of the trace, by name."""
    return getattr(trace, part).log_softmax(-1)


@once
def probabilities(trace: Trace, part: str = "logits") -> Tensor:
    """(T, V) probabilities of the same."""
    return logprobs(trace, part).exp()


@once
def token_logprob(trace: Trace, part: str = "logits") -> Tensor:
    """(T,) log-probability of the answer's own tokens."""
    return of_tokens(logprobs(trace, part), trace)


@once
def entropy_of(trace: Trace, part: str = "logits") -> Tensor:
    """(T,) Shannon entropy in nats."""
    return -(probabilities(trace, part) * logprobs(trace, part)).sum(-1)


def of_tokens(values: Tensor, trace: Trace) -> Tensor:
    """(T,) of (T, V) values those of the answer's own tokens."""
    ids = values.new_tensor(trace.answer.token_ids).long()
    return values.gather(-1, ids[:, None])[:, 0]


def normalised_entropy(values: Tensor) -> Tensor:
    """(...) entropy of non-negative (..., N) values, normalised to sum 1, over log N."""
    share = values / values.sum(-1, keepdim=True).clamp(min=1e-12)
    return -(share * share.clamp(min=1e-12).log()).sum(-1) / math.log(max(values.shape[-1], 2))
