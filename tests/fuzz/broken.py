"""Broken input for readers: any bytes, any JSON, and valid data with something in it replaced, removed or doubled."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import strategies as st

from stethoscope.core.errors import StethoscopeError

NUMBERS = st.one_of(st.integers(-3, 3), st.integers(), st.floats(), st.just(10**400))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=12), st.sampled_from(["../x", "/etc", "yes", ""])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)  # fmt: skip
"""Any value of JSON, NaN and numbers beyond all ranges among them."""


def places(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside nested lists and objects."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def changed(draw: Callable, data: Any) -> Any:
    """The data with up to three values replaced, removed or, in lists, doubled; seldom something else altogether."""
    if draw(st.integers(0, 19)) == 0:
        return draw(VALUES)
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(data))
        if not paths:
            break
        *path, last = draw(st.sampled_from(paths))
        inside = data
        for key in path:
            inside = inside[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "double"])):
            case "replace":
                inside[last] = draw(VALUES)
            case "remove":
                del inside[last]
            case "double" if isinstance(inside, list):
                inside.append(inside[last])
    return data


def json_bytes(data: Any) -> st.SearchStrategy[bytes]:
    """Changed data as a JSON file, seldom cut, with foreign bytes, or no JSON at all."""
    text = changed(data).map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))
    return damaged(text)


def line_bytes(rows: list[Any]) -> st.SearchStrategy[bytes]:
    """Changed rows as JSON lines."""

    def lines(value: Any) -> bytes:
        records = value if isinstance(value, list) else [value]
        return "\n".join(map(json.dumps, records)).encode("utf-8", "surrogatepass")

    return damaged(changed(rows).map(lines))


@st.composite
def damaged(draw: Callable, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes that are whole most of the time, else cut short, with something put in, or any."""
    data = draw(whole)
    match draw(st.sampled_from(["whole"] * 6 + ["cut", "put in", "any"])):
        case "cut":
            return data[: draw(st.integers(0, len(data)))]
        case "put in":
            position = draw(st.integers(0, len(data)))
            return data[:position] + draw(st.binary(max_size=8)) + data[position:]
        case "any":
            return draw(
                st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda t: t.encode("utf-8", "replace")))
            )
    return data


def answers(call: Callable[[], Any]) -> Any:
    """The result of a call, or None where it raises an error of ours: one line that can be printed.

    Any other exception goes through and fails the test.
    """
    try:
        return call()
    except StethoscopeError as error:
        text = str(error)
        assert text, "an error without words"
        assert "\n" not in text, text
        assert len(text) < 2000, text[:200]
        return None


def judged(task: Any) -> None:
    """A task that has been read must be able to judge any answer, and to say what all of them come to."""
    from stethoscope.core.types import Answer

    samples = list(task.samples())
    assert len({sample.id for sample in samples}) == len(samples) > 0
    scores = []
    for sample in samples:
        text = sample.answer or "Yes, there is a dog."
        answer = Answer(text, (1,), ((0, len(text)),), (-0.5,))
        score = task.score(sample, answer)
        assert score.status in ("ok", "unparsed")
        assert all(math.isfinite(value) for value in score.counts.values())
        for mention in task.mentions(sample, answer):
            assert 0 <= mention.start < mention.end <= len(text)
            assert mention.label in (-1, 0, 1)
        json.dumps(dict(sample.reference), allow_nan=False)
        scores.append((sample, score.counts))
    task.tally(scores)


def fails(call: Callable[[], Any]) -> None:
    """Asserts that a call raises an error of ours."""
    with pytest.raises(StethoscopeError):
        call()
