"""Features of what the model writes beyond its answer: sampled answers, and a short continuation.

Of sampled answers nothing but the text is read: does the model name the object again? Tokens that name no object have
no value (NaN); all tokens and mentions of an object share one. Of a continuation the look at the image is read: is it
that of a token when the model goes on to invent?
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace


@feature("sampling", higher_means="grounded", requires=["samples"], by_row=True)
def sample_agreement(trace: Trace) -> Tensor:
    """Share in [0, 1] of five answers sampled at temperature 1 that name the object too.

    Objects are read by the task's own vocabulary; for questions of yes and no it is the share that says yes again.
    Source: SelfCheckGPT (Manakul et al., EMNLP 2023), for objects instead of sentences.

    Lower means hallucinated.
    """
    return trace.require("named_share")


@feature("sampling", higher_means="hallucinated", requires=["samples"], by_row=True)
def sample_entropy(trace: Trace) -> Tensor:
    """Entropy in nats, in [0, log 2], of what five sampled answers mean: the object named, or not named.

    Discrete semantic entropy (Farquhar et al., Nature 2024) of the claim that the object is there. The meanings are
    those of the task's vocabulary instead of clusters by entailment.

    Higher means hallucinated.
    """
    share = trace.require("named_share")
    return -(share.xlogy(share) + (1 - share).xlogy(1 - share))


@feature("continuation", higher_means="hallucinated", requires=["continuation"], by_row=True)
def ig_score(trace: Trace) -> Tensor:
    """Likeness in [0, 1] of the token's look at the image to that of an added word (IG score, HalTrapper).

    The model goes on from the finished answer and " There is also". The cosine is between two rows of attention to the
    image tokens, all layers and heads side by side: of the row that consumes the token, and of the row that consumes
    the second word that the model adds. Late tokens are nearer to it by their position. Source: arXiv 2510.20229.

    Higher means hallucinated.
    """
    return trace.require("imagining")
