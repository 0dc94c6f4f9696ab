"""Apply mitigations that edit finished answers: judge mentions by a detector, then remove some or choose an answer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from stethoscope.core.errors import ConfigError
from stethoscope.core.types import Answer, Generation, Mention, Sample
from stethoscope.detection.lookup import check_model, mention_probabilities
from stethoscope.evaluation.removal_guarantee import promise_removal
from stethoscope.features.columns import feature_of, matching_columns
from stethoscope.features.registry import FeatureSet
from stethoscope.mitigation.answers import Drop, EditingMitigation, Rerank, edit_record
from stethoscope.mitigation.base import EditedAnswer
from stethoscope.mitigation.editing import remove_mentions
from stethoscope.storage.tokens import TokenRows
from stethoscope.tracing.mention_passes import Resampling, trace_answers, yes_odds

if TYPE_CHECKING:
    import pandas as pd

    from stethoscope.adapters.base import Adapter
    from stethoscope.detection.detector import Detector
    from stethoscope.mitigation.editing import Removal
    from stethoscope.tasks.base import Task
    from stethoscope.tracing.trace import Encoded


TRIAL = Mention(2, 5, "dog", -1)
"""Mention of the answer ``A dog.``, by which ``try_features`` tries features and detectors."""


class MentionSource(Protocol):
    """What names the mentions of an answer: a task, or a single question."""

    @property
    def name(self) -> str:
        """Name in token tables."""

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """See ``Task.mentions``."""


class JudgedAnswer(NamedTuple):
    """An answer with what the detector says of its mentions.

    Attributes:
        answer: the answer.
        mentions: objects that it names, in reading order; none in the reply to a question.
        probabilities: of hallucination, by mention.
    """

    answer: Answer
    mentions: tuple[Mention, ...]
    probabilities: list[float]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Character spans of the mentions."""
        return [(mention.start, mention.end) for mention in self.mentions]

    def record(
        self,
        removals: Sequence[Removal] = (),
        threshold: float | None = None,
        yes_odds: Sequence[float] | None = None,
    ) -> dict[str, Any]:
        """Describe the answer and what was removed from it, see ``mitigation.answers.edit_record``."""
        objects = [mention.object for mention in self.mentions]
        return edit_record(self.answer.text, self.spans, objects, self.probabilities, removals, threshold, yes_odds)


