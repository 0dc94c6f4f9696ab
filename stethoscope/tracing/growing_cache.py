"""KV caches that grow in place: a step of decoding writes its keys and values behind those that are there.

A ``DynamicCache`` copies all keys and values of every layer at every step. Without that, generation takes a tenth less
time behind 650 tokens on a CPU; and a cache can begin with keys and values that a graph keeps, without a copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOM = 128
"""Tokens that fit behind those of a cache before it is copied to a larger tensor, by default."""
_SMALL = 2**16  # bytes of a layer's keys, at most, that are copied faster than others are written behind them


def keeps_all_tokens(model: PreTrainedModel) -> bool:
    """Tell from the configuration whether all layers keep a key and a value for every token.

    Layers that attend to a sliding window drop some, others keep a running state; an encoder keeps its own.
    """
    encodes = getattr(model.config.get_text_config(), "is_encoder_decoder", False)
    return not encodes and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def with_room(*parts: Tensor, room: int = ROOM) -> Tensor:
    """Copy keys or values (B, heads, n, d), one part after another, to the beginning of a tensor with room for more."""
    size = sum(part.shape[2] for part in parts)
    roomy = parts[-1].new_empty(*parts[-1].shape[:2], size + room, parts[-1].shape[3])
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
        room: tokens that fit behind the others when these have to be copied.
    """

    def __init__(self, roomy: tuple[Tensor, Tensor] | None = None, length: int = 0, room: int = ROOM) -> None:
        super().__init__()
        self._roomy, self._room = roomy, room
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
            self._roomy = (
                with_room(self.keys, key_states, room=self._room),
                with_room(self.values, value_states, room=self._room),
            )
        else:
            keys, values = self._roomy
            keys.narrow(2, length, end - length).copy_(key_states)
            values.narrow(2, length, end - length).copy_(value_states)
        self.keys, self.values = (roomy.narrow(2, 0, end) for roomy in self._roomy)
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
        room: of the others, see ``GrowingLayer``.
    """

    def __init__(self, layers: Iterable[GrowingLayer] = (), room: int = ROOM) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = list(layers), partial(GrowingLayer, room=room)


def empty_cache(key_bytes: int, room: int = ROOM) -> DynamicCache:
    """Return an empty cache: one that grows in place, or that of transformers where it is as fast.

    Args:
        key_bytes: of the keys of a layer.
        room: tokens that fit behind the first ones before these are copied.
    """
    return GrowingCache(room=room) if key_bytes > _SMALL else DynamicCache()


def cache_for(model: PreTrainedModel, ids: Tensor, room: int = ROOM) -> GrowingCache | None:
    """Return an empty cache for answers to prompts, whose ids are (B, n); None where that of transformers is as good.

    It is where it is as fast, or where the model needs one of another kind.
    """
    width = model.config.get_text_config().hidden_size  # of keys, or more
    if ids.numel() * width * model.dtype.itemsize <= _SMALL or not keeps_all_tokens(model):
        return None
    return GrowingCache(room=room)
