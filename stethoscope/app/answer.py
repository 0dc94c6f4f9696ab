"""Answer a question step by step, and explain the answer again in another scope of the gradient."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.app import payload
from stethoscope.app.model_pool import TRAIN_ONE, ModelPool, Ready
from stethoscope.app.sessions import NO_PICTURE
from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.images import file_format
from stethoscope.core.types import Answer, Generation, ImageRef, Mention, required
from stethoscope.detection.lookup import AUTO
from stethoscope.diagnosis import diagnose
from stethoscope.diagnosis.run_diagnosis import edit_answer
from stethoscope.mitigation.answers import EditingMitigation
from stethoscope.streaming import Final, MentionCompleted, TakenBack, Token, stream
from stethoscope.streaming.backtrack import Backtrack

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.detection.detector import Detector
    from stethoscope.diagnosis import Diagnosis
    from stethoscope.tasks.object_extraction import MentionExtractor
    from stethoscope.tracing.trace import Encoded

MAX_QUESTION = 512  # tokens of a question
MAX_LENGTH, MAX_BEAMS = 512, 10  # tokens of an answer, and beams of a beam search
EXPORTS = {"json": "application/json", "html": "text/html"}
BROWSER_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PAUSE = 0.05  # seconds between two updates of a partial answer; more would be too fast to see or to send


@dataclass(frozen=True)
class Question:
    """A question of one user.

    Attributes:
        model: one of the pool's names.
        picture: a file of the app's own folder, decoded only while the question is answered, to save memory.
        text: the question.
        generation: settings for generating the answer.
        answer: a stored answer to diagnose; None to let the model answer.
        detector: used instead of the chosen one; None to use that one.
        detector_name: of the pool's detectors, the chosen one.
        notes: lines to be shown with the answer.
        asks: what the text asks for, see ``Sample.asks``.
        truth: names of the objects that the picture shows; None where they are not known.
        mentions: labelled mentions of the stored answer; None to extract them.
        mitigation: one of ``conf/mitigation``.
        edit: of the stored answer by a mitigation, as a run's record has it.
        case: of a run that is opened: ``run``, ``task``, ``sample``, ``mention`` (first character of its tokens, or
            None), and the samples ``previous`` and ``next``; None for a question of the user.
    """

    model: str
    picture: Path | None
    text: str
    generation: Generation
    answer: Answer | None = None
    detector: Detector | None = None
    notes: tuple[str, ...] = ()
    asks: str = "question"
    truth: tuple[str, ...] | None = None
    mentions: tuple[Mention, ...] | None = None
    case: Mapping[str, Any] | None = None
    mitigation: str = "none"
    detector_name: str = AUTO
    edit: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerSession:
    """An answer that was explained, stored so that its user can see it in another scope.

    Attributes:
        id: unique for every answer.
        question: with the answer in it.
    """

    id: str
    question: Question


Step = tuple[str, AnswerSession | None]
"""JSON for the page, and the answer's session once the answer is complete."""


def read_picture(path: str | Path | None) -> Image:
    """Read an uploaded picture, upright as a viewer would show it.

    Raises:
        ConfigError: no picture was uploaded.
        DataError: the file is no picture, is too large, or has been deleted.
    """
    if path is None:
        raise ConfigError("there is no picture yet: upload one, or choose an example")
    file = Path(path)
    if not file.is_file():
        raise DataError(NO_PICTURE)
    try:
        return ImageRef(file.name, file).load()
    except DataError as error:  # without the server's path of the file
        raise DataError(str(error).replace(str(file), repr(file.name))) from None


def displayable(file: Path) -> Path:
    """Return the file of a picture that every browser shows: the file itself, or a PNG of the same pixels beside it.

    Raises:
        DataError: the file is no picture, is too large, or has been deleted.
    """
    picture = read_picture(file)
    if file_format(file) in BROWSER_FORMATS:
        return file
    copy = file.with_suffix(".png") if file.suffix.lower() != ".png" else file.with_name(f"{file.stem}-shown.png")
    picture.save(copy)
    return copy


