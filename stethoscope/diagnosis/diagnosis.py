"""Hold the diagnosis of one answer, and export it as JSON, a pandas table, pages and plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stethoscope.core.errors import CapabilityError, ConfigError, wrong_type
from stethoscope.core.types import Answer
from stethoscope.diagnosis import render
from stethoscope.diagnosis.answer_verdicts import DiagnosedMention, TokenVerdict
from stethoscope.relevancy.heatmaps import OPACITY, heat, image_token_tiles, overlay, relevancy_tiles
from stethoscope.tracing.token_spans import Box, TokenRegions

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from stethoscope.diagnosis.layers_pass import AttentionMaps, LensTrajectory
    from stethoscope.relevancy import Relevancy


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The diagnosis of one answer of T tokens from a language model of L layers.

    Attributes:
        model: name of the adapter.
        image: the picture, RGB.
        question: the prompt's text.
        answer: text, token ids, character offsets and log-probabilities.
        entropy: (T,) float32, of the distribution that predicts each token, in nats, at least 0.
        question_tokens: texts of the question's tokens.
        verdicts: of the detector on every token; empty without a detector.
        mentions: objects that the answer names, in reading order.
        threshold: probability at or above which the detector warns; None without a detector.
        relevancy: of every token after every layer; None if the model cannot compute it.
        token_regions: boxes of image tokens and patches in the picture; None if they are not known.
        evolution: predictions of every layer (logit lens); None if the model cannot compute them.
        attention: raw attention by layer and head; None if the model's attention cannot be recorded.
        notes: explanations of what is missing.
        seconds: time spent by stage.
        scope: of the gradient of ``relevancy``, ``row`` or ``token``.
        shift: one sentence where the picture or the answer is unlike those that the detector was calibrated on, so that
            no probability of it is calibrated; else empty.
        monitored: whether the detector has a monitor of such shifts, so that an empty ``shift`` means none.
        edit: what a mitigation did to the answer, as a run's record has it; empty where nothing was done.
        truth: names of the objects that the picture shows; None where not known. Mentions have labels.
        history: earlier questions about the picture with their answers, which the prompt holds; the oldest first.
        seen: by object that the answer names, (N,) how probable each image token alone makes it that the picture shows
            it, to the detector (``Design.locate``); empty if that reads no image tokens.
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
    token_regions: TokenRegions | None = None
    evolution: LensTrajectory | None = None
    attention: AttentionMaps | None = None
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    scope: str = "row"
    shift: str = ""
    monitored: bool = False
    truth: tuple[str, ...] | None = None
    edit: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[tuple[str, str], ...] = ()
    seen: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Diagnosis({self.model!r}, {self.question!r}, {self.answer.text!r}, warned={[*map(str, self.warned)]})"

    def __len__(self) -> int:
        """Return the number of answer tokens T."""
        return len(self.answer.token_ids)

    @property
    def warned(self) -> tuple[str, ...]:
        """List the objects that the detector warns of, in reading order."""
        return tuple(mention.object for mention in self.mentions if mention.warned)

    @property
    def calibration(self) -> str:
        """Say what the probabilities of the detector are here: ``calibrated``, ``shifted`` or ``unknown``."""
        return "shifted" if self.shift else "calibrated" if self.monitored else "unknown"

    @property
    def outcomes(self) -> dict[str, int]:
        """Count the mentions whose truth is known by their outcome, see ``mention_outcome``."""
        return dict(Counter(mention.outcome for mention in self.mentions if mention.outcome))

    @property
    def token_probability(self) -> np.ndarray:
        """Compute the (T,) probabilities of the tokens under the model's own distribution, in [0, 1]."""
        return np.exp(np.array(self.answer.logprobs))

    @property
    def warning(self) -> np.ndarray | None:
        """Return (T,) probabilities that the named object is hallucinated; NaN for other tokens.

        ``calibration`` says whether they are calibrated. None without a detector. Detectors learn from object names,
        so ``verdicts`` of other tokens are not calibrated.
        """
        if not self.verdicts:
            return None
        values = np.full(len(self), np.nan)
        for mention in self.mentions:
            if mention.verdict is not None:
                values[list(mention.tokens)] = mention.verdict.probability
        return values

    @property
    def shares(self) -> dict[str, np.ndarray]:
        """Shares of the relevancy, see ``Relevancy.shares``."""
        return self._relevancy.shares

    @property
    def contributions(self) -> dict[str, np.ndarray]:
        """Visual contributions, see ``Relevancy.contributions``."""
        return self._relevancy.contributions

    @property
    def _relevancy(self) -> Relevancy:
        if self.relevancy is None:
            raise CapabilityError("; ".join(self.notes) or f"{self.model} gives no relevancy")
        return self.relevancy

    def mention_of(self, token: int) -> DiagnosedMention | None:
        """Return the mention that a token is part of, if any."""
        return next((mention for mention in self.mentions if token in mention.tokens), None)

    def relevancy_tiles(
        self, index: tuple[int | slice, int | list[int]], raw: bool | None = None
    ) -> tuple[list[np.ndarray], list[Box | None]]:
        """Select the relevancy of image tokens or patches as tiles, with their boxes in the image.

        Args:
            index: of tokens and layers.
            raw: as in ``heat_map``.

        Raises:
            CapabilityError: the model gives no relevancy, or its image tokens are no grid.
        """
        relevancy = self._relevancy
        if self.token_regions is None:
            raise CapabilityError(f"{self.model}: the positions of image tokens in the picture are not known")
        return relevancy_tiles(
            relevancy, self.token_regions, bool(self.token_regions.grids) if raw is None else raw, index
        )

    def _check_indices(self, token: int, layer: int) -> None:
        layers = self._relevancy.image.shape[1]
        for name, index in (("token", token), ("layer", layer)):
            if not isinstance(index, Integral):
                raise wrong_type(name, "a whole number", index)
        if not -len(self) <= token < len(self):
            raise ConfigError(f"token={token} is not one of the answer's {len(self)} tokens, 0 to {len(self) - 1}")
        if not -layers <= layer < layers:
            raise ConfigError(f"layer={layer} is not one of the model's {layers} layers, 0 to {layers - 1}")

    def heat_map(
        self, token: int, layer: int = -1, raw: bool | None = None, shape: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Spread the relevancy of one token over the image, undoing the processor's crop, padding and tiling.

        Args:
            token: index in the answer.
            layer: of the language model, the last by default.
            raw: use the relevancy of the image tokens; False propagates it through the vision tower to the patches.
                None means True, unless the image tokens form no grid (queries of a Q-Former).
            shape: rows and columns of the map; those of the picture by default.

        Returns:
            (height, width) float64, at least 0. It sums to the relevancy of all image tokens (or patches) except those
            on padding; 0 where the model does not see the picture.

        Raises:
            ConfigError: there is no such token or layer.
            CapabilityError: the model gives no relevancy, or its image tokens are no grid.
        """
        self._check_indices(token, layer)
        tiles, boxes = self.relevancy_tiles((token, layer), raw)
        return heat(tiles, boxes, self.image.size, shape or (self.image.height, self.image.width))

    def heat_maps(self, shape: tuple[int, int], layers: list[int], raw: bool | None = None) -> np.ndarray:
        """Compute the (T, layers, *shape) heat maps of all tokens after the given layers."""
        tiles, boxes = self.relevancy_tiles((slice(None), layers), raw)
        return heat(tiles, boxes, self.image.size, shape)

    def attention_map(
        self,
        token: int,
        layer: int | None = None,
        head: int | Literal["mean", "largest"] = "mean",
        shape: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Spread the raw attention of one token to the image tokens over the image, as ``heat_map`` does relevancy.

        Args:
            token: index in the answer.
            layer: of the language model; None for the mean over layers.
            head: index; ``mean`` over the heads of a layer, or the ``largest`` of them for every image token.
            shape: rows and columns of the map; those of the picture by default.

        Returns:
            (height, width) float64. It sums to the attention to all image tokens except those on padding.

        Raises:
            ConfigError: there is no such token, layer or head.
            CapabilityError: there is no raw attention, or the image tokens are no grid.
        """
        if self.attention is None:
            raise CapabilityError("; ".join(self.notes) or f"{self.model} gives no raw attention")
        return self._spread(self.attention.to_image(token, layer, head).numpy(), shape, "attention")

    def seen_map(self, name: str, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Spread where the detector sees an object over the image, as ``heat_map`` does relevancy.

        Args:
            name: of an object that the answer names.
            shape: rows and columns of the map; those of the picture by default.

        Returns:
            (height, width) float64 in [0, 1], the largest as in ``seen``: next to nothing for an object that the
            detector sees nowhere.

        Raises:
            CapabilityError: the detector does not look for this object, or the image tokens are no grid.
        """
        if name not in self.seen:
            raise CapabilityError(f"the detector does not look for {name!r} in image tokens, {sorted(self.seen)} only")
        spread = self._spread(self.seen[name], shape, "seen")
        return spread * (self.seen[name].max() / max(spread.max(), 1e-12))

    def _spread(self, values: np.ndarray, shape: tuple[int, int] | None, name: str) -> np.ndarray:
        """Spread (N,) values of image tokens over the image; ``name`` is that of the attribute that has them all."""
        if self.token_regions is None or not self.token_regions.grids:
            raise CapabilityError(f"{self.model}: its image tokens are no grid over the picture; read `{name}`")
        tiles, boxes = image_token_tiles(values, self.token_regions)
        return heat(tiles, boxes, self.image.size, shape or (self.image.height, self.image.width))

    def regions(self, token: int, count: int = 3, layer: int = -1) -> list[tuple[Box, float]]:
        """List the image regions that are most relevant to a token, best first.

        Args:
            token: index in the answer.
            count: number of regions, at most.
            layer: of the language model, the last by default.

        Returns:
            Boxes (left, top, right, bottom) in pixels, within the picture, and their shares of the relevancy of all
            image tokens (or patches), in [0, 1].

        Raises:
            ConfigError: there is no such token or layer.
            CapabilityError: the model gives no relevancy.
        """
        self._check_indices(token, layer)
        tiles, boxes = self.relevancy_tiles((token, layer))
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

    def picture(self, token: int, layer: int = -1, raw: bool | None = None, opacity: float = OPACITY) -> Image:
        """Draw the image under the token's heat map, at least 480 pixels wide.

        Args:
            token: index in the answer.
            layer: of the language model, the last by default.
            raw: as in ``heat_map``.
            opacity: of the heat map where it is highest, in [0, 1].
        """
        return overlay(self.image, self.heat_map(token, layer, raw), opacity)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-able dictionary without pixels; floats are rounded.

        Relevancy is the last layer's; ``attention`` is the mean over heads, and of ``image`` also over layers.
        """
        warning = self.warning
        return {
            "model": self.model,
            "history": [list(turn) for turn in self.history],
            "question": self.question,
            "answer": self.answer.text,
            "finished": self.answer.finished,
            "image": {"width": self.image.width, "height": self.image.height},
            "scope": self.scope,
            "threshold": self.threshold,
            "shift": self.shift,
            "calibration": self.calibration,
            "truth": None if self.truth is None else list(self.truth),
            "edit": dict(self.edit),
            "warned": list(self.warned),
            "mentions": [mention.to_dict() for mention in self.mentions],
            "tokens": [self._token_to_dict(index, warning) for index in range(len(self))],
            "question_tokens": list(self.question_tokens),
            "grids": [list(grid) for grid, _ in self.token_regions.grids] if self.token_regions else [],
            "notes": list(self.notes),
            "seconds": {stage: round(value, 4) for stage, value in self.seconds.items()},
        }

    def _token_to_dict(self, index: int, warning: np.ndarray | None) -> dict[str, Any]:
        start, end = self.answer.offsets[index]
        section: dict[str, Any] = {
            "text": self.answer.tokens[index],
            "id": self.answer.token_ids[index],
            "start": start,
            "end": end,
            "probability": round(float(self.token_probability[index]), 6),
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
                "shares": {name: _as_list(values[index]) for name, values in self.shares.items()},
                "contribution": {name: _as_list(values[index]) for name, values in self.contributions.items()},
                "image": _as_list(self.relevancy.image[index, -1].numpy()),
                "question": _as_list(self.relevancy.question[index, -1].numpy()),
                "answer": _as_list(self.relevancy.answer[index, -1, :index].numpy()),
            }
        if self.attention is not None:
            section["attention"] = {
                "image": _as_list(self.attention.to_image(index).numpy()),
                "image_by_layer": _as_list(self.attention.image_mass[index].mean(-1).numpy()),
            }
        return section

    def to_frame(self) -> pd.DataFrame:
        """Make a table with a row per token; shares and contributions are of the last layer, attention of all."""
        import pandas as pd

        mentions = [self.mention_of(index) for index in range(len(self))]
        columns: dict[str, Any] = {
            "text": self.answer.tokens,
            "token_id": self.answer.token_ids,
            "start": [start for start, _ in self.answer.offsets],
            "end": [end for _, end in self.answer.offsets],
            "probability": self.token_probability,
            "entropy": self.entropy,
            "object": [mention.object if mention else "" for mention in mentions],
        }
        if self.verdicts:
            columns["warning"] = self.warning
            columns["warned"] = [bool(mention and mention.warned) for mention in mentions]
            for name in ("evidence", "prior"):
                columns[name] = [getattr(verdict, name) for verdict in self.verdicts]
        if self.relevancy is not None:
            columns |= {f"share_{name}": values[:, -1] for name, values in self.shares.items()}
            columns |= {f"contribution_{name}": values[:, -1] for name, values in self.contributions.items()}
        if self.attention is not None:
            columns["attention_image"] = self.attention.matrix[:, 0].numpy()
        return pd.DataFrame(columns)

    def plot(self, token: int, layer: int = -1, raw: bool | None = None) -> Figure:
        """Plot the token's heat map, its relevancy by part and its rank by layer, as a matplotlib figure."""
        return render.figure(self, token, layer, raw)

    def _repr_html_(self) -> str:
        """Write HTML for notebooks: tokens coloured by warning, mentions with heat maps; all text is escaped."""
        return render.notebook(self)

    def to_html(self) -> str:
        """Write a self-contained HTML page: nothing is fetched, all text is escaped."""
        return render.page(self)


def _as_list(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
