"""Diagnosis of one answer: its tokens, mentions and verdicts, as numbers, a table for pandas, pages and plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.core.types import Answer
from stethoscope.diagnosis import render
from stethoscope.relevancy.heatmaps import heat, overlay, relevancy_tiles
from stethoscope.tracing.token_spans import Box, TokenRegions

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from stethoscope.detection.visual_consistency import NamedProbability
    from stethoscope.relevancy import Relevancy

CONTRIBUTIONS = ("sum", "max", "mean")
SHARES = ("image", "question", "answer", "rest")
_FLOOR = 1e-9  # what float32 can tell from nothing; as in the features of the same name

Pushes = tuple[tuple[str, float], ...]
"""Features and what they add to the evidence, in log-odds, strongest first; above 0 it speaks for hallucination."""


@dataclass(frozen=True)
class TokenVerdict:
    """A detector's verdict on a token or a mention.

    Attributes:
        probability: that it is hallucinated. Calibrated for names of objects, from which detectors learn; of other
            tokens it is what the detector extrapolates to, for curiosity only.
        evidence, prior: log-odds that add up to those of the probability (``stethoscope.detection.explain``); None
            where the detector's calibration does not add up.
        top: the features that push it the most; empty unless the detector is linear.
        visual_evidence: objects that the attended image evidence resembles, most probable first, None for nothing known
            (``Detector.visual_evidence``); empty for other tokens and where the detector does not learn it.
    """

    probability: float
    evidence: float | None = None
    prior: float | None = None
    top: Pushes = ()
    visual_evidence: tuple[NamedProbability, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Write it for JSON, rounded."""
        return {
            "probability": _short(self.probability),
            "evidence": _short(self.evidence),
            "prior": _short(self.prior),
            "top": [{"feature": name, "push": _short(push)} for name, push in self.top],
            "visual_evidence": [
                {"object": name, "probability": _short(chance)} for name, chance in self.visual_evidence
            ],
        }


