"""From a picture and a question to a diagnosis."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import CapabilityError, ConfigError, DataError
from stethoscope.core.types import Answer, Generation, ImageRef, Mention, load_picture
from stethoscope.detection.finding import check_model, load_detector
from stethoscope.diagnosis.parts import Evolution, Judgement, Named
from stethoscope.diagnosis.readers import Reader, default_reader
from stethoscope.diagnosis.result import Diagnosis
from stethoscope.tracing.token_spans import token_regions

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.adapters.base import Adapter
    from stethoscope.detector import Detector
    from stethoscope.tracing.trace import Encoded, Trace

WORDS = 5  # most probable words that are kept for every layer


def diagnose(
    adapter: Adapter,
    image: Image | ImageRef | Path | str,
    question: str,
    answer: Answer | str | None = None,
    detector: Detector | Path | str | None = None,
    *,
    scope: str = "row",
    generation: Generation | None = None,
    mentions: Reader | None = None,
) -> Diagnosis:
    """Everything about one answer.

    Args:
        adapter: the model.
        image: the picture, or the path of its file.
        question: what to ask.
        answer: what the model answered, or a text written elsewhere; None to let the model answer.
        detector: gives warnings; or the folder of one, or of a run that has one.
        scope: of the gradient of relevancy, ``row`` or ``token`` (see ``stethoscope.relevancy``).
        generation: how to write an answer; greedy, at most 128 tokens by default.
        mentions: finds the objects that a text names, as things with ``name``, ``start`` and ``end``; by default the
            function that ``conf/diagnose.yaml`` names.

    Raises:
        DataError: the picture is missing or cannot be read, or the answer is empty.
        ConfigError: the question is empty, the scope is not known, or the detector reads states of another model.
        CapabilityError: the detector reads features that the model does not give.
        ArtefactError: the folder holds no detector.
    """
    _check(question, scope)
    detector = load_detector(detector)
    seconds: dict[str, float] = {}
    notes: list[str] = []
    with _timed(seconds, "read"):
        picture = load_picture(image)
        adapter.setup()
        if detector is not None:
            check_model(detector, adapter)
        encoded = adapter.encode(picture, question)
    with _timed(seconds, "generate"):
        answer = _answer(adapter, encoded, answer, generation)
    found = find_mentions(answer, mentions or default_reader())
    with _timed(seconds, "trace"):
        trace, columns = _trace(adapter, encoded, answer, detector, scope, notes, picture, found)
    with _timed(seconds, "evolution"):
        evolution = _optional(lambda: _evolution(adapter, encoded, answer), notes)
    with _timed(seconds, "places"):
        tiles = 0 if trace.relevancy is None or trace.relevancy.tiles is None else trace.relevancy.tiles.shape[2]
        where = token_regions(adapter, picture.size, encoded.spans, tiles)
    with _timed(seconds, "judge"):
        judgements, named = judge_mentions(encoded, answer, found, columns, detector)
    return Diagnosis(
        model=adapter.name,
        image=picture,
        question=question,
        answer=answer,
        entropy=_entropy(trace),
        question_tokens=_question_tokens(adapter, encoded),
        judgements=judgements,
        mentions=named,
        threshold=None if detector is None else detector.threshold,
        relevancy=trace.relevancy,
        places=where,
        evolution=evolution,
        notes=tuple(notes),
        seconds=seconds,
        scope=scope,
    )


def _check(question: str, scope: str) -> None:
    if not question.strip():
        raise ConfigError("the question is empty; the usual one is 'Please describe this image in detail.'")
    if scope not in ("row", "token"):
        raise ConfigError(f"scope={scope!r} should be row or token")


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _answer(adapter: Adapter, encoded: Encoded, answer: Answer | str | None, generation: Generation | None) -> Answer:
    if answer is None:
        generation = generation or Generation()
        if generation.max_new_tokens is None:
            generation = replace(generation, max_new_tokens=128)
        answer = adapter.generate([encoded], generation)[0]
    elif isinstance(answer, str):
        answer = adapter.answer(encoded, answer)
    if not answer.token_ids:
        raise DataError(f"{adapter.name}: the answer is empty, there is nothing to diagnose")
    return answer


def _optional(make: Callable[[], Any], notes: list[str]) -> Any:
    """What ``make`` gives; None and a note where the model cannot."""
    try:
        return make()
    except CapabilityError as error:
        notes.append(str(error))
        return None


def _trace(
    adapter: Adapter,
    encoded: Encoded,
    answer: Answer,
    detector: Detector | None,
    scope: str,
    notes: list[str],
    picture: Image,
    found: Sequence[Mention],
) -> tuple[Trace, dict[str, Any]]:
    """The traced pass with relevancy of the scope, and the features that the detector reads."""
    from stethoscope.tracing.mention_passes import trace_answers

    features, needs = None, frozenset()
    if detector is not None:
        from stethoscope.diagnosis.detecting import columns_of, feature_set

        features = feature_set(detector.schema.names)
        needs = features.requires
    try:
        trace = trace_answers(adapter, [encoded], [answer], {*needs, "relevancy"}, [picture], [found])[0]
    except CapabilityError as error:
        if "relevancy" in needs:
            raise CapabilityError(f"the detector reads features that {adapter.name} does not give: {error}") from None
        notes.append(str(error))
        trace = trace_answers(adapter, [encoded], [answer], needs, [picture], [found])[0]
    # features are defined in scope row, whatever is shown
    columns = {} if features is None else columns_of(features, trace, detector, adapter.name)
    if scope == "token" and trace.relevancy is not None:
        from stethoscope.relevancy import answer_relevancy

        trace = replace(trace, relevancy=answer_relevancy(adapter, encoded, answer, scope=scope))
    return trace, columns


def _entropy(trace: Trace) -> Any:
    logprob = trace.logits.log_softmax(-1)
    return -(logprob.exp() * logprob).nan_to_num(0.0).sum(-1).numpy()


def _decoder(adapter: Adapter) -> Callable[[Sequence[int]], str]:
    """From ids to text; only adapters with a processor know how.

    Raises:
        CapabilityError: the adapter has no tokenizer.
    """
    tokenizer = getattr(getattr(adapter, "processor", None), "tokenizer", None)
    if tokenizer is None:
        raise CapabilityError(f"{adapter.name} has no tokenizer that would tell words")
    return lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _question_tokens(adapter: Adapter, encoded: Encoded) -> tuple[str, ...]:
    """Texts of the question's tokens, in the order of ``Relevancy.question``."""
    try:
        decode = _decoder(adapter)
    except CapabilityError:
        return tuple(f"token {index}" for index in range(len(encoded.spans.question)))
    ids = encoded.inputs["input_ids"][0].tolist()
    return tuple(decode([ids[position]]).strip() for position in encoded.spans.question)


