"""Self-verification: the model is asked about every object that it named, in POPE's words.

The score is what the first token of the reply says: the probability of a yes, of a yes and a no together. Answers are
not generated: one forward pass over the question gives that token's distribution.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import nan
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from stethoscope.core.errors import CapabilityError
from stethoscope.core.types import UNKNOWN, Answer, ImageRef, Mention
from stethoscope.tracing.interventions import masked_pictures
from stethoscope.tracing.trace import MENTION_REQUIREMENTS, Encoded, Trace

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from stethoscope.adapters.base import Adapter
    from stethoscope.tracing.trace import Encoded


BLANKS = "▁Ġ "
"""What vocabularies put before a word that comes after a blank."""
TOGETHER = 16
"""Questions or masked pictures that share a forward pass."""

_known: WeakKeyDictionary[Adapter, tuple[list[int], list[int]]] = WeakKeyDictionary()


def question(name: str) -> str:
    """What is asked about an object.

    >>> question("orange"), question("dining table")
    ('Is there an orange in the image?', 'Is there a dining table in the image?')
    """
    return f"Is there {'an' if name[:1].lower() in 'aeiou' else 'a'} {name} in the image?"


def yes_odds(adapter: Adapter, pictures: Sequence[Image], names: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Log-odds of yes against no, in nats, for every object of every picture.

    Args:
        adapter: the model.
        pictures: N pictures.
        names: the objects to ask about, of every picture; each is asked about once.

    Returns:
        By picture, from name to log-odds.

    Raises:
        CapabilityError: the model's tokens for yes and no are the same.
    """
    asked = [(at, name) for at, some in enumerate(names) for name in dict.fromkeys(some)]
    found: list[dict[str, float]] = [{} for _ in pictures]
    for start in range(0, len(asked), TOGETHER):
        some = asked[start : start + TOGETHER]
        encoded = [adapter.encode(pictures[at], question(name)) for at, name in some]
        for (at, name), logits in zip(some, first_logits(adapter, encoded), strict=True):
            yes, no = reply_ids(adapter, encoded[0])
            found[at][name] = float(logits[yes].logsumexp(-1) - logits[no].logsumexp(-1))
    return found


def first_logits(adapter: Adapter, encoded: Sequence[Encoded]) -> list[Tensor]:
    """(V,) logits of the first token of every reply; no reply is written."""
    reply = Answer("", (0,), ((0, 0),), (0.0,))  # the row that predicts a token does not see it
    return [trace.logits[0] for trace in adapter.trace_batch(encoded, [reply] * len(encoded), ())]


def reply_ids(adapter: Adapter, encoded: Encoded) -> tuple[list[int], list[int]]:
    """Ids of the tokens that say yes and no: upper or lower case, with or without a blank before.

    Only whole words count; where a tokenizer has no such token, the first piece of "Yes" and of "No" stands for it.

    Raises:
        CapabilityError: they are the same.
    """
    if adapter not in _known:
        yes, no = (_ids(adapter, encoded, word) for word in ("Yes", "No"))
        if yes & no:
            raise CapabilityError(f"{adapter.name}: a yes and a no begin with the same token, {sorted(yes & no)}")
        _known[adapter] = sorted(yes), sorted(no)
    return _known[adapter]


def _ids(adapter: Adapter, encoded: Encoded, word: str) -> set[int]:
    """Ids of the vocabulary's entries that are the word, or the first of the word behind a prompt."""
    tokenizer = getattr(getattr(adapter, "processor", None), "tokenizer", None)
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    found = {index for piece, index in vocabulary.items() if piece.lstrip(BLANKS).lower() == word.lower()}
    return found or {adapter.answer(encoded, word).token_ids[0]}


def trace_answers(
    adapter: Adapter,
    encoded: Sequence[Encoded],
    answers: Sequence[Answer],
    requires: Collection[str],
    pictures: Sequence[Image | ImageRef],
    mentions: Sequence[Sequence[Mention]],
) -> list[Trace]:
    """``Adapter.trace_batch``, and what is to be done for every mention on top of it.

    Args:
        adapter: the model.
        encoded: B prompts; ``answers``: to them.
        requires: of ``stethoscope.tracing.trace``; those of ``MENTION_REQUIREMENTS`` are made here.
        pictures: those of the prompts; an ``ImageRef`` is read only if it is needed.
        mentions: the objects that every answer names.
    """
    traces = adapter.trace_batch(encoded, answers, frozenset(requires) - set(MENTION_REQUIREMENTS))
    if not set(MENTION_REQUIREMENTS) & set(requires):
        return traces
    shown = [picture.load() if isinstance(picture, ImageRef) else picture for picture in pictures]
    owners = [answer.owners(some) for answer, some in zip(answers, mentions, strict=True)]
    if "questions" in requires:
        names = [[mention.object for mention in some if mention and mention.object != UNKNOWN] for some in owners]
        for at, odds in enumerate(yes_odds(adapter, shown, names)):
            values = [odds.get(mention.object, nan) if mention else nan for mention in owners[at]]
            traces[at] = replace(traces[at], yes_odds=traces[at].logits.new_tensor(values))
    if "masked" in requires:
        for at, picture in enumerate(shown):
            named = [token for token, mention in enumerate(owners[at]) if mention]
            traces[at] = replace(traces[at], masked_logprob=_masked(adapter, encoded[at], traces[at], picture, named))
    return traces


def _masked(adapter: Adapter, encoded: Encoded, trace: Trace, picture: Image, tokens: Sequence[int]) -> Tensor:
    """(T,) log-probabilities of some tokens, each predicted from a picture of its own; NaN for the others."""
    values = trace.logits.new_full((len(trace.answer.token_ids),), nan)
    changed = masked_pictures(adapter, picture, encoded.spans, trace.image_attention.numpy(), tokens)
    for start in range(0, len(tokens), TOGETHER):
        some = tokens[start : start + TOGETHER]
        prompts = [adapter.encode(one, encoded.question) for one in changed[start : start + TOGETHER]]
        heads = [trace.answer.until(token + 1) for token in some]
        for token, other in zip(some, adapter.trace_batch(prompts, heads, ()), strict=True):
            values[token] = other.logits[token].log_softmax(-1)[trace.answer.token_ids[token]]
    return values
