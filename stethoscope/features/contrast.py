"""Contrast features: how predictions change with a blank, a noised, a partly hidden or no image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stethoscope.features.distributions import (
    cached_on_trace,
    entropy_of,
    logprobs,
    probabilities,
    select_tokens,
    token_logprob,
)
from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import TensorPart, Trace


@feature("blank", higher_means="grounded", requires=["blank"], by_row=True)
def pmi(trace: Trace) -> Tensor:
    """log p(token | image) - log p(token | blank image), in nats: information that the image adds.

    Lower means hallucinated.
    """
    return token_logprob(trace) - token_logprob(trace, "blank_logits")


@feature("blank", higher_means="grounded", requires=["blank"], by_row=True)
def blank_entropy_difference(trace: Trace) -> Tensor:
    """Entropy with a blank image minus entropy with the image, in nats (IS_blank of VAUQ, 2026).

    Lower means hallucinated.
    """
    return entropy_of(trace, "blank_logits") - entropy_of(trace)


@feature("blank", higher_means="grounded", requires=["blank"], by_row=True)
def blank_divergence(trace: Trace) -> Tensor:
    """Kullback-Leibler divergence of the prediction from that with a blank image, in nats, >= 0.

    Lower means hallucinated.
    """
    difference = logprobs(trace) - logprobs(trace, "blank_logits")
    return difference.mul_(probabilities(trace)).sum(-1).clamp(min=0)


# --- contrast with a noised image (VCD) -----------------------------------------------------------------------------

VCD_ALPHA = 1.0
"""Contrast strength alpha of VCD's published script."""


@feature("noise", higher_means="grounded", requires=["noise"], by_row=True)
def vcd_gap(trace: Trace) -> Tensor:
    """log p(token | image) - log p(token | noised image), in nats (VCD, arXiv 2311.16922).

    The image is noised as at diffusion step 500.

    Lower means hallucinated.
    """
    return token_logprob(trace) - token_logprob(trace, "noise_logits")


@feature("noise", higher_means="grounded", requires=["noise"], by_row=True)
def vcd_logprob(trace: Trace) -> Tensor:
    """Log-probability in nats of the token under VCD's logits 2 z(image) - z(noised image).

    VCD also forbids improbable tokens (beta 0.2). This decoding rule is left out: a token sampled against it would have
    probability 0.

    Lower means hallucinated.
    """
    contrasted = (1 + VCD_ALPHA) * trace.logits - VCD_ALPHA * trace.require("noise_logits")
    return select_tokens(contrasted.log_softmax(-1), trace)


@feature("noise", higher_means="grounded", requires=["noise"], by_row=True)
def noise_divergence(trace: Trace) -> Tensor:
    """Jensen-Shannon divergence between predictions with image and noised image, in nats, [0, log 2].

    Lower means hallucinated.
    """
    return _jensen_shannon(trace, "noise_logits")


# --- contrast with no image at all ----------------------------------------------------------------------------------


@feature("no_image", higher_means="grounded", requires=["no_image"], by_row=True)
def pmi_no_image(trace: Trace) -> Tensor:
    """log p(token | image) - log p(token | no image), in nats; the mask hides the image tokens.

    Lower means hallucinated.
    """
    return token_logprob(trace) - token_logprob(trace, "no_image_logits")


@feature("no_image", higher_means="grounded", requires=["no_image"], by_row=True)
def no_image_divergence(trace: Trace) -> Tensor:
    """Jensen-Shannon divergence between predictions with and without image tokens, in nats, [0, log 2].

    Lower means hallucinated.
    """
    return _jensen_shannon(trace, "no_image_logits")


# --- contrast with the image less its core (VAUQ) -------------------------------------------------------------------

VAUQ_ALPHA = 0.6
"""Weight of VAUQ for LLaVA on MM-Vet, which goes with a core of 40 % of the image tokens."""


@feature("core", higher_means="grounded", requires=["core"], by_row=True)
@cached_on_trace
def core_information(trace: Trace) -> Tensor:
    """Entropy without the 40 % most attended image tokens minus entropy, in bits (IS_core of VAUQ).

    The hidden tokens are those of the whole answer, so one pass serves all tokens. Source: arXiv 2602.21054.

    Lower means hallucinated.
    """
    return (entropy_of(trace, "core_logits") - entropy_of(trace)) / math.log(2)


@feature("core", higher_means="hallucinated", requires=["core"], by_row=True)
def vauq(trace: Trace) -> Tensor:
    """Entropy in bits minus 0.6 times ``core_information`` (VAUQ, arXiv 2602.21054).

    Higher means hallucinated.
    """
    return entropy_of(trace) / math.log(2) - VAUQ_ALPHA * core_information(trace)


@feature("core", higher_means="grounded", requires=["core"], by_row=True)
def core_gap(trace: Trace) -> Tensor:
    """log p(token | image) - log p(token | image without its most attended tokens), in nats.

    Lower means hallucinated.
    """
    return token_logprob(trace) - token_logprob(trace, "core_logits")


def _jensen_shannon(trace: Trace, part: TensorPart) -> Tensor:
    """Compute the (T,) divergence between the prediction and a contrasted one, in nats, in [0, log 2]."""
    first, other = probabilities(trace), probabilities(trace, part)
    middle = (first + other).div_(2).clamp_(min=1e-38).log_()  # in place, as all (T, V) below: a third of the time
    divergence = (logprobs(trace) - middle).mul_(first).sum(-1)
    return (divergence + middle.neg_().add_(logprobs(trace, part)).mul_(other).sum(-1)).clamp(min=0) / 2
