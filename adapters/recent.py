"""Values that are kept as long as there is room for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Recent:
    """Least recently used values up to a total size.

    >>> kept = Recent(10, len)
    >>> for text in ("a" * 6, "b" * 3, "c" * 4):
    ...     _ = kept.put(text[0], text)
    >>> list(kept.values)
    ['b', 'c']

    Attributes:
        limit: most bytes of all values together; the newest is kept in any case.
        size: tells the bytes of a value.
    """

    limit: int
    size: Callable[[Any], int]
    used: int = 0
    values: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)

    def get(self, key: Hashable) -> Any:
        """The value of a key, which is the newest then, or None."""
        if key in self.values:
            self.values.move_to_end(key)
        return self.values.get(key)

    def put(self, key: Hashable, value: Any) -> Any:
        """Keeps a value, for which the oldest may have to go; returns it."""
        if key in self.values:
            self.used -= self.size(self.values.pop(key))
        self.used += self.size(value)
        self.values[key] = value
        while self.used > self.limit and len(self.values) > 1:
            self.used -= self.size(self.values.popitem(last=False)[1])
        return value
