"""Go back while a model talks: take a doubtful object back and let the answer go on in other words.

The loop is that of REVERSE (Wu et al., NeurIPS 2025), without its trained tokens: a detector of this package judges
every object as soon as its name is complete.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stethoscope.core.errors import CapabilityError
from stethoscope.core.system import ModelFaults
from stethoscope.core.types import Answer
from stethoscope.diagnosis.answer_verdicts import ReadAnswer, extract_mentions, feature_set, read_features, token_rows
from stethoscope.mitigation.base import DetectorMitigation, EditedAnswer, check_no_beams, check_range, check_whole
from stethoscope.streaming.decode_loop import Rewind
from stethoscope.streaming.events import MentionCompleted, MentionTracker, TakenBack
from stethoscope.streaming.scorer import smallest_delay
from stethoscope.streaming.warning_streamer import WarningStreamer, decode_answers
from stethoscope.tasks.extraction import as_extraction
from stethoscope.tracing.step_inputs import takes_rows_back
from stethoscope.tracing.trace import EXTRA_REQUIREMENTS, REQUIREMENTS

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter
    from stethoscope.adapters.hf import HfAdapter
    from stethoscope.core.types import Generation
    from stethoscope.detection.detector import Detector
    from stethoscope.tasks.extraction import Extraction
    from stethoscope.tasks.object_extraction import MentionExtractor
    from stethoscope.tracing.trace import Encoded

_JOINT = re.compile(
    r"(?:,\s*(?:and|or)\b|,|\b(?:and|or|with)\b)(?:\s+(?:an?|the|another|some|several|one|two|three))?(?:\s+\w+)?\s*$",
    re.IGNORECASE,
)
"""What stands between an item of a list and the one before it, with the item's article and one adjective."""
WHEN_NEEDED = 2**20
"""Delay, in steps, with which tokens are scored only when a mention is judged, all that wait together."""


@dataclass(frozen=True)
class Backtrack(DetectorMitigation):
    """Take a doubtful object back, forbid how its phrase began, and let the model go on.

    An object whose probability of hallucination reaches the threshold is taken back once its name is complete: the
    answer goes back to the comma or conjunction before it in a list, which is forbidden there, and the model writes on.
    Where there is none, or the tries are used up, it goes back to the start of the sentence and forbids that. What is
    still doubtful then stays, and is warned of as usual.

    Attributes:
        threshold: probability at or above which an object is taken back, in [0, 1]; None for the detector's own.
        tries_per_place: how often the answer goes back to one and the same place, at least 1.
        tries_per_answer: how often it goes back at all, at least 1.
    """

    name: ClassVar[str] = "backtrack"
    source: ClassVar[str] = "our detector"
    writes: ClassVar[bool] = True
    threshold: float | None = None
    tries_per_place: int = 10
    tries_per_answer: int = 50

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_range("threshold", self.threshold, 0, 1)
        for name in ("tries_per_place", "tries_per_answer"):
            check_whole(name, getattr(self, name), 1)
        super().__post_init__()

    def check(self, generation: Generation) -> None:
        """See ``Mitigation.check``.

        Raises:
            ConfigError: the answer is searched by beams, which are not known until they end.
        """
        check_no_beams(self.name, generation)

    def load(self, adapter: Adapter) -> Detector:
        """See ``DetectorMitigation.load``.

        Raises:
            ConfigError, ArtefactError: see there.
            CapabilityError: the detector reads what only a finished answer has.
        """
        detector = super().load(adapter)
        features = feature_set(detector.features).features
        late = [item.name for item in features if not item.requires <= {*REQUIREMENTS, *EXTRA_REQUIREMENTS}]
        if late:
            raise CapabilityError(
                f"mitigation={self.name}: the detector reads {', '.join(late)}, for which a finished answer is asked "
                "about; train with detector.exclude, or with features=default"
            )
        return detector

    def write(
        self,
        adapter: HfAdapter,
        encoded: Sequence[Encoded],
        generation: Generation,
        extractors: Sequence[MentionExtractor] | None = None,
    ) -> list[EditedAnswer]:
        """See ``Mitigation.write``; as one batch where the model and the inputs allow it, else one after another."""
        detector, written = self.load(adapter), dict[int, EditedAnswer]()
        for group in _batches(adapter, encoded):
            streamers = []
            for index in group:
                extraction = as_extraction(None if extractors is None else extractors[index])
                prompt = encoded[index]
                streamers.append(make_streamer(adapter, prompt, self, detector, generation, extraction, WHEN_NEEDED))
            with ModelFaults(f"{adapter.name} fails to answer"):
                for _ in decode_answers(streamers):
                    pass
            for index, streamer in zip(group, streamers, strict=True):
                edit = self.record([event for event in streamer.events if isinstance(event, TakenBack)], detector)
                if edit:
                    edit["passes"] = streamer.steps.passes
                written[index] = EditedAnswer(streamer.finished_answer(), edit)
        return [written[index] for index in range(len(encoded))]

    def record(self, taken: Sequence[TakenBack], detector: Detector) -> dict[str, Any]:
        """Describe what was taken back for the record of a sample, as plain values; empty for nothing.

        Args:
            taken: in this order.
            detector: that judged.
        """
        if not taken:
            return {}
        threshold = detector.threshold if self.threshold is None else self.threshold
        return {
            "text": taken[0].draft,
            "mentions": [],
            "removed": [],
            "threshold": round(float(threshold), 6),
            "taken_back": [
                {
                    "text": event.text,
                    "start": event.start,
                    "token": event.tokens[0],
                    "object": event.object,
                    "probability": round(event.probability, 6),
                }
                for event in taken
            ],
        }


