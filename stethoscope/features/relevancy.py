"""Relevancy: what the token was written from, by gradient-weighted attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stethoscope.features.common import normalised_entropy, once
from stethoscope.features.registry import feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace


def _share(part: Tensor, trace: Trace) -> Tensor:
    """(T, L) share of the whole row's relevancy; 0 where the row has none."""
    return part.sum(-1) / trace.relevancy.total.clamp(min=1e-12)


@once
def _text(trace: Trace) -> Tensor:
    """(T, text) relevancy to question and earlier answer tokens after the last layer."""
    relevancy = trace.relevancy
    parts = relevancy.question[:, -1], relevancy.answer[:, -1]
    return parts[0].new_tensor(np.concatenate(parts, -1))


def _log_ratio(image: Tensor, text: Tensor) -> Tensor:
    """(T,) log of the visual contribution R_image / R_text, within what float32 can tell from nothing."""
    floor = 1e-9
    return (image.clamp(min=floor) / text.clamp(min=floor)).log()


@feature("relevancy", high="grounded", needs=["relevancy"])
def relevancy_image(trace: Trace) -> Tensor:
    """Share of the token's relevancy that lies on the image tokens, in [0, 1], by layer (Chefer et al. 2021)."""
    return _share(trace.relevancy.image, trace)


@feature("relevancy", high="depends", needs=["relevancy"])
def relevancy_question(trace: Trace) -> Tensor:
    """Share of the token's relevancy that lies on the question, in [0, 1], by layer."""
    return _share(trace.relevancy.question, trace)


@feature("relevancy", high="hallucinated", needs=["relevancy"])
def relevancy_previous(trace: Trace) -> Tensor:
    """Share of the token's relevancy that lies on the earlier answer tokens, in [0, 1], by layer."""
    return _share(trace.relevancy.answer, trace)


@feature("relevancy", high="grounded", needs=["relevancy"])
def visual_contribution_sum(trace: Trace) -> Tensor:
    """log of summed relevancy to the image over summed relevancy to question and earlier answer, last layer."""
    return _log_ratio(trace.relevancy.image[:, -1].sum(-1), _text(trace).sum(-1))


@feature("relevancy", high="grounded", needs=["relevancy"])
def visual_contribution_max(trace: Trace) -> Tensor:
    """The same with the largest relevancy instead of the sum."""
    return _log_ratio(trace.relevancy.image[:, -1].amax(-1), _text(trace).amax(-1))


@feature("relevancy", high="grounded", needs=["relevancy"])
def visual_contribution_mean(trace: Trace) -> Tensor:
    """The same with the mean, over image tokens and over the text tokens that stand before the token."""
    relevancy = trace.relevancy
    before = relevancy.question.shape[-1] + np.arange(len(trace.answer.token_ids))
    text = _text(trace).sum(-1) / relevancy.image.new_tensor(np.maximum(before, 1))
    return _log_ratio(relevancy.image[:, -1].mean(-1), text)


@feature("relevancy", high="depends", needs=["relevancy"])
def relevancy_entropy(trace: Trace) -> Tensor:
    """Entropy of the relevancy over image tokens divided by log N, in [0, 1], last layer."""
    return normalised_entropy(trace.relevancy.image[:, -1])


@feature("relevancy", high="grounded", needs=["relevancy"])
def relevancy_peak(trace: Trace) -> Tensor:
    """Share of the image relevancy that lies on the most relevant tenth of the image tokens, last layer."""
    image = trace.relevancy.image[:, -1]
    top = image.topk(max(image.shape[-1] // 10, 1), dim=-1).values.sum(-1)
    return top / image.sum(-1).clamp(min=1e-12)


@once
def _saliency(trace: Trace) -> Tensor:
    """(T, late layers, S) saliency of the later half of the layers, every row divided by its L2 norm."""
    saliency = trace.relevancy.saliency
    late = saliency[:, saliency.shape[1] // 2 :]
    return late / late.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _previous_saliency(trace: Trace) -> Tensor:
    """(T, late layers, A) of ``_saliency``, on earlier answer tokens."""
    return _saliency(trace)[..., trace.relevancy.first + 1 :]


@feature("relevancy", high="grounded", needs=["relevancy"])
def saliency_previous(trace: Trace) -> Tensor:
    """Gradient saliency on earlier answer tokens, mean over them and the later half of the layers, in [0, 1].

    From the row that predicts the token, divided by its L2 norm; 0 for the first token (LVLMs-Saliency 2026).
    """
    before = np.maximum(np.arange(len(trace.answer.token_ids)), 1)
    values = _previous_saliency(trace)
    return values.sum(-1).mean(-1) / values.new_tensor(before)


@feature("relevancy", high="grounded", needs=["relevancy"])
def saliency_previous_max(trace: Trace) -> Tensor:
    """The same for the most salient earlier answer token, in [0, 1]."""
    values = _previous_saliency(trace)
    return values.amax(-1).mean(-1) if values.shape[-1] else values.sum(-1).mean(-1)


@feature("relevancy", high="depends", needs=["relevancy"])
def saliency_previous_share(trace: Trace) -> Tensor:
    """Share of the row's saliency that lies on earlier answer tokens, mean over the later half of the layers."""
    share = _previous_saliency(trace).sum(-1) / _saliency(trace).sum(-1).clamp(min=1e-12)
    return share.mean(-1)


@feature("relevancy", high="grounded", needs=["relevancy"])
def saliency_image_share(trace: Trace) -> Tensor:
    """Share of the row's saliency that lies on image tokens, mean over the later half of the layers.

    0 in an encoder-decoder model, whose decoder's own attention sees no image.
    """
    relevancy, rows = trace.relevancy, _saliency(trace)
    image = rows[..., list(relevancy.image_at) if relevancy.encoder is None else []]
    return (image.sum(-1) / rows.sum(-1).clamp(min=1e-12)).mean(-1)
