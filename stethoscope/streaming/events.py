"""Events of a stream: a token, an object whose name is complete, the finished answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from stethoscope.core.types import Answer
from stethoscope.diagnosis.verdict import DiagnosedMention

if TYPE_CHECKING:
    from stethoscope.detection.detector import Detector
    from stethoscope.tasks.object_extraction import MentionExtractor


@dataclass(frozen=True)
class Token:
    """One token of the answer.

    Attributes:
        index: in the answer, from 0.
        id: index in the vocabulary.
        text: text that it adds to the answer; empty while a character is incomplete.
        start: first character of ``text`` in the answer.
        end: last character + 1.
        logprob: natural log of its probability under the model's own distribution.
        probability: score of the detector, in [0, 1], higher means hallucinated; None without a detector. Detectors
            learn from objects that answers name, so it is a probability only where an object's name begins, and no
            warning by itself: ``MentionCompleted`` is.
    """

    index: int
    id: int
    text: str
    start: int
    end: int
    logprob: float
    probability: float | None = None


@dataclass(frozen=True)
class MentionCompleted:
    """An object that the answer names; its name is complete, since a further word or the end has followed.

    Attributes:
        object: canonical name.
        start: first character of the name in the answer.
        end: last character + 1.
        tokens: indices of the tokens that name the object.
        probability: that it is hallucinated, in [0, 1]; None without a detector. A detector that judges an object once
            per answer gives later mentions the probability of the first.
        warned: whether the probability is at or above the detector's threshold.
    """

    object: str
    start: int
    end: int
    tokens: tuple[int, ...]
    probability: float | None = None
    warned: bool = False


@dataclass(frozen=True)
class Final:
    """The finished answer, the last event.

    Attributes:
        answer: the answer, equal to that of ``Adapter.generate``.
        diagnose: computes ``mentions`` and ``shift``.
    """

    answer: Answer
    diagnose: Callable[[], tuple[tuple[DiagnosedMention, ...], str]] = field(repr=False, compare=False)

    @cached_property
    def _diagnosed(self) -> tuple[tuple[DiagnosedMention, ...], str]:
        return self.diagnose()

    @property
    def mentions(self) -> tuple[DiagnosedMention, ...]:
        """Objects that the answer names, with the detector's scores; computed on first access.

        Raises:
            CapabilityError: ``final`` reads features that the model does not give.
        """
        return self._diagnosed[0]

    @property
    def shift(self) -> str:
        """One sentence where the picture or the answer is unlike those of the detector's calibration; else empty.

        No probability of such an answer is calibrated. Computed on first access, as ``mentions``.
        """
        return self._diagnosed[1]


StreamEvent = Token | MentionCompleted | Final
"""All that ``stream`` yields."""

_WORD_FOLLOWS = re.compile(r"\s*\S+\s")  # after a mention: whatever else its word has, or a word, is complete


class MentionTracker:
    """Finds the mentions of a growing answer as their names become complete.

    A name is complete once a further word is, which might have changed it ("baby" before "elephant"), or once the
    answer ends. A choice of objects that changes its mind even later (CHAIR's "seat of the toilet" is no chair) has
    the last word in ``Final.mentions``.

    Args:
        extractor: lists the objects that a text names.
        detector: whose probabilities the tokens have; None without one.
    """

    def __init__(self, extractor: MentionExtractor, detector: Detector | None) -> None:
        self._extractor, self._detector = extractor, detector
        self._once = detector is not None and detector.settings["repeats"] == "first"
        self.completed: list[MentionCompleted] = []

    def update(self, text: str, tokens: Sequence[Token], finished: bool = False) -> list[MentionCompleted]:
        """Return the mentions that have become complete, in reading order.

        Args:
            text: of the answer so far.
            tokens: that it consists of.
            finished: whether the answer has ended.
        """
        position = self.completed[-1].end if self.completed else 0
        if not finished and not _WORD_FOLLOWS.match(text, position):
            return []
        known = len(self.completed)
        for mention in sorted(self._extractor(text), key=lambda mention: mention.start):
            if mention.start < position:
                continue
            if not finished and not _WORD_FOLLOWS.match(text, mention.end):
                break
            self.completed.append(self._complete(mention.name, mention.start, mention.end, tokens))
        return self.completed[known:]

    def _complete(self, name: str, start: int, end: int, tokens: Sequence[Token]) -> MentionCompleted:
        covered = tuple(token.index for token in tokens if token.start < end and token.end > start)
        owned = {index for mention in self.completed for index in mention.tokens}
        first = next((index for index in covered if index not in owned), None)
        probability = None if first is None else tokens[first].probability
        if self._once:
            earlier = next((mention for mention in self.completed if mention.object == name), None)
            probability = probability if earlier is None else earlier.probability
        warned = self._detector is not None and probability is not None and probability >= self._detector.threshold
        return MentionCompleted(name, start, end, covered, probability, warned)
