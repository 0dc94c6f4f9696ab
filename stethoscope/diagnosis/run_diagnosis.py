"""Diagnose one answer: generate it, extract its mentions, trace it, and score it with a detector."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope.adapters.base import check_asked
from stethoscope.core.errors import CapabilityError, ConfigError, DataError, check_list, wrong_type
from stethoscope.core.types import Answer, Generation, ImageRef, Mention, Picture, Sample, load_picture, with_limit
from stethoscope.detection.lookup import check_model, load_detector
from stethoscope.diagnosis.answer_verdicts import (
    ReadAnswer,
    extract_mentions,
    feature_set,
    locate_objects,
    make_resampling,
    read_features,
    score_mentions,
    shift_sentence,
)
from stethoscope.diagnosis.diagnosis import Diagnosis
from stethoscope.mitigation.answers import EditingMitigation
from stethoscope.mitigation.base import EditedAnswer
from stethoscope.tasks.extraction import Extraction, as_extraction
from stethoscope.tasks.object_extraction import MentionExtractor
from stethoscope.tasks.yes_no import first_word
from stethoscope.tracing.token_spans import token_regions

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.adapters.base import Adapter
    from stethoscope.detection.detector import Detector
    from stethoscope.diagnosis.layers_pass import AttentionMaps, LensTrajectory
    from stethoscope.tracing.mention_passes import Resampling
    from stethoscope.tracing.trace import Encoded, Trace


def diagnose(
    adapter: Adapter,
    image: Picture,
    question: str,
    answer: Answer | str | None = None,
    detector: Detector | Path | str | None = None,
    *,
    scope: str = "row",
    generation: Generation | None = None,
    extraction: Extraction | MentionExtractor | str | None = None,
    asks: str = "question",
    truth: Collection[str] | None = None,
    mentions: Sequence[Mention] | None = None,
    history: Sequence[tuple[str, str]] = (),
) -> Diagnosis:
    """Diagnose one answer: probability, relevancy, prediction evolution and verdict of every token.

    Args:
        adapter: the model.
        image: the picture, the path of its file, or the bytes of one.
        question: the prompt's text.
        answer: an answer of the model, or any other text; None to let the model answer.
        detector: a detector, its folder, or the folder of a run that has one; None for no warnings.
        scope: of the gradient of relevancy, ``row`` or ``token`` (see ``stethoscope.relevancy``).
        generation: settings for generating the answer; greedy, at most 128 tokens by default.
        extraction: how objects that the answer names are found: a choice of ``stethoscope.tasks.extraction``, or a
            function of the text; COCO's objects by default.
        asks: what the question asks for, ``question`` or ``description``, see ``Adapter.encode_as``.
        truth: COCO's names of all objects that the picture shows, where they are known: mentions get labels by them.
        mentions: of ``answer``, with their labels, such as those of a run's record; None to extract them.
        history: earlier questions about the picture with their answers, the oldest first, see ``Adapter.encode``.
            Detectors are calibrated on first questions, so behind a history no probability counts as calibrated.

    Raises:
        DataError: the picture is missing or cannot be read, or the answer is empty.
        ConfigError: the question is empty, the scope is unknown, the history is no list of pairs of texts, or the
            detector reads states of another model.
        CapabilityError: the detector reads features that the model does not provide, or there is a history and the
            model is asked one question at a time.
        ArtefactError: the folder holds no detector.
    """
    _check_arguments(adapter, question, scope, asks, truth, mentions)
    if answer is not None and not isinstance(answer, (str, Answer)):
        raise wrong_type("answer", "a text or an Answer of the model", answer)
    generation = with_limit(generation)
    detector = load_detector(detector)
    seconds: dict[str, float] = {}
    notes: list[str] = []
    with _timed(seconds, "read"):
        picture = load_picture(image)
        adapter.setup()
        if detector is not None:
            check_model(detector, adapter)
        encoded = adapter.encode_as(asks, picture, question, history)
    extractor = as_extraction(extraction)
    is_given = answer is not None
    with _timed(seconds, "generate"):
        answer, edit = _complete_answer(adapter, encoded, answer, generation, extractor)
    if not is_given and isinstance(generation.mitigation, EditingMitigation):
        with _timed(seconds, "edit"):
            answer, edit = edit_answer(adapter, encoded, answer, generation, picture, extractor)
    extracted = extract_mentions(answer, extractor, truth) if mentions is None else list(mentions)
    with _timed(seconds, "trace"):
        resampling = make_resampling(extractor, generation)
        read = ReadAnswer(encoded, answer, extracted)
        trace, read = _trace(adapter, read, detector, scope, picture, resampling, notes)
    with _timed(seconds, "layers"):
        evolution, attention = _read_layers(adapter, read, notes)
    with _timed(seconds, "regions"):
        tiles = 0 if trace.relevancy is None or trace.relevancy.tiles is None else trace.relevancy.tiles.shape[2]
        regions = token_regions(adapter, picture.size, encoded.spans, tiles)
    with _timed(seconds, "score"):
        verdicts, diagnosed = score_mentions(read, detector)
        shift = shift_sentence(read, detector, picture, extractor)
    logprob = trace.logits.log_softmax(-1)
    return Diagnosis(
        model=adapter.name,
        image=picture,
        question=question,
        answer=answer,
        entropy=-(logprob.exp() * logprob).nan_to_num(0.0).sum(-1).numpy(),
        question_tokens=_question_tokens(adapter, encoded),
        verdicts=verdicts,
        mentions=diagnosed,
        threshold=None if detector is None else detector.threshold,
        relevancy=trace.relevancy,
        token_regions=regions,
        evolution=evolution,
        attention=attention,
        notes=tuple(notes),
        seconds=seconds,
        scope=scope,
        shift=shift,
        monitored=detector is not None and detector.monitor is not None,
        truth=None if truth is None else tuple(truth),
        edit=edit,
        history=encoded.history,
        seen=locate_objects(read, detector),
    )


def _check_arguments(
    adapter: Adapter,
    question: str,
    scope: str,
    asks: str,
    truth: Collection[str] | None,
    mentions: Sequence[Mention] | None,
) -> None:
    check_asked(adapter, question)
    if scope not in ("row", "token"):
        raise ConfigError(f"scope={scope!r} should be row or token")
    if asks not in ("question", "description"):
        raise ConfigError(f"asks={asks!r} should be question or description")
    if truth is not None:
        check_list("truth", "a list of names of objects", truth, Collection)
    if mentions is not None:
        check_list("mentions", "a list of Mention", mentions, Sequence)
    for mention in mentions or ():
        if not isinstance(mention, Mention):
            raise wrong_type("mentions", "a list of Mention", mention)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _complete_answer(
    adapter: Adapter,
    encoded: Encoded,
    answer: Answer | str | None,
    generation: Generation,
    extractor: MentionExtractor,
) -> EditedAnswer:
    """Write the answer if there is none, or tokenise it if it is a text; with what a mitigation did while it wrote.

    Raises:
        DataError: the answer is empty.
    """
    method = generation.mitigation
    complete = EditedAnswer(answer, {}) if isinstance(answer, Answer) else None
    if isinstance(answer, str):
        complete = EditedAnswer(adapter.answer(encoded, answer), {})
    elif complete is None:
        adapter.check_mitigation(generation)
        if method is not None and method.writes:
            complete = method.write(adapter, [encoded], generation, [extractor])[0]
        else:
            complete = EditedAnswer(adapter.generate([encoded], generation)[0], {})
    if not complete.answer.token_ids:
        raise DataError(f"{adapter.name}: the answer is empty, there is nothing to diagnose")
    return complete


def _trace(
    adapter: Adapter,
    read: ReadAnswer,
    detector: Detector | None,
    scope: str,
    picture: Image,
    resampling: Resampling,
    notes: list[str],
) -> tuple[Trace, ReadAnswer]:
    """Trace the answer with relevancy of the scope; return it with the features that the detector reads."""
    # imported here: importing this package imports no torch
    from stethoscope.relevancy import answer_relevancy
    from stethoscope.tracing.mention_passes import trace_answers

    features = None if detector is None else feature_set(detector.schema.names)
    requires = frozenset[str]() if features is None else features.requires

    def traced(parts: Collection[str]) -> Trace:
        return trace_answers(adapter, [read.encoded], [read.answer], parts, [picture], [read.mentions], resampling)[0]

    try:
        trace = traced({*requires, "relevancy"})
    except CapabilityError as error:
        if "relevancy" in requires:
            raise CapabilityError(f"the detector reads features that {adapter.name} does not give: {error}") from None
        notes.append(str(error))
        trace = traced(requires)
    if features is not None and detector is not None:  # in scope row, in which features are defined
        read = read._replace(features=read_features(features, trace, detector, adapter.name))
    if scope == "token" and trace.relevancy is not None:
        trace = replace(trace, relevancy=answer_relevancy(adapter, read.encoded, read.answer, scope=scope))
    return trace, read


def _read_layers(
    adapter: Adapter, read: ReadAnswer, notes: list[str]
) -> tuple[LensTrajectory | None, AttentionMaps | None]:
    """Read predictions and raw attention of all layers; single heads first of the tokens that name objects."""
    from stethoscope.diagnosis.layers_pass import read_layers  # importing this package imports no torch

    named = [token for mention in read.mentions for token in read.answer.covering(mention.start, mention.end)]
    return read_layers(adapter, read.encoded, read.answer, named, notes)


def _question_tokens(adapter: Adapter, encoded: Encoded) -> tuple[str, ...]:
    """Decode the question's tokens, in the order of ``Relevancy.question``."""
    from stethoscope.diagnosis.layers_pass import token_decoder  # importing this package imports no torch

    try:
        decode = token_decoder(adapter)
    except CapabilityError:
        return tuple(f"token {index}" for index in range(len(encoded.spans.question)))
    ids = encoded.inputs["input_ids"][0].tolist()
    return tuple(decode([ids[position]]).strip() for position in encoded.spans.question)


