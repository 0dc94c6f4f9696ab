"""Let the model read the answers of a log, and check whether it wrote them.

A given answer is scored, labelled and traced like one that the model has generated. Its own words come from elsewhere:
another engine, another model, a person.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import DataError
from stethoscope.core.types import Answer, Sample, required
from stethoscope.evaluation.joined_answers import TAG, shorten

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter
    from stethoscope.storage.log_values import LoggedAnswer
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
                f"the tokenizer makes {shorten(answer)} of it, in which the answer behind the reasoning is lost"
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
    prompts = ["".join(TAG.sub("", text).split()) for text in (logged.prompt, encoded.text, question)]
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


def _describe_log(figures: Mapping[str, Any]) -> str:
    """Write who wrote the answers of a log, and to how many samples of the task."""
    writer = " ".join(filter(None, (figures["model"], figures["revision"])))
    by, engine = f", written by {writer}" if writer else "", f" with {figures['engine']}" if figures["engine"] else ""
    failed = f", {figures['failed']:,} of them because it failed" if figures["failed"] else ""
    unmatched = f"; answers to no sample of the task: {figures['unmatched']:,}" if figures["unmatched"] else ""
    return (
        f"answers from {figures['file']} ({figures['format']}{by}{engine}): "
        f"{figures['samples'] - figures['missing']:,} of {figures['samples']:,} samples; left out, without an "
        f"answer: {figures['missing']:,}{failed}{unmatched}"
    )


def describe(figures: Mapping[str, Any]) -> list[str]:
    """Write the figures of given answers as sentences: where they come from, how they were read, who wrote them."""
    lines = []
    if "file" in figures:
        lines += [_describe_log(figures), *(f"of this log: {note}" for note in figures.get("notes", ()))]
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
