"""A question and its answer, step by step: what the browser shows, and what is kept to look at it again."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope.app import payload
from stethoscope.app.models import TRAIN_ONE, Pool, Ready
from stethoscope.diagnosis import diagnose
from stethoscope.errors import ConfigError, DataError, StethoscopeError
from stethoscope.records import Answer, Generation, ImageRef
from stethoscope.streaming import StreamedToken, stream

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.detector import Detector
    from stethoscope.diagnosis.readers import Reader

PAUSE = 0.05  # seconds between two views of an answer that is being written: what an eye and a network can follow


@dataclass(frozen=True)
class Question:
    """What one user asks.

    Attributes:
        model: a name of the pool.
        picture: RGB. ``text``: the question.
        generation: how to write.
        answer: a stored answer to look at; None lets the model answer.
        detector: judges in place of the model's own; None for that.
        notes: lines to be shown with the answer.
    """

    model: str
    picture: Image
    text: str
    generation: Generation
    answer: Answer | None = None
    detector: Detector | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """An answer that was looked at, kept for its user so that it can be looked at in another scope.

    Attributes:
        id: tells answers apart.
        question: with the answer in it.
    """

    id: str
    question: Question


Step = tuple[str, Case | None]
"""What to show, and the case once there is one."""


def read_picture(path: str | Path | None) -> Image:
    """The picture of an upload, as a person would see it.

    Raises:
        ConfigError: there is none. DataError: the file is no picture.
    """
    if path is None:
        raise ConfigError("there is no picture yet: upload one, or choose an example")
    file = Path(path)
    try:
        return ImageRef(file.name, file).load()
    except DataError as error:  # the user need not know where the server keeps it
        raise DataError(str(error).replace(str(file), repr(file.name))) from None


def generation(
    temperature: float = 0.0, top_p: float = 1.0, beams: int = 1, length: int = 128, seed: int = 0
) -> Generation:
    """How to write, from the settings on the screen. Temperature 0 takes the most probable token every time.

    Raises:
        ConfigError: drawing and beams at once.
    """
    if temperature > 0 and beams > 1:
        raise ConfigError(f"temperature {temperature:g} and {beams} beams exclude each other; set one back to 0 or 1")
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "seed": int(seed)} if temperature else {}
    return Generation(max_new_tokens=int(length), num_beams=int(beams), **drawn)


def ask(pool: Pool, question: Question, reader: Reader) -> Iterator[Step]:
    """Lets the model answer and explains the answer. Closing the iterator ends the answer and frees the model.

    Errors that the user can mend are shown, not raised.
    """
    try:
        if not question.text.strip():
            raise ConfigError("the question is empty; the usual one is 'Please describe this image in detail.'")
        yield payload.message("waiting for the model …" if pool.busy else "reading …", "busy", clear=True), None
        with pool.use(question.model) as ready:
            start = time.perf_counter()
            answer = question.answer
            if answer is None:
                answer = yield from _write(ready, question, reader)
            case = Case(
                uuid.uuid4().hex, Question(**{**vars(question), "answer": answer, "notes": _notes(ready, question)})
            )
            yield payload.message("looking at every token …", "busy"), None
            shown = _explain(ready, case, "row", reader, start)
        yield shown, case
    except StethoscopeError as error:
        yield payload.message(str(error), "error"), None


def again(pool: Pool, case: Case, scope: str, reader: Reader) -> Iterator[Step]:
    """The same answer in another scope of the gradient."""
    try:
        if scope not in ("row", "token"):
            raise ConfigError(f"scope={scope!r} should be row or token")
        yield payload.message("looking at every token again …", "busy"), case
        with pool.use(case.question.model) as ready:
            shown = _explain(ready, case, scope, reader, time.perf_counter())
        yield shown, case
    except StethoscopeError as error:
        yield payload.message(str(error), "error"), case


def _write(ready: Ready, question: Question, reader: Reader) -> Iterator[Step]:
    """Yields the answer while it is written, and returns it."""
    detectors, settings = ready.detectors, question.generation
    if settings.num_beams > 1:
        yield payload.message(f"writing {settings.num_beams} answers side by side …", "busy"), None
        encoded = ready.adapter.encode(question.picture, question.text)
        return ready.adapter.generate([encoded], settings)[0]
    threshold = None if detectors.live is None else detectors.live.threshold
    tokens: list[StreamedToken] = []
    shown = 0.0
    options = {"detector": detectors.live, "delay": detectors.delay, "generation": settings, "mentions": _no_mentions}
    for item in stream(ready.adapter, question.picture, question.text, **options):
        if not isinstance(item, StreamedToken):
            return item.answer
        tokens.append(item)
        if time.perf_counter() - shown > PAUSE:
            yield payload.writing(question.text, tokens, reader, threshold), None
            shown = time.perf_counter()
    raise AssertionError("a stream ends with its answer")


def _no_mentions(text: str) -> list:
    """The objects of the finished answer are judged with everything else about it."""
    return []


def _explain(ready: Ready, case: Case, scope: str, reader: Reader, start: float) -> str:
    """Everything about the answer of a case, to be shown."""
    question = case.question
    detector = question.detector or ready.detectors.final
    diagnosis = diagnose(
        ready.adapter, question.picture, question.text, question.answer, detector, scope=scope, mentions=reader
    )
    seconds = time.perf_counter() - start
    return payload.finished(diagnosis, case.id, scope, [*question.notes, f"Answered and explained in {seconds:.1f} s."])


def _notes(ready: Ready, question: Question) -> tuple[str, ...]:
    detector = question.detector or ready.detectors.final
    if detector is None:
        return (*question.notes, ready.detectors.names or TRAIN_ONE.format(model=question.model))
    return (*question.notes, *([f"Detector: {ready.detectors.names}"] if question.detector is None else []))
