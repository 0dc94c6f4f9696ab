"""Edit finished answers by a detector: remove hallucinated mentions, ask about them first, or choose among samples.

``drop`` costs no pass beyond the one that the detector reads; ``ask`` puts a question about every doubtful object and
removes those that the model itself denies (as Woodpecker does with an external detector, Yin et al. 2023); ``rerank``
samples further answers and keeps the one with the fewest expected hallucinations. All edit descriptions only: a yes or
no to a question is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from stethoscope.core.errors import ConfigError
from stethoscope.mitigation.base import DetectorMitigation, check_range, check_whole

if TYPE_CHECKING:
    from stethoscope.core.types import Generation
    from stethoscope.mitigation.editing import Removal


class EditingMitigation(DetectorMitigation):
    """A method that edits finished descriptions by what a detector says of their mentions."""


@dataclass(frozen=True)
class Drop(EditingMitigation):
    """Remove mentions whose probability of hallucination reaches a threshold, with the words around them.

    Attributes:
        threshold: probability at or above which a mention is removed, in [0, 1]; None for the detector's own.
        max_hallucinated: instead of a threshold, the largest share of the mentions that remain that may be
            hallucinated, in (0, 1), with ``confidence`` over images (``evaluation.removal_guarantee``). The detector
            must be that of a run with labelled descriptions. None for no promise.
        confidence: of the promise, in (0, 1).
        asks: whether the model is asked about a mention before it is removed.
    """

    name: ClassVar[str] = "drop"
    source: ClassVar[str] = "our detector"
    asks: ClassVar[bool] = False
    threshold: float | None = None
    max_hallucinated: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_range("threshold", self.threshold, 0, 1)
        if self.max_hallucinated is not None:
            self._check_promise()
        super().__post_init__()

    def _check_promise(self) -> None:
        for name in ("max_hallucinated", "confidence"):
            value = getattr(self, name)
            check_range(name, value, 0, 1)
            if value in (0, 1):
                raise ConfigError(f"mitigation.{name}={value!r} should lie between 0 and 1")
        if self.threshold is not None:
            raise ConfigError("mitigation.threshold and mitigation.max_hallucinated exclude each other: leave one null")
        if self.asks:
            raise ConfigError(
                "mitigation.max_hallucinated goes with mitigation=drop; what the model would say of the calibration "
                "images when it is asked is not known"
            )

    def unwanted(
        self, probabilities: Sequence[float], threshold: float, yes_odds: Sequence[float] | None = None
    ) -> set[int]:
        """Choose the mentions to remove.

        Args:
            probabilities: of hallucination, by mention.
            threshold: of the detector, where the method has none of its own.
            yes_odds: by mention, log-odds of a yes when the model is asked whether the object is there.

        Returns:
            Indices of mentions.
        """
        limit = threshold if self.threshold is None else self.threshold
        return {
            index
            for index, probability in enumerate(probabilities)
            if probability >= limit and (yes_odds is None or yes_odds[index] < 0)
        }


@dataclass(frozen=True)
class Ask(Drop):
    """Ask the model about every mention whose probability reaches the threshold, and remove those that it denies."""

    name: ClassVar[str] = "ask"
    asks: ClassVar[bool] = True


@dataclass(frozen=True)
class Rerank(EditingMitigation):
    """Sample further answers, and take the one with the fewest expected hallucinations.

    The score of an answer is sum p - gain * sum (1 - p) over its mentions, p the probability of hallucination: expected
    hallucinated mentions less ``gain`` for every right one that is expected. Without the second term the answer that
    says least would win. A mention lowers the score, so that naming it pays, where p < gain / (1 + gain).

    Attributes:
        candidates: number K of answers to choose from, at least 2: the answer itself, as the settings of generation
            have it, and K - 1 samples at temperature 1 with the seeds ``generation.seed`` + 1, + 2, ...
        gain: how many hallucinated mentions a right one makes up for, at least 0.
    """

    name: ClassVar[str] = "rerank"
    source: ClassVar[str] = "our detector"
    samples: ClassVar[bool] = True
    candidates: int = 5
    gain: float = 0.2

    def __post_init__(self) -> None:
        check_whole("candidates", self.candidates, 2)
        check_range("gain", self.gain, 0)
        super().__post_init__()

    @property
    def passes_per_token(self) -> float:
        """See ``Mitigation.passes_per_token``: one for every candidate."""
        return float(self.candidates)

    def settings(self, generation: Generation) -> list[Generation]:
        """Return the settings that the K - 1 samples are generated with.

        Args:
            generation: settings of the answer itself.
        """
        own = replace(generation, do_sample=True, temperature=1.0, top_p=1.0, num_beams=1, mitigation=None)
        return [replace(own, seed=generation.seed + index) for index in range(1, self.candidates)]

    def score(self, probabilities: Sequence[float]) -> float:
        """Compute the score of an answer, lower for a better one.

        Args:
            probabilities: of hallucination, by mention.

        >>> round(Rerank(gain=0.5).score([0.1, 0.8]), 2)
        0.35
        """
        return sum(probability - self.gain * (1 - probability) for probability in probabilities)


def edit_record(
    text: str,
    spans: Sequence[tuple[int, int]],
    objects: Sequence[str],
    probabilities: Sequence[float],
    parts: Sequence[Removal] = (),
    threshold: float | None = None,
    yes_odds: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Describe an edit for the record of a sample, as plain values.

    Args:
        text: the answer as it was written.
        spans: of its mentions.
        objects: their names.
        probabilities: of hallucination, by mention.
        parts: what was removed.
        threshold: probability from which mentions are removed, or asked about; None for a choice among answers.
        yes_odds: by mention, log-odds of a yes when the model was asked whether the object is there; NaN where it was
            not asked. None where it was asked nothing.
    """
    mentions = [
        {"start": start, "end": end, "object": name, "probability": round(float(probability), 6)}
        for (start, end), name, probability in zip(spans, objects, probabilities, strict=True)
    ]
    for mention, odds in zip(mentions, yes_odds or (), strict=False):
        if not math.isnan(odds):
            mention["yes_odds"] = round(float(odds), 4)
    removed = [{**part._asdict(), "mentions": list(part.mentions)} for part in parts]
    limit = {} if threshold is None else {"threshold": round(float(threshold), 6)}
    return {"text": text, "mentions": mentions, "removed": removed, **limit}
