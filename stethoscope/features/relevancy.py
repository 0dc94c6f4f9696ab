"""Relevancy features: shares of a token's gradient-weighted attention on image, question and earlier answer.

The image evidence that it weights is a vector, which ``detection.visual_consistency`` reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stethoscope.core.token_table import pack_vectors
from stethoscope.features.distributions import cached_on_trace, normalised_entropy
from stethoscope.features.registry import FEATURES, feature

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace

DIMENSIONS, TOKEN_DIMENSIONS = 256, 128
"""Largest number of columns. Wider states are projected onto random directions, which keeps angles to about 6 %."""
TOKEN_GROUPS = frozenset({"hidden", "visual_evidence"})
"""Groups of features beside which a token table has the image tokens: their traces hold them."""


@dataclass(frozen=True)
class RelevancyParts:
    """What the features read of the relevancy of T tokens after L layers, computed once per trace.

    Attributes:
        total: (T, L) sum of the whole row, at least 1e-12.
        image: (T, L, N) over image tokens; ``question``: (T, L, Q); ``answer``: (T, L, A) over earlier answer tokens.
        last_image: (T, N) over image tokens after the last layer.
        last_text: (T, Q + A) over question and earlier answer after the last layer.
    """

    total: Tensor
    image: Tensor
    question: Tensor
    answer: Tensor
    last_image: Tensor
    last_text: Tensor


@cached_on_trace
def _parts(trace: Trace) -> RelevancyParts:
    relevancy = trace.require("relevancy")
    image, question, answer = relevancy.image, relevancy.question, relevancy.answer
    last_text = question.new_tensor(np.concatenate((question[:, -1], answer[:, -1]), -1))
    return RelevancyParts(relevancy.total.clamp(min=1e-12), image, question, answer, image[:, -1], last_text)


def _log_ratio(image: Tensor, text: Tensor) -> Tensor:
    """Compute the (T,) natural log of R_image / R_text, both clamped to 1e-9 to stay finite."""
    floor = 1e-9
    return (image.clamp(min=floor) / text.clamp(min=floor)).log()


@feature("relevancy", higher_means="grounded", requires=["relevancy"], by_row=True)
def relevancy_image(trace: Trace) -> Tensor:
    """Share of the token's relevancy on the image tokens, in [0, 1], by layer (Chefer et al. 2021).

    Lower means hallucinated.
    """
    parts = _parts(trace)
    return parts.image.sum(-1) / parts.total


@feature("relevancy", higher_means="depends", requires=["relevancy"], by_row=True)
def relevancy_question(trace: Trace) -> Tensor:
    """Share of the token's relevancy on the question, in [0, 1], by layer.

    Either direction can mean hallucinated; it depends on the model.
    """
    parts = _parts(trace)
    return parts.question.sum(-1) / parts.total


@feature("relevancy", higher_means="hallucinated", requires=["relevancy"], by_row=True)
def relevancy_previous(trace: Trace) -> Tensor:
    """Share of the token's relevancy on the earlier answer tokens, in [0, 1], by layer.

    Higher means hallucinated.
    """
    parts = _parts(trace)
    return parts.answer.sum(-1) / parts.total


@feature("relevancy", higher_means="grounded", requires=["relevancy"], by_row=True)
def visual_contribution_sum(trace: Trace) -> Tensor:
    """Natural log of summed relevancy to the image over that to question and earlier answer, last layer.

    Lower means hallucinated.
    """
    parts = _parts(trace)
    return _log_ratio(parts.last_image.sum(-1), parts.last_text.sum(-1))


@feature("relevancy", higher_means="grounded", requires=["relevancy"], by_row=True)
def visual_contribution_max(trace: Trace) -> Tensor:
    """Natural log of largest relevancy to the image over that to question and earlier answer, last layer.

    Lower means hallucinated.
    """
    parts = _parts(trace)
    return _log_ratio(parts.last_image.amax(-1), parts.last_text.amax(-1))


@feature("relevancy", higher_means="grounded", requires=["relevancy"], by_row=True)
def visual_contribution_mean(trace: Trace) -> Tensor:
    """Natural log of mean relevancy to image tokens over that to question and earlier answer, last layer.

    Lower means hallucinated.
    """
    parts = _parts(trace)
    before = parts.question.shape[-1] + trace.positions
    text = parts.last_text.sum(-1) / parts.last_text.new_tensor(np.maximum(before, 1))
    return _log_ratio(parts.last_image.mean(-1), text)


@feature("relevancy", higher_means="depends", requires=["relevancy"], by_row=True)
def relevancy_entropy(trace: Trace) -> Tensor:
    """Entropy of the relevancy over image tokens, divided by log N, in [0, 1], last layer.

    Either direction can mean hallucinated; it depends on the model.
    """
    return normalised_entropy(_parts(trace).last_image)


@feature("relevancy", higher_means="grounded", requires=["relevancy"], by_row=True)
def relevancy_peak(trace: Trace) -> Tensor:
    """Share, in [0, 1], of the image relevancy on the most relevant tenth of the image tokens, last layer.

    Lower means hallucinated.
    """
    image = _parts(trace).last_image
    top = image.topk(max(image.shape[-1] // 10, 1), dim=-1).values.sum(-1)
    return top / image.sum(-1).clamp(min=1e-12)


class SaliencyParts(NamedTuple):
    """Saliency of the later half of the layers, every row divided by its L2 norm.

    Attributes:
        rows: (T, late layers, S) over the whole row.
        previous: (T, late layers, A) over earlier answer tokens; zero for a token itself and those after it.
        image: (T, late layers, N) over image tokens; empty in an encoder-decoder model.
    """

    rows: Tensor
    previous: Tensor
    image: Tensor


@cached_on_trace
def _saliency(trace: Trace) -> SaliencyParts:
    relevancy = trace.require("relevancy")
    saliency = relevancy.require_saliency()
    late = saliency[:, saliency.shape[1] // 2 :]
    rows = late / late.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    image = list(relevancy.image_positions) if relevancy.encoder is None else []
    return SaliencyParts(rows, rows[..., relevancy.first + 1 :], rows[..., image])


@feature("relevancy", higher_means="grounded", requires=["relevancy"], by_row=True)
def saliency_previous(trace: Trace) -> Tensor:
    """Mean gradient saliency on earlier answer tokens in the later half of the layers, in [0, 1].

    Read from the row that predicts the token, divided by its L2 norm; 0 for the first token (LVLMs-Saliency 2026).

    Lower means hallucinated.
    """
    before = np.maximum(trace.positions, 1)
    values = _saliency(trace).previous
    return values.sum(-1).mean(-1) / values.new_tensor(before)


@feature("relevancy", higher_means="grounded", requires=["relevancy"], by_row=True)
def saliency_previous_max(trace: Trace) -> Tensor:
    """Largest gradient saliency on an earlier answer token in the later half of the layers, in [0, 1].

    Mean over these layers; the row that predicts the token is divided by its L2 norm.

    Lower means hallucinated.
    """
    values = _saliency(trace).previous
    return values.amax(-1).mean(-1) if values.shape[-1] else values.sum(-1).mean(-1)


@feature("relevancy", higher_means="depends", requires=["relevancy"], by_row=True)
def saliency_previous_share(trace: Trace) -> Tensor:
    """Share, in [0, 1], of the saliency on earlier answer tokens, mean over the later half of the layers.

    Either direction can mean hallucinated; it depends on the model.
    """
    saliency = _saliency(trace)
    return (saliency.previous.sum(-1) / saliency.rows.sum(-1).clamp(min=1e-12)).mean(-1)


@feature("relevancy", higher_means="grounded", requires=["relevancy"], by_row=True)
def saliency_image_share(trace: Trace) -> Tensor:
    """Share, in [0, 1], of the saliency on image tokens, mean over the later half of the layers.

    0 in an encoder-decoder model, whose decoder does not see the image in its self-attention.

    Lower means hallucinated.
    """
    saliency = _saliency(trace)
    return (saliency.image.sum(-1) / saliency.rows.sum(-1).clamp(min=1e-12)).mean(-1)


@feature("visual_evidence", higher_means="depends", requires=["relevancy"], vector=True)
def attended_embedding(trace: Trace) -> np.ndarray:
    """Image embeddings at the input of the language model, weighted with the token's relevancy, unit-free.

    (T, D), or (T, 256) after a random projection (Johnson and Lindenstrauss) where D is larger. The weights of a token
    are its relevancy to the image tokens after the last layer, divided by their L2 norm, so that a small region counts
    as much as a large one; zero where it has no relevancy to the image. Source: this project; there is no paper.

    Either direction can mean hallucinated; it depends on the model.
    """
    last = trace.require("relevancy").image[:, -1].float().numpy()
    weights = last / np.maximum(np.linalg.norm(last, axis=-1, keepdims=True), 1e-12)
    evidence = weights @ trace.require("image_embeds").numpy()
    return _projected(evidence, DIMENSIONS)


def image_tokens(trace: Trace, columns: Iterable[str]) -> str:
    """Write the image tokens that ``attended_embedding`` weights as text (``pack_vectors``).

    They have ``TOKEN_DIMENSIONS`` dimensions at most, after a random projection as there. The text is empty without
    that feature and hidden states, or where the model does not show its image tokens.

    Args:
        trace: of the answer.
        columns: names of the columns that were computed of it.
    """
    embeds = trace.image_embeds
    if embeds is None or not len(embeds):
        return ""
    return pack_vectors(project_image_tokens(embeds)) if _has_states(tuple(columns)) else ""


@lru_cache(maxsize=16)
def _has_states(columns: tuple[str, ...]) -> bool:
    prefixes = tuple(f"{name}_d" for name, item in FEATURES.items() if item.group in TOKEN_GROUPS)
    return any(name.startswith(prefixes) for name in columns)


def project_image_tokens(embeds: Tensor) -> np.ndarray:
    """Project (N, D) image tokens to ``TOKEN_DIMENSIONS`` where they have more, (N, d) float32."""
    return _projected(embeds.float().cpu().numpy(), TOKEN_DIMENSIONS)


def _projected(vectors: np.ndarray, most: int) -> np.ndarray:
    """Project (N, D) vectors at random where they have more than ``most`` dimensions."""
    size = vectors.shape[-1]
    return vectors if size <= most else vectors @ _directions(size, most)


@lru_cache(maxsize=4)
def _directions(size: int, count: int) -> np.ndarray:
    """Draw ``count`` normal random directions, (size, count) float32, the same on every call."""
    directions = np.random.default_rng(size).standard_normal((size, count)) / count**0.5
    return directions.astype(np.float32)
