"""Features of sampled answers: does the model name the object again? Nothing but the answers is read.

Tokens that name no object have no value (NaN); all tokens and mentions of an object share one.
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
