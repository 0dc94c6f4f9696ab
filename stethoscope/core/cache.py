"""Keep what was used most recently, up to a number of values or a total size.

Threads may share a cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any


def _one(value: Any) -> int:
    return 1


@dataclass
class LRUCache:
    """Keep values up to a total size and drop the least recently used ones beyond it.

    A copy, also one by pickle, begins empty.

    >>> cache = LRUCache(10, len)
    >>> for text in ("a" * 6, "b" * 3, "c" * 4):
    ...     _ = cache.put(text[0], text)
    >>> list(cache.values)
    ['b', 'c']

    Attributes:
        limit: largest total size of all values; the newest value is kept in any case.
        size: function that returns the size of one value, such as its bytes; by default every value counts 1.
        used: total size of the values at present.
        values: cached values by key, the least recently used first.
    """

    limit: int
    size: Callable[[Any], int] = field(default=_one)
    used: int = 0
    values: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[LRUCache], tuple[int, Callable[[Any], int]]]:
        return LRUCache, (self.limit, self.size)  # a lock has no copy, and who copies an owner may change what it keeps

    def __contains__(self, key: Hashable) -> bool:
        return key in self.values

    def get(self, key: Hashable) -> Any:
        """Return the value of a key and mark it as the newest; None if it is not cached."""
        with self._lock:
            if key in self.values:
                self.values.move_to_end(key)
            return self.values.get(key)

    def put(self, key: Hashable, value: Any) -> Any:
        """Store a value, drop the oldest ones that no longer fit, and return the value."""
        with self._lock:
            if key in self.values:
                self.used -= self.size(self.values.pop(key))
            self.used += self.size(value)
            self.values[key] = value
            while self.used > self.limit and len(self.values) > 1:
                self.used -= self.size(self.values.popitem(last=False)[1])
        return value
