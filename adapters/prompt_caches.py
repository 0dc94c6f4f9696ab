"""Cut KV caches of batches into those of prompts, join those of prompts into caches of batches, and store them.

What a model makes of prompts apart from the pixels is stored for all images of one size.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from stethoscope.adapters.fingerprint import state_key
from stethoscope.core.cache import LRUCache
from stethoscope.tracing.growing_cache import GrowingCache, GrowingLayer, empty_cache
from stethoscope.tracing.trace import Encoded, PromptCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STORE_BYTES = 64 * 2**20
"""Enough for the questions of a benchmark and a small model; prompts of a large model exceed it and are not stored."""


def split_cache(cache: Any, columns: Sequence[Sequence[slice]], first: int = 0) -> list[PromptCache] | None:
    """Cut ranges of columns out of the rows of a cache, from the ``first`` row on.

    The parts are views, unless ranges of a row have columns between them: then all rows are copied, layer by layer, and
    the cache is emptied meanwhile.

    Returns:
        A cache by row; None where the cache drops or changes keys.
    """
    if type(cache) not in (DynamicCache, GrowingCache):
        return None
    if any(type(layer) not in (DynamicLayer, GrowingLayer) for layer in cache.layers):
        return None
    ranges = [_merged(parts) for parts in columns]
    copies = any(len(parts) > 1 for parts in ranges)
    layers = []
    for layer in cache.layers:
        pairs = [
            tuple(_cut(tensor[row : row + 1], parts, copies) for tensor in (layer.keys, layer.values))
            for row, parts in enumerate(ranges, first)
        ]
        layers.append(pairs)
        if copies:
            layer.reset()
    return [PromptCache(parts) for parts in zip(*layers, strict=True)]


def _merged(ranges: Sequence[slice]) -> list[slice]:
    """Join neighbouring ranges, and drop empty ones.

    >>> _merged([slice(0, 0), slice(2, 4), slice(4, 7), slice(9, 10)])
    [slice(2, 7, None), slice(9, 10, None)]
    """
    merged: list[slice] = []
    for part in ranges:
        if merged and merged[-1].stop == part.start:
            merged[-1] = slice(merged[-1].start, part.stop)
        elif part.start < part.stop:
            merged.append(part)
    return merged


def _cut(row: Tensor, ranges: Sequence[slice], copies: bool) -> Tensor:
    """Return the (1, heads, n, d) columns of some ranges."""
    parts = [row[:, :, part] for part in ranges]
    return torch.cat(parts, 2) if copies else parts[0]


def join_caches(
    caches: Sequence[PromptCache], prefix_lengths: Sequence[int], pad_offsets: Sequence[int]
) -> Iterator[tuple[Tensor, ...]]:
    """Join the first tokens of every prompt's cache, padded on the left, layer by layer."""
    count = prefix_lengths[0]
    if all(cache is caches[0] for cache in caches) and len(set(prefix_lengths)) == 1:
        for layer in caches[0].layers:  # views, which the next token turns into copies
            yield tuple(part[:, :, :count].expand(len(caches), -1, -1, -1) for part in layer)
        return
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        joined = []
        for parts in zip(*layers, strict=True):
            prefixes = [part[:, :, :count] for part, count in zip(parts, prefix_lengths, strict=True)]
            padded = [
                torch.nn.functional.pad(prefix, (0, 0, offset, 0)) if offset else prefix
                for prefix, offset in zip(prefixes, pad_offsets, strict=True)
            ]
            joined.append(torch.cat(padded))
        yield tuple(joined)


def joined_cache(
    caches: Sequence[PromptCache], prefix_lengths: Sequence[int], pad_offsets: Sequence[int], room: int
) -> DynamicCache:
    """Copy the first tokens of every prompt's cache, padded on the left, into a cache that generation goes on from.

    Where these are all tokens of the prompts of a graph that is not kept whole, the cache shares its keys and values;
    otherwise ``room`` tokens fit behind its copies.
    """
    graph = caches[0].graph
    if graph is not None and not graph.keeps_whole and all(cache.graph is graph for cache in caches):
        whole = [cache.index for cache in caches] == list(range(len(graph.inputs["input_ids"])))
        shared = graph.growing_cache() if whole and set(prefix_lengths) == {graph.length - 1} else None
        if shared is not None:
            return shared
    joined = empty_cache(len(caches) * caches[0].layers[0][0].nbytes, room)
    for layer, (keys, values) in enumerate(join_caches(caches, prefix_lengths, pad_offsets)):
        joined.update(keys, values, layer)
    return joined


class PromptStore:
    """Store what a model makes of prompts apart from the pixels, shared by all images of one size with one question.

    All is dropped when the model's weights or hooks are replaced, or weights change in place (except through ``.data``,
    which tensors do not count).
    """

    def __init__(self) -> None:
        self._values = LRUCache(_STORE_BYTES, attrgetter("nbytes"))
        self._model: tuple[Any, ...] | None = None  # its ``state_key`` when the values were stored

    def check(self, model: PreTrainedModel) -> None:
        """Drop all values if weights or hooks have changed, or where changes of weights cannot be counted."""
        state = state_key(model)
        if state is None or state != self._model:
            self._values, self._model = LRUCache(_STORE_BYTES, attrgetter("nbytes")), state

    def get(self, key: Hashable) -> Any:
        """Return the value stored under a key; None if there is none."""
        return self._values.get(key)

    def put(self, key: Hashable, value: PromptCache | Tensor) -> None:
        """Store a copy of a value, without the batch that it was computed in; nothing that exceeds the whole store."""
        if value.nbytes <= _STORE_BYTES:
            self._values.put(key, value.clone())


def key_without_pixels(encoded: Encoded) -> Hashable:
    """Build a key from all inputs of a prompt but the values of its pixels."""
    return tuple(
        (name, tuple(value.shape), b"" if name == "pixel_values" else value.contiguous().cpu().numpy().tobytes())
        for name, value in sorted(encoded.inputs.items())
    )
