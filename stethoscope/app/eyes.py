"""What a model saw in a picture, kept for the next question about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import wraps
from typing import TYPE_CHECKING, Any

from stethoscope.core.cache import LRUCache

if TYPE_CHECKING:
    from torch import nn


class Eyes:
    """The output of a model's ``get_image_features`` by its arguments, for the last few pictures.

    Passes with gradients go through the vision tower all the same: relevancy of patches is read from its own maps.
    Models without such a method look at the picture every time.

    Args:
        pictures: how many are kept; the one that was not asked about for the longest time is forgotten first.

    Attributes:
        looked: how often the vision tower ran without gradients. ``remembered``: how often it did not have to.
    """

    def __init__(self, pictures: int = 4) -> None:
        self._seen = LRUCache(pictures)
        self.looked = self.remembered = 0

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """For the length of a block the model remembers what it saw."""
        modules = [module for module in model.modules() if hasattr(type(module), "get_image_features")]
        # that of a model calls that of the model inside it, which alone is called in the forward pass
        modules = modules[-1:]
        for module in modules:
            module.get_image_features = self._remembering(module.get_image_features)
        try:
            yield
        finally:
            for module in modules:
                del module.get_image_features

    def _remembering(self, look: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        @wraps(look)  # transformers reads its signature
        def remember(*arguments: Any, **options: Any) -> Any:
            if torch.is_grad_enabled():
                return look(*arguments, **options)
            given = [(name, value) for name, value in sorted(options.items()) if value is not None]
            key = _key((arguments, [pair for pair in given if pair[0] != "return_dict"]))
            if key in self._seen:
                self.remembered += 1
                features = self._seen.get(key)
            else:
                self.looked += 1
                features = self._seen.put(key, look(*arguments, **options))
            return copy(features)  # beam search writes into what it is given

        return remember


def _key(value: Any) -> Hashable:
    """What two equal arguments have in common."""
    import torch

    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
        return tuple(value.shape), str(value.dtype), hashlib.sha256(content).digest()
    if isinstance(value, (list, tuple)):
        return tuple(_key(one) for one in value)
    return repr(value)