@dataclass(frozen=True)
class DiagnosedMention:
    """An object that the answer names, with the detector's verdict.

    Attributes:
        object: canonical name.
        start, end: characters of the answer.
        tokens: indices of the tokens that say it.
        verdict: None without a detector.
        warned: the probability is at or above the detector's threshold.
    """

    object: str
    start: int
    end: int
    tokens: tuple[int, ...]
    verdict: TokenVerdict | None = None
    warned: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Write it for JSON."""
        judged = {} if self.verdict is None else {**self.verdict.to_dict(), "warned": self.warned}
        return {"object": self.object, "start": self.start, "end": self.end, "tokens": list(self.tokens), **judged}


@dataclass(frozen=True, eq=False)
class LensTrajectory:
    """Predictions of every layer, decoded by the model's own final norm and head (logit lens).

    Attributes:
        words: T x L x k most probable words, best first.
        probabilities: (T, L, k) float32, theirs.
        rank: (T, L) int64 rank of the token that was said, 0 for the most probable.
        logprob: (T, L) float32, its natural-log probability.
        said: T texts of the tokens as the vocabulary has them, to be found among ``words``.
    """

    words: tuple[tuple[tuple[str, ...], ...], ...]
    probabilities: np.ndarray
    rank: np.ndarray
    logprob: np.ndarray
    said: tuple[str, ...]

    def to_list(self, token: int) -> list[dict[str, Any]]:
        """Write the layers of one token for JSON, a dictionary each."""
        return [
            {
                "rank": int(self.rank[token, layer]),
                "probability": _short(float(np.exp(self.logprob[token, layer]))),
                "top": [
                    {"word": word, "probability": _short(float(value))}
                    for word, value in zip(words, self.probabilities[token, layer], strict=True)
                ],
            }
            for layer, words in enumerate(self.words[token])
        ]


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """One answer of T tokens, with everything that is known of it.

    Attributes:
        model: name of the adapter.
        image: the picture, RGB. ``question``: what was asked. ``question_tokens``: the tokens that say it.
        answer: text, token ids, character offsets and log-probabilities.
        entropy: (T,) float32 of the distribution that each token was taken from, in nats.
        verdicts: of the detector on every token; empty without a detector.
        mentions: objects that the answer names, in reading order.
        threshold: probability at or above which the detector warns; None without a detector.
        relevancy: of every token after every layer; None where the model cannot give it.
        places: where image tokens and patches lie in the picture.
        evolution: the logit lens; None where the model cannot give it.
        notes: what is missing and why, in words.
        seconds: time spent by stage.
        scope: of the gradient of ``relevancy``, ``row`` or ``token``.
    """

    model: str
    image: Image
    question: str
    answer: Answer
    entropy: np.ndarray
    question_tokens: tuple[str, ...] = ()
    verdicts: tuple[TokenVerdict, ...] = ()
    mentions: tuple[DiagnosedMention, ...] = ()
    threshold: float | None = None
    relevancy: Relevancy | None = None
    places: TokenRegions | None = None
    evolution: LensTrajectory | None = None
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    scope: str = "row"

    def __repr__(self) -> str:
        return f"Diagnosis({self.model!r}, {self.question!r}, {self.answer.text!r}, warned={[*map(str, self.warned)]})"

    def __len__(self) -> int:
        """Count the answer tokens."""
        return len(self.answer.token_ids)

    @property
    def warned(self) -> tuple[str, ...]:
        """List the objects that the detector warns of, in reading order."""
        return tuple(mention.object for mention in self.mentions if mention.warned)

    @property
    def probability(self) -> np.ndarray:
        """Compute (T,) probability of every token under the model's own distribution, in [0, 1]."""
        return np.exp(np.array(self.answer.logprobs))

    @property
    def warning(self) -> np.ndarray | None:
        """Return (T,) calibrated probability that the named object is hallucinated; NaN where a token names none.

        Detectors learn from names of objects, so ``verdicts`` of other tokens are no calibrated probabilities.
        """
        if not self.verdicts:
            return None
        values = np.full(len(self), np.nan)
        for mention in self.mentions:
            if mention.verdict is not None:
                values[list(mention.tokens)] = mention.verdict.probability
        return values

    @cached_property
    def shares(self) -> dict[str, np.ndarray]:
        """Compute (T, L) shares of the relevancy, on ``image``, ``question``, ``answer`` (earlier) and ``rest``."""
        return shares(self._relevancy)

    @cached_property
    def contributions(self) -> dict[str, np.ndarray]:
        """Compute (T, L) visual contribution log(R_image / R_text), by ``sum``, ``max`` and ``mean``."""
        return contributions(self._relevancy)

    @property
    def _relevancy(self) -> Relevancy:
        if self.relevancy is None:
            raise CapabilityError("; ".join(self.notes) or f"{self.model} gives no relevancy")
        return self.relevancy

    def mention_of(self, token: int) -> DiagnosedMention | None:
        """Return the mention that a token is part of; None if it is part of none."""
        return next((mention for mention in self.mentions if token in mention.tokens), None)

    def _raw(self, raw: bool | None) -> bool:
        return bool(self.places is not None and self.places.grids) if raw is None else raw

    def _check(self, token: int, layer: int) -> None:
        layers = self._relevancy.image.shape[1]
        if not -len(self) <= token < len(self):
            raise ConfigError(f"token={token} is not one of the answer's {len(self)} tokens, 0 to {len(self) - 1}")
        if not -layers <= layer < layers:
            raise ConfigError(f"layer={layer} is not one of the model's {layers} layers, 0 to {layers - 1}")

    def heat_map(
        self, token: int, layer: int = -1, raw: bool | None = None, shape: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Spread the relevancy of one token over the image, as the processor cropped, padded and tiled it.

        Args:
            token: index in the answer. ``layer``: of the language model, the last by default.
            raw: of the image tokens; False carries it on through the vision tower to its patches. None: raw, unless
                image tokens are no grid (queries of a Q-Former).
            shape: rows and columns of the map; those of the picture by default.

        Returns:
            (height, width) float64, at least 0. It sums to the relevancy of all image tokens (or patches), less what
            lies on padding; 0 where the model does not see the picture.

        Raises:
            ConfigError: there is no such token or layer.
            CapabilityError: the model gives no relevancy, or its image tokens are no grid.
        """
        self._check(token, layer)
        tiles, boxes = relevancy_tiles(self._relevancy, self.places, self._raw(raw), (token, layer))
        return heat(tiles, boxes, self.image.size, shape or (self.image.height, self.image.width))

    def heat_maps(self, shape: tuple[int, int], layers: list[int], raw: bool | None = None) -> np.ndarray:
        """Make the heat maps of all tokens and some layers at once, (T, layers, *shape)."""
        chosen = (slice(None), layers)
        tiles, boxes = relevancy_tiles(self._relevancy, self.places, self._raw(raw), chosen)
        return heat(tiles, boxes, self.image.size, shape)

    def regions(self, token: int, count: int = 3, layer: int = -1) -> list[tuple[Box, float]]:
        """List the parts of the image that are most relevant to a token, best first.

        Returns:
            Boxes in pixels, within the picture, and their shares of the relevancy of all image tokens (or patches).
        """
        self._check(token, layer)
        tiles, boxes = relevancy_tiles(self._relevancy, self.places, self._raw(None), (token, layer))
        cells = []
        width, height = self.image.size
        total = max(float(sum(tile.sum() for tile in tiles)), 1e-12)
        for tile, box in zip(tiles, boxes, strict=True):
            if box is None:
                continue
            xs, ys = np.linspace(box[0], box[2], tile.shape[1] + 1), np.linspace(box[1], box[3], tile.shape[0] + 1)
            xs, ys = xs.clip(0, width), ys.clip(0, height)
            for (row, column), value in np.ndenumerate(tile):
                cell = (float(xs[column]), float(ys[row]), float(xs[column + 1]), float(ys[row + 1]))
                if value > 0 and cell[0] < cell[2] and cell[1] < cell[3]:
                    cells.append((cell, float(value) / total))
        return sorted(cells, key=lambda pair: -pair[1])[:count]

    def picture(self, token: int, layer: int = -1, raw: bool | None = None, opacity: float = 0.6) -> Image:
        """Draw the image under the token's heat map, at least 480 pixels wide."""
        return overlay(self.image, self.heat_map(token, layer, raw), opacity)

    def to_dict(self) -> dict[str, Any]:
        """Write everything but pixels for JSON: floats rounded, heat maps of the last layer on image tokens."""
        warning = self.warning
        return {
            "model": self.model,
            "question": self.question,
            "answer": self.answer.text,
            "finished": self.answer.finished,
            "image": {"width": self.image.width, "height": self.image.height},
            "scope": self.scope,
            "threshold": self.threshold,
            "warned": list(self.warned),
            "mentions": [mention.to_dict() for mention in self.mentions],
            "tokens": [self._token(index, warning) for index in range(len(self))],
            "question_tokens": list(self.question_tokens),
            "grids": [list(grid) for grid, _ in self.places.grids] if self.places else [],
            "notes": list(self.notes),
            "seconds": {stage: round(value, 4) for stage, value in self.seconds.items()},
        }

    def _token(self, index: int, warning: np.ndarray | None) -> dict[str, Any]:
        start, end = self.answer.offsets[index]
        section: dict[str, Any] = {
            "text": self.answer.tokens[index],
            "id": self.answer.token_ids[index],
            "start": start,
            "end": end,
            "probability": round(float(self.probability[index]), 6),
            "entropy": round(float(self.entropy[index]), 6),
        }
        if warning is not None:
            value = float(warning[index])
            section["warning"] = None if np.isnan(value) else round(value, 6)
            section["verdict"] = self.verdicts[index].to_dict()
        if self.evolution is not None:
            section["evolution"] = self.evolution.to_list(index)
        if self.relevancy is not None:
            section["relevancy"] = {
                "shares": {name: _list(values[index]) for name, values in self.shares.items()},
                "contribution": {name: _list(values[index]) for name, values in self.contributions.items()},
                "image": _list(self.relevancy.image[index, -1].numpy()),
                "question": _list(self.relevancy.question[index, -1].numpy()),
                "answer": _list(self.relevancy.answer[index, -1, :index].numpy()),
            }
        return section

    def to_frame(self) -> pd.DataFrame:
        """Make a table with a row per token; shares and contributions are those of the last layer."""
        import pandas as pd

        owners = [self.mention_of(index) for index in range(len(self))]
        columns: dict[str, Any] = {
            "text": self.answer.tokens,
            "token_id": self.answer.token_ids,
            "start": [start for start, _ in self.answer.offsets],
            "end": [end for _, end in self.answer.offsets],
            "probability": self.probability,
            "entropy": self.entropy,
            "object": [owner.object if owner else "" for owner in owners],
        }
        if self.verdicts:
            columns["warning"] = self.warning
            columns["warned"] = [bool(owner and owner.warned) for owner in owners]
            for name in ("evidence", "prior"):
                columns[name] = [getattr(verdict, name) for verdict in self.verdicts]
        if self.relevancy is not None:
            columns |= {f"share_{name}": values[:, -1] for name, values in self.shares.items()}
            columns |= {f"contribution_{name}": values[:, -1] for name, values in self.contributions.items()}
        return pd.DataFrame(columns)

    def plot(self, token: int, layer: int = -1, raw: bool | None = None) -> Figure:
        """Plot the token's heat map, its relevancy by part and its rank by layer, as a matplotlib figure."""
        return render.figure(self, token, layer, raw)

    def _repr_html_(self) -> str:
        """Write it for notebooks: tokens coloured by warning, mentions with their heat maps; text is escaped."""
        return render.notebook(self)

    def to_html(self) -> str:
        """Write a page that opens anywhere: nothing is fetched, the model's text is escaped."""
        return render.page(self)


def _list(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def contributions(relevancy: Relevancy) -> dict[str, np.ndarray]:
    """Compute log(R_image / R_text) by layer, from sums, largest values and means; text is question and earlier answer.

    The same as the features ``visual_contribution_*``, which read the last layer.

    Returns:
        For each of ``CONTRIBUTIONS`` (T, L) float64.
    """
    image = relevancy.image.double().numpy()
    text = np.concatenate([relevancy.question.double().numpy(), relevancy.answer.double().numpy()], -1)
    before = relevancy.question.shape[-1] + np.array(relevancy.tokens)
    pairs = {
        "sum": (image.sum(-1), text.sum(-1)),
        "max": (image.max(-1), text.max(-1)),
        "mean": (image.mean(-1), text.sum(-1) / np.maximum(before, 1)[:, None]),
    }
    return {
        name: np.log(of_image.clip(min=_FLOOR) / of_text.clip(min=_FLOOR))
        for name, (of_image, of_text) in pairs.items()
    }


def shares(relevancy: Relevancy) -> dict[str, np.ndarray]:
    """Compute for each of ``SHARES`` its (T, L) share of the whole row's relevancy, in [0, 1]; they add up to 1."""
    total = relevancy.total.numpy().clip(min=1e-12)
    return {name: getattr(relevancy, name).sum(-1).numpy() / total for name in SHARES}


def _short(value: float | None) -> float | None:
    return None if value is None else round(float(value), 6)