def _evolution(adapter: Adapter, encoded: Encoded, answer: Answer) -> Evolution:
    """The logit lens in one forward pass; one layer is decoded at a time."""
    import torch

    from stethoscope.relevancy.result import layout
    from stethoscope.tracing.attention_recorder import logits_to_keep
    from stethoscope.tracing.logit_lens import Lens

    decode = _decoder(adapter)
    model, inputs = adapter.forward_inputs(encoded, answer.token_ids)
    first = layout(model, inputs, answer.token_ids).first
    rows = torch.arange(first, first + len(answer.token_ids))
    options = logits_to_keep(model, rows.tolist())
    lens, tokens = Lens(model), torch.tensor([answer.token_ids])
    words, parts = [], []
    with torch.inference_mode():
        with lens.listen(rows[None]) as heard:
            logits = model(**inputs, **options, use_cache=False).logits
        logits = (logits if options else logits[:, rows.to(logits.device)]).float()
        lens.read(heard[-1:], logits, tokens)  # checks that final norm and head are found
        for hidden in [*heard[:-1], None]:
            decoded = (logits if hidden is None else lens.decode(hidden))[0].log_softmax(-1)
            own = decoded.gather(-1, tokens[0][:, None].to(decoded.device))
            top = decoded.topk(WORDS)
            parts.append([top.values.exp().cpu(), (decoded > own).sum(-1).cpu(), own[:, 0].cpu()])
            words.append([tuple(decode([index]) for index in row) for row in top.indices.tolist()])
    probabilities, rank, logprob = (torch.stack(part, 1).numpy() for part in zip(*parts, strict=True))
    said = tuple(decode([token]) for token in answer.token_ids)
    return Evolution(tuple(zip(*words, strict=True)), probabilities, rank, logprob, said)


def find_mentions(answer: Answer, reader: Reader) -> list[Mention]:
    """Objects of the answer with no label, numbered as tasks number them."""
    before: Counter[str] = Counter()
    found = []
    for number, one in enumerate(sorted(reader(answer.text), key=lambda one: one.start)):
        found.append(Mention(one.start, one.end, one.name, -1, number, before[one.name]))
        before[one.name] += 1
    return found


def judge_mentions(
    encoded: Encoded, answer: Answer, found: list[Mention], columns: dict[str, Any], detector: Detector | None
) -> tuple[tuple[Judgement, ...], tuple[Named, ...]]:
    """What the detector says of every token, and the mentions with what it says of them."""
    named = [Named(one.object, one.start, one.end, tuple(answer.covering(one.start, one.end))) for one in found]
    if detector is None:
        return (), tuple(named)
    from stethoscope.diagnosis.detecting import judge

    tokens, mentions = judge(detector, encoded, answer, found, columns)
    for number, judgement in mentions.items():
        warned = judgement.probability >= detector.threshold
        named[number] = replace(named[number], judgement=judgement, warned=warned)
    return tokens, tuple(named)
