"""Answer a question step by step, and explain the answer again in another scope of the gradient."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.app import payload
from stethoscope.app.model_pool import NO_DETECTOR, ModelPool, Ready
from stethoscope.app.pictures import read_picture
from stethoscope.core.errors import CapabilityError, ConfigError, DataError
from stethoscope.core.images import file_digest
from stethoscope.core.text import counted
from stethoscope.core.types import Answer, Generation, Mention, required
from stethoscope.detection.lookup import AUTO
from stethoscope.diagnosis import diagnose
from stethoscope.diagnosis.layers_pass import read_attention
from stethoscope.diagnosis.run_diagnosis import edit_answer
from stethoscope.diagnosis.viewer_parts import heads_payload
from stethoscope.mitigation.answers import EditingMitigation
from stethoscope.streaming import Final, MentionCompleted, TakenBack, Token, stream
from stethoscope.streaming.backtrack import Backtrack
from stethoscope.tracing.token_spans import token_regions

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.detection.detector import Detector
    from stethoscope.diagnosis import Diagnosis
    from stethoscope.tasks.object_extraction import MentionExtractor
    from stethoscope.tracing.trace import Encoded

MAX_QUESTION = 512  # tokens of a question
MAX_LENGTH, MAX_BEAMS = 512, 10  # tokens of an answer, and beams of a beam search
MAX_TURNS, MAX_CONVERSATION = 32, 2048  # questions of a conversation, and tokens of its prompt besides the image's
BEGIN_ANEW = "begin a new conversation"
OWN_SQUARE = "own"
SQUARED = {
    OWN_SQUARE: "as the model takes it",
    "none": "as it is, for the model's processor to crop or scale",
    "pad": "padded to a square",
    "crop": "cropped to a square",
    "stretch": "stretched to a square",
}
"""What becomes of a picture that is no square, by ``Question.square``."""
OTHER_SHAPE = (
    "The picture was given to the model {how}, otherwise than those that the detector was calibrated on, so no "
    "probability here is calibrated, and no guarantee of its threshold holds."
)
EXPORTS = {"json": "application/json", "html": "text/html"}
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
        square: how the picture is brought to a square, one of ``SQUARED``.
        edit: of the stored answer by a mitigation, as a run's record has it.
        earlier: answers to earlier questions about the picture, the oldest first.
        history: those that the prompt holds, once the question is answered; none for a model of one turn.
        case: of a run that is opened: ``run``, ``task``, ``sample``, ``mention`` (first character of its tokens, or
            None), and the samples ``previous`` and ``next``; None for a question of the user.
    """

    model: str
    picture: Path | None
    text: str
    generation: Generation
    answer: Answer | None = None
    detector: Detector | None = None
    detector_name: str = AUTO
    notes: tuple[str, ...] = ()
    asks: str = "question"
    truth: tuple[str, ...] | None = None
    mentions: tuple[Mention, ...] | None = None
    mitigation: str = "none"
    square: str = OWN_SQUARE
    edit: Mapping[str, Any] = field(default_factory=dict)
    earlier: tuple[AnswerSession, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    case: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class AnswerSession:
    """An answer that was explained, stored so that its user can see it again, also in another scope.

    Attributes:
        id: unique for every answer.
        question: with the answer in it.
        turn: the answer in a few words for the list of a conversation, see ``payload.turn``.
    """

    id: str
    question: Question
    turn: Mapping[str, Any] = field(default_factory=dict)

    @property
    def conversation(self) -> tuple[AnswerSession, ...]:
        """The answers up to this one."""
        return (*self.question.earlier, self)


Step = tuple[str, AnswerSession | None]
"""JSON for the page, and the answer's session once the answer is complete."""


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
        ConfigError: a temperature is combined with beams, or a value is missing or larger than the page offers.
    """
    values = {"temperature": temperature, "top-p": top_p, "beams": beams, "length": length, "seed": seed}
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{name} should be a number, and {'is empty' if value is None else f'is {value!r:.20}'}")
    if not (length <= MAX_LENGTH and beams <= MAX_BEAMS):
        raise ConfigError(f"{length} tokens and {beams} beams: at most {MAX_LENGTH} and {MAX_BEAMS} are written")
    if temperature > 0 and beams > 1:
        raise ConfigError(f"temperature {temperature:g} and {beams} beams exclude each other; set one back to 0 or 1")
    greedy = Generation(max_new_tokens=int(length), num_beams=int(beams))
    if not temperature:
        return greedy
    return replace(greedy, do_sample=True, temperature=temperature, top_p=top_p, seed=int(seed))


def earlier_turns(conversation: Sequence[AnswerSession], question: Question) -> tuple[AnswerSession, ...]:
    """Return the answers that a question goes on from: those about the same picture by the same model.

    A question that is asked again has its new answer in place of the last one, so that settings can be compared.
    """
    if not conversation:
        return ()
    last = conversation[-1].question
    if last.model != question.model or not _same_picture(last.picture, question.picture):
        return ()
    return tuple(conversation[:-1] if last.text.strip() == question.text.strip() else conversation)


def _same_picture(picture: Path | None, other: Path | None) -> bool:
    if picture is None or other is None or not (picture.is_file() and other.is_file()):
        return False
    return picture == other or file_digest(picture) == file_digest(other)


def _prepared(pool: ModelPool, ready: Ready, question: Question) -> Ready:
    """Return the model with the detectors and the way of taking pictures that a question asks for."""
    return replace(ready.with_square(question.square), detectors=pool.detectors(ready, question.detector_name))


def _history(ready: Ready, question: Question) -> tuple[tuple[tuple[str, str], ...], str]:
    """Return the earlier turns that the prompt can hold, and why it holds none of them where it is so.

    Raises:
        DataError: there are too many.
    """
    if len(question.earlier) >= MAX_TURNS:
        raise DataError(f"a conversation has at most {counted(MAX_TURNS, 'question')} here: {BEGIN_ANEW}")
    answered = [(turn.question.text, turn.question.answer) for turn in question.earlier]
    history = tuple((text, answer.text) for text, answer in answered if answer is not None and answer.text.strip())
    if not history:
        return (), ""
    try:
        ready.adapter.check_conversation()
    except CapabilityError:
        return (), f"{ready.adapter.name} is asked one question at a time, so it has not read the earlier ones."
    return history, ""


def _encode(ready: Ready, question: Question, picture: Image) -> Encoded:
    """Encode a question with its history.

    Raises:
        DataError: the question or the conversation is too long.
    """
    encoded = ready.adapter.encode_as(question.asks, picture, question.text, question.history)
    tokens = len(encoded.spans.question)
    if tokens > MAX_QUESTION:  # it would keep the model from all others
        raise DataError(f"the question has {tokens:,} tokens; at most {MAX_QUESTION} are answered here")
    tokens = encoded.spans.length - len(encoded.spans.image)
    if question.history and tokens > MAX_CONVERSATION:
        raise DataError(f"the conversation has {tokens:,} tokens; at most {MAX_CONVERSATION:,} are read: {BEGIN_ANEW}")
    return encoded


def ask(pool: ModelPool, question: Question, extractor: MentionExtractor) -> Iterator[Step]:
    """Let the model answer, and explain the answer.

    Closing the iterator stops the generation and releases the model. Errors are sent to the page
    (``payload.failure``) instead of raised, so that the page does not wait forever.
    """
    conversation = payload.conversation(question.earlier)
    try:
        if not question.text.strip():
            raise ConfigError("the question is empty; the usual one is 'Please describe this image in detail.'")
        first = "waiting for the model …" if pool.busy else "reading …"
        yield payload.message(first, "busy", clear=True, conversation=conversation), None
        with pool.use(question.model) as ready:
            ready = _prepared(pool, ready, question)
            start = time.perf_counter()
            picture = read_picture(question.picture)
            history, alone = _history(ready, question)
            question = replace(question, history=history)
            encoded = _encode(ready, question, picture)
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
            notes = (*([alone] if alone else []), *_notes(ready, question))
            session = AnswerSession(uuid.uuid4().hex, replace(question, answer=answer, edit=edit, notes=notes))
            yield payload.message("looking at every token …", "busy"), None
            diagnosis = _diagnose(ready, session, picture, "row", extractor)
            session = replace(session, turn=payload.turn(diagnosis, session.id))
            explanation = _explanation(session, diagnosis, start, session.conversation)
        yield explanation, session
    except Exception as error:
        yield payload.failure(error, True, conversation), None


def explain_again(
    pool: ModelPool,
    session: AnswerSession,
    scope: str,
    extractor: MentionExtractor,
    conversation: Sequence[AnswerSession] = (),
) -> Iterator[Step]:
    """Explain the answer of a session again, in the scope ``row`` or ``token`` of the gradient.

    Args:
        pool: the models.
        session: one of the conversation.
        scope: of the gradient.
        extractor: extracts the objects that a text names.
        conversation: all answers about the picture; by default those up to this one.
    """
    try:
        if scope not in ("row", "token"):
            raise ConfigError(f"scope={scope!r} should be row or token")
        yield payload.message("looking at every token again …", "busy"), session
        with pool.use(session.question.model) as ready:
            ready = _prepared(pool, ready, session.question)
            start = time.perf_counter()
            picture = read_picture(session.question.picture)
            diagnosis = _diagnose(ready, session, picture, scope, extractor)
            explanation = _explanation(session, diagnosis, start, conversation or session.conversation)
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
    """Generate the answer, yield its parts for the page, and return it.

    What is taken back of it is added to ``taken``.
    """
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
        history=question.history,
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
    """Encode the diagnosis of a session as a file.

    ``json`` has all numbers, ``html`` is a page that fetches nothing.

    Raises:
        ConfigError: there is no such kind or scope.
        StethoscopeError: the answer cannot be diagnosed again.
    """
    if kind not in EXPORTS:
        raise ConfigError(f"an export is one of {', '.join(EXPORTS)}, not {kind!r}")
    with pool.use(session.question.model) as ready:
        ready = _prepared(pool, ready, session.question)
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
    question, answer = session.question, required(session.question.answer)
    if not isinstance(token, int) or not 0 <= token < len(answer.token_ids):
        raise DataError(f"the answer has no token {token!r:.20}, but {len(answer.token_ids)} of them")
    with pool.use(question.model) as ready:
        adapter, picture = ready.with_square(question.square).adapter, read_picture(question.picture)
        encoded = adapter.encode_as(question.asks, picture, question.text, question.history)
        attention = read_attention(adapter, encoded, answer, [token])
        regions = token_regions(adapter, picture.size, encoded.spans)
    heads = heads_payload(attention, regions, picture.size, [token])
    return payload.encode("heads", answer_id=session.id, **heads)


def _explanation(
    session: AnswerSession, diagnosis: Diagnosis, start: float, conversation: Sequence[AnswerSession]
) -> str:
    """Encode the diagnosis of a session's answer for the page."""
    question, seconds = session.question, time.perf_counter() - start
    notes = [*question.notes, f"{'Explained' if question.case else 'Answered and explained'} in {seconds:.1f} s."]
    turns = payload.conversation(conversation, session.id)
    return payload.diagnosed_answer(diagnosis, session.id, notes, question.case, turns)


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
        history=question.history,
    )
    other = picture.width != picture.height and ready.adapter is ready.squared.get(question.square)
    if other and detector is not None and not diagnosis.shift:
        diagnosis = replace(diagnosis, shift=OTHER_SHAPE.format(how=SQUARED[question.square]))
    return replace(diagnosis, edit=question.edit)


def _notes(ready: Ready, question: Question) -> tuple[str, ...]:
    """List the question's notes, and one about the origin or the lack of the detector."""
    detector = question.detector or ready.detectors.final
    if detector is None:
        return (*question.notes, ready.detectors.origin or NO_DETECTOR.format(model=question.model))
    return (*question.notes, *([f"Detector: {ready.detectors.origin}"] if question.detector is None else []))
