"""The catalogue of features: names, groups, costs and directions. The other modules of this package fill it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stethoscope.trace import MENTION_NEEDS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from stethoscope.trace import Trace

FORWARD, EXTRA_FORWARD, BACKWARD = "same forward pass", "one more forward pass", "a backward pass"
PER_MENTION, QUESTION = "one more pass per mention", "one more question per mention"
CLASSES = (FORWARD, EXTRA_FORWARD, BACKWARD, PER_MENTION, QUESTION)
"""Cost classes, the cheapest first."""

COSTS = {
    "attention": FORWARD,
    "lens": FORWARD,
    "heads": FORWARD,
    "trajectory": FORWARD,
    "states": FORWARD,
    "image_lens": FORWARD,
    "blank": EXTRA_FORWARD,
    "noise": EXTRA_FORWARD,
    "no_image": EXTRA_FORWARD,
    "core": EXTRA_FORWARD,
    "relevancy": BACKWARD,
    "masked": PER_MENTION,
    "questions": QUESTION,
}
"""Cost class of every part of a trace that a feature may read."""


@dataclass(frozen=True)
class Feature:
    """A named feature.

    Attributes:
        name: column name; features with one column per layer get a suffix ``_l00``, ``_l01``, ..., those with one per
            layer and head ``_l00h00``, ..., those with one per dimension of a state ``_d0000``, ... .
        group: what configs switch on and off together.
        high: what a high value speaks for, as published: ``hallucinated``, ``grounded`` or ``depends``.
        needs: parts of the trace it reads beyond the logits, of ``stethoscope.trace``.
        function: from a trace to (T,), (T, layers), (T, layers, heads) or (T, dimensions) values.
        vector: the columns are dimensions of a state and mean nothing one by one.
    """

    name: str
    group: str
    high: str
    needs: frozenset[str]
    function: Callable[[Trace], Tensor | np.ndarray]
    vector: bool = False

    @property
    def gaps(self) -> bool:
        """Whether tokens that name no object have no value (NaN)."""
        return not self.needs.isdisjoint(MENTION_NEEDS)

    @property
    def summary(self) -> str:
        """First line of the function's documentation."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    @property
    def cost(self) -> str:
        """What the feature costs beyond generating the answer."""
        return max((COSTS[need] for need in self.needs), key=CLASSES.index, default=FORWARD)


FEATURES: dict[str, Feature] = {}


def feature(group: str, high: str, needs: Iterable[str] = (), vector: bool = False) -> Callable:
    """Registers the decorated function under its own name."""

    def register(function: Callable[[Trace], Tensor | np.ndarray]) -> Callable[[Trace], Tensor | np.ndarray]:
        name = function.__name__
        FEATURES[name] = Feature(name, group, high, frozenset(needs), function, vector)
        return function

    return register


def both_rows(group: str, high: str, needs: Iterable[str] = (), vector: bool = False) -> Callable:
    """Registers a function of a trace and a row convention twice, as ``<name>_q`` and ``<name>_c``.

    ``q`` is the row that predicts the token, known before the token is shown; ``c`` the next one, which reads it.
    The function's second argument is their offset, 0 or 1.
    """

    def register(function: Callable[[Trace, int], Tensor]) -> Callable[[Trace, int], Tensor]:
        for offset, (suffix, row) in enumerate((("q", "predicting row"), ("c", "consuming row"))):

            def one(trace: Trace, offset: int = offset) -> Tensor:
                return function(trace, offset)

            first, _, rest = (function.__doc__ or "").strip().partition("\n")
            one.__doc__ = f"{first.rstrip('.')}; {row}.\n{rest}"
            one.__name__ = f"{function.__name__}_{suffix}"
            feature(group, high, needs, vector)(one)
        return function

    return register