def _batches(adapter: HfAdapter, encoded: Sequence[Encoded]) -> list[list[int]]:
    """List the indices of prompts whose answers are written as one batch."""
    if takes_rows_back(adapter.model):
        return adapter.batches(encoded)
    return [[index] for index in range(len(encoded))]


def make_streamer(
    adapter: Adapter,
    encoded: Encoded,
    method: Backtrack,
    detector: Detector,
    generation: Generation,
    extraction: Extraction,
    delay: int = 0,
) -> WarningStreamer:
    """Make the streamer of one answer, to be used with ``decode_answers``.

    Args:
        adapter: the model.
        encoded: the prompt.
        method: the mitigation.
        detector: judges mentions. Where it reads more than decoding steps give, every mention costs a traced pass.
        generation: settings of decoding.
        extraction: how objects that the answer names are found.
        delay: see ``stream``; more where the detector needs it.
    """
    least = smallest_delay(detector)
    trace = None if least is not None else MentionScorer(adapter, encoded, detector, extraction)
    backtracker = Backtracker(method, detector, extraction, trace)
    live = None if least is None else detector
    return WarningStreamer(adapter, encoded, live, max(delay, least or 0), None, generation, extraction, backtracker)


class MentionScorer:
    """Scores the tokens that name objects in an unfinished answer, by a traced pass over it.

    Args:
        adapter: the model.
        encoded: the prompt.
        detector: any that reads no more than a trace.
        extraction: how objects that the answer names are found.
    """

    def __init__(self, adapter: Adapter, encoded: Encoded, detector: Detector, extraction: Extraction) -> None:
        self._adapter, self._encoded, self._detector, self._extraction = adapter, encoded, detector, extraction
        self._features = feature_set(detector.schema.names)

    def __call__(self, answer: Answer) -> list[float]:
        """Compute the probability of every token; not a number where it begins no name.

        Raises:
            CapabilityError: the model does not give what the detector reads.
        """
        named = extract_mentions(answer, self._extraction)
        trace = self._adapter.trace(self._encoded, answer, self._features.requires)
        features = read_features(self._features, trace, self._detector, self._adapter.name)
        table = token_rows(ReadAnswer(self._encoded, answer, named, features))
        rows = self._detector.select_mentions(table, judged=False)
        probabilities = [math.nan] * len(answer.token_ids)
        for token, probability in zip(rows["token"], self._detector.predict(rows), strict=True):
            probabilities[int(token)] = float(probability)
        return probabilities


