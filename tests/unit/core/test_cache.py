"""The LRU cache when several threads share it."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

from stethoscope.core.cache import LRUCache


def test_threads_may_share_it():
    cache = LRUCache(40, len)

    def work(seed):
        for step in range(4000):
            key = (seed * 31 + step * 7) % 23
            cache.put(key, "a" * (1 + key))
            cache.get((key + 5) % 23)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert cache.used == sum(map(len, cache.values.values())) <= 40


def test_a_copy_begins_empty_with_a_lock_of_its_own():
    cache = LRUCache(3, len)
    cache.put("a", "aaa")
    for copied in (copy.copy(cache), copy.deepcopy({"cache": cache})["cache"], pickle.loads(pickle.dumps(cache))):
        assert (copied.limit, copied.used, len(copied.values)) == (3, 0, 0)
        copied.put("b", "bb")
        copied.put("c", "cc")
        assert (list(copied.values), list(cache.values)) == (["c"], ["a"])
    assert pickle.loads(pickle.dumps(LRUCache(2))).put("a", 7) == 7
