"""Several prompts as one batch, and prompts extended by answers, for every family's set of inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
