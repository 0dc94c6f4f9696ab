"""Run the passes that are made for every mention: self-verification questions and masked images.

Self-verification asks the model about every object that it named, in POPE's words. The score is the probability of yes
among yes and no as the first token of the reply. Replies are not generated: one forward pass over the question gives
that token's distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from stethoscope.core.errors import CapabilityError
from stethoscope.core.types import UNKNOWN, Answer, Generation, ImageRef, Mention, required
from stethoscope.tracing.interventions import masked_pictures
from stethoscope.tracing.trace import MENTION_REQUIREMENTS, SAMPLES, Encoded, Trace

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from stethoscope.adapters.base import Adapter

BLANKS = "▁Ġ "
"""Characters by which vocabularies mark a word after a blank."""
BATCH = 16
"""Number of questions or masked images per forward pass."""

_reply_ids: WeakKeyDictionary[Adapter, tuple[list[int], list[int]]] = WeakKeyDictionary()


def question(name: str) -> str:
    """Write the question about an object.

    >>> question("orange"), question("dining table")
    ('Is there an orange in the image?', 'Is there a dining table in the image?')
    """
    return f"Is there {'an' if name[:1].lower() in 'aeiou' else 'a'} {name} in the image?"


@dataclass(frozen=True)
class Reply:
    """What a model makes of the question about an object.

    Attributes:
        odds: log-odds of yes against no, in nats.
        states: (K, D) states of the row that predicts the reply, see ``probe_layers``; None where not asked for.
        states_without: (K, D) the same when the image is hidden.
    """

    odds: float
    states: Tensor | None = None
    states_without: Tensor | None = None


def yes_odds(adapter: Adapter, pictures: Sequence[Image], names: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Compute the log-odds of yes against no, in nats, for every object of every image; see ``ask``.

    Returns:
        By image, log-odds by name.
    """
    replies = ask(adapter, pictures, names)
    return [{name: reply.odds for name, reply in asked.items()} for asked in replies]


def ask(
    adapter: Adapter, pictures: Sequence[Image], names: Sequence[Sequence[str]], states: bool = False
) -> list[dict[str, Reply]]:
    """Ask about every object of every image, without generating.

    Args:
        adapter: the model.
        pictures: N images.
        names: the objects to ask about, by image; each is asked about once.
        states: whether replies hold states. Those without the image are the same for all images of one size, and
            adapters of transformers models compute them once per object.

    Returns:
        By image, replies by name.

    Raises:
        CapabilityError: the model's tokens for yes and no are the same.
    """
    questions = [(index, name) for index, objects in enumerate(names) for name in dict.fromkeys(objects)]
    replies: list[dict[str, Reply]] = [{} for _ in pictures]
    first = Answer("", (0,), ((0, 0),), (0.0,))  # the row that predicts a token does not see it
    requires = ("layer_states", "no_image_states") if states else ()
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        encoded = [adapter.encode(pictures[index], question(name)) for index, name in batch]
        traces = adapter.trace_batch(encoded, [first] * len(batch), requires)
        for (index, name), trace in zip(batch, traces, strict=True):
            yes, no = reply_ids(adapter, encoded[0])
            odds = float(trace.logits[0, yes].logsumexp(-1) - trace.logits[0, no].logsumexp(-1))
            both = (trace.require("layer_states")[0], trace.require("no_image_states")[0]) if states else (None, None)
            replies[index][name] = Reply(odds, *both)
    return replies


def reply_ids(adapter: Adapter, encoded: Encoded) -> tuple[list[int], list[int]]:
    """Return the ids of the tokens for yes and no, in any case, with or without a leading blank.

    Only whole words count; a tokenizer without such a token uses the first piece of "Yes" and of "No".

    Raises:
        CapabilityError: yes and no have a token in common.
    """
    if adapter not in _reply_ids:
        yes, no = (_ids(adapter, encoded, word) for word in ("Yes", "No"))
        if yes & no:
            raise CapabilityError(f"{adapter.name}: a yes and a no begin with the same token, {sorted(yes & no)}")
        _reply_ids[adapter] = sorted(yes), sorted(no)
    return _reply_ids[adapter]


def _ids(adapter: Adapter, encoded: Encoded, word: str) -> set[int]:
    """Return the ids of the vocabulary's entries for a word, or the first id of the word after a prompt."""
    tokenizer = getattr(getattr(adapter, "processor", None), "tokenizer", None)
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    ids = {index for piece, index in vocabulary.items() if piece.lstrip(BLANKS).lower() == word.lower()}
    return ids or {adapter.answer(encoded, word).token_ids[0]}


@dataclass(frozen=True)
class Resampling:
    """How answers are sampled again.

    Attributes:
        generation: settings of the answers themselves; samples differ in seed and temperature, which is 1.
        name_objects: by prompt, a function that lists the objects which an answer names.
    """

    generation: Generation
    name_objects: Sequence[Callable[[Answer], Collection[str]]]


