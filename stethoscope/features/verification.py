"""Verification features: ask the model about each object that it named, or hide the image evidence for it.

Tokens that name no object have no value (NaN). All sub-tokens of a mention share the answer to its question; with
masked evidence each sub-token has its own value. Later mentions of an object share its question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.distributions import token_logprob
from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace


@feature("verification", higher_means="grounded", requires=["questions"], by_row=True)
def verify_yes(trace: Trace) -> Tensor:
    """Probability in [0, 1] of yes, against no, when asked "Is there a ...?" about the object.

    The first token of the reply is read. Source: wording of POPE (Li et al., EMNLP 2023).

    Lower means hallucinated.
    """
    return trace.require("yes_odds").sigmoid()


@feature("verification", higher_means="grounded", requires=["questions"], by_row=True)
def verify_odds(trace: Trace) -> Tensor:
    """Log-odds in nats of ``verify_yes``, which do not saturate.

    Lower means hallucinated.
    """
    return trace.require("yes_odds")


# --- states of the model while it is asked ---------------------------------------------------------------------


@feature("verify_states", higher_means="depends", requires=["question_states"], vector=True, by_row=True)
def verify_state(trace: Trace) -> Tensor:
    """State that predicts the reply to "Is there a ...?" about the object, by layer and dimension.

    Without unit. Columns ``_l00``, ``_l01``, ...: the distinct layers among 8, 12, 16, 20, 24 of 32, by share of depth.
    Source: hub pbcong/llava-1.5-7b-hal-verify-probe (2026), which asks "Is at least one ... visible in this image?".

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require("verify_states")


@feature("verify_states", higher_means="depends", requires=["question_states"], vector=True, by_row=True)
def verify_state_without(trace: Trace) -> Tensor:
    """``verify_state`` when nothing after the image may attend to it, by layer and dimension.

    Without unit. It is the same for all pictures of one size, so it is computed once per object.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require("verify_states_without")


@feature("verify_states", higher_means="depends", requires=["question_states"], vector=True, by_row=True)
def verify_state_change(trace: Trace) -> Tensor:
    """``verify_state`` less ``verify_state_without``, without unit, by layer and dimension.

    Source: hub pbcong/llava-1.5-7b-hal-verify-probe (2026).

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require("verify_states") - trace.require("verify_states_without")


@feature("masked", higher_means="depends", requires=["attention", "masked"], by_row=True)
def masked_prob(trace: Trace) -> Tensor:
    """Probability in [0, 1] of the token when the most attended 30 % of the image are grey (CADMP, 2026).

    P_masked of the paper.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require("masked_logprob").exp()


@feature("masked", higher_means="grounded", requires=["attention", "masked"], by_row=True)
def masked_drop(trace: Trace) -> Tensor:
    """Probability of the token minus ``masked_prob``, in [-1, 1] (Delta P of CADMP, 2026).

    Lower means hallucinated.
    """
    return token_logprob(trace).exp() - masked_prob(trace)
