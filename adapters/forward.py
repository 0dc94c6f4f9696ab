"""Several prompts as one batch, and prompts extended by answers, for every family's set of inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from stethoscope.tracing.trace import Encoded, PromptCache, Spans

Inputs = Mapping[str, Tensor]

SEQUENCE = {"input_ids": None, "attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0}
"""Inputs with one entry per token, and what they are padded with (``input_ids`` with the model's padding token)."""
SIDE = {"qformer_input_ids": 0, "qformer_attention_mask": 0, "decoder_input_ids": 0}
"""Inputs of another sequence, always padded on the right: under their own mask, or where causal rows never look."""


def extend(
    inputs: Inputs, answer: Sequence[int], model_type: str, decoder_start: int | None = None
) -> dict[str, Tensor]:
    """The inputs of a forward pass over a prompt and the first tokens of its answer.

    Args:
        inputs: a prompt's inputs, batch 1.
        answer: ids to append.
        model_type: PaliGemma marks the prompt, which it reads in both directions, by token types; its answer is 1.
        decoder_start: what the decoder of an encoder-decoder model begins with; the answer then goes there.
    """
    if decoder_start is not None:
        return {**inputs, "decoder_input_ids": torch.tensor([[decoder_start, *answer]])}
    values = {
        "input_ids": torch.tensor([list(answer)], dtype=torch.long),
        "attention_mask": torch.ones(1, len(answer), dtype=torch.long),
        "mm_token_type_ids": torch.zeros(1, len(answer), dtype=torch.long),
        "token_type_ids": torch.full((1, len(answer)), int(model_type == "paligemma")),
    }
    return {
        name: torch.cat([value, values[name].to(value)], 1) if name in SEQUENCE and answer else value
        for name, value in inputs.items()
    }


def groups(inputs: Sequence[Inputs]) -> list[list[int]]:
    """Indices of prompts that can share a batch: the same inputs, and images cut into the same number of tiles."""
    found: dict[tuple, list[int]] = {}
    for index, one in enumerate(inputs):
        padded = {**SEQUENCE, **SIDE}
        key = tuple(sorted((name, () if name in padded else tuple(v.shape[1:])) for name, v in one.items()))
        found.setdefault(key, []).append(index)
    return list(found.values())


def collate(inputs: Sequence[Inputs], pad_id: int, side: str) -> dict[str, Tensor]:
    """One batch.

    Args:
        inputs: prompts of one of ``groups``.
        pad_id: what to pad ``input_ids`` with.
        side: ``left`` for generation; ``right`` for a teacher-forced pass, where positions then stay what they are
            without padding and causal rows never see it.
    """
    if len(inputs) == 1:
        return dict(inputs[0])
    batch = {}
    for name in inputs[0]:
        parts = [one[name] for one in inputs]
        if name in SEQUENCE or name in SIDE:
            fill = pad_id if name == "input_ids" else {**SEQUENCE, **SIDE}[name]
            parts = _pad(parts, fill, "right" if name in SIDE else side)
        batch[name] = torch.cat(parts)
    return batch


def _pad(parts: list[Tensor], fill: int, side: str) -> list[Tensor]:
    longest = max(part.shape[1] for part in parts)
    padded = []
    for part in parts:
        missing = longest - part.shape[1]
        pads = (missing, 0) if side == "left" else (0, missing)
        padded.append(torch.nn.functional.pad(part, pads, value=fill) if missing else part)
    return padded


CAUSAL = frozenset(
    {"llava", "llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm", "convllava", "mplug_owl2"}
)
"""``model_type`` of models whose prompt is causal text around image tokens, with one position a token, so that an
answer can be read behind the keys and values of its prompt. Not among them are PaliGemma and Gemma 3, which read
prompts in both directions, Qwen's models, whose positions are of three kinds, and those that hand no cache out (BLIP-2)
or have an encoder. The contract tests compare traces of all of them."""


@dataclass(frozen=True)
class Pass:
    """B answers in one forward pass, padded on the right, where causal rows never look.

    Attributes:
        inputs: keyword arguments of the forward pass. A cache among them serves one pass.
        rows: (B, T) positions among the queries that predict the answer tokens, or (B, T + 1) with the one that reads
            the last. Shorter answers repeat their last row.
        spans: of the prompts, in positions of the keys.
        firsts: position of every prompt's first token among the keys.
        length: number of keys of the sequence that the prompts are in.
        behind: the pass begins behind the images.
    """

    inputs: dict[str, Any]
    rows: Tensor
    spans: list[Spans]
    firsts: list[int]
    length: int
    behind: bool = False

    @property
    def queries(self) -> int | None:
        """Number of queries of a pass behind the images."""
        return self.inputs["input_ids"].shape[1] if self.behind else None


def answer_rows(starts: Sequence[int], read: Sequence[int]) -> Tensor:
    """(B, T) rows of answers of which so many tokens are read, the first row at ``starts``.

    >>> answer_rows([4, 2], [2, 1]).tolist()
    [[4, 5, 6], [2, 3, 3]]
    """
    steps = torch.arange(max([0, *read]) + 1)
    return torch.tensor(starts)[:, None] + steps.minimum(torch.tensor(read)[:, None])


def pass_behind(
    encoded: Sequence[Encoded],
    caches: Sequence[PromptCache],
    answers: Sequence[Sequence[int]],
    tails: Sequence[int],
    pad_id: int,
) -> Pass:
    """A pass over the last tokens of every prompt and the answer, behind the keys and values of the tokens before.

    Args:
        encoded: B prompts of a causal model. ``caches``: of them, or of prompts with other pictures.
        answers: ids that are read.
        tails: how many prompt tokens run again, at least the last, which predicts the answer's first token.
        pad_id: what to pad ``input_ids`` with.
    """
    known = [one.spans.length - tail for one, tail in zip(encoded, tails, strict=True)]
    firsts = [max(known) - count for count in known]
    read = [
        [*one.inputs["input_ids"][0, count:].tolist(), *ids]
        for one, count, ids in zip(encoded, known, answers, strict=True)
    ]
    longest = max(map(len, read))
    mask = torch.ones(len(read), max(known) + longest, dtype=torch.long)
    for index, first in enumerate(firsts):
        mask[index, :first] = 0
    inputs = {
        "input_ids": torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in read]),
        "attention_mask": mask,
        "position_ids": torch.tensor(known)[:, None] + torch.arange(longest),
        "past_key_values": _joined(caches, known, firsts),
    }
    rows = answer_rows([tail - 1 for tail in tails], [len(ids) for ids in answers])
    spans = [_moved(one.spans, first) for one, first in zip(encoded, firsts, strict=True)]
    return Pass(inputs, rows, spans, firsts, mask.shape[1], True)


