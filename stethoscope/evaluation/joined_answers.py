"""Join the answers of a log with the samples of a task: by id, or by the row of the data set, and the question."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.core.errors import DataError
from stethoscope.core.types import Sample

if TYPE_CHECKING:
    from stethoscope.storage.log_values import LoggedAnswer
    from stethoscope.storage.logged_answers import AnswerLog

_COCO_IMAGE = re.compile(r"(?:COCO_\w+_)?0*(\d+)(?:\.(?:jpg|png))?")
TAG = re.compile(r"<[^<>\s]{1,40}>")  # special tokens and image placeholders, which engines write in their own ways


@dataclass(frozen=True)
class JoinedAnswers:
    """The answers of a log that belong to the samples of a task.

    Attributes:
        log: that they come from.
        answers: by sample id.
        counts: ``samples`` of the task; ``missing``, those without an answer; ``failed``, those of them of which the
            log says why it has none; ``unmatched``, the answers of the log that belong to no sample.
        uses_ids: whether the log's token ids are taken, where it has them.
    """

    log: AnswerLog
    answers: Mapping[str, LoggedAnswer]
    counts: Mapping[str, int]
    uses_ids: bool = True

    @classmethod
    def join(cls, log: AnswerLog, samples: Sequence[Sample], task: str, uses_ids: bool = True) -> JoinedAnswers:
        """Find the sample of every answer, by id or else by data set row and question.

        Args:
            log: of answers.
            samples: all samples of the task.
            task: its name, for messages.
            uses_ids: as the attribute.

        Raises:
            DataError: no answer belongs to a sample, two belong to the same one, or question or given answer are not
                those of the sample.
        """
        refusal: _OtherQuestion | None = None
        for scheme in _schemes(log, samples):
            try:
                return cls._join(log, samples, task, scheme, uses_ids)
            except _OtherQuestion as error:  # what looked like an id may be a row
                refusal = refusal or error
        raise refusal or DataError(_nothing_to_join(log, samples))

    @classmethod
    def _join(
        cls, log: AnswerLog, samples: Sequence[Sample], task: str, scheme: Scheme, uses_ids: bool
    ) -> JoinedAnswers:
        answers: dict[str, LoggedAnswer] = {}
        failed: dict[str, LoggedAnswer] = {}
        unmatched = 0
        for answer in log.answers:
            candidates = scheme.samples.get(scheme.key(answer), ())
            if not candidates:
                unmatched += 1
                continue
            sample = _same_question(answer, candidates, task, scheme.needs_question)
            if answer.error:
                failed.setdefault(sample.id, answer)
                continue
            if sample.id in answers:
                raise DataError(
                    f"{answer.origin}: sample {sample.id} is answered before, in {answers[sample.id].origin}"
                )
            _check_task_answer(answer, sample, task)
            answers[sample.id] = answer
        if not answers:
            first = next(iter(failed.values()))
            raise DataError(f"{log.path} holds no answer to {task}, only failures; {first.origin}: {first.error}")
        counts = {"samples": len(samples), "missing": len(samples) - len(answers)}
        counts |= {"failed": sum(id_ not in answers for id_ in failed), "unmatched": unmatched}
        return cls(log, answers, counts, uses_ids)

    def fingerprint(self) -> dict[str, Any]:
        """Identify the log; ``file`` is only its location."""
        log = self.log
        return {
            "file": str(log.path),
            "format": log.format,
            "sha256": log.sha256,
            "engine": log.engine,
            "model": log.model,
            "revision": log.revision,
            "token_ids": self.uses_ids,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the source of the answers, its counts and its reader's notes, for ``metrics.json``."""
        notes = {"notes": list(self.log.notes)} if self.log.notes else {}
        return {**self.fingerprint(), "file": self.log.path.name, **self.counts, **notes}


class _OtherQuestion(DataError):
    """The question of an answer is not that of its sample."""


class Scheme(NamedTuple):
    """A way to find the samples that an answer may belong to.

    Attributes:
        samples: by key, such as an id or a row of the data set.
        key: returns the key of an answer; None for one without.
        needs_question: whether a key proves little by itself, so that the question must be checked too.
    """

    samples: Mapping[Any, Sequence[Sample]]
    key: Callable[[LoggedAnswer], Any]
    needs_question: bool


