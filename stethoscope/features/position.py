"""Position features: the prior that every detector must be compared with."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from stethoscope.tracing.trace import Trace


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
    counts: Counter[int] = Counter()
    earlier = []
    for token in trace.answer.token_ids:
        earlier.append(counts[token])
        counts[token] += 1
    return np.array(earlier)
