"""Hold the answers of a log, and check and translate its values."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from stethoscope.core.errors import DataError
from stethoscope.core.json_rows import clipped, shown
from stethoscope.core.text import listed

_FINISHED = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "word", "tool_calls", "function_call"}
_CUT = {"length", "limit", "max_tokens", "model_length", "max_output_tokens"}
_LARGEST_ID, _LOWEST = 2**31 - 1, 1e300
_ROUNDING = 1e-3  # a log-probability of 0 in half precision may come out just above it
_REASONING = re.compile(r"<(think|thinking|reasoning|analysis)>.*?(?:</\1>|\Z)", re.DOTALL)
_UNOPENED = re.compile(r"</(?:think|thinking|reasoning|analysis)>")


@dataclass(frozen=True)
class LoggedAnswer:
    """One answer of a log.

    Attributes:
        text: the answer with its reasoning; empty where the log holds none.
        id: of the sample, as text; None where the log numbers its rows only.
        row: of the data set's split, from 0; None where the log names samples by id only.
        question: asked of the model, without the chat template; None if not logged.
        token_ids: of the answer, as the engine counts them; an end-of-sequence id may be the last. None if not logged.
        logprobs: natural logarithms of the probabilities of the answer's tokens, at most 0. None if not logged.
        prompt: the whole prompt with its chat template; None if not logged.
        prompt_token_ids: of the prompt; image placeholders are the engine's. None if not logged.
        reasoning: (start, end) character spans of ``text`` that are reasoning and no answer, with their tags.
        finished: False if the answer was cut at the limit of tokens, True if the model ended it, None if not logged.
        error: one line on why the log holds no answer; empty if it does.
        origin: file and line, for messages.
    """

    text: str
    id: str | None = None
    row: int | None = None
    question: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    reasoning: tuple[tuple[int, int], ...] = ()
    finished: bool | None = None
    error: str = ""
    origin: str = ""


@dataclass(frozen=True)
class Contents:
    """Answers of a log, what is known of their origin, and notes, as in ``AnswerLog``."""

    answers: list[LoggedAnswer]
    engine: str = ""
    model: str = ""
    revision: str = ""
    notes: tuple[str, ...] = ()


def logged_answer(text: Any, origin: str, error: str = "", **values: Any) -> LoggedAnswer:
    """Build an answer: check text and lengths, find its reasoning, note why it is empty.

    Raises:
        DataError: the text is no text, or there are not as many log-probabilities as token ids.
    """
    if not isinstance(text, str):
        raise DataError(f"{origin}: answer {shown(text)} is no text")
    ids, logprobs = values.get("token_ids"), values.get("logprobs")
    if ids is not None and logprobs is not None and len(ids) != len(logprobs):
        raise DataError(
            f"{origin}: {len(ids)} token ids but {len(logprobs)} log-probabilities; one for each token was expected"
        )
    values.setdefault("reasoning", reasoning_spans(text))
    if not error and not text.strip():
        error = "the answer is empty"
    return LoggedAnswer(text, error=error, origin=origin, **values)


def reasoning_spans(text: str) -> tuple[tuple[int, int], ...]:
    """Find the (start, end) character spans of ``<think>`` parts, with their tags.

    A part without end runs to the end of the text. A part without start, which a chat template writes into the
    prompt, runs from the start of the text.

    >>> reasoning_spans("<think>a</think> Yes"), reasoning_spans("so</think>No"), reasoning_spans("Yes")
    (((0, 16),), ((0, 10),), ())
    """
    if "<" not in text:
        return ()
    spans = [match.span() for match in _REASONING.finditer(text)]
    end = _UNOPENED.search(text)
    if end and (not spans or end.start() < spans[0][0]):
        spans.insert(0, (0, end.end()))
    return tuple(spans)


def with_reasoning(reasoning: str, text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Put reasoning that is logged apart before its answer; return the text and all its spans.

    Most chat templates write it so.

    >>> with_reasoning("a", "Yes")
    ('<think>\\na\\n</think>\\n\\nYes', ((0, 20),))
    """
    if not reasoning.strip():
        return text, reasoning_spans(text)
    block = f"<think>\n{reasoning.strip()}\n</think>\n\n"
    spans = ((start + len(block), end + len(block)) for start, end in reasoning_spans(text))
    return block + text, ((0, len(block)), *spans)


def is_finished(reason: Any) -> bool | None:
    """Translate a finish reason; None for one that is not known.

    >>> is_finished("stop"), is_finished("length"), is_finished("content_filter")
    (True, False, None)
    """
    reason = str(reason).lower()
    return True if reason in _FINISHED else False if reason in _CUT else None


def keys_of(row: Mapping[str, Any]) -> str:
    """List the keys of an object for a message, shortened."""
    return clipped(", ".join(map(str, row))) or "no key"


def error_line(error: Any) -> str:
    """Shorten what a log has as error to one line; empty for none."""
    if isinstance(error, Mapping):
        error = error.get("message") or error.get("code") or error
    return clipped(" ".join(str(error).split())) if error else ""


