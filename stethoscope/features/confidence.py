"""Confidence scores of language models of 2025 and 2026 that need no further pass, token by token."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stethoscope.core.types import required
from stethoscope.features.distributions import cached_on_trace, largest_logprobs, logprobs, token_logprob
from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace

BOOSTED_JUMP, BOOSTED_LEAST = 0.3, 0.005
"""BoostedProb: smallest drop of probability behind the dominant words as a share and absolute."""
RAUQ_ALPHA = 0.5
"""Weight of the token's own probability in RAUQ's recursion, of the released code for instruction-tuned models."""


@feature("confidence", higher_means="grounded", by_row=True)
def self_certainty(trace: Trace) -> Tensor:
    """Divergence KL(uniform || q) of the predicted distribution q, in nats, >= 0 (SelfCertainty).

    -mean_v log q(v) - log V. Source: arXiv 2502.18581.

    Lower means hallucinated.
    """
    values = logprobs(trace)
    return -values.mean(-1) - math.log(values.shape[-1])


@feature("confidence", higher_means="grounded", by_row=True)
def boosted_prob(trace: Trace) -> Tensor:
    """Probability in [0, 1] of all dominant words if the token is one, else its own (BoostedProb, 2025).

    The dominant words are those before the last drop p_(i) - p_(i+1) > max(0.3 p_(i), 0.005) of sorted probabilities.

    Lower means hallucinated.
    """
    top = largest_logprobs(trace).exp()  # no more are dominant
    drops = top[:, :-1] - top[:, 1:]
    cuts = (drops > BOOSTED_JUMP * top[:, :-1]) & (drops > BOOSTED_LEAST)
    dominant = cuts.flip(-1).cummax(-1).values.flip(-1)  # up to the last cut
    mass = (top[:, :-1] * dominant).sum(-1)
    least = top[:, :-1].masked_fill(~dominant, math.inf).amin(-1)  # infinite where no word is dominant
    own = token_logprob(trace).exp()
    return own.where(own < least, mass)


@cached_on_trace
def _confidences(trace: Trace) -> Tensor:
    """Return RAUQ's recurrent confidences (layers, T) in (0, 1], of the middle third of the layers."""
    own = trace.require("own")
    layers = own.shape[1]
    chosen = own[:, layers // 3 : math.ceil(2 * layers / 3) + 1]  # (T, layers, H)
    heads = chosen[1:].mean(0).argmax(-1) if len(own) > 1 else chosen[0].argmax(-1)
    attention = chosen.gather(-1, heads[None, :, None].expand(len(own), -1, 1))[..., 0]
    probability = token_logprob(trace).exp()
    confidences = probability[:, None].repeat(1, attention.shape[1])
    weights, steps = ((1 - RAUQ_ALPHA) * attention).numpy(), confidences.numpy()  # steps shares its memory
    steps[1:] *= RAUQ_ALPHA
    for index in range(1, len(steps)):
        steps[index] += weights[index] * steps[index - 1]
    return confidences.T.clamp(min=1e-30)


@feature("confidence", higher_means="hallucinated", requires=["own"])
def rauq(trace: Trace) -> Tensor:
    """Surprise -log c_t in nats, >= 0, largest over the middle third of the layers (token form of RAUQ).

    c_1 = p_1, c_t = 0.5 p_t + 0.5 a_t c_{t-1}; a_t is the attention of the row that predicts token t to the token
    before it, in the layer's head with the largest mean of it over the answer. Source: arXiv 2505.20045.

    Higher means hallucinated.
    """
    if not trace.answer.token_ids:
        return token_logprob(trace)
    return -_confidences(trace).log().amin(0)


@feature("confidence", higher_means="hallucinated", requires=["own"])
def rauq_answer(trace: Trace) -> Tensor:
    """RAUQ of the whole answer, >= 1, equal for its tokens: 1 - mean_t log c_t, largest over layers.

    Source: arXiv 2505.20045.

    Higher means hallucinated.
    """
    if not trace.answer.token_ids:
        return token_logprob(trace)
    return (1 - _confidences(trace).log().mean(-1).amin(0)).expand(len(trace.answer.token_ids))


@feature("confidence", higher_means="depends", requires=["evidence"], by_row=True)
def logit_pos_mean(trace: Trace) -> Tensor:
    """Mean positive evidence of the head over the vocabulary, >= 0, in logits (w+ of EUQ's code, 2026).

    s = (W - row mean of W) z for the state z that the head W reads; w+ = mean_v max(s_v, 0).

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require("evidence")[:, 0]


@feature("confidence", higher_means="depends", requires=["evidence"], by_row=True)
def logit_neg_mean(trace: Trace) -> Tensor:
    """Mean negative evidence of the head over the vocabulary, >= 0, in logits (w- of EUQ's code, 2026).

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require("evidence")[:, 1]


@cached_on_trace
def _fused(trace: Trace) -> tuple[Tensor, Tensor]:
    """Return the (T,) conflict and ignorance of Dempster's rule, for as many equal sources as the state is wide."""
    sources = required(trace.width)
    positive, negative = trace.require("evidence").double().clamp(max=600).unbind(-1)  # exp of more is infinite
    absent = (-negative).exp()
    plus = 1 / (sources * positive.expm1() + 1)
    minus = -1 / (sources * (-absent).log1p()).expm1()
    conflict = sources * plus * positive.expm1() * (1 - minus * absent)
    return conflict, sources * absent * plus * minus / (1 - conflict)


@feature("confidence", higher_means="hallucinated", requires=["evidence"], by_row=True)
def euq_conflict(trace: Trace) -> Tensor:
    """Conflict CF in [0, 1] of the head's evidence by Dempster's rule (EUQ, 2026, as its code has it).

    With K = D sources, each of weights w+ and w-: eta+ = 1 / (K e^{w+} - K + 1), eta- = 1 / (1 - (1 - e^{-w-})^K),
    CF = K eta+ (e^{w+} - 1)(1 - eta- e^{-w-}). So it is a function of ``logit_pos_mean`` and ``logit_neg_mean`` alone,
    where the paper has a weight for every word and dimension.

    Higher means hallucinated.
    """
    return _fused(trace)[0]


@feature("confidence", higher_means="hallucinated", requires=["evidence"], by_row=True)
def euq_ignorance(trace: Trace) -> Tensor:
    """Ignorance IG >= 0 of the head's evidence by Dempster's rule (EUQ, 2026, as its code has it).

    K e^{-w-} eta+ eta- / (1 - CF), see ``euq_conflict``.

    Higher means hallucinated.
    """
    return _fused(trace)[1]
