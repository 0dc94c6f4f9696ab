"""Events of a stream: a token, an object whose name is complete, text that is taken back, the finished answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from stethoscope.core.types import Answer
from stethoscope.diagnosis.answer_verdicts import DiagnosedMention
from stethoscope.tasks.extraction import as_extraction

if TYPE_CHECKING:
    from stethoscope.detection.detector import Detector
    from stethoscope.tasks.extraction import Extraction
    from stethoscope.tasks.object_extraction import MentionExtractor, TextMention


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
        probability: score of the detector, in [0, 1], higher means hallucinated, where the name of an object can begin,
            which is what detectors learn from. None elsewhere, and without a detector. Where only the next token tells
            whether a name begins (" a" of " airplane"), or where the detector needs the name of the object,
            ``MentionCompleted`` alone has it; that is the warning, too.
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
    """An object that the answer names; its name is complete, as a blank behind its word shows, or the end.

    Attributes:
        object: canonical name.
        start: first character of the name in the answer.
        end: last character + 1.
        tokens: indices of the tokens that name the object.
        probability: that it is hallucinated, in [0, 1]; None without a detector, and for a last name of a cut answer
            where nothing has read what the detector reads. A detector that judges an object once
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


@dataclass(frozen=True)
class TakenBack:
    """Text that is taken back, since an object that it names is probably hallucinated (``mitigation=backtrack``).

    The answer goes on from ``start`` in other words. Tokens and mentions from there on no longer count; those that were
    still waiting for their probability have never been yielded.

    Attributes:
        text: that is taken back.
        start: its first character in the answer.
        end: last character + 1.
        tokens: indices of its tokens, up to the last of the answer so far.
        object: canonical name of the object in doubt.
        probability: that it is hallucinated, in [0, 1].
        draft: the whole answer as it was.
    """

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]
    object: str
    probability: float
    draft: str


StreamEvent = Token | MentionCompleted | TakenBack | Final
"""All that ``stream`` yields."""

_WORD_FOLLOWS = re.compile(r"\s*\S+\s")  # after a name: whatever else its word has, or a word, is complete
_WORD_OVER = re.compile(r"\S*\s")  # after a name: whatever else its word has is complete
_NAME_FOLLOWED = re.compile(r"[^\W\d_]++\S*\s")  # the same after the first letters of a name
_LETTERS_OVER = re.compile(r"[^\W\d_]++(?!\Z)")  # letters to which the text adds no more


class MentionKeys(NamedTuple):
    """What the key columns of a token table say of a mention.

    Attributes:
        object: canonical name.
        tokens: indices of the tokens that belong to it, and to no mention before it.
        mention_index: number of mentions before it in the answer.
        repeat_index: number of mentions of the same object before it.
    """

    object: str
    tokens: tuple[int, ...]
    mention_index: int
    repeat_index: int


Judge = Callable[[MentionKeys], float | None]
"""Computes the probability that a mention is hallucinated."""


class MentionTracker:
    """Finds the mentions of a growing answer as their names become complete.

    A name is complete once its word is, and no longer name begins with what stands there ("baby el" may become "baby
    elephant", "baby is" not); or once the answer ends. Where no list of names is known, a further word must be
    complete. A choice of objects that changes its mind even later (CHAIR's "seat of the toilet" is no chair) has the
    last word in ``Final.mentions``.

    Args:
        extractor: lists the objects that a text names.
        detector: whose probabilities the tokens have; None without one.

    Attributes:
        completed: mentions so far, in reading order.
    """

    def __init__(self, extractor: Extraction | MentionExtractor, detector: Detector | None) -> None:
        self._extractor, self._detector = as_extraction(extractor), detector
        self._read = self._asked = 0  # length of the text of which all words are known; of that last extracted from
        self._starts: list[int] = []  # characters with which later mentions can begin
        self._once = detector is not None and detector.settings["repeats"] == "first"
        self.completed: list[MentionCompleted] = []

    def new(self, text: str, finished: bool = False) -> list[TextMention]:
        """List the mentions whose names are complete and that have not been added, in reading order.

        Args:
            text: of the answer so far.
            finished: whether the answer has ended.
        """
        position = self.completed[-1].end if self.completed else 0
        if not finished and not self._is_due(text, position):
            return []
        later = [mention for mention in self._extractor(text) if mention.start >= position]
        complete = [mention for mention in later if finished or self.is_complete(mention, text)]
        return sorted(complete, key=lambda mention: mention.start)

    def is_complete(self, mention: TextMention | MentionCompleted, text: str) -> bool:
        """Whether the name of a mention is complete in an unfinished text."""
        names = self._extractor.name_prefixes
        if names is None:
            return _WORD_FOLLOWS.match(text, mention.end) is not None
        return _WORD_OVER.match(text, mention.end) is not None and mention.start < names.first_open(text)

    def _is_due(self, text: str, position: int) -> bool:
        """Whether a name that begins at ``position`` or later can be complete: most words begin none.

        To extract the mentions takes time that grows with the text.
        """
        names = self._extractor.name_prefixes
        if names is None:
            return _WORD_FOLLOWS.match(text, position) is not None
        for word in _LETTERS_OVER.finditer(text, self._read):
            self._read = word.end()
            if names.has_first(word[0]):
                self._starts.append(word.start())
        if not self._starts:
            return False
        later = [start for start in self._starts if start >= position]
        self._starts = [start for start in later if names.is_open(text[start:], self._asked - start)]
        due = any(_NAME_FOLLOWED.match(text, start) and not names.goes_on(text[start:]) for start in self._starts)
        if due:
            self._asked = len(text)
        return due

    def add(
        self, mention: TextMention, spans: Sequence[tuple[int, int]], judge: Judge = lambda keys: None
    ) -> MentionCompleted:
        """Add a mention with its probability.

        Args:
            mention: the next one of ``new``.
            spans: of the tokens so far.
            judge: computes its probability, unless an earlier mention decides.
        """
        name, start, end = mention
        covered = tuple(index for index, span in enumerate(spans) if span[0] < end and span[1] > start)
        same = [earlier for earlier in self.completed if earlier.object == name]
        if self.knows(name):
            probability = same[0].probability
        else:
            owned = {index for earlier in self.completed for index in earlier.tokens}
            own = tuple(index for index in covered if index not in owned)
            probability = judge(MentionKeys(name, own, len(self.completed), len(same)))
        warned = self._detector is not None and probability is not None and probability >= self._detector.threshold
        self.completed.append(MentionCompleted(name, start, end, covered, probability, warned))
        return self.completed[-1]

    def knows(self, name: str) -> bool:
        """Whether an earlier mention decides about an object, since the detector judges it once per answer."""
        return self._once and any(earlier.object == name for earlier in self.completed)

    def rewind(self, end: int) -> None:
        """Forget the mentions beyond the first ``end`` characters."""
        self.completed = [mention for mention in self.completed if mention.end <= end]
        self._read, self._asked, self._starts = 0, 0, []
