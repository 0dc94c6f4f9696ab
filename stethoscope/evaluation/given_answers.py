"""Join the answers of a log with the samples of a task, let the model read them, and check whether it wrote them.

A given answer is scored, labelled and traced like one that the model has generated. Its own words come from elsewhere:
another engine, another model, a person.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.core.errors import DataError
from stethoscope.core.types import Answer, Sample, required

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter
    from stethoscope.storage.logged_answers import AnswerLog, LoggedAnswer
    from stethoscope.storage.records import Record
    from stethoscope.tracing.trace import Encoded

OWN_SHARE = 0.95
"""Least share of tokens that are the model's first choice in greedy answers of its own.

Measured on the embedded model's captions (60 to 120 scenes): its own greedy answers 1.000, those it wrote in bfloat16
0.974; its own beams 0.944, its own answers with one object swapped 0.926, sampled at temperature 1 0.816, with their
sentences shuffled 0.677; those of an earlier checkpoint 0.873.
"""
OWN_DIFFERENCE = 0.1
"""Largest mean difference (nats) between logged log-probabilities and the model's, for sampled answers of its own."""
NOT_OWN = "these answers were not written by this model"

_COCO_IMAGE = re.compile(r"(?:COCO_\w+_)?0*(\d+)(?:\.(?:jpg|png))?")
_TAG = re.compile(r"<[^<>\s]{1,40}>")  # special tokens and image placeholders, which engines write in their own ways


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
        samples: by what answers are looked up by.
        key: returns that of an answer; None for one that has no such thing.
        needs_question: whether it proves little by itself, so that the question must be checked too.
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
    by_id, by_own = Scheme(ids, _id, False), Scheme(own, _own_id, False)
    schemes = [by_id] if any(answer.id in ids for answer in log.answers) else [by_own, Scheme(rows, _row, True)]
    return (scheme for scheme in schemes if any(scheme.key(answer) in scheme.samples for answer in log.answers))


def _id(answer: LoggedAnswer) -> str | None:
    return answer.id


def _own_id(answer: LoggedAnswer) -> str | None:
    return None if answer.id is None else _short_id(answer.id)


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
        f"{answer.origin}: the log asks {_short(answer.question or answer.prompt or '')}, but sample {sample.id} of "
        f"{task} asks {_short(sample.question)}; the task should ask what was asked (task.question, task.suffix), or "
        "the file belongs to other data"
    )


def _check_task_answer(answer: LoggedAnswer, sample: Sample, task: str) -> None:
    if sample.answer is not None and _squash(sample.answer) != _squash(answer.text):
        raise DataError(
            f"{answer.origin}: {task} itself gives another answer to sample {sample.id}, {_short(sample.answer)}, than "
            f"the log, {_short(answer.text)}; leave out answers.file"
        )


def _nothing_to_join(log: AnswerLog, samples: Sequence[Sample]) -> str:
    """Say that no answer of a log belongs to a sample."""
    if not log.answers:
        return f"{log.path} holds no answer"
    first = log.answers[0]
    key = f"row {first.row}" if first.id is None else f"id {_short(first.id)}"
    return (
        f"none of the {len(log.answers):,} answers in {log.path} belongs to a sample: the first has {key}, samples "
        f"have ids such as {_short(samples[0].id)}"
    )


def _squash(text: str) -> str:
    """Make texts comparable that differ in white space, case and image placeholders only."""
    return " ".join(_TAG.sub(" ", text).casefold().split())


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else text[:77] + "...")


# --- reading ----------------------------------------------------------------------------------------------------------


