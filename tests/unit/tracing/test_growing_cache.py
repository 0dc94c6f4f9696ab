"""A cache that grows in place holds what one that is copied at every step holds."""

import pytest
import torch
from transformers import DynamicCache

from stethoscope.tracing.growing_cache import ROOM, GrowingCache, GrowingLayer, with_room


def states(count, batch=3):
    return torch.rand(batch, 2, count, 4), torch.rand(batch, 2, count, 4)


def same(*caches):
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for first, second in zip(*(cache.layers for cache in caches), strict=True)
        for name in ("keys", "values")
    )


def grow(caches, count, batch=3):
    for layer in range(2):
        new = states(count, batch)
        first, second = (cache.update(*new, layer) for cache in caches)
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


CHANGES = {
    "crop": lambda cache: cache.crop(-2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "reset": lambda cache: cache.reset(),
    "replace": lambda cache: [setattr(layer, "keys", layer.keys.flip(2)) for layer in cache.layers],
}


@pytest.mark.parametrize("room", [ROOM, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_it_equals_a_dynamic_cache(change, room):
    caches = GrowingCache(room=room), DynamicCache()
    grow(caches, 5)
    grow(caches, 1)
    for cache in caches:
        CHANGES[change](cache)
    for count in (1, 1, 12, 1):
        grow(caches, count, batch=2 if change == "select" else 3)
    assert same(*caches)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_a_step_copies_nothing_while_there_is_room():
    cache = GrowingCache()
    cache.update(*states(5), 0)
    before = cache.layers[0].keys
    keys, values = cache.update(*states(ROOM), 0)
    assert keys.data_ptr() == before.data_ptr()
    assert keys.shape[2] == values.shape[2] == 5 + ROOM
    assert cache.update(*states(1), 0)[0].data_ptr() != before.data_ptr()


def test_it_goes_on_from_given_tensors():
    keys, values = states(5)
    roomy = with_room(keys[:, :, :3], keys[:, :, 3:]), with_room(values)
    cache = GrowingCache([GrowingLayer(roomy, 5)])
    assert torch.equal(cache.layers[0].keys, keys)
    assert cache.update(*states(1), 0)[0].data_ptr() == roomy[0].data_ptr()