def named_shares(
    adapter: Adapter, encoded: Sequence[Encoded], names: Sequence[Collection[str]], resampling: Resampling | None
) -> list[dict[str, float]]:
    """Sample ``SAMPLES`` answers to every prompt at temperature 1 and compute how many name each object.

    Args:
        adapter: the model; nothing but its answers is read.
        encoded: N prompts.
        names: the objects to look for, by prompt.
        resampling: how to generate, and how to read the answers; needed where an object is to be looked for.

    Returns:
        By prompt, shares in [0, 1] by name.
    """
    counts = [dict.fromkeys(objects, 0) for objects in names]
    asked = [index for index, count in enumerate(counts) if count]
    for sample in range(SAMPLES if asked else 0):
        own, readers = required(resampling).generation, required(resampling).name_objects
        seed = own.seed + 1 + sample  # the answer itself may have been sampled with its own
        again = replace(own, do_sample=True, temperature=1.0, top_p=1.0, num_beams=1, seed=seed, mitigation=None)
        for index, answer in zip(asked, adapter.generate([encoded[i] for i in asked], again), strict=True):
            for name in set(readers[index](answer)).intersection(counts[index]):
                counts[index][name] += 1
    return [{name: value / SAMPLES for name, value in count.items()} for count in counts]


def trace_answers(
    adapter: Adapter,
    encoded: Sequence[Encoded],
    answers: Sequence[Answer],
    requires: Collection[str],
    pictures: Sequence[Image | ImageRef],
    mentions: Sequence[Sequence[Mention]],
    resampling: Resampling | None = None,
) -> list[Trace]:
    """Trace answers by ``Adapter.trace_batch``, and make the passes for every mention.

    Args:
        adapter: the model.
        encoded: B prompts.
        answers: B answers to them.
        requires: requirements of ``stethoscope.tracing.trace``; those of ``MENTION_REQUIREMENTS`` are met here.
        pictures: the images of the prompts; an ``ImageRef`` is read only if it is required.
        mentions: the mentions of every answer.
        resampling: how answers are sampled again, for the requirement ``samples``.

    Raises:
        CapabilityError: ``samples`` are required, and nothing says how objects are read from them.
    """
    own = frozenset(requires) - set(MENTION_REQUIREMENTS)
    own |= {"layer_states"} if "question_states" in requires else set()  # of the shape that its states have
    traces = adapter.trace_batch(encoded, answers, own)
    if not set(MENTION_REQUIREMENTS) & set(requires):
        return traces
    shown = [picture.load() if isinstance(picture, ImageRef) else picture for picture in pictures]
    owners = [answer.owners(answer_mentions) for answer, answer_mentions in zip(answers, mentions, strict=True)]
    if not {"questions", "question_states"}.isdisjoint(requires):
        names = [
            [mention.object for mention in token_mentions if mention and mention.object != UNKNOWN]
            for token_mentions in owners
        ]
        for index, replies in enumerate(ask(adapter, shown, names, "question_states" in requires)):
            by_token = [replies.get(mention.object) if mention else None for mention in owners[index]]
            traces[index] = _with_replies(traces[index], by_token, "question_states" in requires)
    if "samples" in requires:
        named = [{mention.object for mention in answer_mentions} - {UNKNOWN} for answer_mentions in mentions]
        if resampling is None and any(named):
            raise CapabilityError("sampled answers need a task or an extractor that reads objects from them")
        for index, shares in enumerate(named_shares(adapter, encoded, named, resampling)):
            values = [shares.get(mention.object, nan) if mention else nan for mention in owners[index]]
            traces[index] = replace(traces[index], named_share=traces[index].logits.new_tensor(values))
    if "masked" in requires:
        for index, picture in enumerate(shown):
            tokens = [token for token, mention in enumerate(owners[index]) if mention]
            logprobs = _masked_logprobs(adapter, encoded[index], traces[index], picture, tokens)
            traces[index] = replace(traces[index], masked_logprob=logprobs)
    return traces


def _with_replies(trace: Trace, replies: Sequence[Reply | None], states: bool) -> Trace:
    """Add the replies about the objects that the tokens name to a trace; NaN where a token names none."""
    trace = replace(trace, yes_odds=trace.logits.new_tensor([reply.odds if reply else nan for reply in replies]))
    if not states:
        return trace
    shape = trace.require("layer_states")
    with_image, without = shape.new_full(shape.shape, nan), shape.new_full(shape.shape, nan)
    for index, reply in enumerate(replies):
        if reply:
            with_image[index], without[index] = required(reply.states), required(reply.states_without)
    return replace(trace, verify_states=with_image, verify_states_without=without)


def _masked_logprobs(adapter: Adapter, encoded: Encoded, trace: Trace, picture: Image, tokens: Sequence[int]) -> Tensor:
    """Compute the (T,) log-probabilities of some tokens, each with its own masked image; NaN for the others."""
    values = trace.logits.new_full((len(trace.answer.token_ids),), nan)
    changed = masked_pictures(adapter, picture, encoded.spans, trace.require("image_attention").numpy(), tokens)
    for start in range(0, len(tokens), BATCH):
        batch = tokens[start : start + BATCH]
        prompts = [
            adapter.encode_as(encoded.asks, masked, encoded.question, encoded.history)
            for masked in changed[start : start + BATCH]
        ]
        heads = [trace.answer.until(token + 1) for token in batch]
        for token, other in zip(batch, adapter.trace_batch(prompts, heads, ()), strict=True):
            values[token] = other.logits[token].log_softmax(-1)[trace.answer.token_ids[token]]
    return values