@dataclass(frozen=True)
class _OneQuestion:
    """Names the mentions of a single answer, as a task does for ``evaluation.edit_answers``."""

    extractor: MentionExtractor
    name: str = "diagnose"

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """See ``Task.mentions``; without labels."""
        return tuple(extract_mentions(answer, self.extractor))


def edit_answer(
    adapter: Adapter,
    encoded: Encoded,
    answer: Answer,
    generation: Generation,
    picture: Image,
    extractor: MentionExtractor,
) -> EditedAnswer:
    """Apply a mitigation that edits finished answers; the reply to a yes/no question is left as it is.

    Args:
        adapter: the model, after ``setup``.
        encoded: the prompt.
        answer: of the model.
        generation: settings that it was written with; its mitigation is an ``EditingMitigation``.
        picture: that the answer is about.
        extractor: finds the objects that the answer names.

    Raises:
        ConfigError, ArtefactError: there is no detector for the model.
        CapabilityError: the detector reads features that the model does not provide.
    """
    # imported here: importing this package imports no torch
    from stethoscope.evaluation.edit_answers import make_editor

    method = generation.mitigation
    assert isinstance(method, EditingMitigation)
    asks = "description" if first_word(answer.text) is None else "question"
    sample = Sample("answer", ImageRef("image", lambda: picture), encoded.question, "image", asks=asks)
    [edited] = make_editor(adapter, _OneQuestion(extractor), method, generation)([sample], [encoded], [answer])
    return edited
