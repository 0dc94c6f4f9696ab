"""What a model says when it is asked again about an object that it named, or loses sight of it.

Tokens that name nothing have no value; all sub-tokens of a mention have that of the mention (questions) or their own
(masked), and later mentions of an object share its question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.common import token_logprob
from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace


@feature("verification", high="grounded", needs=["questions"])
def verify_yes(trace: Trace) -> Tensor:
    """Probability of yes to "Is there a ...?" about the named object, of yes and no (self-verification, as POPE asks).

    Source: the wording of POPE (Li et al., EMNLP 2023); the first token of the model's reply is read.
    """
    return trace.yes_odds.sigmoid()


@feature("verification", high="grounded", needs=["questions"])
def verify_odds(trace: Trace) -> Tensor:
    """The same as log-odds, in nats, which do not saturate."""
    return trace.yes_odds


@feature("masked", high="depends", needs=["attention", "masked"])
def masked_prob(trace: Trace) -> Tensor:
    """Probability of the token when the most attended 30 % of the picture are grey (P_masked of CADMP, 2026)."""
    return trace.masked_logprob.exp()


@feature("masked", high="grounded", needs=["attention", "masked"])
def masked_drop(trace: Trace) -> Tensor:
    """Probability of the token less ``masked_prob``, in [-1, 1] (Delta P of CADMP, 2026)."""
    return token_logprob(trace).exp() - masked_prob(trace)
