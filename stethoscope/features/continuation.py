"""Features of a short continuation: does the model look at the image as it does when it goes on to invent?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace


@feature("continuation", higher_means="hallucinated", requires=["continuation"], by_row=True)
def ig_score(trace: Trace) -> Tensor:
    """Likeness in [0, 1] of the token's look at the image to that of an added word (IG score, HalTrapper).

    The model goes on from the finished answer and " There is also". The cosine is between two rows of attention to the
    image tokens, all layers and heads side by side: of the row that consumes the token, and of the row that consumes
    the second word that the model adds. Late tokens are nearer to it by their position. Source: arXiv 2510.20229.

    Higher means hallucinated.
    """
    return trace.require("imagining")
