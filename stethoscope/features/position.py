"""Position features: the prior that every detector must be compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from stethoscope.tracing.trace import Trace


@feature("position", higher_means="hallucinated")
def position(trace: Trace) -> np.ndarray:
    """Index of the token in the answer, from 0.

    Higher means hallucinated.
    """
    return np.arange(len(trace.answer.token_ids))


@feature("position", higher_means="hallucinated")
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
    ids = trace.answer.token_ids
    return np.array([ids[:index].count(token) for index, token in enumerate(ids)])
