"""Contrast: what the token would have been without the picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stethoscope.features.common import entropy_of, logprobs, of_tokens, once, probabilities, token_logprob
from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace


@feature("blank", high="grounded", needs=["blank"])
def pmi(trace: Trace) -> Tensor:
    """log p(token | image) - log p(token | blank image), in nats: what the picture adds to the token."""
    return token_logprob(trace) - token_logprob(trace, "blank_logits")


@feature("blank", high="grounded", needs=["blank"])
def blank_entropy_difference(trace: Trace) -> Tensor:
    """Entropy with a blank image minus entropy with the image, in nats (IS_blank of VAUQ, 2026)."""
    return entropy_of(trace, "blank_logits") - entropy_of(trace)


@feature("blank", high="grounded", needs=["blank"])
def blank_divergence(trace: Trace) -> Tensor:
    """Kullback-Leibler divergence from the blank-image distribution to the one with the image, in nats, at least 0."""
    difference = logprobs(trace) - logprobs(trace, "blank_logits")
    return (probabilities(trace) * difference).sum(-1).clamp(min=0)


# --- contrast with a noised image (VCD) -----------------------------------------------------------------------------

VCD_ALPHA = 1.0
"""Of VCD's published script."""


@feature("noise", high="grounded", needs=["noise"])
def vcd_gap(trace: Trace) -> Tensor:
    """log p(token | image) - log p(token | noised image), in nats (VCD, arXiv 2311.16922; noise step 500)."""
    return token_logprob(trace) - token_logprob(trace, "noise_logits")


@feature("noise", high="grounded", needs=["noise"])
def vcd_logprob(trace: Trace) -> Tensor:
    """Log-probability of the token under VCD's contrasted logits 2 z(image) - z(noised image).

    VCD also forbids improbable tokens (beta 0.2); that is a rule for choosing tokens and left out, since a token that
    was sampled against it would have no logarithm.
    """
    contrasted = (1 + VCD_ALPHA) * trace.logits - VCD_ALPHA * trace.noise_logits
    return of_tokens(contrasted.log_softmax(-1), trace)


@feature("noise", high="grounded", needs=["noise"])
def noise_divergence(trace: Trace) -> Tensor:
    """Jensen-Shannon divergence between the distributions with the image and with the noised one, in nats."""
    return _jensen_shannon(trace, "noise_logits")


# --- contrast with no image at all ----------------------------------------------------------------------------------


@feature("no_image", high="grounded", needs=["no_image"])
def pmi_no_image(trace: Trace) -> Tensor:
    """log p(token | image) - log p(token | no image), in nats; image tokens are hidden by the attention mask."""
    return token_logprob(trace) - token_logprob(trace, "no_image_logits")


@feature("no_image", high="grounded", needs=["no_image"])
def no_image_divergence(trace: Trace) -> Tensor:
    """Jensen-Shannon divergence between the distributions with and without image tokens, in nats."""
    return _jensen_shannon(trace, "no_image_logits")


# --- contrast with the image less its core (VAUQ) -------------------------------------------------------------------

VAUQ_ALPHA = 0.6
"""VAUQ for LLaVA on MM-Vet, which goes with 40 % of the image tokens."""


@feature("core", high="grounded", needs=["core"])
@once
def core_information(trace: Trace) -> Tensor:
    """Entropy without the most attended 40 % of the image tokens minus entropy, in bits (IS_core of VAUQ).

    Source: arXiv 2602.21054. The core is that of the whole answer, so one pass serves all tokens (``knockout.core``).
    """
    return (entropy_of(trace, "core_logits") - entropy_of(trace)) / math.log(2)


@feature("core", high="hallucinated", needs=["core"])
def vauq(trace: Trace) -> Tensor:
    """Entropy in bits minus 0.6 times ``core_information`` (VAUQ, arXiv 2602.21054)."""
    return entropy_of(trace) / math.log(2) - VAUQ_ALPHA * core_information(trace)


@feature("core", high="grounded", needs=["core"])
def core_gap(trace: Trace) -> Tensor:
    """log p(token | image) - log p(token | image less its core), in nats."""
    return token_logprob(trace) - token_logprob(trace, "core_logits")


def _jensen_shannon(trace: Trace, other: str) -> Tensor:
    """(T,) divergence of the distribution with the image from another one, in [0, log 2]."""
    parts = [(probabilities(trace, part), logprobs(trace, part)) for part in ("logits", other)]
    middle = ((parts[0][0] + parts[1][0]) / 2).clamp(min=1e-38).log()
    return sum((share * (logprob - middle)).sum(-1) for share, logprob in parts).clamp(min=0) / 2