def read_answer(
    adapter: Adapter, encoded: Encoded | None, sample: Sample, logged: LoggedAnswer | None, uses_ids: bool = True
) -> tuple[Answer, dict[str, Any]]:
    """Let a model read a given answer, and note how.

    Args:
        adapter: the model; one without a model takes the text as it is.
        encoded: the prompt; None without a model.
        sample: that is answered.
        logged: the answer; None for the one that the sample has.
        uses_ids: whether to take the log's token ids.

    Returns:
        The answer, and ``Record.given``: ``tokens`` (``logged``, ``retokenised`` or ``none``); ``changed``, whether
        the tokenizer changes the text; ``prompt`` (``same`` or ``other``), where the log has it; ``difference``, the
        sum of absolute differences of log-probabilities (nats) and its number of tokens, where the log has them.

    Raises:
        ForeignTokens: the ids do not decode to the text.
        DataError: the answer cannot be read, or the reasoning in it is lost.
    """
    text = logged.text if logged is not None else required(sample.answer)
    ids = logged.token_ids if logged is not None and uses_ids else None
    if not adapter.has_model:
        answer, tokens = Answer(text.strip(), (), (), ()), "none"
    elif ids is None:
        answer, tokens = adapter.answer(required(encoded), text), "retokenised"
    else:
        answer, tokens = adapter.answer(required(encoded), text, token_ids=ids), "logged"
    note: dict[str, Any] = {"tokens": tokens, "changed": answer.text.strip() != text.strip()}
    if logged is None:
        return answer, note
    if logged.finished is not None:
        answer = replace(answer, finished=logged.finished)
    if logged.reasoning:
        answer = replace(answer, reasoning=find_reasoning(text, logged.reasoning, answer.text))
    if encoded is not None:
        same = _same_prompt(logged, encoded, sample.question)
        note |= {} if same is None else {"prompt": "same" if same else "other"}
        note |= _difference(logged, answer, ids is not None)
    return answer, note


def find_reasoning(text: str, spans: Sequence[tuple[int, int]], answer: str) -> tuple[tuple[int, int], ...]:
    """Find the reasoning of a text in what a tokenizer makes of it: all that is not of the visible parts.

    Tags such as ``<think>`` may be lost, and white space and case may change.

    Args:
        text: of the log.
        spans: half-open character spans of its reasoning.
        answer: the text that the tokenizer gives back.

    Raises:
        DataError: a visible part did not come back.

    >>> find_reasoning("<think>A dog?</think>\\n\\nNo.", [(0, 21)], "A dog? no.")
    ((0, 7),)
    """
    letters = [index for index, letter in enumerate(answer) if not letter.isspace()]
    folded = "".join(_fold(answer[index]) for index in letters)
    hidden = {index for start, end in spans for index in range(start, end)}
    parts = [list(part) for is_hidden, part in groupby(range(len(text)), hidden.__contains__) if not is_hidden]
    end, stop, reasoning = len(folded), len(answer), list[tuple[int, int]]()
    for part in reversed(parts):
        visible = "".join(_fold(text[index]) for index in part if not text[index].isspace())
        start = folded.rfind(visible, 0, end)
        if start < 0:
            raise DataError(
                f"the tokenizer makes {_short(answer)} of it, in which the answer behind the reasoning is lost"
            )
        if visible:
            reasoning.append((letters[start + len(visible) - 1] + 1, stop))
            end, stop = start, letters[start]
    gaps = [(first, last, answer[first:last].lstrip()) for first, last in (*reasoning, (0, stop))]
    return tuple(sorted((last - len(hidden_text), last) for _, last, hidden_text in gaps if hidden_text))


def _fold(letter: str) -> str:
    """Return a letter in lower case, if that is one letter."""
    lower = letter.lower()
    return lower if len(lower) == 1 else letter


def _same_prompt(logged: LoggedAnswer, encoded: Encoded, question: str) -> bool | None:
    """Tell whether the log's prompt is ours, apart from the image's placeholders; None where it has none."""
    ids = encoded.inputs["input_ids"][0].tolist()
    if logged.prompt_token_ids is not None and len(ids) == encoded.spans.length:
        placeholders = {ids[position] for position in encoded.spans.image}
        ours, theirs = (
            [token for token in part if token not in placeholders] for part in (ids, logged.prompt_token_ids)
        )
        return theirs in (ours, ours[1:])  # engines may leave out the token that begins a text
    if not logged.prompt:
        return None
    prompts = ["".join(_TAG.sub("", text).split()) for text in (logged.prompt, encoded.text, question)]
    return prompts[0] in prompts[1:]


def _difference(logged: LoggedAnswer, answer: Answer, has_ids: bool) -> dict[str, Any]:
    """Sum the differences of log-probabilities, token by token; empty where the tokens are not known to be the same."""
    values, own = logged.logprobs or (), answer.logprobs
    if len(values) < len(own) or not own or not (has_ids or len(values) == len(own)):
        return {}
    gaps = [abs(value - other) for value, other in zip(values, own, strict=False) if math.isfinite(value - other)]
    return {"difference": [round(sum(gaps), 6), len(gaps)]} if gaps else {}


