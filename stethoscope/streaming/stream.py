"""Stream tokens and warnings of the objects that they name, computed from the pass that generates them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from stethoscope.adapters.base import check_asked
from stethoscope.core.errors import CaptureError, ConfigError
from stethoscope.core.types import Answer, Generation, Picture, load_picture, with_limit
from stethoscope.detection.lookup import check_model, load_detector
from stethoscope.diagnosis.run_diagnosis import (
    extract_mentions,
    score_mentions,
    shift_sentence,
)
from stethoscope.diagnosis.verdict import DiagnosedMention
from stethoscope.streaming.decode_loop import decode
from stethoscope.streaming.events import Final, MentionCompleted, MentionTracker, StreamEvent, Token
from stethoscope.streaming.scorer import Scorer
from stethoscope.streaming.step_recorder import RESIDUAL_REQUIREMENTS, StepRecorder
from stethoscope.tasks.extraction import Extraction, as_extraction
from stethoscope.tracing.logit_lens import lens_of
from stethoscope.tracing.token_spans import GrowingText

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

    from stethoscope.adapters.base import Adapter
    from stethoscope.detection.detector import Detector
    from stethoscope.tasks.object_extraction import MentionExtractor
    from stethoscope.tracing.trace import Encoded


class WarningStreamer(BaseStreamer):
    """Warning streamer for your own ``generate(streamer=...)`` call, for one prompt and without beams.

    Use it in a ``with`` block, so that the model is left as it was even if ``generate`` fails.

    Args:
        adapter: of the model.
        encoded: the prompt; call ``generate`` with its ``inputs`` or with ``arguments``.
        detector: computes the probabilities.
        delay: number of steps that a token may wait for its probability, see ``stream``. A detector with features of
            the consuming row gives none to the last token of an answer that was cut off, since nothing has read it.
        on_event: called with every event but ``Final``, in order.
        generation: settings, for ``arguments`` and for the stop strings.
        extraction: how objects that the answer names are found, as in ``stethoscope.diagnose``.

    Attributes:
        events: events so far: tokens, and the objects that they name.
        tokens: tokens so far.
        answer: the finished answer, None before ``end``.
        model: the transformers model.
        arguments: arguments of its ``generate`` that give the adapter's answer, with one step more where the last token
            must be read to be scored.

    Raises:
        CapabilityError: the detector reads features that are unknown during generation, or the adapter has no model.
        ConfigError: the delay is negative.
    """

    def __init__(
        self,
        adapter: Adapter,
        encoded: Encoded,
        detector: Detector | Path | str | None = None,
        delay: int = 0,
        on_event: Callable[[Token | MentionCompleted], None] | None = None,
        generation: Generation | None = None,
        extraction: Extraction | MentionExtractor | str | None = None,
    ) -> None:
        self._limit = None if generation is None else generation.max_new_tokens  # else that of the caller
        self._adapter, self._generation = adapter, with_limit(generation)
        self.detector = load_detector(detector)
        self.scorer = None if self.detector is None else Scorer(self.detector, delay)
        self.model, self.arguments = adapter.prepare_generate([encoded], self._generation)
        requires: frozenset[str] = frozenset() if self.scorer is None else self.scorer.requires
        lens = lens_of(self.model) if requires & RESIDUAL_REQUIREMENTS else None
        settings = self.arguments["generation_config"]
        encoder = settings.decoder_start_token_id is not None
        self.steps = StepRecorder(self.model, lens, encoded.spans, encoder, requires)
        if self.scorer is not None and self.scorer.lookahead:
            settings.max_new_tokens += 1
            self.arguments["stopping_criteria"] = [
                _NextStep(criterion) for criterion in self.arguments["stopping_criteria"]
            ]
        self._end_ids = frozenset(settings.eos_token_id or ())
        self._stop_strings = (*getattr(adapter, "stop", ()), *self._generation.stop)
        tokenizer = adapter.processor.tokenizer  # type: ignore[attr-defined]  # an adapter that generates has one
        self._decode_ids, self._on_event = _decoder(tokenizer), on_event
        self._text = GrowingText(self._decode)
        self._mentions = MentionTracker(as_extraction(extraction), self.detector)
        self._released = ""  # text of the tokens so far
        self._pending: list[tuple[str, int, int]] = []  # tokens not yet released: text, start, end
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._probabilities: list[float] = []
        self._started = self._finished = False
        self.events: list[Token | MentionCompleted] = []
        self.tokens: list[Token] = []
        self.answer: Answer | None = None

    def __enter__(self) -> WarningStreamer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def finished_answer(self) -> Answer:
        """Return the finished answer.

        Raises:
            CaptureError: the answer is not finished.
        """
        if self.answer is None:
            raise CaptureError("the answer is not finished; call end() first")
        return self.answer

    def close(self) -> None:
        """Remove all hooks from the model; does nothing the second time."""
        self.steps.stop()

    def put(self, value: Tensor) -> None:
        """Receive the prompt and then every token from ``generate``.

        Raises:
            CaptureError: there is more than one prompt, or more than one token comes at once.
        """
        if self.answer is not None:
            raise CaptureError("this streamer has its answer; give each generate call a new streamer")
        if not self._started:
            self._started = True
            self.steps.start()
            return
        if value.numel() != 1:
            raise CaptureError(f"{value.numel()} tokens came at once; warnings are for one prompt, token by token")
        with torch.inference_mode():
            self.add_token(int(value))

    def add_token(self, token: int) -> None:
        """Add the next token, whose step has been recorded.

        Raises:
            CaptureError: the step has not been recorded.
        """
        self._finished = self._finished or token in self._end_ids
        if not self._finished:
            if len(self.steps.logits) <= len(self._ids):
                raise CaptureError(
                    "a token came before its step was recorded; use the streamer in the thread that generates"
                )
            self._ids.append(token)
            self._pending.append(self._text.add(token))
        self._score_pending(1 if self.scorer is None else self.scorer.batch_size)
        if not self._stop_strings or not self._in_stop_string():
            self._release()

    @torch.inference_mode()
    def end(self) -> None:
        """Finish the answer and release its remaining tokens; ``generate`` calls this when it is done."""
        self.close()
        self._score_pending(1)
        self._logprobs += self._missing_logprobs()
        ids = self._ids[: self._limit]
        if self._finished and len(ids) == len(self._ids) and len(ids) != self._limit:
            ids = [*ids, min(self._end_ids)]
        self.answer = self._adapter.decode_answer(ids, self._logprobs, self._generation)
        for start, end in self.answer.offsets[len(self.tokens) :]:
            self._emit(self.answer.text[start:end], start, end)
        self._pending = []
        for mention in self._mentions.update(self.answer.text, self.tokens, finished=True):
            self._add_event(mention)

    def _score_pending(self, least: int) -> None:
        """Score the newest tokens whose steps are known, if there are at least ``least`` of them."""
        if self.scorer is None:
            self._logprobs += self._missing_logprobs()
            return
        done, known = len(self._probabilities), min(len(self._ids), len(self.steps.logits) - self.scorer.lookahead)
        if known - done >= least:
            self._probabilities += self.scorer.score(self.steps, self._ids[:known], done).tolist()
            self._logprobs += self.scorer.logprobs

    def _missing_logprobs(self) -> list[float]:
        """Compute the natural log-probabilities of the tokens that have none yet."""
        done = len(self._logprobs)
        rows = zip(self.steps.logits[done:], self._ids[done:], strict=False)  # the last step may have ended the answer
        return [row.float().log_softmax(-1)[token].item() for row, token in rows]

    def _in_stop_string(self) -> bool:
        """Decide whether the text may end within a stop string."""
        text = self._decode(self._ids, special=True)
        return any(
            stop in text or any(text.endswith(stop[:size]) for size in range(1, len(stop)))
            for stop in self._stop_strings
        )

    def _decode(self, ids: Sequence[int], special: bool = False) -> str:
        return self._decode_ids(ids, skip_special_tokens=not special)

    def _release(self) -> None:
        ready = len(self._ids if self.scorer is None else self._probabilities) - len(self.tokens)
        for waiting in self._pending[:ready]:
            self._emit(*waiting)
        del self._pending[:ready]

    def _emit(self, text: str, start: int, end: int) -> None:
        index, known = len(self.tokens), self._probabilities
        probability = known[index] if index < len(known) else None
        token = Token(index, self._ids[index], text, start, end, self._logprobs[index], probability)
        self.tokens.append(token)
        self._released += text
        self._add_event(token)
        if text != "".join(text.split()):  # a word may be complete
            for mention in self._mentions.update(self._released, self.tokens):
                self._add_event(mention)

    def _add_event(self, event: Token | MentionCompleted) -> None:
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)


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
) -> Iterator[StreamEvent]:
    """Stream an answer as typed events: its tokens, warnings of the objects that it names, the finished answer.

    The tokens are those of ``adapter.generate``; probabilities are those of the detector on a trace of the finished
    answer. The model takes its next step when the next item is requested.

    Args:
        adapter: the model.
        image: the image, the path of its file, or the bytes of one.
        question: the question about it.
        detector: computes probabilities; or the folder of one, or of a run that has one. It may read only features of
            the decoding step, such as ``features=fast``.
        generation: settings; greedy, at most 128 tokens by default. No beams.
        delay: number of steps that a token may wait for its probability. With 0 every token is scored as it is
            generated. Detectors with features of the row that consumes the token (``_c``) need 1. Tokens that wait
            together are scored together, which costs less.
        final: scores the mentions of the finished answer instead of ``detector``, with any features.
        extraction: how objects that the answer names are found, as in ``stethoscope.diagnose``.
        asks: what the question asks for, as in ``stethoscope.diagnose``.

    Yields:
        ``Token``; ``MentionCompleted`` when an object is named, which is where warnings are; ``Final`` at last.

    Raises:
        CapabilityError: the detector reads features that are unknown during generation, or the adapter has no model.
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
    encoded = adapter.encode_as(asks, picture, question)
    extractor = as_extraction(extraction)
    streamer = WarningStreamer(adapter, encoded, detector, delay, None, generation, extractor)
    return _stream_tokens(streamer, lambda: _diagnose_mentions(adapter, picture, encoded, streamer, final, extractor))


