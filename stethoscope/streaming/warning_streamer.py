"""Follow one answer token by token: its text, its scores, the objects that it names, and what is taken back of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from stethoscope.core.errors import CaptureError
from stethoscope.core.types import Answer, Generation, with_limit
from stethoscope.detection.lookup import load_detector
from stethoscope.streaming.candidates import Candidates
from stethoscope.streaming.decode_loop import Rewind, decode, look_ahead
from stethoscope.streaming.events import (
    Judge,
    MentionCompleted,
    MentionKeys,
    MentionTracker,
    TakenBack,
    Token,
)
from stethoscope.streaming.recorded_steps import RESIDUAL_REQUIREMENTS, RecordedSteps
from stethoscope.streaming.scorer import Scorer
from stethoscope.streaming.step_recorder import StepRecorder
from stethoscope.tasks.extraction import as_extraction
from stethoscope.tracing.logit_lens import lens_of
from stethoscope.tracing.token_spans import GrowingText, decoder_of

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter
    from stethoscope.detection.detector import Detector
    from stethoscope.streaming.backtrack import Backtracker
    from stethoscope.tasks.extraction import Extraction
    from stethoscope.tasks.object_extraction import MentionExtractor
    from stethoscope.tracing.trace import Encoded

AnswerEvent = Token | MentionCompleted | TakenBack
"""All events but ``Final``."""


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
        backtracker: decides what is taken back, of which only ``decode_answers`` is capable; None for nothing.

    Attributes:
        encoded: the prompt.
        events: events so far: tokens, the objects that they name, and what was taken back.
        tokens: tokens so far, without those taken back.
        steps: the decoding steps so far.
        recorder: records them.
        rewinds: whether there is a backtracker.
        adapter: of the model.
        generation: settings.
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
        on_event: Callable[[AnswerEvent], None] | None = None,
        generation: Generation | None = None,
        extraction: Extraction | MentionExtractor | str | None = None,
        backtracker: Backtracker | None = None,
    ) -> None:
        self._limit = None if generation is None else generation.max_new_tokens  # else that of the caller
        self.adapter, self.encoded, self.generation = adapter, encoded, with_limit(generation)
        self.detector = load_detector(detector)
        self.scorer = None if self.detector is None else Scorer(self.detector, delay)
        self.model, self.arguments = adapter.prepare_generate([encoded], self.generation)
        requires: frozenset[str] = frozenset() if self.scorer is None else self.scorer.requires
        lens = lens_of(self.model) if requires & RESIDUAL_REQUIREMENTS else None
        settings = self.arguments["generation_config"]
        encoder = settings.decoder_start_token_id is not None
        imaged = self.scorer is not None and self.scorer.imaged
        self.steps = RecordedSteps(lens, encoded.spans, encoder, requires, backtracker is not None, imaged)
        self.recorder = StepRecorder(self.model, [self.steps])
        if self.scorer is not None and self.scorer.lookahead:
            look_ahead(self.arguments)
        self._end_ids = frozenset(settings.eos_token_id or ())
        self._stop_strings = (*getattr(adapter, "stop", ()), *self.generation.stop)
        tokenizer = adapter.processor.tokenizer  # type: ignore[attr-defined]  # an adapter that generates has one
        self._decode_ids, self._on_event = decoder_of(tokenizer), on_event
        self._growing = GrowingText(self._decode)
        extractor = as_extraction(extraction)
        every = self.detector is not None and self.detector.settings["subtokens"] != "first"
        cut = any(stop[:1].isalpha() for stop in self._stop_strings)  # they can end an answer, and a name, within words
        self._candidates = Candidates(None if cut else extractor.name_prefixes, tokenizer, every)
        own = MentionTracker(extractor, self.detector)
        self._mentions, self._backtracker = own if backtracker is None else backtracker.mentions, backtracker
        self.rewinds = backtracker is not None
        self._announced = 0  # number of mentions that are events
        self._text = ""  # of all tokens so far, also of those that wait for their probability
        self._spans: list[tuple[int, int]] = []  # of these tokens in it
        self._pieces: list[str] = []  # the text of each, up to the limit
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._probabilities: list[float | None] = []  # None for tokens that can begin no name, or are not judged alone
        self._started = self._finished = False
        self.events: list[AnswerEvent] = []
        self.tokens: list[Token] = []
        self.answer: Answer | None = None

    def __enter__(self) -> WarningStreamer:
        self.recorder.watch_prompt()
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
        self.recorder.stop()

    def put(self, value: Tensor) -> None:
        """Receive the prompt and then every token from ``generate``.

        Raises:
            CaptureError: there is more than one prompt, or more than one token comes at once.
        """
        if self.answer is not None:
            raise CaptureError("this streamer has its answer; give each generate call a new streamer")
        if not self._started:
            self._started = True
            self.recorder.start()
            return
        if value.numel() != 1:
            raise CaptureError(f"{value.numel()} tokens came at once; warnings are for one prompt, token by token")
        with torch.inference_mode():
            self.add_token(int(value))

    def add_token(self, token: int) -> Rewind | None:
        """Add the next token, whose step has been recorded; say what is taken back, if anything.

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
            text, start, end = self._growing.add(token)
            self._text += text
            self._spans.append((start, end))
            if self._limit is None or len(self._pieces) < self._limit:
                self._pieces.append(text)
            self._logprobs += self._missing_logprobs()
            if _has_blank(text) and (rewind := self._judge()) is not None:
                return rewind
        if self.scorer is not None:
            self._score_pending(self.scorer.batch_size)
        if not self._stop_strings or not self._in_stop_string():
            scorer = self.scorer
            immediately = scorer is None or scorer.named or (scorer.batch_size == 1 and not scorer.lookahead)
            known = len(self._ids if immediately else self._probabilities)
            for start, end in self._spans[len(self.tokens) : known]:
                self._emit(self._text[start:end], start, end)
        return None

    @torch.inference_mode()
    def end(self) -> Rewind | None:
        """Finish the answer and release its remaining tokens; ``generate`` calls this when it is done.

        Returns:
            What is taken back instead, if anything; the answer then goes on.
        """
        self._score_pending(1, finished=True)
        ids = self._ids[: self._limit]
        if self._finished and len(ids) == len(self._ids) and len(ids) != self._limit:
            ids = [*ids, min(self._end_ids)]
        answer = self.adapter.decode_answer(ids, self._logprobs, self.generation)
        if (rewind := self._judge(answer)) is not None:
            return rewind
        self.close()
        self.answer = answer
        for start, end in answer.offsets[len(self.tokens) :]:
            self._emit(answer.text[start:end], start, end)
        self._complete(answer.text, finished=True)
        return None

    def _judge(self, answer: Answer | None = None) -> Rewind | None:
        """Let the backtracker judge the mentions that are complete; take back what it says.

        Args:
            answer: when it is finished.
        """
        if self._backtracker is None:
            return None
        text, spans = (self._text, self._spans) if answer is None else (answer.text, answer.offsets)
        new = self._mentions.new(text, answer is not None)
        if not new:
            return None
        self._score_pending(1)
        traced = self._backtracker.trace is not None
        for mention in new:
            decided = traced and self._backtracker.has_decided(mention.name)
            judges = () if decided else (self._judge_of_mentions(answer),)
            completed = self._mentions.add(mention, spans, *judges)
            rewind = self._backtracker.decide(completed, text, spans, self._ids, self.steps.logits)
            if rewind is not None:
                self._take_back(rewind.kept, completed, self._backtracker.doubted[mention.name])
                return rewind
            if completed.probability is None and decided:  # it stays, and its event has a probability
                self._mentions.completed.pop()
                self._mentions.add(mention, spans, self._judge_of_mentions(answer))
        return None

    def _judge_of_mentions(self, answer: Answer | None = None) -> Judge:
        """Return what computes the probability of a mention: the scorer, or that of its first token.

        Where the steps do not give that, a traced pass does.

        Args:
            answer: when it is finished.
        """
        if self.scorer is not None and self.scorer.named:
            return partial(self.scorer.judge, steps=self.steps)
        probabilities: Sequence[float | None] = self._probabilities
        if self._backtracker is not None and self._backtracker.trace is not None:
            text = answer or self.adapter.decode_answer(self._ids, self._logprobs, self.generation)
            probabilities = self._backtracker.trace(text)

        def of_first_token(keys: MentionKeys) -> float | None:
            first = keys.tokens[0] if keys.tokens else len(probabilities)
            return probabilities[first] if first < len(probabilities) else None

        return of_first_token

    def _take_back(self, kept: int, mention: MentionCompleted, probability: float) -> None:
        """Go back to the first ``kept`` tokens because of a mention and its probability."""
        start, end, tokens = self._spans[kept][0], len(self._text), tuple(range(kept, len(self._ids)))
        event = TakenBack(self._text[start:], start, end, tokens, mention.object, probability, self._text)
        for values in (self._ids, self._spans, self._pieces, self._logprobs, self._probabilities, self.tokens):
            del values[kept:]
        self._text, self._finished = self._text[:start], False
        self.steps.rewind(kept)
        if self.scorer is not None:
            self.scorer.rewind(self._ids)
        self._growing.rewind(kept)
        self._mentions.rewind(start)
        self._announced = min(self._announced, len(self._mentions.completed))
        self._add_event(event)

    def _score_pending(self, least: int, finished: bool = False) -> None:
        """Score the newest tokens that can begin a name, once ``least`` steps from the first of them on are known."""
        scorer = self.scorer
        if scorer is None:
            return
        known = min(len(self._pieces), len(self.steps.logits) - scorer.lookahead)
        chosen: list[int] = []
        for index in range(len(self._probabilities), len(self._pieces)):
            decision = self._candidates.decide(self._pieces, self._ids, index, finished)
            if decision is None or (decision and known - index < (1 if chosen else least)):
                break
            chosen += [index] * decision
            self._probabilities.append(None)
        if chosen:
            scores = scorer.score(self.steps, self._ids[: chosen[-1] + 1], chosen)
            for index, probability in zip(chosen, scores.tolist(), strict=not scorer.named):
                self._probabilities[index] = probability
        scorer.skip(self.steps, len(self._probabilities))

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

    def _emit(self, text: str, start: int, end: int) -> None:
        index, known = len(self.tokens), self._probabilities
        probability = known[index] if index < len(known) else None
        token = Token(index, self._ids[index], text, start, end, self._logprobs[index], probability)
        self.tokens.append(token)
        self._add_event(token)
        if _has_blank(text):
            self._complete(self._text[:end])

    def _complete(self, text: str, finished: bool = False) -> None:
        """Add events of the mentions whose names are complete in the text of the tokens that are events."""
        if self._backtracker is None and (new := self._mentions.new(text, finished)):  # else they are judged before
            if self.scorer is not None and self.scorer.named:
                self._score_pending(1, finished)
            spans = [(token.start, token.end) for token in self.tokens]
            for named in new:
                self._mentions.add(named, spans, self._judge_of_mentions())
        for mention in self._mentions.completed[self._announced :]:
            judged_before = self._backtracker is not None and not finished  # in text that is no event yet
            if judged_before and not self._mentions.is_complete(mention, text):
                break
            self._announced += 1
            self._add_event(mention)

    def _add_event(self, event: AnswerEvent) -> None:
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)


def decode_answers(streamers: Sequence[WarningStreamer]) -> Iterator[None]:
    """Decode the answers of streamers, several of them as one batch, see ``decode``.

    Args:
        streamers: of one adapter, of the same settings and of the same detector, for prompts that can share a batch.

    Yields:
        None after every pass of the model.

    Raises:
        CapabilityError: something is to be taken back, and the model's cache cannot be cropped.
    """
    first = streamers[0]
    model, arguments, recorder = first.model, first.arguments, first.recorder
    if len(streamers) > 1:
        prompts = [streamer.encoded for streamer in streamers]
        model, arguments = first.adapter.prepare_generate(prompts, first.generation)
        recorder = StepRecorder(model, [streamer.steps for streamer in streamers])
        if first.scorer is not None and first.scorer.lookahead:
            look_ahead(arguments)
    yield from decode(model, arguments, recorder, streamers, first.rewinds)


def _has_blank(text: str) -> bool:
    """Whether a text has white space, which completes a word."""
    return text != "".join(text.split())
