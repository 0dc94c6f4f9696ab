"""Ask questions with one right reply each, alone or in sets of which every reply must be right.

What DASH-B, NaturalBench, MMVP, BEAF, PhD, HumbleBench and data sets described by configuration share: a subclass
makes samples of the rows of its source and says how an answer is read; here rows are checked, answers counted, claims
labelled and sets put together. Figures with the plain name are over the answers that could be read; those called
``published`` follow the authors and take an answer that cannot be read for a wrong one.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from stethoscope.core.errors import DataError
from stethoscope.core.json_rows import shown
from stethoscope.core.types import UNKNOWN, Answer, Mention, Sample, Score
from stethoscope.tasks.base import Metric, ScoredSample, Tally, Task
from stethoscope.tasks.counts import complete_sets, confusion, set_counts, share
from stethoscope.tasks.sources import DataSource, SourceRow, check_unused
from stethoscope.tasks.yes_no import PARSERS, Reply, claim

SUFFIXES = {"lmms_eval": "\nAnswer the question using a single word or phrase."}
"""Suffixes by name: ``lmms_eval`` is that of lmms-eval's POPE and of LLaVA's own POPE file."""

ALL = "all"
"""Subset of all samples together, where a task has several subsets."""

_ASKED = re.compile(r"\bthere (?:an?|any) (.+?)(?: in (?:the|this) \w+)?\s*\?", re.IGNORECASE)


class QuestionTask(Task):
    """Questions with one right reply each, which ``reference["label"]`` of a sample gives.

    Attributes:
        sets: prefix of counts -> fields of ``Sample.reference`` that name the set of which all replies must be right.
        data: source of the rows.
        parser: name of the rule by which replies are read.
    """

    sets: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    data: DataSource
    parser: str

    def __init__(self, data: DataSource) -> None:
        """Store the source."""
        self.data = data
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Read the questions and check that every image is there.

        Raises:
            DataError: a file is missing or broken; the message names file and line.
        """
        if self._samples:
            return
        origins: dict[str, str] = {}
        samples = []
        for row in self.data.rows():
            for sample in self.read_row(row):
                check_unused(origins, sample.id, row.origin)
                samples.append(sample)
        if not samples:
            raise DataError(f"the source of task {self.name} holds no question")
        self._samples = self.arrange(samples)

    @abstractmethod
    def read_row(self, row: SourceRow) -> Iterable[Sample]:
        """Make the samples of one row, each with ``label`` in its reference.

        Raises:
            DataError: a field of the row is not what it should be.
        """

    def arrange(self, samples: list[Sample]) -> list[Sample]:
        """Check the samples together, and put them in order; as they are by default."""
        return samples

    @abstractmethod
    def reply(self, sample: Sample, text: str) -> Reply:
        """Read the reply out of an answer; None if there is none."""

    def samples(self) -> Sequence[Sample]:
        """Return the questions in the order of the source."""
        return self._samples

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Count the answer as right or wrong; ``unparsed`` if no reply can be read."""
        reply, label = self.reply(sample, answer.text), sample.reference["label"]
        counts = {"asked": 1.0, "read": float(reply is not None), "right": float(reply == label)}
        return Score("unparsed" if reply is None else "ok", counts, {"reply": reply, "label": label})

    def tally(self, scored: Sequence[ScoredSample]) -> Sequence[Tally]:
        """Total every sample under its subset and ``all``; the first of a complete set carries the set's counts too."""
        if self.sets:
            self.setup()  # the task of a finished run has read nothing yet
        counts = [dict(own) for _, own in scored]
        for name, fields in self.sets.items():
            for indices in complete_sets(scored, self.samples(), key=partial(self.set_key, fields=fields)):
                rights, reads = ([scored[index][1][count] for index in indices] for count in ("right", "read"))
                counts[indices[0]] |= set_counts(name, rights, reads)
        self.add_counts(scored, counts)
        return [
            Tally(sample.group, subset, own)
            for (sample, _), own in zip(scored, counts, strict=True)
            for subset in self.subsets_of(sample)
        ]

    def unit(self, sample: Sample) -> Hashable:
        """Name the smallest group of samples that holds every set of this one, by the fields that all sets share."""
        first, *others = self.sets.values() or [()]
        shared = tuple(field for field in first if all(field in fields for fields in others))
        return (self.set_key(sample, shared) if shared else None) or sample.id

    def set_key(self, sample: Sample, fields: tuple[str, ...]) -> tuple[Any, ...] | None:
        """Return what identifies the set of a sample, by fields of its reference; None where it lacks one of them."""
        names = tuple(sample.reference.get(field) for field in fields)
        return None if None in names else names

    def notes(self, samples: Sequence[Sample]) -> Sequence[str]:
        """Name the parser."""
        return [f"Replies are read by the parser {self.parser!r}."]

    def add_counts(self, scored: Sequence[ScoredSample], counts: list[dict[str, float]]) -> None:
        """Add counts that depend on several samples; none by default.

        Args:
            scored: samples that did not fail, with the counts of their scores.
            counts: counts to total for each of them, changed in place.
        """

    def subsets_of(self, sample: Sample) -> tuple[str, ...]:
        """Return the subsets under which a sample is totalled."""
        return (ALL,) if sample.subset == ALL else (ALL, sample.subset)


