"""Stream tokens and warnings of the objects that they name, computed from the pass that generates them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope.adapters.base import check_asked
from stethoscope.core.errors import ConfigError
from stethoscope.core.types import Generation, Picture, load_picture, with_limit
from stethoscope.detection.lookup import check_model, load_detector
from stethoscope.diagnosis.answer_verdicts import (
    AnswerFeatures,
    DiagnosedMention,
    ReadAnswer,
    extract_mentions,
    feature_set,
    make_resampling,
    read_features,
    score_mentions,
    shift_sentence,
)
from stethoscope.streaming.backtrack import Backtrack, make_streamer
from stethoscope.streaming.events import Final, StreamEvent
from stethoscope.streaming.warning_streamer import WarningStreamer, decode_answers
from stethoscope.tasks.extraction import Extraction, as_extraction
from stethoscope.tracing.mention_passes import trace_answers

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.adapters.base import Adapter
    from stethoscope.detection.detector import Detector
    from stethoscope.tasks.object_extraction import MentionExtractor
    from stethoscope.tracing.trace import Encoded


def stream(
    adapter: Adapter,
    image: Picture,
    question: str,
    *,
    detector: Detector | Path | str | None = None,
    generation: Generation | None = None,
    delay: int = 0,
    final: Detector | Path | str | None = None,
    extraction: Extraction | MentionExtractor | str | None = None,
    asks: str = "question",
    history: Sequence[tuple[str, str]] = (),
) -> Generator[StreamEvent, None, None]:
    """Stream an answer as typed events: its tokens, warnings of the objects that it names, the finished answer.

    The tokens are those of ``adapter.generate``; probabilities are those of the detector on a trace of the finished
    answer. The model takes its next step when the next item is requested.

    Args:
        adapter: the model.
        image: the image, the path of its file, or the bytes of one.
        question: the question about it.
        detector: computes probabilities; or the folder of one, or of a run that has one. It may read only features of
            the decoding step, such as ``features=default``.
        generation: settings; greedy, at most 128 tokens by default. No beams. With ``mitigation=Backtrack()`` doubtful
            objects are taken back while the answer is written; ``detector``, where there is one, judges instead of the
            mitigation's own.
        delay: number of steps that a token may wait for its probability. With 0 it is scored as it is generated.
            Detectors with features of the row that consumes the token (``_c``) need 1. Tokens that wait together are
            scored together, which costs less. Tokens that can begin no name are not scored, and do not wait. Detectors
            that need the name of the object score whole mentions instead, and no token waits.
        final: scores the mentions of the finished answer instead of ``detector``, with any features.
        extraction: how objects that the answer names are found, as in ``stethoscope.diagnose``.
        asks: what the question asks for, as in ``stethoscope.diagnose``.
        history: earlier questions about the picture with their answers, as in ``stethoscope.diagnose``.

    Yields:
        ``Token``; ``MentionCompleted`` when an object is named, which is where warnings are; ``TakenBack`` with a
        mitigation that takes text back; ``Final`` at last.

    Raises:
        CapabilityError: the detector reads features that are unknown during generation, the adapter has no model, or
            there is a history and the model is asked one question at a time.
        ConfigError: the question is empty, a setting is out of range, or a detector reads states of another model.
        DataError: the image is missing or cannot be read.
    """
    generation = with_limit(generation)
    if generation.num_beams > 1:
        raise ConfigError(f"generation.num_beams={generation.num_beams}: beams are not known until they end; use 1")
    check_asked(adapter, question)
    detector, final = load_detector(detector), load_detector(final)
    adapter.setup()
    for loaded in filter(None, (detector, final)):
        check_model(loaded, adapter)
    picture = load_picture(image)
    encoded = adapter.encode_as(asks, picture, question, history)
    extractor, method = as_extraction(extraction), generation.mitigation
    if isinstance(method, Backtrack):
        judge = detector or method.load(adapter)
        streamer = make_streamer(adapter, encoded, method, judge, generation, extractor, delay)
        final = final or judge
    else:
        streamer = WarningStreamer(adapter, encoded, detector, delay, None, generation, extractor)
    return _stream_tokens(streamer, lambda: _diagnose_mentions(adapter, picture, encoded, streamer, final, extractor))


def _stream_tokens(
    streamer: WarningStreamer, diagnosed: Callable[[], tuple[tuple[DiagnosedMention, ...], str]]
) -> Generator[StreamEvent, None, None]:
    with streamer:
        count = 0
        for _ in decode_answers([streamer]):
            yield from streamer.events[count:]
            count = len(streamer.events)
    yield Final(streamer.finished_answer(), diagnosed)


def _diagnose_mentions(
    adapter: Adapter,
    picture: Image,
    encoded: Encoded,
    streamer: WarningStreamer,
    final: Detector | None,
    extraction: Extraction,
) -> tuple[tuple[DiagnosedMention, ...], str]:
    """Extract and score the objects that the finished answer names; say whether the picture is unlike others."""
    answer = streamer.finished_answer()
    read = ReadAnswer(encoded, answer, extract_mentions(answer, extraction))
    detector = final or streamer.detector
    if not read.mentions or detector is None:
        return score_mentions(read, None)[1], ""
    if final is None and streamer.scorer is not None:
        scorer = streamer.scorer
        read = read._replace(features=AnswerFeatures(scorer.columns(len(answer.token_ids)), scorer.image_tokens))
    elif final is not None:
        selected = feature_set(final.schema.names)
        resampling = make_resampling(extraction, None)
        mentions = [read.mentions]
        trace = trace_answers(adapter, [encoded], [answer], selected.requires, [picture], mentions, resampling)[0]
        read = read._replace(features=read_features(selected, trace, final, adapter.name))
    return score_mentions(read, detector)[1], shift_sentence(read, detector, picture, extraction)
