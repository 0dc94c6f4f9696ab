"""Warnings while the model writes: tokens with their probabilities, one by one, from the very pass that writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from stethoscope.core.errors import CaptureError, ConfigError
from stethoscope.core.offsets import GrowingText
from stethoscope.core.types import Answer, Generation, ImageRef, load_picture
from stethoscope.detection.finding import check_model, load_detector
from stethoscope.diagnosis.diagnosis import DiagnosedMention
from stethoscope.diagnosis.run_diagnosis import MentionExtractor, default_extractor, extract_mentions, score_mentions
from stethoscope.streaming.decode_loop import run
from stethoscope.streaming.scorer import Scorer
from stethoscope.streaming.step_recorder import Steps
from stethoscope.tracing.logit_lens import lens_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

    from stethoscope.adapters.base import Adapter
    from stethoscope.detector import Detector
    from stethoscope.tracing.trace import Encoded

LONGEST = 128  # tokens of an answer where nothing is said


@dataclass(frozen=True)
class StreamedToken:
    """One token as it comes.

    Attributes:
        token: its index in the answer, from 0.
        id: of the vocabulary.
        text: what it adds to the text so far; empty while a character is not complete.
        start, end: the characters of ``text`` in the answer.
        logprob: natural log of its probability under the model's own distribution.
        probability: what the detector says of its rows, in [0, 1]; None without a detector. Detectors learn from
            objects that answers name, by default from their first sub-token: there it is the probability that the
            object is not in the picture. For other tokens it says how the rows would look if such a name began here;
            it warns of nothing. The mentions of ``StreamedAnswer`` say which tokens name an object.
        warned: the probability is at or above the detector's threshold.
    """

    token: int
    id: int
    text: str
    start: int
    end: int
    logprob: float
    probability: float | None = None
    warned: bool = False


class StreamedAnswer:
    """What ``stream`` yields last.

    Attributes:
        answer: the finished answer, that of ``Adapter.generate``.
    """

    def __init__(self, answer: Answer, mentions: Callable[[], tuple[DiagnosedMention, ...]]) -> None:
        self.answer, self._find = answer, mentions

    @cached_property
    def mentions(self) -> tuple[DiagnosedMention, ...]:
        """The objects that the answer names, with what the detector says of them; found when they are first read.

        Raises:
            CapabilityError: ``final`` reads features that the model does not give.
        """
        return self._find()


class WarningStreamer(BaseStreamer):
    """Goes as ``streamer=`` into a ``generate`` call of one's own, for one prompt and without beams.

    Use it in a ``with`` block, so that the model is left as it was even if ``generate`` fails.

    Args:
        adapter: of the model.
        encoded: the prompt; call ``generate`` with its ``inputs`` or with ``arguments``.
        detector: gives the probabilities.
        delay: how many steps a token may wait for its probability, see ``stream``. A detector with features of the
            consuming row gives none to the last token of an answer that was cut off, since nothing has read it.
        on_token: called with every token, in order.
        generation: how to write, for ``arguments`` and for the stop strings.

    Attributes:
        tokens: what was handed out so far. ``answer``: the finished answer, None before ``end``.
        model, arguments: the transformers model, and arguments of its ``generate`` for the answer of the adapter, with
            a step more where the last token has to be read to be judged.

    Raises:
        CapabilityError: the detector reads what is not known while an answer is written, or the adapter has no model.
        ConfigError: the delay is negative.
    """

    def __init__(
        self,
        adapter: Adapter,
        encoded: Encoded,
        detector: Detector | Path | str | None = None,
        delay: int = 0,
        on_token: Callable[[StreamedToken], None] | None = None,
        generation: Generation | None = None,
    ) -> None:
        self._limit = None if generation is None else generation.max_new_tokens  # else that of the caller
        self._adapter, self._generation = adapter, _bounded(generation)
        self.detector = load_detector(detector)
        self.scorer = None if self.detector is None else Scorer(self.detector, delay)
        self.model, self.arguments = adapter.prepare_generate([encoded], self._generation)
        needs = frozenset() if self.scorer is None else self.scorer.requires
        lens = lens_of(self.model) if needs & {"lens", "trajectory"} else None
        settings = self.arguments["generation_config"]
        encoder = settings.decoder_start_token_id is not None
        self.steps = Steps(self.model, lens, encoded.spans, encoder, needs)
        settings.output_logits = False
        if self.scorer is not None and self.scorer.waits:
            settings.max_new_tokens += 1
            self.arguments["stopping_criteria"] = [_Late(one) for one in self.arguments["stopping_criteria"]]
        self._ends = frozenset(settings.eos_token_id or ())
        self._stops = (*getattr(adapter, "stop", ()), *self._generation.stop)
        self._write, self._on_token = _decoder(adapter.processor.tokenizer), on_token
        self._text = GrowingText(self._decode)
        self._waiting: list[tuple[str, int, int]] = []  # of tokens that are not handed out: text, start, end
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._probabilities: list[float] = []
        self._begun = self._ended = False
        self.tokens: list[StreamedToken] = []
        self.answer: Answer | None = None

    def __enter__(self) -> WarningStreamer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes everything off the model; does nothing the second time."""
        self.steps.stop()

    def put(self, value: Tensor) -> None:
        """Called by ``generate``, first with the prompt, then with every token.

        Raises:
            CaptureError: there is more than one prompt, or more than one token comes at once.
        """
        if self.answer is not None:
            raise CaptureError("this streamer has its answer; give each generate call a new streamer")
        if not self._begun:
            self._begun = True
            self.steps.start()
            return
        if value.numel() != 1:
            raise CaptureError(f"{value.numel()} tokens came at once; warnings are for one prompt, token by token")
        with torch.inference_mode():
            self.follow(int(value))

    def follow(self, token: int) -> None:
        """Takes the next token, whose step has been heard.

        Raises:
            CaptureError: it has not.
        """
        self._ended = self._ended or token in self._ends
        if not self._ended:
            if len(self.steps.logits) <= len(self._ids):
                raise CaptureError(
                    "a token came before its step was heard; use the streamer in the thread that generates"
                )
            self._ids.append(token)
            self._waiting.append(self._text.add(token))
        self._read(1 if self.scorer is None else self.scorer.together)
        if not self._stops or not self._held():
            self._hand_out()

    @torch.inference_mode()
    def end(self) -> None:
        """Called by ``generate`` when it is done: what waited is handed out, but for what is no part of the answer."""
        self.close()
        self._read(1)
        self._logprobs += self._rest()
        ids = self._ids[: self._limit]
        if self._ended and len(ids) == len(self._ids) and len(ids) != self._limit:
            ids = [*ids, min(self._ends)]
        self.answer = self._adapter.decode_answer(ids, self._logprobs, self._generation)
        for start, end in self.answer.offsets[len(self.tokens) :]:
            self._give(self.answer.text[start:end], start, end)
        self._waiting = []

    def _read(self, least: int) -> None:
        """Log-probabilities and warnings of the newest tokens whose steps are known, if there are so many."""
        if self.scorer is None:
            self._logprobs += self._rest()
            return
        done, known = len(self._probabilities), min(len(self._ids), len(self.steps.logits) - self.scorer.waits)
        if known - done >= least:
            self._probabilities += self.scorer.judge(self.steps, self._ids[:known], done).tolist()
            self._logprobs += self.scorer.logprobs

    def _rest(self) -> list[float]:
        """Log-probabilities of the tokens that have none."""
        done = len(self._logprobs)
        rows = zip(self.steps.logits[done:], self._ids[done:], strict=False)  # the last step may have ended the answer
        return [row.float().log_softmax(-1)[token].item() for row, token in rows]

    def _held(self) -> bool:
        """Whether the text may be in the middle of a stop string."""
        text = self._decode(self._ids, special=True)
        return any(
            stop in text or any(text.endswith(stop[:size]) for size in range(1, len(stop))) for stop in self._stops
        )

    def _decode(self, ids: Sequence[int], special: bool = False) -> str:
        return self._write(ids, skip_special_tokens=not special)

    def _hand_out(self) -> None:
        ready = len(self._ids if self.scorer is None else self._probabilities) - len(self.tokens)
        for waiting in self._waiting[:ready]:
            self._give(*waiting)
        del self._waiting[:ready]

    def _give(self, text: str, start: int, end: int) -> None:
        at, known = len(self.tokens), self._probabilities
        probability = known[at] if at < len(known) else None
        warned = probability is not None and probability >= self.detector.threshold
        token = StreamedToken(at, self._ids[at], text, start, end, self._logprobs[at], probability, warned)
        self.tokens.append(token)
        if self._on_token is not None:
            self._on_token(token)


