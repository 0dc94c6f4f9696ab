"""Overthinking features: how undecided the layers are about the next word, and what the row's heads look at most.

Source: "Overthinking", arXiv 2603.07619 (CVPR Findings 2026). All read the row that predicts the token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace


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