# --- figures ----------------------------------------------------------------------------------------------------------


def count_given(record: Record) -> dict[str, float]:
    """Count what the figures of given answers are summed from; empty for an answer of the model's own."""
    note, answer = record.given, record.answer
    if not note or answer is None:
        return {}
    total, compared = note.get("difference", (0.0, 0))
    flags = answer.argmax or ()
    return {
        note["tokens"]: 1,
        "changed": note["tokens"] == "retokenised" and note["changed"],
        "prompts": "prompt" in note,
        "same_prompts": note.get("prompt") == "same",
        "tokens": len(flags),
        "argmax": sum(flags),
        "logprob": sum(round(value, 6) for value in answer.logprobs) if flags else 0.0,  # as records store them
        "difference": total,
        "compared": compared,
    }


def summarise(counted: Iterable[Mapping[str, float]]) -> dict[str, Any]:
    """Add up counts and compute the off-policy check: do the answers look like those of the model that reads them?

    Args:
        counted: of every answer, from ``count_given``.

    Returns:
        Numbers of answers with ``logged`` and with ``retokenised`` tokens and of those ``changed`` by that, of
        ``prompts`` that the log has and of the ``same_prompts``; under ``check`` the mean log-probability (nats per
        token), the share of tokens that are the model's first choice, the mean absolute difference to the logged
        log-probabilities (nats; None without any) and whether the answers are its own. Empty without answers.
    """
    totals: dict[str, float] = {}
    for counts in counted:
        for name, value in counts.items():
            totals[name] = totals.get(name, 0) + value
    if not totals:
        return {}
    names = ("logged", "retokenised", "changed", "prompts", "same_prompts")
    figures: dict[str, Any] = {name: int(totals.get(name, 0)) for name in names}
    tokens, compared = int(totals["tokens"]), int(totals["compared"])
    if tokens:
        share = totals["argmax"] / tokens
        difference = totals["difference"] / compared if compared else None
        own = share >= OWN_SHARE or (difference is not None and difference <= OWN_DIFFERENCE)
        check = {"tokens": tokens, "mean_logprob": totals["logprob"] / tokens, "argmax_share": share}
        figures["check"] = {**check, "logprob_difference": difference, "own": own}
    return figures


def describe(figures: Mapping[str, Any]) -> list[str]:
    """Write the figures of given answers as sentences: where they come from, how they were read, who wrote them."""
    lines = []
    if "file" in figures:
        written = " ".join(filter(None, (figures["model"], figures["revision"])))
        origin = ", written by " * bool(written) + written + " with " * bool(figures["engine"]) + figures["engine"]
        lines.append(
            f"answers from {figures['file']} ({figures['format']}{origin}): "
            f"{figures['samples'] - figures['missing']:,} of {figures['samples']:,} samples; left out, without an "
            f"answer: {figures['missing']:,}"
            + (f", {figures['failed']:,} of them because it failed" if figures["failed"] else "")
            + (f"; answers to no sample of the task: {figures['unmatched']:,}" if figures["unmatched"] else "")
        )
        lines += [f"of this log: {note}" for note in figures.get("notes", ())]
    if figures.get("retokenised"):
        share = figures["changed"] / figures["retokenised"]
        lines.append(f"tokenised again: {figures['retokenised']:,} answers, which changes the text of {share:.1%}")
    if figures.get("prompts") and figures["same_prompts"] < figures["prompts"]:
        others = figures["prompts"] - figures["same_prompts"]
        lines.append(
            f"prompts: {others:,} of {figures['prompts']:,} in the log are not those that this model reads here"
        )
    check = figures.get("check")
    if check:
        gap = check["logprob_difference"]
        logged = "" if gap is None else f", {gap:.4f} nats from the logged ones on average"
        lines.append(
            f"off-policy check: {check['argmax_share']:.3f} of {check['tokens']:,} tokens are this model's first "
            f"choice, log-probability {check['mean_logprob']:.3f} nats per token{logged}"
        )
        if check["own"] and check["argmax_share"] < OWN_SHARE:
            lines[-1] += ": sampled answers of this model, by their logged log-probabilities"
        elif not check["own"]:
            lines[-1] += (
                f": {NOT_OWN}, or sampled (its greedy answers have 1.000, in another precision at least {OWN_SHARE}); "
                "features and warnings say how this model reads them"
            )
    return lines