def _schemes(log: AnswerLog, samples: Sequence[Sample]) -> Iterator[Scheme]:
    """List the ways in which answers of a log are found: by the sample's id, or else by the benchmark's own or by row.

    The own id is what the benchmark calls a question: ids of samples begin with the subset. CHAIR's is COCO's number.
    """
    ids = {sample.id: [sample] for sample in samples}
    own: dict[str, list[Sample]] = {}
    rows: dict[int, list[Sample]] = {}
    for index, sample in enumerate(samples):
        own.setdefault(_short_id(sample.id.removeprefix(f"{sample.subset}-")), []).append(sample)
        rows.setdefault(index if sample.image.row is None else sample.image.row, []).append(sample)
    schemes = [Scheme(ids, lambda answer: answer.id, False)]
    if not any(answer.id in ids for answer in log.answers):
        by_own = Scheme(own, lambda answer: None if answer.id is None else _short_id(answer.id), False)
        schemes = [by_own, Scheme(rows, _row, True)]
    return (scheme for scheme in schemes if any(scheme.key(answer) in scheme.samples for answer in log.answers))


def _short_id(id_: str) -> str:
    """Return COCO's number where an id is the name of one of its images.

    >>> _short_id("COCO_val2014_000000000042.jpg"), _short_id("000000000042"), _short_id("42"), _short_id("a-42")
    ('42', '42', '42', 'a-42')
    """
    number = _COCO_IMAGE.fullmatch(id_)
    return number[1] if number else id_


def _row(answer: LoggedAnswer) -> int | None:
    """Return the row of an answer; an id of digits may be one too, as its question is checked."""
    if answer.row is not None or answer.id is None:
        return answer.row
    return int(answer.id) if answer.id.isdecimal() and len(answer.id) < 16 else None


def _same_question(answer: LoggedAnswer, candidates: Sequence[Sample], task: str, needs_question: bool) -> Sample:
    """Return the candidate whose question the log holds.

    Raises:
        DataError: the log asks something else, or does not tell which candidate is meant.
    """
    asked = [_squash(text) for text in (answer.question, answer.prompt) if text and text.strip()]
    if not asked and (needs_question or len(candidates) > 1):
        raise DataError(
            f"{answer.origin}: {'a row' if needs_question else 'an id'} that may be that of sample {candidates[0].id}, "
            f"but neither question nor prompt to check it by; give the ids that {task} has"
        )
    matches = []
    for sample in candidates:
        question = _squash(sample.question)
        if not asked or any(question in text or text in question for text in asked):
            matches.append(sample)
    if len(matches) == 1:
        return matches[0]
    sample = candidates[0]
    if matches:
        named = " and ".join(match.id for match in matches[:3])
        raise DataError(f"{answer.origin}: it may belong to samples {named} alike; give the ids that {task} has")
    raise _OtherQuestion(
        f"{answer.origin}: the log asks {shorten(answer.question or answer.prompt or '')}, but sample {sample.id} of "
        f"{task} asks {shorten(sample.question)}; the task should ask what was asked (task.question, task.suffix), or "
        "the file belongs to other data"
    )


def _check_task_answer(answer: LoggedAnswer, sample: Sample, task: str) -> None:
    if sample.answer is not None and _squash(sample.answer) != _squash(answer.text):
        raise DataError(
            f"{answer.origin}: {task} itself gives another answer to sample {sample.id}, {shorten(sample.answer)}, "
            f"than the log, {shorten(answer.text)}; leave out answers.file"
        )


def _nothing_to_join(log: AnswerLog, samples: Sequence[Sample]) -> str:
    """Say that no answer of a log belongs to a sample."""
    if not log.answers:
        return f"{log.path} holds no answer"
    first = log.answers[0]
    key = f"row {first.row}" if first.id is None else f"id {shorten(first.id)}"
    return (
        f"none of the {len(log.answers):,} answers in {log.path} belongs to a sample: the first has {key}, samples "
        f"have ids such as {shorten(samples[0].id)}"
    )


def _squash(text: str) -> str:
    """Make texts comparable that differ in white space, case and image placeholders only."""
    return " ".join(TAG.sub(" ", text).casefold().split())


def shorten(text: str) -> str:
    """Quote a text of a log, at most 80 characters of it."""
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else text[:77] + "...")
