"""What several features do to a distribution."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.trace import Trace


def token_logprob(logits: Tensor, trace: Trace) -> Tensor:
    """(T,) log-probability of the answer's own tokens under (T, V) logits."""
    ids = logits.new_tensor(trace.answer.token_ids).long()
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def entropy_of(logits: Tensor) -> Tensor:
    """(T,) Shannon entropy of (T, V) logits in nats."""
    logprob = logits.log_softmax(-1)
    return -(logprob.exp() * logprob).sum(-1)


def normalised_entropy(values: Tensor) -> Tensor:
    """(...) entropy of non-negative (..., N) values, normalised to sum 1, over log N."""
    share = values / values.sum(-1, keepdim=True).clamp(min=1e-12)
    return -(share * share.clamp(min=1e-12).log()).sum(-1) / math.log(max(values.shape[-1], 2))