def _stream_tokens(
    streamer: WarningStreamer, diagnosed: Callable[[], tuple[tuple[DiagnosedMention, ...], str]]
) -> Iterator[StreamEvent]:
    with streamer:
        count = 0
        for _ in decode(streamer.model, streamer.arguments, streamer.steps, streamer.add_token):
            yield from streamer.events[count:]
            count = len(streamer.events)
        streamer.end()
        yield from streamer.events[count:]
    yield Final(streamer.finished_answer(), diagnosed)


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    """Return ``decode`` of the tokenizer without cleaning up spaces; fast tokenizers skip their wrapper.

    The wrapper doubles the time of a call.
    """
    own = [getattr(type(tokenizer), name, None) for name in ("decode", "_decode")]
    if own == [PreTrainedTokenizerFast.decode, PreTrainedTokenizerFast._decode]:
        return tokenizer.backend_tokenizer.decode
    decode_ids = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    return cast("Callable[..., str]", decode_ids)  # one sequence gives a string; only batches give lists


class _NextStep(StoppingCriteria):
    """Stopping criterion that takes effect one step after another one."""

    def __init__(self, criterion: StoppingCriteria) -> None:
        self._criterion, self._before = criterion, False

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: object) -> Tensor:
        now, before = self._criterion(input_ids, scores, **more), self._before
        self._before = before or bool(now.any())
        return now & before


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
    named: Any = extract_mentions(answer, extraction)
    detector, columns = final or streamer.detector, {}
    if not named or detector is None:
        return score_mentions(encoded, answer, named, {}, None)[1], ""
    if final is None and streamer.scorer is not None:
        columns = {name: values[: len(answer.token_ids)] for name, values in streamer.scorer.columns().items()}
    elif final is not None:
        from stethoscope.diagnosis.run_diagnosis import (  # only for detectors of any features
            compute_columns,
            feature_set,
            read_samples,
        )
        from stethoscope.tracing.mention_passes import trace_answers

        features = feature_set(final.schema.names)
        resampling = read_samples(extraction, None)
        trace = trace_answers(adapter, [encoded], [answer], features.requires, [picture], [named], resampling)[0]
        columns = compute_columns(features, trace, final, adapter.name)
    shift = shift_sentence(encoded, answer, named, columns, detector, picture, extraction)
    return score_mentions(encoded, answer, named, columns, detector)[1], shift
