"""KV caches that grow in place: a step of decoding writes its keys and values behind those that are there.

So the cache can begin with keys and values that a graph keeps, without a copy of them. It takes as long as a
``DynamicCache``, which copies all keys and values of every layer at every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 128
"""Tokens that fit behind those of a cache before it is copied to a larger tensor."""


def with_room(*parts: Tensor) -> Tensor:
    """Copy keys or values (B, heads, n, d), one part after another, to the beginning of a tensor with ``ROOM`` more."""
    size = sum(part.shape[2] for part in parts)
    roomy = parts[-1].new_empty(*parts[-1].shape[:2], size + ROOM, parts[-1].shape[3])
    start = 0
    for part in parts:
        roomy[:, :, start : start + part.shape[2]] = part
        start += part.shape[2]
    return roomy


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer at the beginning of tensors with room for more.

    ``keys`` and ``values`` may be cropped or replaced, as those of any layer.

    Args:
        roomy: these tensors, (B, key-value heads, n or more, d).
        length: number of tokens that they hold.
    """

    def __init__(self, roomy: tuple[Tensor, Tensor] | None = None, length: int = 0) -> None:
        super().__init__()
        self._roomy = roomy
        if roomy is not None:
            self.lazy_initialization(*roomy)
            self.keys, self.values = (part[:, :, :length] for part in roomy)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values behind those that are there, and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        length, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self._roomy is None or not self._fits(end):
            self._roomy = with_room(self.keys, key_states), with_room(self.values, value_states)
        else:
            for roomy, states in zip(self._roomy, (key_states, value_states), strict=True):
                roomy[:, :, length:end] = states
        self.keys, self.values = (roomy[:, :, :end] for roomy in self._roomy)
        return self.keys, self.values

    def reset(self) -> None:
        """Drop keys and values."""
        super().reset()
        self._roomy = None

    def _fits(self, end: int) -> bool:
        """Tell whether keys and values still begin the roomy tensors, and ``end`` tokens fit there."""
        return self._roomy is not None and all(
            part.data_ptr() == roomy.data_ptr() and part.shape[:2] == roomy.shape[:2] and end <= roomy.shape[2]
            for part, roomy in zip((self.keys, self.values), self._roomy, strict=True)
        )


class GrowingCache(DynamicCache):
    """KV cache of ``GrowingLayer``.

    Args:
        layers: the first ones; others are made when they are first called.
    """

    def __init__(self, layers: Iterable[GrowingLayer] = ()) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = list(layers), GrowingLayer