def prompt_caches(cache: Any, lengths: Sequence[int], ends: Sequence[int]) -> list[PromptCache | None]:
    """Parts of a cache of transformers, one for every prompt; None where it is of a kind that drops or changes keys.

    Args:
        cache: what a forward pass or ``generate`` has left.
        lengths: of the prompts. ``ends``: the column behind each one's last token.
    """
    if type(cache) is not DynamicCache or not all(type(layer) is DynamicLayer for layer in cache.layers):
        return [None] * len(lengths)
    return [
        PromptCache(
            tuple(
                tuple(part[index : index + 1, :, end - length : end] for part in (layer.keys, layer.values))
                for layer in cache.layers
            )
        )
        for index, (length, end) in enumerate(zip(lengths, ends, strict=True))
    ]


def _joined(caches: Sequence[PromptCache], known: Sequence[int], firsts: Sequence[int]) -> DynamicCache:
    """One cache of the first ``known`` tokens of every prompt, padded on the left to begin at ``firsts``."""
    joined = DynamicCache()
    for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        both = []
        for parts in zip(*layers, strict=True):
            cut = [part[:, :, :count] for part, count in zip(parts, known, strict=True)]
            padded = [
                torch.nn.functional.pad(part, (0, 0, first, 0)) if first else part
                for part, first in zip(cut, firsts, strict=True)
            ]
            both.append(torch.cat(padded))
        joined.update(*both, number)
    return joined


def _moved(spans: Spans, by: int) -> Spans:
    """The spans behind ``by`` positions of padding."""
    if not by:
        return spans
    moved = {name: tuple(at + by for at in getattr(spans, name)) for name in ("image", "question", "separators")}
    return replace(spans, length=spans.length + by, **moved)
