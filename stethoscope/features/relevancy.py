"""Relevancy features: shares of a token's gradient-weighted attention on image, question and earlier answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stethoscope.core.errors import CapabilityError
from stethoscope.features.common import cached_on_trace, normalised_entropy
from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace


def _share(part: Tensor, trace: Trace) -> Tensor:
    """Divide the relevancy of a part by that of the whole row: (T, L) in [0, 1], 0 where the row has none."""
    return part.sum(-1) / trace.require("relevancy").total.clamp(min=1e-12)


@cached_on_trace
def _text(trace: Trace) -> Tensor:
    """Return the (T, text) relevancy to question and earlier answer tokens after the last layer."""
    relevancy = trace.require("relevancy")
    parts = relevancy.question[:, -1], relevancy.answer[:, -1]
    return parts[0].new_tensor(np.concatenate(parts, -1))


def _log_ratio(image: Tensor, text: Tensor) -> Tensor:
    """Compute the (T,) natural log of R_image / R_text, both clamped to 1e-9 to stay finite."""
    floor = 1e-9
    return (image.clamp(min=floor) / text.clamp(min=floor)).log()


@feature("relevancy", higher_means="grounded", requires=["relevancy"])
def relevancy_image(trace: Trace) -> Tensor:
    """Share of the token's relevancy on the image tokens, in [0, 1], by layer (Chefer et al. 2021).

    Lower means hallucinated.
    """
    return _share(trace.require("relevancy").image, trace)


@feature("relevancy", higher_means="depends", requires=["relevancy"])
def relevancy_question(trace: Trace) -> Tensor:
    """Share of the token's relevancy on the question, in [0, 1], by layer.

    Either direction can mean hallucinated; it depends on the model.
    """
    return _share(trace.require("relevancy").question, trace)


@feature("relevancy", higher_means="hallucinated", requires=["relevancy"])
def relevancy_previous(trace: Trace) -> Tensor:
    """Share of the token's relevancy on the earlier answer tokens, in [0, 1], by layer.

    Higher means hallucinated.
    """
    return _share(trace.require("relevancy").answer, trace)


@feature("relevancy", higher_means="grounded", requires=["relevancy"])
def visual_contribution_sum(trace: Trace) -> Tensor:
    """Natural log of summed relevancy to the image over that to question and earlier answer, last layer.

    Lower means hallucinated.
    """
    return _log_ratio(trace.require("relevancy").image[:, -1].sum(-1), _text(trace).sum(-1))


@feature("relevancy", higher_means="grounded", requires=["relevancy"])
def visual_contribution_max(trace: Trace) -> Tensor:
    """Natural log of largest relevancy to the image over that to question and earlier answer, last layer.

    Lower means hallucinated.
    """
    return _log_ratio(trace.require("relevancy").image[:, -1].amax(-1), _text(trace).amax(-1))


@feature("relevancy", higher_means="grounded", requires=["relevancy"])
def visual_contribution_mean(trace: Trace) -> Tensor:
    """Natural log of mean relevancy to image tokens over that to question and earlier answer, last layer.

    Lower means hallucinated.
    """
    relevancy = trace.require("relevancy")
    before = relevancy.question.shape[-1] + np.arange(len(trace.answer.token_ids))
    text = _text(trace).sum(-1) / relevancy.image.new_tensor(np.maximum(before, 1))
    return _log_ratio(relevancy.image[:, -1].mean(-1), text)


@feature("relevancy", higher_means="depends", requires=["relevancy"])
def relevancy_entropy(trace: Trace) -> Tensor:
    """Entropy of the relevancy over image tokens, divided by log N, in [0, 1], last layer.

    Either direction can mean hallucinated; it depends on the model.
    """
    return normalised_entropy(trace.require("relevancy").image[:, -1])


@feature("relevancy", higher_means="grounded", requires=["relevancy"])
def relevancy_peak(trace: Trace) -> Tensor:
    """Share, in [0, 1], of the image relevancy on the most relevant tenth of the image tokens, last layer.

    Lower means hallucinated.
    """
    image = trace.require("relevancy").image[:, -1]
    top = image.topk(max(image.shape[-1] // 10, 1), dim=-1).values.sum(-1)
    return top / image.sum(-1).clamp(min=1e-12)


@cached_on_trace
def _saliency(trace: Trace) -> Tensor:
    """Return the (T, late layers, S) saliency of the later half of the layers, with rows of L2 norm 1.

    Raises:
        CapabilityError: the relevancy has no saliency.
    """
    saliency = trace.require("relevancy").saliency
    if saliency is None:
        raise CapabilityError("the relevancy of this trace holds no saliency, which its features require")
    late = saliency[:, saliency.shape[1] // 2 :]
    return late / late.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _previous_saliency(trace: Trace) -> Tensor:
    """Return the part (T, late layers, A) of ``_saliency`` on earlier answer tokens."""
    return _saliency(trace)[..., trace.require("relevancy").first + 1 :]


@feature("relevancy", higher_means="grounded", requires=["relevancy"])
def saliency_previous(trace: Trace) -> Tensor:
    """Mean gradient saliency on earlier answer tokens in the later half of the layers, in [0, 1].

    Read from the row that predicts the token, divided by its L2 norm; 0 for the first token (LVLMs-Saliency 2026).

    Lower means hallucinated.
    """
    before = np.maximum(np.arange(len(trace.answer.token_ids)), 1)
    values = _previous_saliency(trace)
    return values.sum(-1).mean(-1) / values.new_tensor(before)


@feature("relevancy", higher_means="grounded", requires=["relevancy"])
def saliency_previous_max(trace: Trace) -> Tensor:
    """Largest gradient saliency on an earlier answer token in the later half of the layers, in [0, 1].

    Mean over these layers; the row that predicts the token is divided by its L2 norm.

    Lower means hallucinated.
    """
    values = _previous_saliency(trace)
    return values.amax(-1).mean(-1) if values.shape[-1] else values.sum(-1).mean(-1)


@feature("relevancy", higher_means="depends", requires=["relevancy"])
def saliency_previous_share(trace: Trace) -> Tensor:
    """Share, in [0, 1], of the saliency on earlier answer tokens, mean over the later half of the layers.

    Either direction can mean hallucinated; it depends on the model.
    """
    share = _previous_saliency(trace).sum(-1) / _saliency(trace).sum(-1).clamp(min=1e-12)
    return share.mean(-1)


@feature("relevancy", higher_means="grounded", requires=["relevancy"])
def saliency_image_share(trace: Trace) -> Tensor:
    """Share, in [0, 1], of the saliency on image tokens, mean over the later half of the layers.

    0 in an encoder-decoder model, whose decoder does not see the image in its self-attention.

    Lower means hallucinated.
    """
    relevancy, rows = trace.require("relevancy"), _saliency(trace)
    image = rows[..., list(relevancy.image_positions) if relevancy.encoder is None else []]
    return (image.sum(-1) / rows.sum(-1).clamp(min=1e-12)).mean(-1)
