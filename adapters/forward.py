"""Run teacher-forced forward passes over prompts and answers, whole or continued from a prompt's KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from stethoscope.adapters.prompt_caches import join_caches, joined_cache, split_cache
from stethoscope.core.types import required
from stethoscope.relevancy.shared_passes import PrefixCache, continues
from stethoscope.tracing.attention_recorder import logits_to_keep
from stethoscope.tracing.hooks import AttentionCall, AttentionRecorder, record
from stethoscope.tracing.model_parts import capture_inputs, layers_of
from stethoscope.tracing.trace import Encoded, PromptCache, Spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = Mapping[str, Tensor]

SEQUENCE = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0}
"""Inputs with one entry per token, and their padding value (``input_ids`` have the model's padding token)."""
OTHER_SEQUENCES = {"qformer_input_ids": 0, "qformer_attention_mask": 0, "decoder_input_ids": 0}
"""Inputs of another sequence, always padded on the right: with their own mask, or where causal rows never attend."""


def extend(
    inputs: Inputs, answer: Sequence[int], model_type: str, decoder_start: int | None = None
) -> dict[str, Tensor]:
    """Extend a prompt's inputs by the first tokens of its answer.

    Args:
        inputs: a prompt's inputs, batch 1.
        answer: ids to append.
        model_type: for PaliGemma, whose answer has the token type 1; the prompt, read in both directions, has 0.
        decoder_start: first id of an encoder-decoder model's decoder, to which the answer then belongs.
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
    """List the indices of prompts that can share a batch: with the same inputs, and images of as many tiles."""
    batches: dict[tuple, list[int]] = {}
    padded = {**SEQUENCE, **OTHER_SEQUENCES}
    for index, prompt in enumerate(inputs):
        shapes = ((name, () if name in padded else tuple(value.shape[1:])) for name, value in prompt.items())
        key = tuple(sorted(shapes))
        batches.setdefault(key, []).append(index)
    return list(batches.values())


def collate(inputs: Sequence[Inputs], pad_id: int, side: str) -> dict[str, Tensor]:
    """Collate prompts into one batch.

    Args:
        inputs: prompts of one of ``groups``.
        pad_id: padding token of ``input_ids``.
        side: ``left`` for generation; ``right`` for a teacher-forced pass, where padding then changes no position and
            causal rows never attend to it.
    """
    if len(inputs) == 1:
        return dict(inputs[0])
    batch = {}
    for name in inputs[0]:
        parts = [prompt[name] for prompt in inputs]
        if name in SEQUENCE or name in OTHER_SEQUENCES:
            fill = pad_id if name == "input_ids" else {**SEQUENCE, **OTHER_SEQUENCES}[name]
            parts = _pad(parts, fill, "right" if name in OTHER_SEQUENCES else side)
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


def prompt_columns(encoded: Sequence[Encoded], prefix_lengths: Sequence[int] | None = None) -> list[list[slice]]:
    """Return by prompt the columns of its prefix and of its rest in a batch that ``generate`` reads.

    Both are padded on the left, to the longest of each; without prefixes the first range is empty.
    """
    prefix_lengths = prefix_lengths or [0] * len(encoded)
    longest = max(prefix_lengths)
    rests = [prompt.spans.length - length for prompt, length in zip(encoded, prefix_lengths, strict=True)]
    width = longest + max(rests)
    return [
        [slice(longest - length, longest), slice(width - rest, width)]
        for length, rest in zip(prefix_lengths, rests, strict=True)
    ]


class Prefix(NamedTuple):
    """The first tokens of a prompt, in a KV cache.

    Attributes:
        cache: of these tokens, and maybe of more.
        length: number of tokens.
    """

    cache: PromptCache
    length: int


@dataclass(frozen=True)
class ForwardPass:
    """Hold B answers of one forward pass, padded on the right, where causal rows never attend.

    Attributes:
        inputs: keyword arguments of the forward pass.
        rows: (B, T) int64, query positions that predict the answer tokens, or (B, T + 1) with the one that consumes the
            last token. Shorter answers repeat their last row.
        spans: of the prompts, in key positions.
        pad_offsets: (B,) key position of every prompt's first token.
        length: number of keys of the sequence that the prompts are in.
        skipped: number of keys before the first query, which are in a KV cache.
    """

    inputs: dict[str, Any]
    rows: Tensor
    spans: list[Spans]
    pad_offsets: list[int]
    length: int
    skipped: int = 0


class ForwardRunner:
    """Prepare and run teacher-forced passes of one loaded model.

    Args:
        model: in evaluation mode.
        pad_id: padding token of ``input_ids``.
        decoder_start: first token id of an encoder-decoder model's decoder; None for a decoder-only model.

    Attributes:
        causal: passes can continue from the KV caches of prompts, see ``continues``.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int, decoder_start: int | None) -> None:
        self.model, self.pad_id, self.decoder_start = model, pad_id, decoder_start
        self.causal = continues(model)
        self._takes_positions = bool(logits_to_keep(model, []))

    def to_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move inputs to the model's device, floating-point ones in its dtype.

        Weights that accelerate has offloaded are on no device; its hook then names the device.
        """
        hook = getattr(self.model, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        device, dtype = self.model.device if device is None else torch.device(device), self.model.dtype
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in inputs.items()
        }

    def collate(self, encoded: Sequence[Encoded], side: str) -> dict[str, Tensor]:
        """Collate prompts into one batch on the model's device, padded on ``side`` (``left`` or ``right``)."""
        return self.to_device(collate([prompt.inputs for prompt in encoded], self.pad_id, side))

    def extended(self, encoded: Encoded, answer_ids: Sequence[int]) -> dict[str, Tensor]:
        """Return the inputs of a pass over one prompt and its answer, on the model's device."""
        return self.to_device(extend(encoded.inputs, answer_ids, self.model.config.model_type, self.decoder_start))

    def full_forward(
        self, encoded: Sequence[Encoded], answers: Sequence[Sequence[int]], consuming: bool = False
    ) -> ForwardPass:
        """Prepare a pass over whole prompts and answers.

        Args:
            encoded: B prompts.
            answers: B lists of token ids.
            consuming: also read the last token of every answer, whose row predicts no answer token: row k + 1 is the
                one that consumes token k.
        """
        model_type = self.model.config.model_type
        read = [ids if consuming else ids[:-1] for ids in answers]
        parts = [
            extend(prompt.inputs, ids, model_type, self.decoder_start)
            for prompt, ids in zip(encoded, read, strict=True)
        ]
        inputs = self.to_device(collate(parts, self.pad_id, "right"))
        spans = [prompt.spans for prompt in encoded]
        starts = [span.length - 1 if self.decoder_start is None else 0 for span in spans]
        rows = answer_rows(starts, [len(ids) for ids in read])
        return ForwardPass(inputs, rows, spans, [0] * len(spans), inputs["input_ids"].shape[1])

    def continue_from_cache(
        self,
        encoded: Sequence[Encoded],
        answers: Sequence[Sequence[int]],
        caches: Sequence[PromptCache],
        tail_lengths: Sequence[int] | None = None,
        consuming: bool = False,
        hidden: Sequence[Sequence[int]] | None = None,
        prefix: PrefixCache | None = None,
    ) -> ForwardPass:
        """Prepare a pass over the answers and the prompts' last tokens, continuing from the KV cache of the others.

        Args:
            encoded: B prompts of a causal model.
            answers: B lists of token ids.
            caches: of these prompts, or of the same prompts with other images.
            tail_lengths: number of prompt tokens to run again, at least the last, which predicts the first answer
                token; 1 each by default.
            consuming: as for ``full_forward``.
            hidden: by prompt, positions that nothing in the pass attends to.
            prefix: of all prompts; by default ``caches`` joined.
        """
        read = [ids if consuming else ids[:-1] for ids in answers]
        tails = list(tail_lengths or [1] * len(encoded))
        prefix_lengths = [prompt.spans.length - tail for prompt, tail in zip(encoded, tails, strict=True)]
        longest_prefix = max(prefix_lengths)
        pad_offsets = [longest_prefix - count for count in prefix_lengths]
        queries = [
            [*prompt.inputs["input_ids"][0, count:].tolist(), *ids]
            for prompt, count, ids in zip(encoded, prefix_lengths, read, strict=True)
        ]
        longest = max(map(len, queries))
        mask = torch.ones(len(queries), longest_prefix + longest, dtype=torch.long)
        for index, offset in enumerate(pad_offsets):
            mask[index, :offset] = 0
            if hidden is not None:
                mask[index, [offset + position for position in hidden[index]]] = 0
        inputs: dict[str, Any] = self.to_device(
            {
                "input_ids": torch.tensor([[*ids, *[self.pad_id] * (longest - len(ids))] for ids in queries]),
                "attention_mask": mask,
                "position_ids": torch.tensor(prefix_lengths)[:, None] + torch.arange(longest),
            }
        )
        joined = PrefixCache(join_caches(caches, prefix_lengths, pad_offsets)) if prefix is None else prefix
        inputs["past_key_values"] = joined
        rows = answer_rows([tail - 1 for tail in tails], [len(ids) for ids in read])
        spans = [prompt.spans.shifted(offset) for prompt, offset in zip(encoded, pad_offsets, strict=True)]
        return ForwardPass(inputs, rows, spans, pad_offsets, mask.shape[1], longest_prefix)

    def read_prefixes(self, encoded: Sequence[Encoded], lengths: Sequence[int]) -> list[PromptCache] | None:
        """Run one pass over the first tokens of B prompts of a causal model, and return their KV caches.

        Args:
            encoded: B prompts.
            lengths: B numbers of tokens, all image tokens among them.

        Returns:
            B caches, parts of the same tensors; None where the cache drops or changes keys.
        """
        parts = [
            {name: value[:, :length] if name in SEQUENCE else value for name, value in prompt.inputs.items()}
            for prompt, length in zip(encoded, lengths, strict=True)
        ]
        inputs = self.to_device(collate(parts, self.pad_id, "right"))
        head = self.positions_to_keep([inputs["input_ids"].shape[1] - 1])
        with self.captured_embeds(encoded) as embeds:
            cache = self.model(**inputs, **head, use_cache=True).past_key_values
        caches = split_cache(cache, [[slice(0, length)] for length in lengths])
        return None if caches is None else _with_embeds(caches, embeds)

    @contextmanager
    def captured_embeds(
        self, encoded: Sequence[Encoded], starts: Sequence[int] | None = None
    ) -> Iterator[list[Tensor | None]]:
        """Capture the image tokens of prompts at the input of the language model, from the first pass in the block.

        Args:
            encoded: B prompts, which the pass reads.
            starts: of each, the position of its first token in the pass; 0 by default.

        Yields:
            A list that holds the (N, D) image tokens of every prompt after the block; None where the model has no layer
            that reads them.
        """
        role = "language" if self.decoder_start is None else "encoder"
        embeds: list[Tensor | None] = []
        capture: AbstractContextManager[list[Tensor]] = nullcontext([])
        if layers_of(self.model, role):
            capture = capture_inputs(self.model, role)
        with capture as captured:
            yield embeds
        if not captured:
            embeds += [None] * len(encoded)
            return
        for row, prompt, start in zip(captured[0], encoded, starts or [0] * len(encoded), strict=True):
            embeds.append(row[[start + position for position in prompt.spans.image]])

    @torch.inference_mode()
    def read_embeds(self, encoded: Sequence[Encoded]) -> list[Tensor | None]:
        """Run B prompts of a decoder-only model up to its first layer, and return the (N, D) image tokens of each."""
        with self.captured_embeds(encoded) as embeds, suppress(_PromptRead), record(self.model, _StopAtKeys(1)):
            self.model(**self.collate(encoded, "right"), use_cache=False)
        return embeds

    def read_prompts(self, encoded: Sequence[Encoded]) -> list[PromptCache]:
        """Run one pass over B prompts of a causal model, which ends at the keys and values of the last layer.

        Args:
            encoded: B prompts; what follows in a later pass begins with their last tokens.

        Returns:
            B caches, parts of the same tensors.
        """
        cache, last = DynamicCache(), self.model.config.get_text_config().num_hidden_layers
        with suppress(_PromptRead), record(self.model, _StopAtKeys(last)):
            self.model(**self.collate(encoded, "right"), past_key_values=cache, use_cache=True)
        caches = split_cache(cache, [[slice(0, prompt.spans.length)] for prompt in encoded])
        return required(caches)

    def generate_from_prefixes(
        self, encoded: Sequence[Encoded], prefixes: Sequence[Prefix], room: int
    ) -> dict[str, Any]:
        """Prepare arguments of ``generate`` for B prompts of a causal model whose first tokens are in KV caches.

        Columns are those of ``prompt_columns``: padding, the prefix, padding, the rest of the prompt. ``generate``
        counts positions without the padding.

        Args:
            encoded: B prompts, with at least one token behind each prefix and no image token.
            prefixes: of the prompts.
            room: answer tokens that fit into the cache before it is copied to a larger one.
        """
        lengths = [prefix.length for prefix in prefixes]
        columns = prompt_columns(encoded, lengths)
        width = columns[0][-1].stop
        ids = torch.full((len(encoded), width), self.pad_id)
        mask = torch.zeros(len(encoded), width, dtype=torch.long)
        for index, (prompt, parts) in enumerate(zip(encoded, columns, strict=True)):
            pieces = prompt.inputs["input_ids"][0].split([part.stop - part.start for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                ids[index, part], mask[index, part] = piece, 1
        offsets = [max(lengths) - length for length in lengths]
        room += width - max(lengths)
        cache = joined_cache([prefix.cache for prefix in prefixes], lengths, offsets, room)
        return {**self.to_device({"input_ids": ids, "attention_mask": mask}), "past_key_values": cache}

    def last_prefix(self, cache: Any, encoded: Sequence[Encoded], lengths: Sequence[int] | None) -> PromptCache | None:
        """Cut the first tokens of the last prompt out of the cache that ``generate`` returned.

        Args:
            cache: ``past_key_values`` of B prompts.
            encoded: the prompts.
            lengths: of their prefixes; None for the whole prompt without its last token.

        Returns:
            The cache of the prefix, a copy where it is one of several prompts.
        """
        columns = prompt_columns(encoded, lengths)[-1][0]
        if lengths is None:
            rest = prompt_columns(encoded)[-1][1]
            columns = slice(rest.start, rest.stop - 1)
        caches = split_cache(cache, [[columns]], len(encoded) - 1)
        return None if caches is None else caches[0].clone() if len(encoded) > 1 else caches[0]

    def prompt_caches(
        self,
        cache: Any,
        encoded: Sequence[Encoded],
        columns: Sequence[Sequence[slice]],
        embeds: Sequence[Tensor | None] | None = None,
    ) -> list[PromptCache | None]:
        """Cut a cache of transformers into one per prompt.

        Args:
            cache: ``past_key_values`` that a forward pass or ``generate`` returned; it cannot be used afterwards.
            encoded: B prompts.
            columns: B lists of ranges of cache columns, which hold the prompt.
            embeds: of their image tokens, where they are known.

        Returns:
            B caches; None where the cache drops or changes keys, or cannot be used again.
        """
        caches = split_cache(cache, columns) if self.causal else None
        if caches is None:
            return [None] * len(encoded)
        caches = caches if embeds is None else _with_embeds(caches, embeds)
        # a prompt's last token runs again, and an image token would be embedded as text without the pixels
        return [None if prompt.spans.ends_in_image else part for part, prompt in zip(caches, encoded, strict=True)]

    def logits(self, forward: ForwardPass, rows: Tensor | None = None) -> Tensor:
        """Run a pass and return the (B, T, V) float32 logits of its rows; the head runs on no other rows.

        Where a shorter answer repeats its last row, the logits may be those of its padding.

        Args:
            forward: the pass.
            rows: (B, T) query positions; ``forward.rows`` by default.
        """
        rows = forward.rows if rows is None else rows
        positions = rows.unique()
        options = self.positions_to_keep(positions.tolist())
        logits = self.model(**forward.inputs, **options, use_cache="past_key_values" in forward.inputs).logits
        columns = torch.searchsorted(positions, rows) if options else rows
        if torch.equal(columns, torch.arange(logits.shape[1]).minimum(columns[:, -1:])):
            return logits.float()  # no copy of them, nor of their gradient
        return logits[torch.arange(len(rows))[:, None].to(logits.device), columns.to(logits.device)].float()

    def positions_to_keep(self, positions: Sequence[int]) -> dict[str, list[int]]:
        """Return the argument that makes the head run on some positions alone, see ``logits_to_keep``."""
        return {"logits_to_keep": list(positions)} if self._takes_positions else {}


def _with_embeds(caches: Sequence[PromptCache], embeds: Sequence[Tensor | None]) -> list[PromptCache]:
    return [replace(cache, embeds=part) for cache, part in zip(caches, embeds, strict=True)]


class _PromptRead(Exception):
    """Ends a pass of which only keys and values are needed."""


class _StopAtKeys(AttentionRecorder):
    """Ends a pass at the attention of the last layer, whose keys and values are in the cache by then."""

    roles = ("language",)

    def __init__(self, layers: int) -> None:
        self._remaining = layers

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        self._remaining -= 1
        if not self._remaining:
            raise _PromptRead
        return call.sdpa()


def answer_rows(starts: Sequence[int], read: Sequence[int]) -> Tensor:
    """Return the (B, T) query positions of answers, from the first of each on, for ``read`` further tokens.

    >>> answer_rows([4, 2], [2, 1]).tolist()
    [[4, 5, 6], [2, 3, 3]]
    """
    steps = torch.arange(max([0, *read]) + 1)
    return torch.tensor(starts)[:, None] + steps.minimum(torch.tensor(read)[:, None])
