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
from stethoscope.app.sessions import NO_PICTURE
from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.types import Answer, Generation, ImageRef
from stethoscope.diagnosis import diagnose
from stethoscope.streaming import StreamedToken, stream

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.detector import Detector
    from stethoscope.diagnosis.readers import Reader
    from stethoscope.tracing.trace import Encoded

MAX_QUESTION = 512  # tokens of a question
MAX_LENGTH, MAX_BEAMS = 512, 10  # tokens of an answer, and how many are written side by side
PAUSE = 0.05  # seconds between two views of an answer that is being written: what an eye and a network can follow


@dataclass(frozen=True)
class Question:
    """What one user asks.

    Attributes:
        model: a name of the pool.
        picture: a file of the app's own folder, decoded while the question is answered; sessions keep no pixels.
        text: the question.
        generation: how to write.
        answer: a stored answer to look at; None lets the model answer.
        detector: judges in place of the model's own; None for that.
        notes: lines to be shown with the answer.
    """

    model: str
    picture: Path | None
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
    """Read the picture of an upload, as a person would see it.

    Raises:
        ConfigError: there is none. DataError: the file is no picture, too large a one, or gone.
    """
    if path is None:
        raise ConfigError("there is no picture yet: upload one, or choose an example")
    file = Path(path)
    if not file.is_file():
        raise DataError(NO_PICTURE)
    try:
        return ImageRef(file.name, file).load()
    except DataError as error:  # the user need not know where the server keeps it
        raise DataError(str(error).replace(str(file), repr(file.name))) from None


def generation(
    temperature: float = 0.0, top_p: float = 1.0, beams: int = 1, length: int = 128, seed: int = 0
) -> Generation:
    """How to write, from the settings on the screen. Temperature 0 takes the most probable token every time.

    Raises:
        ConfigError: drawing and beams at once, or more than the screen offers.
    """
    if not (length <= MAX_LENGTH and beams <= MAX_BEAMS):  # not a number either
        raise ConfigError(f"{length} tokens and {beams} beams: at most {MAX_LENGTH} and {MAX_BEAMS} are written")
    if temperature > 0 and beams > 1:
        raise ConfigError(f"temperature {temperature:g} and {beams} beams exclude each other; set one back to 0 or 1")
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "seed": int(seed)} if temperature else {}
    return Generation(max_new_tokens=int(length), num_beams=int(beams), **drawn)


def ask(pool: Pool, question: Question, reader: Reader) -> Iterator[Step]:
    """Let the model answer and explain the answer. Closing the iterator ends the answer and frees the model.

    Errors are shown (:func:`stethoscope.app.payload.failure`), not raised, so that the page never waits for more.
    """
    try:
        if not question.text.strip():
            raise ConfigError("the question is empty; the usual one is 'Please describe this image in detail.'")
        yield payload.message("waiting for the model …" if pool.busy else "reading …", "busy", clear=True), None
        with pool.use(question.model) as ready:
            start = time.perf_counter()
            picture = read_picture(question.picture)
            encoded = ready.adapter.encode(picture, question.text)
            _check_question(encoded)
            answer = question.answer
            if answer is None:
                answer = yield from _write(ready, question, encoded, picture, reader)
            case = Case(
                uuid.uuid4().hex, Question(**{**vars(question), "answer": answer, "notes": _notes(ready, question)})
            )
            yield payload.message("looking at every token …", "busy"), None
            shown = _explain(ready, case, picture, "row", reader, start)
        yield shown, case
    except Exception as error:
        yield payload.failure(error), None


def again(pool: Pool, case: Case, scope: str, reader: Reader) -> Iterator[Step]:
    """The same answer in another scope of the gradient."""
    try:
        if scope not in ("row", "token"):
            raise ConfigError(f"scope={scope!r} should be row or token")
        yield payload.message("looking at every token again …", "busy"), case
        with pool.use(case.question.model) as ready:
            start = time.perf_counter()
            shown = _explain(ready, case, read_picture(case.question.picture), scope, reader, start)
        yield shown, case
    except Exception as error:
        yield payload.failure(error), case


def _check_question(encoded: Encoded) -> None:
    """Refuse a question that would hold the model for everybody.

    Raises:
        DataError: it has more than ``MAX_QUESTION`` tokens.
    """
    tokens = len(encoded.spans.question)
    if tokens > MAX_QUESTION:
        raise DataError(f"the question has {tokens:,} tokens; at most {MAX_QUESTION} are answered here")


def _write(ready: Ready, question: Question, encoded: Encoded, picture: Image, reader: Reader) -> Iterator[Step]:
    """Yield the answer while it is written, and return it."""
    detectors, settings = ready.detectors, question.generation
    if settings.num_beams > 1:
        yield payload.message(f"writing {settings.num_beams} answers side by side …", "busy"), None
        return ready.adapter.generate([encoded], settings)[0]
    threshold = None if detectors.live is None else detectors.live.threshold
    tokens: list[StreamedToken] = []
    shown = 0.0
    options = {"detector": detectors.live, "delay": detectors.delay, "generation": settings, "mentions": _no_mentions}
    for item in stream(ready.adapter, picture, question.text, **options):
        if not isinstance(item, StreamedToken):
            return item.answer
        tokens.append(item)
        if time.perf_counter() - shown > PAUSE:
            yield payload.prepare_generate(question.text, tokens, reader, threshold), None
            shown = time.perf_counter()
    raise AssertionError("a stream ends with its answer")


def _no_mentions(text: str) -> list:
    """The objects of the finished answer are judged with everything else about it."""
    return []


def _explain(ready: Ready, case: Case, picture: Image, scope: str, reader: Reader, start: float) -> str:
    """Everything about the answer of a case, to be shown."""
    question = case.question
    detector = question.detector or ready.detectors.final
    diagnosis = diagnose(ready.adapter, picture, question.text, question.answer, detector, scope=scope, mentions=reader)
    seconds = time.perf_counter() - start
    return payload.finished(diagnosis, case.id, scope, [*question.notes, f"Answered and explained in {seconds:.1f} s."])


def _notes(ready: Ready, question: Question) -> tuple[str, ...]:
    detector = question.detector or ready.detectors.final
    if detector is None:
        return (*question.notes, ready.detectors.names or TRAIN_ONE.format(model=question.model))
    return (*question.notes, *([f"Detector: {ready.detectors.names}"] if question.detector is None else []))