def stream(
    adapter: Adapter,
    image: Image | ImageRef | Path | str,
    question: str,
    *,
    detector: Detector | Path | str | None = None,
    generation: Generation | None = None,
    delay: int = 0,
    final: Detector | Path | str | None = None,
    mentions: MentionExtractor | None = None,
) -> Iterator[StreamedToken | StreamedAnswer]:
    """Lets the model answer and yields every token as it is written, and at the end the answer with its warnings.

    The tokens are those of ``adapter.generate``; probabilities are those that the detector gives for a trace of the
    finished answer. The model takes its next step when the next item is asked for.

    Args:
        adapter: the model.
        image: the picture, or the path of its file.
        question: what to ask.
        detector: gives probabilities; or the folder of one, or of a run that has one. It may read features of the
            decoding step alone, as ``features=fast`` are.
        generation: how to write; greedy, at most 128 tokens by default. No beams.
        delay: how many steps a token may wait for its probability. With 0 every token is judged as it is written.
            Detectors with features of the row that consumes the token (``_c``) need 1. Tokens that wait together are
            judged together, which costs less.
        final: judges the mentions of the finished answer in ``detector``'s place, with any features at all.
        mentions: finds the objects that a text names, as in ``stethoscope.diagnose``.

    Yields:
        ``StreamedToken``, and a ``StreamedAnswer`` at last.

    Raises:
        CapabilityError: the detector reads what is not known while an answer is written, or the adapter has no model.
        ConfigError: the question is empty, a setting is out of range, or a detector reads states of another model.
        DataError: the picture is missing or cannot be read.
    """
    generation = _bounded(generation)
    if generation.num_beams > 1:
        raise ConfigError(f"generation.num_beams={generation.num_beams}: beams are not known until they end; use 1")
    if not question.strip():
        raise ConfigError("the question is empty; the usual one is 'Please describe this image in detail.'")
    detector, final = load_detector(detector), load_detector(final)
    adapter.setup()
    for one in filter(None, (detector, final)):
        check_model(one, adapter)
    picture = load_picture(image)
    encoded = adapter.encode(picture, question)
    streamer = WarningStreamer(adapter, encoded, detector, delay, None, generation)
    return _written(streamer, lambda: _named(adapter, picture, encoded, streamer, final, mentions))


