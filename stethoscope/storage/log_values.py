"""Check and translate single values of logged answers: ids, token ids, log-probabilities, reasoning, names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from stethoscope.core.errors import DataError
from stethoscope.core.json_rows import clipped, shown

_FINISHED = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "word", "tool_calls", "function_call"}
_CUT = {"length", "limit", "max_tokens", "model_length", "max_output_tokens"}
_LARGEST_ID, _LOWEST = 2**31 - 1, 1e300
_ROUNDING = 1e-3  # a log-probability of 0 in half precision may come out just above it
_REASONING = re.compile(r"<(think|thinking|reasoning|analysis)>.*?(?:</\1>|\Z)", re.DOTALL)
_UNOPENED = re.compile(r"</(?:think|thinking|reasoning|analysis)>")


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
    """Put reasoning that is logged apart before its answer, as most chat templates do, and return all spans of it.

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


def objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects in a list; none where the value is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


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
        return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")

    def notes(self) -> tuple[str, ...]:
        """Return a line for each kind that has several names."""
        return tuple(f"the log names {len(names)} {kind}s: {self[kind]}" for kind, names in self._names.items()
                     if len(names) > 1)  # fmt: skip
