"""Any data set of Parquet files with yes/no or multiple-choice questions, described by configuration alone.

Many benchmarks are re-hosted as such data sets, with columns called one way or another. ``conf/task/h_pope.yaml`` is an
example.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.images import SUFFIXES
from stethoscope.core.json_rows import shown
from stethoscope.core.types import UNKNOWN, Answer, Mention, Sample, Score
from stethoscope.tasks import choice, yes_no
from stethoscope.tasks.base import Metric
from stethoscope.tasks.counts import YES_NO_METRICS, share
from stethoscope.tasks.questions import ACCURACY, ALL, QuestionTask, YesNoTask, question_text, with_suffix
from stethoscope.tasks.sources import DataSource, HubSource, SourceRow, check_choice, check_name, check_positive


class HubQuestions(QuestionTask):
    """Questions of a data set with an image, a label and perhaps a subset in columns of any name.

    Every figure is given for all questions together, and for every subset.
    """

    version: ClassVar[str] = "1"
    primary = "accuracy"
    parsers: ClassVar[Mapping[str, Any]]
    """How a reply may be read, by name."""

    def __init__(
        self,
        name: str | int,
        parser: str,
        suffix: str,
        max_new_tokens: int,
        columns: Mapping[str, str | None],
        hub: HubSource,
    ) -> None:
        """Store and check what both kinds of questions have.

        Args:
            name: of the task in tables and run directories.
            parser: name of one of ``parsers``.
            suffix: added to every question.
            max_new_tokens: longest answer, in tokens.
            columns: of ``question``, ``label``, ``subset``, ``group``, ``id``, ``object``; the last four may be None.
            hub: the data set, with the column of the images.

        Raises:
            ConfigError: a setting is missing, or has another value than it may have.
        """
        self.name = check_name(name)
        if not hub.dataset:
            raise ConfigError(f"{name} needs task.dataset, owner/name on the hub or a folder of Parquet files")
        for key, column in (("image", hub.image), ("question", columns["question"]), ("label", columns["label"])):
            if not column:
                raise ConfigError(f"{name} needs task.{key}, the column of the data set that holds it")
        check_choice(f"parser of {name}", parser, self.parsers)
        check_positive(max_new_tokens=max_new_tokens)
        self.parser, self.suffix, self.max_new_tokens = parser, suffix, max_new_tokens
        self.columns = {key: column for key, column in columns.items() if column}
        self.hub = hub
        super().__init__(DataSource(self.name, "hub", {"hub": self._read_hub}))

    def _read_hub(self) -> Iterator[SourceRow]:
        group = self.columns.get("group")
        wanted = dict.fromkeys((*self.columns.values(), *self._more_columns()))
        yield from self.hub.rows(wanted, (lambda row: str(row[group])) if group else None)

    def _more_columns(self) -> Sequence[str]:
        return ()

    def read_row(self, row: SourceRow) -> Iterator[Sample]:
        """Make the sample of a row of the data set."""
        values = {key: row.values[column] for key, column in self.columns.items()}
        question, subset = question_text(values["question"], row.origin), values.get("subset", ALL)
        if subset is None or not str(subset).strip():
            raise DataError(f"{row.origin}: {self.columns['subset']} {shown(subset)} is no subset")
        text, reference = self._ask(question, values["label"], row)
        yield Sample(
            id=str(values.get("id", row.origin.rpartition(" ")[2])),
            image=row.image,
            question=with_suffix(text, self.suffix),
            group=row.image.group if Path(row.image.name).suffix.lower() in SUFFIXES else row.image.name,
            subset=str(subset).strip(),
            reference={**reference, "object": str(values.get("object") or UNKNOWN)},
        )

    @abstractmethod
    def _ask(self, question: str, label: Any, row: SourceRow) -> tuple[str, dict[str, Any]]:
        """Return the question as it is asked, and the reference of the sample."""


class HubYesNo(HubQuestions, YesNoTask):
    """Yes/no questions of a data set."""

    primary = "f1"
    parsers = yes_no.PARSERS

    def __init__(
        self,
        name: str | int = "hub_yes_no",
        dataset: str | None = None,
        folder: str = "",
        split: str = "test",
        revision: str | None = None,
        local_files_only: bool = False,
        image: str = "image",
        question: str = "question",
        label: str = "answer",
        positive: str = "yes",
        negative: str = "no",
        subset: str | None = None,
        group: str | None = None,
        id: str | None = None,
        object: str | None = None,
        suffix: str = "",
        parser: str = "first_word",
        max_new_tokens: int = 32,
    ) -> None:
        """Store and check the settings; ``conf/task/hub_yes_no.yaml`` explains every argument.

        Raises:
            ConfigError: a setting is missing, or has another value than it may have.
        """
        columns = dict(question=question, label=label, subset=subset, group=group, id=id, object=object)
        hub = HubSource(dataset or "", split, revision, local_files_only, folder, image)
        super().__init__(name, parser, suffix, max_new_tokens, columns, hub)
        self._labels = {_plain(positive): "yes", _plain(negative): "no"}
        if len(self._labels) < 2:
            raise ConfigError(f"task.positive={positive!r} and task.negative={negative!r} should differ")

    def _ask(self, question: str, label: Any, row: SourceRow) -> tuple[str, dict[str, Any]]:
        if _plain(label) not in self._labels:
            labels = " nor ".join(map(repr, self._labels))
            raise DataError(
                f"{row.origin}: {self.columns['label']} {shown(label)} is neither {labels} (task.positive, negative)"
            )
        return question, {"label": self._labels[_plain(label)]}

    def metrics(self) -> Mapping[str, Metric]:
        """Return accuracy, balanced accuracy and the other shares of the confusion matrix, from 0 to 1."""
        return YES_NO_METRICS


class HubChoice(HubQuestions):
    """Multiple-choice questions of a data set, answered by a letter."""

    parsers = choice.PARSERS

    def __init__(
        self,
        name: str | int = "hub_choice",
        dataset: str | None = None,
        folder: str = "",
        split: str = "test",
        revision: str | None = None,
        local_files_only: bool = False,
        image: str = "image",
        question: str = "question",
        label: str = "label",
        options: str | Sequence[str] | None = None,
        letters: str = "ABCDE",
        subset: str | None = None,
        group: str | None = None,
        id: str | None = None,
        suffix: str = "",
        parser: str = "lone_letter",
        max_new_tokens: int = 32,
    ) -> None:
        """Store and check the settings; ``conf/task/hub_choice.yaml`` explains every argument.

        Raises:
            ConfigError: a setting is missing, or has another value than it may have.
        """
        columns = dict(question=question, label=label, subset=subset, group=group, id=id, object=None)
        hub = HubSource(dataset or "", split, revision, local_files_only, folder, image)
        super().__init__(name, parser, suffix, max_new_tokens, columns, hub)
        self.options = options if options is None or isinstance(options, str) else tuple(options)
        self.letters = "".join(dict.fromkeys(str(letters).upper()))
        if not 2 <= len(self.letters) <= 26 or not (self.letters.isascii() and self.letters.isalpha()):
            raise ConfigError(f"task.letters={letters!r} should be the letters of the options, such as ABCD")

    def _more_columns(self) -> Sequence[str]:
        return () if self.options is None else (self.options,) if isinstance(self.options, str) else self.options

    def _ask(self, question: str, label: Any, row: SourceRow) -> tuple[str, dict[str, Any]]:
        texts = self._option_texts(row)
        options = dict(zip(self.letters, texts, strict=False)) if texts else dict.fromkeys(self.letters, "")
        reference = {"label": self._letter(label, options, row), "options": options if texts else {}}
        return (f"{question}\n{choice.list_options(options)}" if texts else question), reference

    def _option_texts(self, row: SourceRow) -> list[str]:
        """Return the options of a row, none if they are part of its question."""
        if self.options is None:
            return []
        if isinstance(self.options, str):
            cells = row.values[self.options]
        else:
            cells = [row.values[column] for column in self.options]
        if not isinstance(cells, list):
            raise DataError(f"{row.origin}: {self.options} {shown(cells)} is no list of options")
        texts = [str(cell).strip() for cell in cells if cell is not None and str(cell).strip()]
        if not 2 <= len(texts) <= len(self.letters):
            raise DataError(
                f"{row.origin}: {len(texts)} options, {shown(texts)}; with task.letters={self.letters} there can be 2 "
                f"to {len(self.letters)}"
            )
        return texts

    def _letter(self, label: Any, options: Mapping[str, str], row: SourceRow) -> str:
        """Return the right letter: given as such, as the option's number from 0, or as its text."""
        by_text = [letter for letter, text in options.items() if text and text == str(label).strip()]
        number = int(label) if str(label).strip().isdecimal() else -1
        letter = choice.bare_letter(str(label))
        if letter in options:
            return letter
        by_number = list(options)[number] if 0 <= number < len(options) else None
        shown_label = f"{row.origin}: {self.columns['label']} {shown(label)}"
        if len(by_text) == 1 and by_number not in (None, by_text[0]):  # the options are numbers themselves
            raise DataError(
                f"{shown_label} is the text of option {by_text[0]} and the number of option {by_number}, counted from "
                "0; it should be a letter"
            )
        if len(by_text) == 1:
            return by_text[0]
        if by_number is not None:
            return by_number
        raise DataError(
            f"{shown_label} should be one of the letters {''.join(options)}, a "
            f"number from 0 to {len(options) - 1}, or the text of an option"
        )

    def reply(self, sample: Sample, text: str) -> str | None:
        """Read a letter by the chosen parser."""
        options = sample.reference["options"] or dict.fromkeys(self.letters, "")
        return self.parsers[self.parser](text, options)

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Count the answer as right or wrong, and the letter that was read; ``unparsed`` if none was."""
        score = super().score(sample, answer)
        return replace(score, counts=choice.reply_counts(**score.detail, letters=self.letters))

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the chosen letter as a mention of its option, hallucinated if another one is right."""
        reply = self.reply(sample, answer.text)
        return choice.claim(answer.text, reply, sample.reference["label"], sample.reference["options"])

    def metrics(self) -> Mapping[str, Metric]:
        """Return the share of right answers, and the share of answers that chose each letter, from 0 to 1.

        ``accuracy`` is over the answers that could be read, ``accuracy_published`` over all.
        """
        return {**ACCURACY, **{f"chose_{letter}": share(f"chose_{letter}", "read") for letter in self.letters}}


def _plain(label: Any) -> str:
    """Write a label for comparison: text in lower case, numbers and truth values alike.

    >>> _plain(" Yes"), _plain(1), _plain(1.0), _plain(True)
    ('yes', '1', '1', 'true')
    """
    text = str(int(label) if isinstance(label, float) and label.is_integer() else label)
    return text.strip().lower()
