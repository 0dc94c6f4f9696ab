"""The parts of a diagnosis: warnings, prediction evolution, and the visual contribution by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from stethoscope.detection.sight import Look
    from stethoscope.relevancy import Relevancy

CONTRIBUTIONS = ("sum", "max", "mean")
SHARES = ("image", "question", "answer", "rest")
_FLOOR = 1e-9  # what float32 can tell from nothing; as in the features of the same name

NOTHING = "nothing known"
"""What people read where a place looks like none of the objects."""
ABOUT_LOOKS = (
    "'Looks like' is what the detector has learned from right and invented mentions: how the place that a name was "
    "written from looks inside the model. It is no object detector: it knows only what was often named, and can err."
)
"""What people should know who read it."""

Pushes = tuple[tuple[str, float], ...]
"""Features and what they add to the evidence, in log-odds, strongest first; above 0 it speaks for hallucination."""


@dataclass(frozen=True)
class Judgement:
    """What a detector says of a token or a mention.

    Attributes:
        probability: that it is hallucinated. Calibrated for names of objects, from which detectors learn; of other
            tokens it is what the detector extrapolates to, for curiosity only.
        evidence, prior: log-odds that add up to those of the probability (``stethoscope.detection.explain``); None
            where the detector's calibration does not add up.
        top: the features that push it the most; empty unless the detector is linear.
        looks: what the place that a name was written from looks like, most probable first, None for nothing known
            (``Detector.looks``); empty for other tokens and where the detector has no sight.
    """

    probability: float
    evidence: float | None = None
    prior: float | None = None
    top: Pushes = ()
    looks: tuple[Look, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, rounded."""
        return {
            "probability": _short(self.probability),
            "evidence": _short(self.evidence),
            "prior": _short(self.prior),
            "top": [{"feature": name, "push": _short(push)} for name, push in self.top],
            "looks": [{"object": name, "probability": _short(chance)} for name, chance in self.looks],
        }


@dataclass(frozen=True)
class Named:
    """An object that the answer names.

    Attributes:
        object: canonical name.
        start, end: characters of the answer.
        tokens: indices of the tokens that say it.
        judgement: None without a detector.
        warned: the probability is at or above the detector's threshold.
    """

    object: str
    start: int
    end: int
    tokens: tuple[int, ...]
    judgement: Judgement | None = None
    warned: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        judged = {} if self.judgement is None else {**self.judgement.to_dict(), "warned": self.warned}
        return {"object": self.object, "start": self.start, "end": self.end, "tokens": list(self.tokens), **judged}


@dataclass(frozen=True, eq=False)
class Evolution:
    """What every layer would have said, decoded by the model's own final norm and head (logit lens).

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
        """JSON-able: one dictionary per layer."""
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


def contributions(relevancy: Relevancy) -> dict[str, np.ndarray]:
    """log(R_image / R_text) by layer, from sums, largest values and means; text is question and earlier answer.

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
    return {name: np.log(one.clip(min=_FLOOR) / other.clip(min=_FLOOR)) for name, (one, other) in pairs.items()}


def shares(relevancy: Relevancy) -> dict[str, np.ndarray]:
    """For each of ``SHARES`` (T, L) in [0, 1], its share of the whole row's relevancy; they add up to 1."""
    total = relevancy.total.numpy().clip(min=1e-12)
    return {name: getattr(relevancy, name).sum(-1).numpy() / total for name in SHARES}


def in_words(looks: Sequence[Look]) -> str:
    """What a place looks like, for people; what rounds to nothing is left out.

    >>> in_words([("spoon", 0.61), ("fork", 0.217), (None, 0.09), ("cup", 0.002)])
    'spoon 61%, fork 22%, nothing known 9%'
    """
    named = [(NOTHING if name is None else name, chance) for name, chance in looks]
    return ", ".join(f"{name} {chance:.0%}" for name, chance in named if chance >= 0.005)


def _short(value: float | None) -> float | None:
    return None if value is None else round(float(value), 6)