class YesNoTask(QuestionTask):
    """Questions to be answered by yes or no; a yes claims what ``reference["object"]`` names."""

    def reply(self, sample: Sample, text: str) -> Reply:
        """Read yes or no by the chosen parser."""
        return PARSERS[self.parser](text)

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Count the answer as a true or false yes or no; ``unparsed`` if the parser reads neither."""
        score, label = super().score(sample, answer), sample.reference["label"]
        counts = {**score.counts, **confusion(score.detail["reply"], label, positive="yes"), f"asked_{label}": 1.0}
        return Score(score.status, counts, score.detail)

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the word yes as a mention of what is asked about, hallucinated if the truth is no."""
        reply = self.reply(sample, answer.text)
        return claim(answer.text, reply, sample.reference["label"], sample.reference["object"])


# --- fields of a row --------------------------------------------------------------------------------------------------


def with_suffix(question: str, suffix: str | None) -> str:
    """Add a suffix, or the one of that name in ``SUFFIXES``, to a question; None adds nothing.

    A blank comes between words where the command line has lost it.

    >>> with_suffix("Is there a dog?", "Answer yes or no."), with_suffix("Is it red?", "\\n(yes or no)")
    ('Is there a dog? Answer yes or no.', 'Is it red?\\n(yes or no)')
    >>> with_suffix("Is there a dog?", "lmms_eval")
    'Is there a dog?\\nAnswer the question using a single word or phrase.'
    """
    suffix = SUFFIXES.get(suffix or "", suffix or "")
    return question + (" " if suffix[:1].isalnum() else "") + suffix


def asked_object(text: str) -> str:
    """Return the object that a question asks about.

    >>> asked_object("Is there a traffic light in the image?")
    'traffic light'
    >>> asked_object("How many?")
    'unknown'
    """
    match = _ASKED.search(text)
    return match.group(1) if match else UNKNOWN


def question_text(value: Any, origin: str) -> str:
    """Return a question without blanks around it.

    Raises:
        DataError: it is no text, or an empty one.
    """
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{origin}: {shown(value)} is no question")
    return value.strip()


def parsed_cell(value: Any, origin: str) -> Any:
    """Return the value of a cell, which some copies of a data set write as JSON in a text.

    Raises:
        DataError: it is a text of something else.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # nested too deeply
        raise DataError(f"{origin} {shown(value)} is not JSON") from None


def label_text(value: Any, origin: str, labels: Sequence[str] = ("yes", "no")) -> str:
    """Return a label in the form in which it is listed, whatever its case.

    Raises:
        DataError: it is none of the labels.

    >>> label_text(" Yes", "line 1")
    'yes'
    """
    known = {label.lower(): label for label in labels}
    label = known.get(str(value).strip().lower())
    if label is None:
        choice = f"neither {labels[0]} nor {labels[1]}" if len(labels) == 2 else f"none of {', '.join(labels)}"
        raise DataError(f"{origin}: label {shown(value)} is {choice}")
    return label


# --- metrics ----------------------------------------------------------------------------------------------------------

ACCURACY: Mapping[str, Metric] = {
    "accuracy": share("right", "read"),
    "accuracy_published": share("right", "asked"),
}
"""Share of right replies, from 0 to 1: among those that could be read, and among all."""


def set_share(name: str) -> tuple[Metric, Metric]:
    """Return the share of complete sets with every reply right: of the sets that were read as a whole, and of all."""
    return share(f"{name}_right", name), share(f"{name}_right", f"{name}_asked")


TPR_PUBLISHED, TNR_PUBLISHED = share("tp", "asked_yes"), share("tn", "asked_no")
"""``counts.recall`` and ``counts.tnr`` with all answers below the line, also those that could not be read."""
