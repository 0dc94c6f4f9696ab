"""Run what prompts about one picture have in common once: the picture, and the text until their questions differ.

A prompt is a prefix, whose keys and values are computed once for all prompts that begin with it, and a tail, which
generation reads behind a copy of them. This is exact for causal prompts, where a token depends on no later one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from stethoscope.adapters.fingerprint import state_key
from stethoscope.adapters.forward import OTHER_SEQUENCES, SEQUENCE, ForwardRunner, Prefix
from stethoscope.tracing.trace import Encoded, PromptCache

if TYPE_CHECKING:
    from torch import Tensor

MOST_PREFIXES = 0.75
"""Largest number of prefixes to compute, as a share of the prompts; with more of them, sharing costs what it gains."""


def common_length(sequences: Sequence[list[int]]) -> int:
    """Return the length of the longest common prefix that leaves every sequence at least its last id.

    >>> common_length([[5, 6, 7, 8], [5, 6, 9]]), common_length([[5, 6, 7]]), common_length([[5, 6], [5, 6]])
    (2, 2, 1)
    """
    low, high = min(sequences), max(sequences)  # in lexicographic order; all others lie between them
    longest = min(map(len, sequences)) - 1
    return next((index for index in range(longest) if low[index] != high[index]), longest)


@dataclass(frozen=True)
class _LastPrefix:
    """The prefix of the prompt that was answered last.

    Attributes:
        picture: key of its picture.
        ids: token ids of the prefix.
        cache: KV cache of these tokens.
        model: ``state_key`` of the model that computed it.
    """

    picture: Hashable
    ids: list[int]
    cache: PromptCache
    model: tuple[Any, ...]


class SharedPrefixes:
    """Compute the common prefixes of prompts.

    Args:
        forward: prepares and runs the passes of the model.
    """

    def __init__(self, forward: ForwardRunner) -> None:
        self._forward = forward
        self._stores = False
        self._last: _LastPrefix | None = None
        self._model_state: tuple[Any, ...] | None = None  # at the last call, where something is stored

    @contextmanager
    def stored(self) -> Iterator[None]:
        """Store the prefix of the last prompt for the next call, whose first questions may be about the same picture.

        It takes the memory of one prompt's KV cache, until the block ends.
        """
        before, self._stores = self._stores, True
        try:
            yield
        finally:
            self._stores, self._last = before, None

    def compute(self, encoded: Sequence[Encoded]) -> list[Prefix] | None:
        """Return the prefix of every prompt; None where sharing gains nothing, or the model cannot do it.

        Args:
            encoded: B prompts of one batch. Where all have KV caches, their prefixes are all but their last tokens.
        """
        last, self._last, self._model_state = self._last, None, None
        if not self._forward.causal or not all(map(_is_unmasked, encoded)):
            return None
        own = [Prefix(prompt.cache, prompt.spans.length - 1) for prompt in encoded if prompt.cache is not None]
        if len(own) == len(encoded):
            return own
        self._model_state = state_key(self._forward.model) if self._stores else None
        by_picture: dict[Hashable, list[int]] = {}
        for index, key in enumerate(_picture_keys(encoded)):
            by_picture.setdefault(key, []).append(index)
        if last is not None and (last.picture not in by_picture or last.model != self._model_state):
            last = None
        prefixes: dict[Hashable, Prefix] = {}
        lengths: dict[Hashable, int] = {}  # of prefixes to compute
        for picture, members in by_picture.items():
            ids, text = [_ids(encoded[index]) for index in members], encoded[members[0]].spans.image[-1] + 1
            continued = common_length([*ids, [*last.ids, -1]]) if last is not None and last.picture == picture else 0
            if last is not None and continued >= text:
                prefixes[picture] = Prefix(last.cache, continued)
            else:
                lengths[picture] = common_length(ids)
        few = len(lengths) <= MOST_PREFIXES * len(encoded)
        if not few or any(length <= encoded[by_picture[key][0]].spans.image[-1] for key, length in lengths.items()):
            return None
        if lengths:
            first_prompts = [encoded[by_picture[picture][0]] for picture in lengths]
            caches = self._forward.read_prefixes(first_prompts, list(lengths.values()))
            if caches is None:
                return None
            pairs = zip(lengths.items(), caches, strict=True)
            prefixes |= {picture: Prefix(cache, length) for (picture, length), cache in pairs}
        by_prompt = {index: prefixes[picture] for picture, members in by_picture.items() for index in members}
        return [by_prompt[index] for index in range(len(encoded))]

    def store(
        self, encoded: Sequence[Encoded], lengths: Sequence[int] | None, cache: Any, embeds: Tensor | None
    ) -> None:
        """Store the first tokens of the last prompt for the next call, in a block of ``stored``.

        A batch without common prefixes stores nothing: the next one will have none either.

        Args:
            encoded: B prompts that have been answered.
            lengths: of their prefixes; None where they had none.
            cache: ``past_key_values`` that ``generate`` returned.
            embeds: image tokens of the last prompt; None where they are not known.
        """
        if self._model_state is None or (lengths is None and len(encoded) > 1):
            return
        prefix = self._forward.last_prefix(cache, encoded, lengths)
        if prefix is not None:
            [picture] = _picture_keys(encoded[-1:])
            ids = _ids(encoded[-1])[: prefix.length]
            self._last = _LastPrefix(picture, ids, replace(prefix, embeds=embeds), self._model_state)


def _ids(prompt: Encoded) -> list[int]:
    return prompt.inputs["input_ids"][0].tolist()


def _is_unmasked(prompt: Encoded) -> bool:
    """Return whether a prompt has no hidden tokens, as that of a contrast without the image has."""
    mask = prompt.inputs.get("attention_mask")
    return mask is None or bool(mask.all())


def _picture_keys(encoded: Sequence[Encoded]) -> list[Hashable]:
    """Build by prompt a key of everything that it has beside its tokens: pixels, sizes, grids."""
    digests: dict[int, bytes] = {}  # by the identity of tensors, which an encoder shares among prompts of a picture

    def digest(value: Tensor) -> bytes:
        if id(value) not in digests:
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            digests[id(value)] = hashlib.blake2b(data, digest_size=16).digest()
        return digests[id(value)]

    return [
        tuple(
            (name, tuple(value.shape), digest(value))
            for name, value in sorted(prompt.inputs.items())
            if name not in SEQUENCE and name not in OTHER_SEQUENCES
        )
        for prompt in encoded
    ]
