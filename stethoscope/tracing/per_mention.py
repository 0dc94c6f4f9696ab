"""Traces with what costs passes for every object that an answer names: ``trace.MENTION_NEEDS``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import nan
from typing import TYPE_CHECKING

from stethoscope.core.types import UNKNOWN, Answer, ImageRef, Mention
from stethoscope.trace import MENTION_NEEDS, Encoded, Trace
from stethoscope.tracing.masking import masked_pictures
from stethoscope.tracing.verification import yes_odds

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from stethoscope.adapter import Adapter

TOGETHER = 16
"""Masked pictures that share a forward pass."""


def trace_answers(
    adapter: Adapter,
    encoded: Sequence[Encoded],
    answers: Sequence[Answer],
    needs: Collection[str],
    pictures: Sequence[Image | ImageRef],
    mentions: Sequence[Sequence[Mention]],
) -> list[Trace]:
    """``Adapter.trace_batch``, and what is to be done for every mention on top of it.

    Args:
        adapter: the model.
        encoded: B prompts; ``answers``: to them.
        needs: of ``stethoscope.trace``; those of ``MENTION_NEEDS`` are made here.
        pictures: those of the prompts; an ``ImageRef`` is read only if it is needed.
        mentions: the objects that every answer names.
    """
    traces = adapter.trace_batch(encoded, answers, frozenset(needs) - set(MENTION_NEEDS))
    if not set(MENTION_NEEDS) & set(needs):
        return traces
    shown = [picture.load() if isinstance(picture, ImageRef) else picture for picture in pictures]
    owners = [answer.owners(some) for answer, some in zip(answers, mentions, strict=True)]
    if "questions" in needs:
        names = [[mention.object for mention in some if mention and mention.object != UNKNOWN] for some in owners]
        for at, odds in enumerate(yes_odds(adapter, shown, names)):
            values = [odds.get(mention.object, nan) if mention else nan for mention in owners[at]]
            traces[at] = replace(traces[at], yes_odds=traces[at].logits.new_tensor(values))
    if "masked" in needs:
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