class Backtracker:
    """Decides for one answer what is taken back.

    Args:
        method: the settings.
        detector: of the threshold, where the settings have none.
        extraction: how objects that the answer names are found.
        trace: scores the tokens of an unfinished answer; None where its decoding steps are scored.

    Attributes:
        mentions: those that were judged.
        trace: as given.
        doubted: probabilities of the objects that were taken back, by name.
        least: probability of the next best token, as a share of the best one's, from which it is worth a try; without
            such a limit a model that may not write ``a`` writes "There is also also also".
    """

    least = 1e-3

    def __init__(
        self, method: Backtrack, detector: Detector, extraction: Extraction, trace: MentionScorer | None = None
    ) -> None:
        self._method, self.trace = method, trace
        self._threshold = detector.threshold if method.threshold is None else method.threshold
        self.mentions = MentionTracker(extraction, detector)
        self._forbidden: dict[int, list[int]] = {}  # by token
        self._tries = 0
        self.doubted: dict[str, float] = {}  # probabilities of objects that were taken back

    def has_decided(self, name: str) -> bool:
        """Whether earlier mentions decide about an object: it was taken back, or is judged once per answer."""
        return name in self.doubted or self.mentions.knows(name)

    def decide(
        self,
        mention: MentionCompleted,
        text: str,
        spans: Sequence[tuple[int, int]],
        ids: Sequence[int],
        logits: Sequence[Tensor],
    ) -> Rewind | None:
        """Decide whether a mention is taken back, and from where on the answer is to be written again.

        An object that was taken back keeps its probability in this answer, however it is named again: among many ways
        of naming it there always is one that the detector misses.

        Args:
            mention: with its probability.
            text: of the answer so far.
            spans: of the tokens in it.
            ids: the tokens.
            logits: (V,) of the step that predicted each token, unprocessed.
        """
        probability = max(mention.probability or 0.0, self.doubted.get(mention.object, 0.0))
        if probability < self._threshold or self._tries >= self._method.tries_per_answer:
            return None
        for token in self.starts(mention, text, spans):
            forbidden = [*self._forbidden.get(token, ()), ids[token]]
            if len(forbidden) > self._method.tries_per_place or not self._has_alternative(logits[token], forbidden):
                continue
            self._tries += 1
            self.doubted[mention.object] = probability
            self._forbidden = {earlier: known for earlier, known in self._forbidden.items() if earlier < token}
            self._forbidden[token] = forbidden
            return Rewind(token, tuple(forbidden))
        return None

    def starts(self, mention: MentionCompleted, text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
        """List the tokens to go back to, the nearest first.

        Only where a phrase can be left out the model has something else to say: at the comma or conjunction before an
        item of a list, and at the start of the sentence. At the name itself it must name another object, and names one
        that it sees no better.
        """
        sentence = max(text.rfind(end, 0, mention.start) for end in ".!?\n") + 1
        joint = _JOINT.search(text, sentence, mention.start)
        begins = [joint.start()] if joint else []
        return [next(index for index, span in enumerate(spans) if span[1] > begin) for begin in (*begins, sentence)]

    def _has_alternative(self, logits: Tensor, forbidden: Sequence[int]) -> bool:
        """Decide whether a token is left that is not much less probable than the most probable one."""
        others = logits.float().index_fill(-1, torch.tensor(forbidden, device=logits.device), -torch.inf)
        return bool(others.max() >= logits.float().max() + math.log(self.least)) if self.least else True
