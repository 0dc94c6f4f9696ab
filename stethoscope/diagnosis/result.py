"""What ``diagnose`` gives back: numbers for programs, a table for pandas, pictures for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.core.types import Answer
from stethoscope.diagnosis.parts import Evolution, Judgement, Named, contributions, shares
from stethoscope.relevancy.heatmaps import heat, overlay, relevancy_tiles
from stethoscope.tracing.token_spans import Box, TokenRegions

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from stethoscope.relevancy import Relevancy


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """One answer of T tokens, looked at from all sides.

    Attributes:
        model: name of the adapter.
        image: the picture, RGB. ``question``: what was asked. ``question_tokens``: the tokens that say it.
        answer: text, token ids, character offsets and log-probabilities.
        entropy: (T,) float32 of the distribution that each token was taken from, in nats.
        judgements: what the detector says of every token; empty without a detector.
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
    judgements: tuple[Judgement, ...] = ()
    mentions: tuple[Named, ...] = ()
    threshold: float | None = None
    relevancy: Relevancy | None = None
    places: TokenRegions | None = None
    evolution: Evolution | None = None
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    scope: str = "row"

    def __repr__(self) -> str:
        return f"Diagnosis({self.model!r}, {self.question!r}, {self.answer.text!r}, warned={[*map(str, self.warned)]})"

    def __len__(self) -> int:
        """Number of answer tokens."""
        return len(self.answer.token_ids)

    @property
    def warned(self) -> tuple[str, ...]:
        """Names of the objects that the detector warns of, in reading order."""
        return tuple(mention.object for mention in self.mentions if mention.warned)

    @property
    def probability(self) -> np.ndarray:
        """(T,) probability of every token under the model's own distribution, in [0, 1]."""
        return np.exp(np.array(self.answer.logprobs))

    @property
    def warning(self) -> np.ndarray | None:
        """(T,) calibrated probability that the object which a token names is hallucinated; NaN where it names none.

        Detectors learn from names of objects, so ``judgements`` of other tokens are no calibrated probabilities.
        """
        if not self.judgements:
            return None
        values = np.full(len(self), np.nan)
        for mention in self.mentions:
            if mention.judgement is not None:
                values[list(mention.tokens)] = mention.judgement.probability
        return values

    @cached_property
    def shares(self) -> dict[str, np.ndarray]:
        """(T, L) share of the relevancy on ``image``, ``question``, ``answer`` (earlier tokens) and ``rest``."""
        return shares(self._relevancy)

    @cached_property
    def contributions(self) -> dict[str, np.ndarray]:
        """(T, L) visual contribution log(R_image / R_text), by ``sum``, ``max`` and ``mean``."""
        return contributions(self._relevancy)

    @property
    def _relevancy(self) -> Relevancy:
        if self.relevancy is None:
            raise CapabilityError("; ".join(self.notes) or f"{self.model} gives no relevancy")
        return self.relevancy

    def mention_of(self, token: int) -> Named | None:
        """The mention that a token is part of."""
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
        """Relevancy of one token over the picture, as the processor cropped, padded and tiled it.

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
        """(T, layers, *shape) the same of all tokens and of some layers at once."""
        chosen = (slice(None), layers)
        tiles, boxes = relevancy_tiles(self._relevancy, self.places, self._raw(raw), chosen)
        return heat(tiles, boxes, self.image.size, shape)

    def regions(self, token: int, count: int = 3, layer: int = -1) -> list[tuple[Box, float]]:
        """The parts of the picture that are most relevant to a token, best first.

        Returns:
            Boxes in pixels, within the picture, and their shares of the relevancy of all image tokens (or patches).
        """
        self._check(token, layer)
        tiles, boxes = relevancy_tiles(self._relevancy, self.places, self._raw(None), (token, layer))
        found = []
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
                    found.append((cell, float(value) / total))
        return sorted(found, key=lambda pair: -pair[1])[:count]

    def picture(self, token: int, layer: int = -1, raw: bool | None = None, opacity: float = 0.6) -> Image:
        """The picture under the token's heat map, at least 480 pixels wide."""
        return overlay(self.image, self.heat_map(token, layer, raw), opacity)

    def to_dict(self) -> dict[str, Any]:
        """Everything but pixels, JSON-able: floats rounded, heat maps of the last layer as they are on image tokens."""
        warning = self.warning
        found = {
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
        return found

    def _token(self, index: int, warning: np.ndarray | None) -> dict[str, Any]:
        start, end = self.answer.offsets[index]
        found: dict[str, Any] = {
            "text": self.answer.tokens[index],
            "id": self.answer.token_ids[index],
            "start": start,
            "end": end,
            "probability": round(float(self.probability[index]), 6),
            "entropy": round(float(self.entropy[index]), 6),
        }
        if warning is not None:
            value = float(warning[index])
            found["warning"] = None if np.isnan(value) else round(value, 6)
            found["judgement"] = self.judgements[index].to_dict()
        if self.evolution is not None:
            found["evolution"] = self.evolution.to_list(index)
        if self.relevancy is not None:
            found["relevancy"] = {
                "shares": {name: _list(values[index]) for name, values in self.shares.items()},
                "contribution": {name: _list(values[index]) for name, values in self.contributions.items()},
                "image": _list(self.relevancy.image[index, -1].numpy()),
                "question": _list(self.relevancy.question[index, -1].numpy()),
                "answer": _list(self.relevancy.answer[index, -1, :index].numpy()),
            }
        return found

    def to_frame(self) -> pd.DataFrame:
        """One row per token: place, probability, entropy, warning, mention, shares and contribution (last layer)."""
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
        if self.judgements:
            columns["warning"] = self.warning
            columns["warned"] = [bool(owner and owner.warned) for owner in owners]
            for name in ("evidence", "prior"):
                columns[name] = [getattr(judgement, name) for judgement in self.judgements]
        if self.relevancy is not None:
            columns |= {f"share_{name}": values[:, -1] for name, values in self.shares.items()}
            columns |= {f"contribution_{name}": values[:, -1] for name, values in self.contributions.items()}
        return pd.DataFrame(columns)

    def plot(self, token: int, layer: int = -1, raw: bool | None = None) -> Figure:
        """The token's heat map beside its relevancy by part and its rank by layer, as a matplotlib figure.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        from stethoscope.diagnosis.figure import figure

        return figure(self, token, layer, raw)

    def _repr_html_(self) -> str:
        """For notebooks: tokens coloured by warning, mentions with their heat maps; text is escaped."""
        from stethoscope.diagnosis.notebook import notebook

        return notebook(self)

    def to_html(self) -> str:
        """A self-contained page that opens anywhere: nothing is fetched, the model's text is escaped."""
        from stethoscope.diagnosis.page import page

        return page(self)


def _list(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
