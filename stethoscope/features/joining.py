"""Join the traces of several answers, so that features whose rows stand alone are computed over all of them at once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from stethoscope.core.types import Answer
from stethoscope.tracing.trace import HeadAttention, HiddenStates, Trace

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.relevancy import Relevancy

_PARTS = frozenset(item.name for item in fields(Trace))
_LOGITS = 2**24  # entries of the logits of traces that are joined


def joinable(traces: Sequence[Trace]) -> list[list[int]]:
    """List the indices of traces that can be joined: of prompts with the same spans, and not too large together."""
    groups: dict[Hashable, list[list[int]]] = {}
    sizes: dict[Hashable, int] = {}
    for index, trace in enumerate(traces):
        key, size = _key(trace), trace.logits.numel()
        sizes[key] = sizes.get(key, 0) + size
        if key not in groups or sizes[key] > _LOGITS:
            groups.setdefault(key, []).append([])
            sizes[key] = size
        groups[key][-1].append(index)
    return [group for same in groups.values() for group in same]


def _key(trace: Trace) -> Hashable:
    relevancy = trace.relevancy
    parts = tuple([name for name, value in vars(trace).items() if name in _PARTS and value is not None])
    if relevancy is None:
        return trace.spans, parts
    if relevancy.llm is None:  # an encoder-decoder model has two sequences
        return id(trace)
    return trace.spans, parts, relevancy.first, relevancy.image_positions, relevancy.question_positions


def join(traces: Sequence[Trace]) -> Trace:
    """Join the traces of two answers or more into one, whose rows follow one another.

    It has the parts that features with ``by_row`` read: no ``image_embeds``, and no ``response`` of ``heads``.
    """
    import torch  # listing features needs none

    ids = [token for trace in traces for token in trace.answer.token_ids]
    answer = Answer("", tuple(ids), ((0, 0),) * len(ids), (0.0,) * len(ids))  # no such feature reads the text
    parts: dict[str, Any] = {"counts": tuple(len(trace.answer.token_ids) for trace in traces)}
    for item in fields(traces[0]):
        values = [getattr(trace, item.name) for trace in traces]
        if isinstance(values[0], torch.Tensor):
            parts[item.name] = torch.cat(values) if item.name != "image_embeds" else None
    if traces[0].heads is not None:
        parts["heads"] = _join_heads([trace.require("heads") for trace in traces])
    if traces[0].states is not None:
        parts["states"] = _join_states([trace.require("states") for trace in traces])
    if traces[0].relevancy is not None:
        parts["relevancy"] = _join_relevancy([trace.require("relevancy") for trace in traces])
    return replace(traces[0], answer=answer, **parts)


def share_cache(joined: Trace, traces: Sequence[Trace]) -> None:
    """Hand what has been computed for every token of a joined trace to the traces of the answers."""
    counts, total = list(joined.counts), sum(joined.counts)
    for key, value in joined.cache.items():
        if hasattr(value, "split") and len(value) == total:
            for trace, part in zip(traces, value.split(counts), strict=True):
                trace.cache[key] = part


def _join_heads(heads: Sequence[HeadAttention]) -> HeadAttention:
    import torch  # listing features needs none

    parts = {name: torch.cat([getattr(part, name) for part in heads]) for name in ("mass", "image", "top", "peak")}
    return HeadAttention(**parts, response=parts["mass"].new_zeros(0))


def _join_states(states: Sequence[HiddenStates]) -> HiddenStates:
    import torch  # listing features needs none

    def by_answer(name: str) -> dict[int, Tensor]:
        return {layer: torch.stack([getattr(part, name)[layer] for part in states]) for layer in getattr(first, name)}

    first = states[0]
    return HiddenStates(
        patch_top=torch.cat([part.patch_top for part in states]),
        patch_peak=torch.cat([part.patch_peak for part in states]),
        sinks=torch.stack([part.sinks for part in states]),
        token={layer: torch.cat([part.token[layer] for part in states]) for layer in first.token},
        image=by_answer("image"),
        instruction=by_answer("instruction"),
        prompt_end=by_answer("prompt_end"),
        prefix=torch.nn.utils.rnn.pad_sequence([part.prefix for part in states], batch_first=True),
        image_probability=torch.cat([part.image_probability for part in states]),
        instruction_probability=torch.cat([part.instruction_probability for part in states]),
    )


def _join_relevancy(relevancies: Sequence[Relevancy]) -> Relevancy:
    """Join the rows over prompt and answer, padded with zeros; the other parts are left out."""
    first = relevancies[0]
    parts: dict[str, Any] = dict.fromkeys(("vision", "tiles", "query_text"))
    parts["llm"] = _padded([part.llm for part in relevancies if part.llm is not None])
    if first.saliency is not None:
        parts["saliency"] = _padded([part.require_saliency() for part in relevancies])
    return replace(first, tokens=tuple(token for part in relevancies for token in part.tokens), **parts)


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Concatenate (T, L, S) rows of different lengths S."""
    longest = max(part.shape[-1] for part in rows)
    result = rows[0].new_zeros(sum(map(len, rows)), rows[0].shape[1], longest)
    for target, part in zip(result.split([len(part) for part in rows]), rows, strict=True):
        target[..., : part.shape[-1]] = part
    return result
