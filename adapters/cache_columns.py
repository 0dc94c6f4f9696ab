"""Cut KV caches of batches into those of prompts, and join those of prompts into caches of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from stethoscope.tracing.trace import Encoded, PromptCache


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


def split_cache(cache: Any, columns: Sequence[Sequence[slice]], first: int = 0) -> list[PromptCache] | None:
    """Cut ranges of columns out of the rows of a cache, from the ``first`` row on.

    The parts are views, unless ranges of a row have columns between them: then all rows are copied, layer by layer, and
    the cache is emptied meanwhile.

    Returns:
        A cache by row; None where the cache drops or changes keys.
    """
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
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