def _written(
    streamer: WarningStreamer, named: Callable[[], tuple[DiagnosedMention, ...]]
) -> Iterator[StreamedToken | StreamedAnswer]:
    with streamer:
        given = 0
        for _ in run(streamer.model, streamer.arguments, streamer.steps, streamer.follow):
            yield from streamer.tokens[given:]
            given = len(streamer.tokens)
        streamer.end()
        yield from streamer.tokens[given:]
    yield StreamedAnswer(streamer.answer, named)


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    """``tokenizer.decode`` without cleaning up spaces; of fast tokenizers what lies below, in half of the time."""
    own = [getattr(type(tokenizer), name, None) for name in ("decode", "_decode")]
    if own == [PreTrainedTokenizerFast.decode, PreTrainedTokenizerFast._decode]:
        return tokenizer.backend_tokenizer.decode
    return partial(tokenizer.decode, clean_up_tokenization_spaces=False)


class _Late(StoppingCriteria):
    """Another criterion, a step later."""

    def __init__(self, criterion: StoppingCriteria) -> None:
        self._criterion, self._before = criterion, False

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: object) -> Tensor:
        now, before = self._criterion(input_ids, scores, **more), self._before
        self._before = before or bool(now.any())
        return now & before


def _named(
    adapter: Adapter,
    picture: Image,
    encoded: Encoded,
    streamer: WarningStreamer,
    final: Detector | None,
    mentions: MentionExtractor | None,
) -> tuple[DiagnosedMention, ...]:
    answer = streamer.answer
    found: Any = extract_mentions(answer, mentions or default_extractor())
    detector, columns = final or streamer.detector, {}
    if not found or detector is None:
        return score_mentions(encoded, answer, found, {}, None)[1]
    if final is None:
        columns = {name: values[: len(answer.token_ids)] for name, values in streamer.scorer.columns().items()}
    else:
        from stethoscope.diagnosis.run_diagnosis import columns_of, feature_set
        from stethoscope.tracing.mention_passes import trace_answers

        features = feature_set(final.schema.names)
        trace = trace_answers(adapter, [encoded], [answer], features.requires, [picture], [found])[0]
        columns = columns_of(features, trace, final, adapter.name)
    return score_mentions(encoded, answer, found, columns, detector)[1]


def _bounded(generation: Generation | None) -> Generation:
    generation = generation or Generation()
    return replace(generation, max_new_tokens=LONGEST) if generation.max_new_tokens is None else generation
