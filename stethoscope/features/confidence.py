"""Confidence scores of recent papers: of the token's own pass, over its layers, and of what else the model writes.

Of sampled answers nothing but the text is read: does the model name the object again? Tokens that name no object have
no value (NaN); all tokens and mentions of an object share one. Of a continuation the look at the image is read: is it
that of a token when the model goes on to invent?
"""

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


# --- layers: how undecided they are about the next word, and what the row's heads look at most ------------------------
# Source: Overthinking, arXiv 2603.07619 (CVPR Findings 2026). All read the row that predicts the token.


@feature("overthinking", higher_means="hallucinated", requires=["layer_entropy"], by_row=True)
def overthinking(trace: Trace) -> Tensor:
    """Mean entropy of the logit lens in nats, times the number of top words over that of layers, >= 0.

    (1 / L) sum_l H_l * D / L, where D is the number of different words that are the most probable one in some layer.
    Source: Overthinking, arXiv 2603.07619.

    Higher means hallucinated.
    """
    top = trace.require("lens_top").sort(-1).values
    different = 1 + (top[:, 1:] != top[:, :-1]).sum(-1)
    return trace.require("lens_entropy").mean(-1) * different / top.shape[-1]


@feature("overthinking", higher_means="depends", requires=["layer_entropy"], by_row=True)
def lens_entropy(trace: Trace) -> Tensor:
    """Entropy in nats of the logit lens, >= 0, for every layer (H_l of Overthinking, arXiv 2603.07619).

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require("lens_entropy")


@feature("overthinking", higher_means="depends", requires=["peaks"], by_row=True)
def image_peaks(trace: Trace) -> Tensor:
    """Largest attention of any head to an image token, mean over these, in [0, 1], by layer.

    IA_l; source: Overthinking, arXiv 2603.07619.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require("peaks")[..., 0]


@feature("overthinking", higher_means="depends", requires=["peaks"], by_row=True)
def text_peaks(trace: Trace) -> Tensor:
    """Largest attention of any head to a position without image, mean over these, in [0, 1], by layer.

    TA_l; source: Overthinking, arXiv 2603.07619.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require("peaks")[..., 1]


# --- what the model writes beyond its answer: sampled answers, and a short continuation -------------------------------


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