def generation(
    temperature: float = 0.0, top_p: float = 1.0, beams: int = 1, length: int = 128, seed: int = 0
) -> Generation:
    """Build generation settings from the values of the page.

    Args:
        temperature: of sampling; 0 for greedy decoding.
        top_p: of sampling, in (0, 1]; used with a temperature only.
        beams: of the beam search; 1 for none.
        length: tokens at most.
        seed: of sampling.

    Raises:
        ConfigError: a temperature is combined with beams, or a value is larger than the page offers.
    """
    if not (length <= MAX_LENGTH and beams <= MAX_BEAMS):  # NaN fails this too
        raise ConfigError(f"{length} tokens and {beams} beams: at most {MAX_LENGTH} and {MAX_BEAMS} are written")
    if temperature > 0 and beams > 1:
        raise ConfigError(f"temperature {temperature:g} and {beams} beams exclude each other; set one back to 0 or 1")
    greedy = Generation(max_new_tokens=int(length), num_beams=int(beams))
    if not temperature:
        return greedy
    return replace(greedy, do_sample=True, temperature=temperature, top_p=top_p, seed=int(seed))


def ask(pool: ModelPool, question: Question, extractor: MentionExtractor) -> Iterator[Step]:
    """Let the model answer, and explain the answer.

    Closing the iterator stops the generation and releases the model. Errors are sent to the page
    (``payload.failure``) instead of raised, so that the page does not wait forever.
    """
    try:
        if not question.text.strip():
            raise ConfigError("the question is empty; the usual one is 'Please describe this image in detail.'")
        yield payload.message("waiting for the model …" if pool.busy else "reading …", "busy", clear=True), None
        with pool.use(question.model) as ready:
            ready = replace(ready, detectors=pool.detectors(ready, question.detector_name))
            start = time.perf_counter()
            picture = read_picture(question.picture)
            encoded = ready.adapter.encode_as(question.asks, picture, question.text)
            tokens = len(encoded.spans.question)
            if tokens > MAX_QUESTION:  # it would keep the model from all others
                raise DataError(f"the question has {tokens:,} tokens; at most {MAX_QUESTION} are answered here")
            answer, edit = question.answer, question.edit
            if answer is None:
                method = pool.mitigation(question.mitigation, ready.detectors)
                question = replace(question, generation=replace(question.generation, mitigation=method))
                ready.adapter.check_mitigation(question.generation)
                taken: list[TakenBack] = []
                answer = yield from _generate(ready, question, encoded, picture, extractor, taken)
                if isinstance(method, Backtrack):
                    edit = method.record(taken, ready.detectors.live or method.load(ready.adapter))
                if isinstance(method, EditingMitigation):
                    yield payload.message("looking for what is hallucinated …", "busy"), None
                    answer, edit = edit_answer(ready.adapter, encoded, answer, question.generation, picture, extractor)
            answered = replace(question, answer=answer, edit=edit, notes=_notes(ready, question))
            session = AnswerSession(uuid.uuid4().hex, answered)
            yield payload.message("looking at every token …", "busy"), None
            explanation = _explain(ready, session, picture, "row", extractor, start)
        yield explanation, session
    except Exception as error:
        yield payload.failure(error, clear=True), None


def explain_again(pool: ModelPool, session: AnswerSession, scope: str, extractor: MentionExtractor) -> Iterator[Step]:
    """Explain the answer of a session in another scope of the gradient, ``row`` or ``token``."""
    try:
        if scope not in ("row", "token"):
            raise ConfigError(f"scope={scope!r} should be row or token")
        yield payload.message("looking at every token again …", "busy"), session
        with pool.use(session.question.model) as ready:
            ready = replace(ready, detectors=pool.detectors(ready, session.question.detector_name))
            start = time.perf_counter()
            picture = read_picture(session.question.picture)
            explanation = _explain(ready, session, picture, scope, extractor, start)
        yield explanation, session
    except Exception as error:
        yield payload.failure(error), session


def _generate(
    ready: Ready,
    question: Question,
    encoded: Encoded,
    picture: Image,
    extractor: MentionExtractor,
    taken: list[TakenBack],
) -> Generator[Step, None, Answer]:
    """Generate the answer, yield its parts for the page, and return it; add to ``taken`` what is taken back of it."""
    detectors, settings = ready.detectors, question.generation
    if settings.num_beams > 1:
        yield payload.message(f"writing {settings.num_beams} answers side by side …", "busy"), None
        return ready.adapter.generate([encoded], settings)[0]
    threshold = None if detectors.live is None else detectors.live.threshold
    tokens: list[Token] = []
    mentions: list[MentionCompleted] = []
    last_update = 0.0
    for event in stream(
        ready.adapter,
        picture,
        question.text,
        detector=detectors.live,
        delay=detectors.delay,
        generation=settings,
        asks=question.asks,
        extraction=extractor,
    ):
        match event:
            case Token():
                tokens.append(event)
            case MentionCompleted():
                mentions.append(event)
            case TakenBack(tokens=(first, *_)):
                taken.append(event)
                del tokens[first:]
                mentions = [mention for mention in mentions if mention.end <= event.start]
            case Final(answer=answer):  # its mentions are diagnosed with everything else
                return answer
        if time.perf_counter() - last_update > PAUSE:
            yield payload.partial_answer(question.text, tokens, mentions, threshold, taken), None
            last_update = time.perf_counter()
    raise AssertionError("a stream ends with its answer")


