"""Store what a model makes of prompts apart from the pixels, so that images of one size share it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stethoscope.adapters.fingerprint import state_key
from stethoscope.core.cache import LRUCache
from stethoscope.tracing.trace import Encoded, PromptCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLANK_BYTES = 64 * 2**20
"""Enough for the questions of a benchmark and a small model; prompts of a large model exceed it and are not cached."""


class PromptStore:
    """Store what a model makes of prompts apart from the pixels, shared by all images of one size with one question.

    All is dropped when the model's weights or hooks are replaced, or weights change in place (except through ``.data``,
    which tensors do not count).

    Args:
        size: returns the bytes of a value.
    """

    def __init__(self, size: Callable[[Any], int]) -> None:
        self._size = size
        self._caches = LRUCache(_BLANK_BYTES, size)
        self._model: tuple[Any, ...] | None = None

    def check(self, model: PreTrainedModel) -> None:
        """Drop all values if weights or hooks have changed, or where changes of weights cannot be counted."""
        state = state_key(model)
        if state is None or state != self._model:
            self._caches, self._model = LRUCache(_BLANK_BYTES, self._size), state

    def get(self, key: Hashable) -> Any:
        """Return the value of a prompt, by its ``blank_key``; None if there is none."""
        return self._caches.get(key)


class HiddenImageStates(PromptStore):
    """Store states of prompts whose image is hidden."""

    def __init__(self) -> None:
        super().__init__(lambda states: states.nbytes)

    def put(self, key: Hashable, states: Tensor) -> None:
        """Store a copy of states (T, K, D)."""
        self._caches.put(key, states.clone())


class BlankPrefixCache(PromptStore):
    """Store KV caches of prompts with a blank image."""

    def __init__(self) -> None:
        super().__init__(lambda cache: cache.nbytes)

    def put(self, key: Hashable, cache: PromptCache) -> None:
        """Store a copy of a cache, without the batch that it was computed in."""
        if cache.nbytes <= _BLANK_BYTES:
            self._caches.put(key, cache.clone())


def blank_key(encoded: Encoded) -> Hashable:
    """Build the key of a prompt with a blank image from everything that it depends on."""
    return tuple(
        (name, tuple(value.shape), b"" if name == "pixel_values" else value.contiguous().cpu().numpy().tobytes())
        for name, value in sorted(encoded.inputs.items())
    )
