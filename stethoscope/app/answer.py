"""Answer a question step by step: what the browser shows, and what is kept to explain the answer again."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope.app import payload
from stethoscope.app.model_pool import TRAIN_ONE, ModelPool, Ready
from stethoscope.app.sessions import NO_PICTURE
from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.types import Answer, Generation, ImageRef
from stethoscope.diagnosis import diagnose
from stethoscope.streaming import StreamedToken, stream

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.detection.detector import Detector
    from stethoscope.diagnosis.run_diagnosis import MentionExtractor
    from stethoscope.tracing.trace import Encoded

MAX_QUESTION = 512  # tokens of a question
MAX_LENGTH, MAX_BEAMS = 512, 10  # tokens of an answer, and how many are written side by side
PAUSE = 0.05  # seconds between two views of an answer that is being written: what an eye and a network can follow


@dataclass(frozen=True)
class Question:
    """A question of one user.

    Attributes:
        model: a name of the pool.
        picture: a file of the app's own folder, decoded while the question is answered; sessions keep no pixels.
        text: the question.
        generation: how to write.
        answer: a stored answer to look at; None lets the model answer.
        detector: scores in place of the model's own; None for that.
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
class AnswerSession:
    """An answer that was explained, kept for its user so that it can be explained in another scope.

    Attributes:
        id: tells answers apart.
        question: with the answer in it.
    """

    id: str
    question: Question


Step = tuple[str, AnswerSession | None]
"""JSON to show, and the answer's session once there is one."""


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
    """Make the generation settings of the page. Temperature 0 takes the most probable token every time.

    Raises:
        ConfigError: drawing and beams at once, or more than the screen offers.
    """
    if not (length <= MAX_LENGTH and beams <= MAX_BEAMS):  # not a number either
        raise ConfigError(f"{length} tokens and {beams} beams: at most {MAX_LENGTH} and {MAX_BEAMS} are written")
    if temperature > 0 and beams > 1:
        raise ConfigError(f"temperature {temperature:g} and {beams} beams exclude each other; set one back to 0 or 1")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "seed": int(seed)} if temperature else {}
    return Generation(max_new_tokens=int(length), num_beams=int(beams), **sampling)


def ask(pool: ModelPool, question: Question, extractor: MentionExtractor) -> Iterator[Step]:
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
                answer = yield from _write(ready, question, encoded, picture, extractor)
            session = AnswerSession(
                uuid.uuid4().hex, Question(**{**vars(question), "answer": answer, "notes": _notes(ready, question)})
            )
            yield payload.message("looking at every token …", "busy"), None
            shown = _explain(ready, session, picture, "row", extractor, start)
        yield shown, session
    except Exception as error:
        yield payload.failure(error), None


def explain_again(pool: ModelPool, session: AnswerSession, scope: str, extractor: MentionExtractor) -> Iterator[Step]:
    """Explain the same answer in another scope of the gradient."""
    try:
        if scope not in ("row", "token"):
            raise ConfigError(f"scope={scope!r} should be row or token")
        yield payload.message("looking at every token again …", "busy"), session
        with pool.use(session.question.model) as ready:
            start = time.perf_counter()
            shown = _explain(ready, session, read_picture(session.question.picture), scope, extractor, start)
        yield shown, session
    except Exception as error:
        yield payload.failure(error), session


def _check_question(encoded: Encoded) -> None:
    """Refuse a question that would hold the model for everybody.

    Raises:
        DataError: it has more than ``MAX_QUESTION`` tokens.
    """
    tokens = len(encoded.spans.question)
    if tokens > MAX_QUESTION:
        raise DataError(f"the question has {tokens:,} tokens; at most {MAX_QUESTION} are answered here")


def _write(
    ready: Ready, question: Question, encoded: Encoded, picture: Image, extractor: MentionExtractor
) -> Iterator[Step]:
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
            yield payload.writing(question.text, tokens, extractor, threshold), None
            shown = time.perf_counter()
    raise AssertionError("a stream ends with its answer")


def _no_mentions(text: str) -> list:
    """Extract nothing: the mentions of the finished answer come with its diagnosis."""
    return []


def _explain(
    ready: Ready, session: AnswerSession, picture: Image, scope: str, extractor: MentionExtractor, start: float
) -> str:
    """Diagnose the answer of a session, to be shown."""
    question = session.question
    detector = question.detector or ready.detectors.final
    diagnosis = diagnose(
        ready.adapter, picture, question.text, question.answer, detector, scope=scope, mentions=extractor
    )
    seconds = time.perf_counter() - start
    return payload.finished(diagnosis, session.id, [*question.notes, f"Answered and explained in {seconds:.1f} s."])


def _notes(ready: Ready, question: Question) -> tuple[str, ...]:
    detector = question.detector or ready.detectors.final
    if detector is None:
        return (*question.notes, ready.detectors.names or TRAIN_ONE.format(model=question.model))
    return (*question.notes, *([f"Detector: {ready.detectors.names}"] if question.detector is None else []))