class AnswerEditor(ABC):
    """Edits the answers of one run.

    Args:
        adapter: the model, after ``setup``.
        task: names the mentions of an answer; their labels are not read.
        method: the mitigation.
        generation: settings that the answers were written with.

    Raises:
        ConfigError, ArtefactError: there is no detector for the model, see ``EditingMitigation.load``.
    """

    def __init__(
        self, adapter: Adapter, task: MentionSource, method: EditingMitigation, generation: Generation
    ) -> None:
        self.adapter, self.task, self.generation = adapter, task, generation
        self.detector: Detector = method.load(adapter)
        self._features = read_features(self.detector)

    @property
    def notes(self) -> list[str]:
        """Sentences for the results: what is promised of the text that remains."""
        return []

    @abstractmethod
    def __call__(
        self, samples: Sequence[Sample], encoded: Sequence[Encoded], answers: Sequence[Answer]
    ) -> list[EditedAnswer]:
        """Edit the answers of a few samples, which are traced in one batch.

        Raises:
            CapabilityError: the detector reads features that the model does not provide.
        """

    def score_mentions(
        self, samples: Sequence[Sample], encoded: Sequence[Encoded], answers: Sequence[Answer]
    ) -> list[JudgedAnswer]:
        """Compute the detector's probabilities for the mentions of answers.

        Raises:
            CapabilityError: the detector reads features that the model does not provide.
        """
        mentions = [self._mentions(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
        judged = [JudgedAnswer(answer, named, []) for answer, named in zip(answers, mentions, strict=True)]
        doubtful = [index for index, named in enumerate(mentions) if named]
        if not doubtful:
            return judged
        resampling = None
        if "samples" in self._features.requires:
            listers = [partial(self._objects, samples[index]) for index in doubtful]
            resampling = Resampling(self.generation, listers)
        traces = trace_answers(
            self.adapter,
            [encoded[index] for index in doubtful],
            [answers[index] for index in doubtful],
            self._features.requires,
            [samples[index].image for index in doubtful],
            [mentions[index] for index in doubtful],
            resampling,
        )
        for index, trace in zip(doubtful, traces, strict=True):
            rows = TokenRows.of_trace(samples[index], trace, mentions[index], self._features.compute(trace))
            probabilities = self._probabilities(mentions[index], rows.frame(self.task.name))
            judged[index] = JudgedAnswer(answers[index], mentions[index], probabilities)
        return judged

    def _mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """List the mentions of a description; the reply to a question is not edited."""
        return self.task.mentions(sample, answer) if sample.asks == "description" else ()

    def _objects(self, sample: Sample, answer: Answer) -> set[str]:
        """Return the objects that an answer names."""
        return {mention.object for mention in self._mentions(sample, answer)}

    def _probabilities(self, mentions: Sequence[Mention], table: pd.DataFrame) -> list[float]:
        rows, _, values = mention_probabilities(table, self.detector)
        by_index = dict(zip(rows["mention_index"], values, strict=True))
        return [float(by_index.get(mention.mention_index, 0.0)) for mention in mentions]


class MentionRemover(AnswerEditor):
    """Removes mentions from the answers of one run (``drop`` and ``ask``).

    Args:
        adapter, task, generation: see ``AnswerEditor``.
        method: the mitigation.

    Attributes:
        certificate: what is promised of the text that remains; None without a promise.

    Raises:
        DataError: the promise cannot be given, see ``removal_guarantee.certify_removal``.
    """

    def __init__(self, adapter: Adapter, task: MentionSource, method: Drop, generation: Generation) -> None:
        super().__init__(adapter, task, method, generation)
        self._method, self.certificate = method, None
        if method.max_hallucinated is not None:
            self.certificate = promise_removal(method, adapter, self.detector)
        self._threshold = self.detector.threshold if self.certificate is None else self.certificate.threshold

    @property
    def notes(self) -> list[str]:
        """See ``AnswerEditor.notes``."""
        return [] if self.certificate is None else [f"Promised: {self.certificate}."]

    def __call__(
        self, samples: Sequence[Sample], encoded: Sequence[Encoded], answers: Sequence[Answer]
    ) -> list[EditedAnswer]:
        """See ``AnswerEditor.__call__``."""
        judged = self.score_mentions(samples, encoded, answers)
        return [self._edit(*parts) for parts in zip(samples, encoded, judged, strict=True)]

    def _edit(self, sample: Sample, encoded: Encoded, judged: JudgedAnswer) -> EditedAnswer:
        mentions, probabilities = judged.mentions, judged.probabilities
        unwanted, asked = self._method.unwanted(probabilities, self._threshold), None
        if unwanted and self._method.asks:
            names = list(dict.fromkeys(mentions[index].object for index in unwanted))
            [odds] = yes_odds(self.adapter, [sample.image.load()], [names])
            by_mention = [odds.get(mention.object, 0.0) for mention in mentions]
            asked = [odds.get(mention.object, math.nan) for mention in mentions]
            unwanted = self._method.unwanted(probabilities, self._threshold, by_mention)
        text = remove_mentions(judged.answer.text, judged.spans, unwanted)
        limit = self._threshold if self._method.threshold is None else self._method.threshold
        if not text.removals:  # what the model was asked is worth telling all the same
            return EditedAnswer(judged.answer, {} if asked is None else judged.record((), limit, asked))
        new = replace(self.adapter.answer(encoded, text.text), finished=judged.answer.finished)
        return EditedAnswer(new, judged.record(text.removals, limit, asked))


class AnswerReranker(AnswerEditor):
    """Chooses among several answers to every description of one run (``rerank``).

    Args:
        adapter, task, generation: see ``AnswerEditor``.
        method: the mitigation.
    """

    def __init__(self, adapter: Adapter, task: MentionSource, method: Rerank, generation: Generation) -> None:
        super().__init__(adapter, task, method, generation)
        self._method = method

    def __call__(
        self, samples: Sequence[Sample], encoded: Sequence[Encoded], answers: Sequence[Answer]
    ) -> list[EditedAnswer]:
        """See ``AnswerEditor.__call__``. One batch of traces for every candidate."""
        edited = [EditedAnswer(answer, {}) for answer in answers]
        described = [index for index, sample in enumerate(samples) if sample.asks == "description"]
        if not described:
            return edited
        own, prompts = [samples[index] for index in described], [encoded[index] for index in described]
        rounds = [self.score_mentions(own, prompts, [answers[index] for index in described])]
        for settings in self._method.settings(self.generation):
            rounds.append(self.score_mentions(own, prompts, self.adapter.generate(prompts, settings)))
        for index, *candidates in zip(described, *rounds, strict=True):
            edited[index] = self._choose(candidates)
        return edited

    def _choose(self, candidates: Sequence[JudgedAnswer]) -> EditedAnswer:
        """Take the answer with the lowest score, the first of equal ones."""
        scores = [self._method.score(candidate.probabilities) for candidate in candidates]
        chosen = min(range(len(scores)), key=scores.__getitem__)
        listed = [
            {"text": candidate.answer.text, "mentions": len(candidate.mentions), "score": round(score, 6)}
            for candidate, score in zip(candidates, scores, strict=True)
        ]
        return EditedAnswer(
            candidates[chosen].answer, {**candidates[0].record(), "chosen": chosen, "candidates": listed}
        )


def read_features(detector: Detector) -> FeatureSet:
    """Return the features that a detector reads."""
    return FeatureSet(groups=(), names=list(dict.fromkeys(feature_of(name) for name in detector.schema.names)))


def try_features(adapter: Adapter, task: Task, features: FeatureSet, generation: Generation) -> pd.DataFrame:
    """Compute features of one short answer, to see that the model has what they read and that none fails.

    Args:
        adapter: the model, which is set up.
        task: whose first sample is tried; it is set up before the model is loaded.
        features: any.
        generation: settings of the answers.

    Returns:
        Token rows of the answer ``A dog.``.

    Raises:
        CapabilityError: the model does not provide a part that a feature reads.
        CaptureError: see ``FeatureSet.compute``.
    """
    task.setup()
    adapter.setup()
    sample = task.samples()[0]
    encoded = adapter.encode_as(sample.asks, sample.image.load(), sample.question)
    answer = adapter.answer(encoded, "A dog.")
    resampling = Resampling(replace(generation, max_new_tokens=1, mitigation=None), [lambda _: ()])
    [trace] = trace_answers(adapter, [encoded], [answer], features.requires, [sample.image], [(TRIAL,)], resampling)
    return TokenRows.of_trace(sample, trace, (TRIAL,), features.compute(trace)).frame(task.name)


def check_detector(adapter: Adapter, task: Task, detector: Detector, generation: Generation) -> None:
    """Check that a model has all features that a detector reads, by ``try_features``.

    Raises:
        ConfigError: the detector reads states of another model, or layers or heads that this one does not have.
        CapabilityError, CaptureError: see ``try_features``.
    """
    check_model(detector, adapter)
    table = try_features(adapter, task, read_features(detector), generation)
    matching_columns(table, detector.schema.names, adapter.name)


def make_editor(
    adapter: Adapter, task: MentionSource, method: EditingMitigation, generation: Generation
) -> AnswerEditor:
    """Create the editor for a mitigation.

    Raises:
        ConfigError: the method is of a class that no editor knows; or see ``AnswerEditor``.
        ArtefactError, DataError: see ``AnswerEditor`` and ``MentionRemover``.
    """
    if isinstance(method, Rerank):
        return AnswerReranker(adapter, task, method, generation)
    if isinstance(method, Drop):
        return MentionRemover(adapter, task, method, generation)
    raise ConfigError(f"mitigation={method.name}: {type(method).__name__} is none of Drop, Ask and Rerank")
