"""The contract of a benchmark: samples, a score for every answer, labelled mentions, metrics of the totals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from stethoscope.core.component import with_checked_kinds
from stethoscope.core.types import Answer, Mention, Sample, Score

Totals = Mapping[str, np.ndarray]
"""Sums of ``Score.counts`` over samples: one float array of any common shape for each name."""

Metric = Callable[[Totals], np.ndarray]
"""An element-wise function of totals; NaN where it is not defined."""

ScoredSample = tuple[Sample, Mapping[str, float]]
"""A sample that did not fail, with the ``counts`` of its score."""


class Tally(NamedTuple):
    """A row of what metrics are totalled from.

    Attributes:
        group: unit of the bootstrap, as in ``Sample.group``.
        subset: where the row belongs; metrics are made for every subset that has rows.
        counts: numbers that add up; a name that is missing counts 0.
    """

    group: str
    subset: str
    counts: Mapping[str, float]


class Task(ABC):
    """A benchmark. Constructors only store and check; ``setup`` reads files.

    Attributes:
        name: how it is called in configs, tables and run directories.
        version: changes whenever prompts, parsing or scoring change.
        primary: the metric that stands for the task.
        macro: metrics of which the mean over subsets is reported too.
        max_new_tokens: longest answer that the task needs, in tokens.
        locations: constructor arguments that tell where data lies, not what it is. A run goes on with others as long as
            its samples are the same; a task with more of them extends the tuple.
        reads_tokens: whether ``score`` reads more of an answer than its text, so that ``model=none`` cannot do it.
    """

    name: str
    version: ClassVar[str]
    primary: str
    macro: tuple[str, ...] = ()
    max_new_tokens: int = 128
    locations: ClassVar[tuple[str, ...]] = (
        "file", "folder", "images", "questions", "instances", "captions", "image_ids", "dataset",
        "local_files_only",
    )  # fmt: skip
    reads_tokens: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the constructor refuse arguments of wrong kinds, whether a configuration gives them or Python code."""
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = with_checked_kinds(cls.__init__, "task")  # type: ignore[method-assign]

    def setup(self) -> None:  # noqa: B027  (a task that needs no files need not override it)
        """Read what ``samples`` needs; called before anything else, does nothing the second time.

        Raises:
            DataError: a file is missing or broken; the message names file and line.
        """

    @abstractmethod
    def samples(self) -> Sequence[Sample]:
        """Return all samples in a fixed order, with unique ids."""

    @abstractmethod
    def score(self, sample: Sample, answer: Answer) -> Score:
        """Score one answer. An answer that cannot be read is ``unparsed``, never a wrong answer."""

    @abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """Return the metrics by name.

        Totals come as arrays so that one call covers the value and every bootstrap replicate.
        """

    def identity(self) -> Mapping[str, Any]:
        """Return what identifies a run's task in place of its settings, by their names; none by default.

        A task whose setting names a file gives what the file holds. Called after ``setup``.
        """
        return {}

    def tally(self, scored: Sequence[ScoredSample]) -> Sequence[Tally]:
        """Return the rows that metrics are totalled from: by default every sample's counts under its own subset.

        A task whose figures span several samples (both questions about an image answered rightly, subsets taken
        together) adds counts or rows here.

        Args:
            scored: samples that did not fail with the counts of their scores, in the order of the task.
        """
        return [Tally(sample.group, sample.subset, counts) for sample, counts in scored]

    def unit(self, sample: Sample) -> Hashable:
        """Return what names the samples that only count together, such as the questions of a pair; its id by default.

        A run with a ``limit`` asks all of them or none.
        """
        return sample.id

    def notes(self, samples: Sequence[Sample]) -> Sequence[str]:
        """Describe in sentences how the figures came about: parser, labels, what is left out; none by default.

        They are printed below the figures and kept with them.

        Args:
            samples: those that were asked.
        """
        return ()

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the labelled object mentions of one answer, in reading order; none by default."""
        return ()

    def evaluate(self, sample: Sample, answer: Answer) -> tuple[Score, tuple[Mention, ...]]:
        """Return ``score`` and ``mentions`` of one answer; a task that reads both off the same text does so once."""
        return self.score(sample, answer), tuple(self.mentions(sample, answer))

    def evaluate_answer(self, sample: Sample, answer: Answer) -> tuple[Score, tuple[Mention, ...]]:
        """Return the results of ``score_answer`` and ``label_mentions``, which read the answer once."""
        scored, kept = answer.without_reasoning()
        score, mentions = self.evaluate(sample, scored)
        return score, _in_whole_answer(mentions, answer, kept)

    def score_answer(self, sample: Sample, answer: Answer) -> Score:
        """Score an answer without its reasoning, which ``score`` never sees."""
        return self.score(sample, answer.without_reasoning()[0])

    def label_mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the mentions outside of an answer's reasoning, as spans of the whole answer."""
        scored, kept = answer.without_reasoning()
        return _in_whole_answer(tuple(self.mentions(sample, scored)), answer, kept)


def _in_whole_answer(mentions: tuple[Mention, ...], answer: Answer, kept: Sequence[int]) -> tuple[Mention, ...]:
    """Move mentions from the text without reasoning, whose characters are the ``kept`` ones, to the whole answer."""
    if not answer.reasoning:
        return mentions
    return tuple(replace(item, start=kept[item.start], end=kept[item.end - 1] + 1) for item in mentions)
