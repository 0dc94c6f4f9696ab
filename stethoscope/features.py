"""Token features: pure functions of a trace, one named column each (one per layer where a layer is meant).

Every value belongs to the row that *predicts* the token, so it is known before the token is shown. T tokens, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.errors import CaptureError, ConfigError, unknown
from stethoscope.trace import SEGMENTS, Trace

if TYPE_CHECKING:
    from torch import Tensor

FORWARD, EXTRA_FORWARD, BACKWARD = "same forward pass", "one more forward pass", "a backward pass"
COSTS = {"attention": FORWARD, "lens": FORWARD, "blank": EXTRA_FORWARD, "relevancy": BACKWARD}


@dataclass(frozen=True)
class Feature:
    """A named feature.

    Attributes:
        name: column name; features with one column per layer get a suffix ``_l00``, ``_l01``, ...
        group: what configs switch on and off together.
        high: what a high value speaks for, as published: ``hallucinated``, ``grounded`` or ``depends``.
        needs: parts of the trace it reads beyond the logits, of ``stethoscope.trace.NEEDS``.
        function: from a trace to (T,) or (T, columns) values.
    """

    name: str
    group: str
    high: str
    needs: frozenset[str]
    function: Callable[[Trace], Tensor | np.ndarray]

    @property
    def summary(self) -> str:
        """First line of the function's documentation."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    @property
    def cost(self) -> str:
        """What the feature costs beyond generating the answer."""
        costs = [COSTS[need] for need in self.needs]
        return max(costs, key=[FORWARD, EXTRA_FORWARD, BACKWARD].index, default=FORWARD)


FEATURES: dict[str, Feature] = {}


def feature(group: str, high: str, needs: Iterable[str] = ()) -> Callable:
    """Registers the decorated function under its own name."""

    def register(function: Callable[[Trace], Tensor | np.ndarray]) -> Callable[[Trace], Tensor | np.ndarray]:
        name = function.__name__
        FEATURES[name] = Feature(name, group, high, frozenset(needs), function)
        return function

    return register


# --- uncertainty: the distribution that the token was taken from ----------------------------------------------------


def _token_logprob(logits: Tensor, trace: Trace) -> Tensor:
    """(T,) log-probability of the answer's own tokens under (T, V) logits."""
    ids = logits.new_tensor(trace.answer.token_ids).long()
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def _entropy(logits: Tensor) -> Tensor:
    """(T,) Shannon entropy of (T, V) logits in nats."""
    logprob = logits.log_softmax(-1)
    return -(logprob.exp() * logprob).sum(-1)


@feature("uncertainty", high="hallucinated")
def nll(trace: Trace) -> Tensor:
    """Negative log-probability of the token, in nats (LURE, Zhou et al. 2024)."""
    return -_token_logprob(trace.logits, trace)


@feature("uncertainty", high="hallucinated")
def entropy(trace: Trace) -> Tensor:
    """Entropy of the predicted distribution, in nats (Malinin & Gales 2021)."""
    return _entropy(trace.logits)


@feature("uncertainty", high="grounded")
def max_prob(trace: Trace) -> Tensor:
    """Largest probability, in [0, 1]; the token's own under greedy decoding."""
    return trace.logits.softmax(-1).amax(-1)


@feature("uncertainty", high="grounded")
def margin(trace: Trace) -> Tensor:
    """Largest minus second largest probability, in [0, 1]."""
    top = trace.logits.softmax(-1).topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


# --- position and repetition: the prior that every detector must be compared with ------------------------------------


@feature("position", high="hallucinated")
def position(trace: Trace) -> np.ndarray:
    """Index of the token in the answer, from 0."""
    return np.arange(len(trace.answer.token_ids))


@feature("position", high="hallucinated")
def log_position(trace: Trace) -> np.ndarray:
    """log(1 + index of the token in the answer)."""
    return np.log1p(position(trace))


@feature("position", high="grounded")
def repetition(trace: Trace) -> np.ndarray:
    """How often the same token id stands earlier in the answer."""
    ids = trace.answer.token_ids
    return np.array([ids[:index].count(token) for index, token in enumerate(ids)])


# --- attention of the predicting row --------------------------------------------------------------------------------


def _mass(trace: Trace, segment: str) -> Tensor:
    """(T, L) head-mean attention mass on a segment, in [0, 1]."""
    return trace.mass[..., SEGMENTS.index(segment)].mean(-1)


@feature("attention", high="grounded", needs=["attention"])
def attn_image(trace: Trace) -> Tensor:
    """Attention mass on the image tokens, mean over heads, by layer (VAR, Jiang et al. 2025)."""
    return _mass(trace, "image")


@feature("attention", high="depends", needs=["attention"])
def attn_question(trace: Trace) -> Tensor:
    """Attention mass on the question, mean over heads, by layer."""
    return _mass(trace, "question")


@feature("attention", high="hallucinated", needs=["attention"])
def attn_previous(trace: Trace) -> Tensor:
    """Attention mass on the earlier answer tokens, mean over heads, by layer (layer 0: PAS, Hoang-Xuan et al. 2026)."""
    return _mass(trace, "previous")


@feature("attention", high="depends", needs=["attention"])
def attn_first(trace: Trace) -> Tensor:
    """Attention mass on the first token of the sequence, mean over heads, by layer."""
    return _mass(trace, "first")


