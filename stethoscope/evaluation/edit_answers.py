"""Apply mitigations that edit finished answers: judge their mentions by a detector, then remove what is unwanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.core.types import Answer, Generation, Mention, Sample
from stethoscope.evaluation.removal_guarantee import promise_removal
from stethoscope.features.columns import feature_of
from stethoscope.features.registry import FeatureSet, without_vectors
from stethoscope.mitigation.answers import Drop, edit_record
from stethoscope.mitigation.editing import remove_mentions
from stethoscope.storage.tokens import token_table
from stethoscope.tracing.mention_passes import Resampling, trace_answers, yes_odds

if TYPE_CHECKING:
    import pandas as pd

    from stethoscope.adapters.base import Adapter
    from stethoscope.detection.detector import Detector
    from stethoscope.tasks.base import Task
    from stethoscope.tracing.trace import Encoded


class EditedAnswer(NamedTuple):
    """An answer after a mitigation.

    Attributes:
        answer: the edited answer with the log-probabilities that the model gives its tokens, or the one that was given.
        edit: what was done, see ``mitigation.answers.edit_record``; empty where nothing was.
    """

    answer: Answer
    edit: Mapping[str, Any]


class AnswerEditor:
    """Edits the answers of one run.

    Args:
        adapter: the model, after ``setup``.
        task: names the mentions of an answer; their labels are not read.
        method: the mitigation.
        generation: settings that the answers were written with.

    Attributes:
        certificate: what is promised of the text that remains; None without a promise.

    Raises:
        ConfigError, ArtefactError: there is no detector for the model, see ``Drop.load``.
        DataError: the promise cannot be given, see ``removal_guarantee.certify_removal``.
    """

    def __init__(self, adapter: Adapter, task: Task, method: Drop, generation: Generation) -> None:
        self._adapter, self._task, self._method, self._generation = adapter, task, method, generation
        self.detector: Detector = method.load(adapter)
        self.certificate = None
        if method.max_hallucinated is not None:
            self.certificate = promise_removal(method, adapter, self.detector)
        self._threshold = self.detector.threshold if self.certificate is None else self.certificate.threshold
        names = list(dict.fromkeys(feature_of(name) for name in self.detector.schema.names))
        self._features = FeatureSet(groups=(), names=names)

    @property
    def notes(self) -> list[str]:
        """Sentences for the results: what is promised of the text that remains."""
        return [] if self.certificate is None else [f"Promised: {self.certificate}."]

    def __call__(
        self, samples: Sequence[Sample], encoded: Sequence[Encoded], answers: Sequence[Answer]
    ) -> list[EditedAnswer]:
        """Edit the answers of a few samples, which are traced in one batch.

        Raises:
            CapabilityError: the detector reads features that the model does not provide.
        """
        mentions = [self._mentions(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
        edited = [EditedAnswer(answer, {}) for answer in answers]
        doubtful = [index for index, named in enumerate(mentions) if named]
        if not doubtful:
            return edited
        resampling = None
        if "samples" in self._features.requires:
            listers = [partial(self._objects, samples[index]) for index in doubtful]
            resampling = Resampling(self._generation, listers)
        traces = trace_answers(
            self._adapter,
            [encoded[index] for index in doubtful],
            [answers[index] for index in doubtful],
            self._features.requires,
            [samples[index].image for index in doubtful],
            [mentions[index] for index in doubtful],
            resampling,
        )
        for index, trace in zip(doubtful, traces, strict=True):
            answer, named = answers[index], mentions[index]
            owners = [owner is not None for owner in answer.owners(named)]
            columns = without_vectors(self._features.compute(trace), owners)
            table = token_table(self._task.name, samples[index], answer, named, columns).to_pandas()
            edited[index] = self._edit(samples[index], encoded[index], answer, named, table)
        return edited

    def _mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """List the mentions of a description; the reply to a question is not edited."""
        return self._task.mentions(sample, answer) if sample.asks == "description" else ()

    def _objects(self, sample: Sample, answer: Answer) -> set[str]:
        """Return the objects that an answer names."""
        return {mention.object for mention in self._mentions(sample, answer)}

    def _edit(
        self, sample: Sample, encoded: Encoded, answer: Answer, mentions: Sequence[Mention], table: pd.DataFrame
    ) -> EditedAnswer:
        rows = self.detector.select_mentions(table, judged=False)
        rows = rows[rows["is_first_subtoken"]].reset_index(drop=True)
        by_index = dict(
            zip(rows["mention_index"], self.detector.predict(rows)[self.detector.deciding_rows(rows)], strict=True)
        )
        probabilities = [float(by_index.get(mention.mention_index, 0.0)) for mention in mentions]
        unwanted = self._method.unwanted(probabilities, self._threshold)
        if unwanted and self._method.asks:
            names = list(dict.fromkeys(mentions[index].object for index in unwanted))
            [odds] = yes_odds(self._adapter, [sample.image.load()], [names])
            by_mention = [odds.get(mention.object, 0.0) for mention in mentions]
            unwanted = self._method.unwanted(probabilities, self._threshold, by_mention)
        spans = [(mention.start, mention.end) for mention in mentions]
        text = remove_mentions(answer.text, spans, unwanted)
        if not text.removals:
            return EditedAnswer(answer, {})
        new = replace(self._adapter.answer(encoded, text.text), finished=answer.finished)
        objects = [mention.object for mention in mentions]
        return EditedAnswer(new, edit_record(answer.text, spans, objects, probabilities, text.removals))