def sample_id(value: Any, origin: str) -> str:
    """Return an id as text.

    Raises:
        DataError: it is empty, or neither text nor a whole number.
    """
    whole = isinstance(value, float) and value.is_integer()  # pandas writes 3.0 where another row has none
    if isinstance(value, bool) or not (isinstance(value, (str, int)) or whole) or not str(value).strip():
        raise DataError(f"{origin}: id {shown(value)} should be text or a whole number")
    return value.strip() if isinstance(value, str) else str(int(value))


def as_object(value: Any) -> dict[str, Any]:
    """Return a value that should be a JSON object; an empty one where it is something else, or missing."""
    return value if isinstance(value, dict) else {}


def objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects in a list; none where the value is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def last_user_message(messages: Any) -> dict[str, Any] | None:
    """Return the last message of the user in a list of chat messages; None where there is none."""
    return next((item for item in reversed(objects(messages)) if item.get("role") == "user"), None)


def row_of_line(line: Mapping[str, Any], index: int, id_: str | None, origin: str) -> int | None:
    """Return the data set's row that a line names, or else its own position.

    It is None where an id names the sample instead.

    Args:
        line: of the log.
        index: position of the line, from 0.
        id_: of the sample; None where the line has none.
        origin: file and line, for messages.

    Raises:
        DataError: it names no whole number from 0 on.
    """
    if "row" in line:
        return row_number(line["row"], origin)
    return index if id_ is None else None


def row_number(value: Any, origin: str) -> int:
    """Return the number of a data set's row.

    Raises:
        DataError: it is no whole number from 0 on.
    """
    whole = isinstance(value, float) and value.is_integer()
    digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19
    if isinstance(value, bool) or not (isinstance(value, int) or whole or digits) or not 0 <= int(value) < 2**63:
        raise DataError(f"{origin}: row {shown(value)} should be a whole number from 0 on")
    return int(value)


def text_or_none(value: Any, name: str, origin: str) -> str | None:
    """Check that a value is text or missing.

    Raises:
        DataError: it is something else.
    """
    if value is not None and not isinstance(value, str):
        raise DataError(f"{origin}: {name} {shown(value)} is no text")
    return value


def int_list(values: Any, name: str, origin: str) -> tuple[int, ...] | None:
    """Check that a value is a list of token ids, or missing.

    Raises:
        DataError: it is no list, or an item is no whole number from 0 to 2^31 - 1.
    """
    if values is None:
        return None
    if not isinstance(values, list):
        raise DataError(f"{origin}: {name} {shown(values)} should be a list of whole numbers")
    if {*map(type, values)} <= {int} and min(values, default=0) >= 0 and max(values, default=0) <= _LARGEST_ID:
        return tuple(values)  # the usual case, ten times as fast
    for index, item in enumerate(values):
        if type(item) is not int or not 0 <= item <= _LARGEST_ID:
            raise DataError(f"{origin}: {name}[{index}] is {shown(item)}; a token id is a whole number from 0 on")
    return tuple(values)


def logprob_list(values: Any, name: str, origin: str) -> tuple[float, ...] | None:
    """Check that a value is a list of log-probabilities (natural logarithms, at most 0), or missing.

    Raises:
        DataError: it is no list, or an item is no finite number, or above 0.
    """
    if values is None:
        return None
    if not isinstance(values, list):
        raise DataError(f"{origin}: {name} {shown(values)} should be a list of numbers")
    if {*map(type, values)} <= {float} and sum(values, 0.0) > -_LOWEST and max(values, default=0) <= 0:
        return tuple(values)  # the usual case, five times as fast; a NaN among them makes the sum one
    for index, item in enumerate(values):
        if type(item) not in (int, float) or not (-math.inf < item <= _ROUNDING):
            raise DataError(
                f"{origin}: {name}[{index}] is {shown(item)}; a log-probability is a finite number of at most 0"
            )
    return tuple(float(max(item, -_LOWEST)) for item in values)


class Names:
    """Collect what the lines of a log say of engine, model and revision."""

    def __init__(self) -> None:
        """Start without any name."""
        self._names: dict[str, dict[str, None]] = {}

    def add(self, row: Mapping[str, Any], **keys: Collection[str]) -> None:
        """Take names of one line: for each kind of name the first of its keys that holds text."""
        for kind, candidates in keys.items():
            name = next((row[key] for key in candidates if isinstance(row.get(key), str) and row[key].strip()), None)
            if name:
                self._names.setdefault(kind, {})[clipped(name.strip())] = None

    def __getitem__(self, kind: str) -> str:
        """Return the name of a kind; several are joined, none is empty."""
        names = list(self._names.get(kind, ()))
        return listed(names, 5)

    def notes(self) -> tuple[str, ...]:
        """Return a line for each kind that has several names."""
        return tuple(f"the log names {len(names)} {kind}s: {self[kind]}" for kind, names in self._names.items()
                     if len(names) > 1)  # fmt: skip