@feature("attention", high="grounded", needs=["attention"])
def svar(trace: Trace) -> Tensor:
    """Summed visual attention ratio: ``attn_image`` summed over the middle layers (SVAR, Jiang et al. 2025).

    Layers at 15 % to 55 % of the depth, which are the published 5 to 18 for 32 layers.
    """
    layers = trace.mass.shape[1]
    return _mass(trace, "image")[:, round(0.15 * layers) : round(0.55 * layers) + 1].sum(-1)


def _normalised_entropy(values: Tensor) -> Tensor:
    """(...) entropy of non-negative (..., N) values, normalised to sum 1, over log N."""
    share = values / values.sum(-1, keepdim=True).clamp(min=1e-12)
    return -(share * share.clamp(min=1e-12).log()).sum(-1) / math.log(max(values.shape[-1], 2))


@feature("attention", high="depends", needs=["attention"])
def attn_entropy(trace: Trace) -> Tensor:
    """Entropy of the head-mean attention over image tokens divided by log N, in [0, 1], by layer."""
    return _normalised_entropy(trace.image_attention)


# --- logit lens -----------------------------------------------------------------------------------------------------


@feature("lens", high="depends", needs=["lens"])
def lens_rank(trace: Trace) -> Tensor:
    """log(1 + rank) of the token when the residual stream after a layer is decoded, for all layers but the last."""
    return trace.lens_rank[:, :-1].float().log1p()


@feature("lens", high="depends", needs=["lens"])
def lens_logprob(trace: Trace) -> Tensor:
    """Log-probability of the token when the residual stream after a layer is decoded, for all layers but the last."""
    return trace.lens_logprob[:, :-1]


# --- contrast with a blank image ------------------------------------------------------------------------------------


@feature("blank", high="grounded", needs=["blank"])
def pmi(trace: Trace) -> Tensor:
    """log p(token | image) - log p(token | blank image), in nats: what the picture adds to the token."""
    return _token_logprob(trace.logits, trace) - _token_logprob(trace.blank_logits, trace)


@feature("blank", high="grounded", needs=["blank"])
def blank_entropy_difference(trace: Trace) -> Tensor:
    """Entropy with a blank image minus entropy with the image, in nats (IS_blank of VAUQ, 2026)."""
    return _entropy(trace.blank_logits) - _entropy(trace.logits)


@feature("blank", high="grounded", needs=["blank"])
def blank_divergence(trace: Trace) -> Tensor:
    """Kullback-Leibler divergence from the blank-image distribution to the one with the image, in nats, at least 0."""
    logprob, blank = trace.logits.log_softmax(-1), trace.blank_logits.log_softmax(-1)
    return (logprob.exp() * (logprob - blank)).sum(-1).clamp(min=0)


# --- relevancy: what the token was written from, by gradient-weighted attention --------------------------------------


def _share(part: Tensor, trace: Trace) -> Tensor:
    """(T, L) share of the whole row's relevancy; 0 where the row has none."""
    return part.sum(-1) / trace.relevancy.total.clamp(min=1e-12)


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
    return _normalised_entropy(trace.relevancy.image[:, -1])


@feature("relevancy", high="grounded", needs=["relevancy"])
def relevancy_peak(trace: Trace) -> Tensor:
    """Share of the image relevancy that lies on the most relevant tenth of the image tokens, last layer."""
    image = trace.relevancy.image[:, -1]
    top = image.topk(max(image.shape[-1] // 10, 1), dim=-1).values.sum(-1)
    return top / image.sum(-1).clamp(min=1e-12)


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


GROUPS = tuple(dict.fromkeys(item.group for item in FEATURES.values()))


class FeatureSet:
    """The features of a run, chosen by group and by name.

    Attributes:
        features: the chosen features in the order of the catalogue.
        needs: what a trace must hold for them.
    """

    def __init__(self, groups: Sequence[str] = GROUPS, names: Sequence[str] = (), without: Sequence[str] = ()) -> None:
        """Chooses all features of ``groups`` plus ``names``, less ``without``.

        Raises:
            ConfigError: a group or name is not known, or nothing is left.
        """
        for group in groups:
            if group not in GROUPS:
                raise ConfigError(unknown("feature group", group, GROUPS))
        for name in [*names, *without]:
            if name not in FEATURES:
                raise ConfigError(unknown("feature", name, FEATURES))
        self.features = tuple(
            item
            for item in FEATURES.values()
            if (item.group in groups or item.name in names) and item.name not in without
        )
        if not self.features:
            raise ConfigError("no feature is left; choose groups of " + ", ".join(GROUPS))
        self.needs = frozenset().union(*(item.needs for item in self.features))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features, without layer suffixes."""
        return tuple(item.name for item in self.features)

    def compute(self, trace: Trace) -> Mapping[str, np.ndarray]:
        """All columns for one trace: name to (T,) float32.

        Raises:
            CaptureError: a value is not finite; the message names the feature.
        """
        columns: dict[str, np.ndarray] = {}
        for item in self.features:
            values = np.asarray(item.function(trace), dtype=np.float32)
            if not np.isfinite(values).all():
                raise CaptureError(f"feature {item.name!r} gave a value that is not finite")
            if values.ndim == 1:
                columns[item.name] = values
            else:
                columns.update({f"{item.name}_l{layer:02d}": values[:, layer] for layer in range(values.shape[1])})
        return columns
