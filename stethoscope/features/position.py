"""Position and repetition: the prior that every detector must be compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from stethoscope.tracing.trace import Trace


@feature("position", high="hallucinated")
def position(trace: Trace) -> np.ndarray:
    """Index of the token in the answer, from 0."""
    return np.arange(len(trace.answer.token_ids))


@feature("position", high="hallucinated")
def log_position(trace: Trace) -> np.ndarray:
    """log(1 + index of the token in the answer)."""
    return np.log1p(position(trace))


@feature("position", high="grounded")
def repetition(trace: Trace) -> np.ndarray:
    """How often the same token id stands earlier in the answer."""
    ids = trace.answer.token_ids
    return np.array([ids[:index].count(token) for index, token in enumerate(ids)])