def export(pool: ModelPool, session: AnswerSession, kind: str, scope: str, extractor: MentionExtractor) -> str:
    """Encode the diagnosis of a session as a file: ``json`` (all numbers) or ``html`` (a page that fetches nothing).

    Raises:
        ConfigError: there is no such kind or scope.
        StethoscopeError: the answer cannot be diagnosed again.
    """
    if kind not in EXPORTS:
        raise ConfigError(f"an export is one of {', '.join(EXPORTS)}, not {kind!r}")
    with pool.use(session.question.model) as ready:
        ready = replace(ready, detectors=pool.detectors(ready, session.question.detector_name))
        diagnosis = _diagnose(ready, session, read_picture(session.question.picture), scope, extractor)
    content = diagnosis.to_html() if kind == "html" else json.dumps(diagnosis.to_dict(), ensure_ascii=False, indent=1)
    return payload.encode("file", name=f"diagnosis.{kind}", type=EXPORTS[kind], content=content)


def single_heads(pool: ModelPool, session: AnswerSession, token: object) -> str:
    """Encode the raw attention of the single heads of one token, which the page has no maps of yet.

    Args:
        pool: the models.
        session: of the answer.
        token: index in the answer, as the page sends it.

    Raises:
        DataError: there is no such token, or the picture is gone.
        CapabilityError: the model's attention cannot be recorded.
    """
    # imported here: they import torch, which the page's other parts load with the model
    from stethoscope.diagnosis.attention_payload import heads_payload
    from stethoscope.diagnosis.layers_pass import read_attention
    from stethoscope.tracing.token_spans import token_regions

    question, answer = session.question, required(session.question.answer)
    if not isinstance(token, int) or not 0 <= token < len(answer.token_ids):
        raise DataError(f"the answer has no token {token!r:.20}, but {len(answer.token_ids)} of them")
    with pool.use(question.model) as ready:
        picture = read_picture(question.picture)
        encoded = ready.adapter.encode_as(question.asks, picture, question.text)
        attention = read_attention(ready.adapter, encoded, answer, [token])
        regions = token_regions(ready.adapter, picture.size, encoded.spans)
    heads = heads_payload(attention, regions, picture.size, [token])
    return payload.encode("heads", answer_id=session.id, **heads)


def _explain(
    ready: Ready, session: AnswerSession, picture: Image, scope: str, extractor: MentionExtractor, start: float
) -> str:
    """Diagnose the answer of a session, and encode the diagnosis for the page."""
    question, diagnosis = session.question, _diagnose(ready, session, picture, scope, extractor)
    seconds = time.perf_counter() - start
    notes = [*question.notes, f"Answered and explained in {seconds:.1f} s."]
    return payload.diagnosed_answer(diagnosis, session.id, notes, question.case)


def _diagnose(
    ready: Ready, session: AnswerSession, picture: Image, scope: str, extractor: MentionExtractor
) -> Diagnosis:
    """Diagnose the answer of a session."""
    question = session.question
    detector = question.detector or ready.detectors.final
    diagnosis = diagnose(
        ready.adapter,
        picture,
        question.text,
        question.answer,
        detector,
        scope=scope,
        extraction=extractor,
        asks=question.asks,
        truth=question.truth,
        mentions=question.mentions,
    )
    return replace(diagnosis, edit=question.edit)


def _notes(ready: Ready, question: Question) -> tuple[str, ...]:
    """List the question's notes, and one about the origin or the lack of the detector."""
    detector = question.detector or ready.detectors.final
    if detector is None:
        return (*question.notes, ready.detectors.origin or TRAIN_ONE.format(model=question.model))
    return (*question.notes, *([f"Detector: {ready.detectors.origin}"] if question.detector is None else []))
