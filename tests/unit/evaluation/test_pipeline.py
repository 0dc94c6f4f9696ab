"""What generation keeps of prompts for the evaluator's traces: used, gone with its batch, first to give way."""

import weakref
from dataclasses import replace

import pytest
import torch
from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask

from stethoscope.evaluation.callbacks import Callback
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.tracing.trace import PromptCache


class Keeping(TinyAdapter):
    """Keeps something of every prompt; a pass over more than so many answers does not fit while it is there."""

    def __init__(self, fits=100):
        super().__init__()
        self.fits, self.kept, self.with_cache = fits, [], []

    def generate_with_cache(self, encoded, generation):
        caches = [PromptCache(((torch.zeros(1), torch.zeros(1)),)) for _ in encoded]
        self.kept += map(weakref.ref, caches)
        prompts = [replace(prompt, cache=cache) for prompt, cache in zip(encoded, caches, strict=True)]
        return self.generate(encoded, generation), prompts

    def trace_batch(self, encoded, answers, requires=()):
        held = [prompt for prompt in self.kept if prompt() is not None]
        if len(held) > self.fits:
            raise MemoryError("no room")
        self.with_cache.append([prompt.cache is not None for prompt in encoded])
        return super().trace_batch(encoded, answers, requires)


def test_what_generation_keeps_reaches_the_trace_and_is_gone_with_the_batch():
    alive = []

    class Count(Callback):
        def on_batch_end(self, run, records):
            alive.append(sum(cache() is not None for cache in adapter.kept))

    adapter = Keeping()
    Evaluator([Count()], batch_size=4, features=TinyFeatures()).run(adapter, TinyTask())
    assert len(adapter.kept) == 10
    assert all(all(batch) for batch in adapter.with_cache)
    assert alive == [0, 0, 0]


def test_nothing_is_kept_when_nothing_is_traced():
    adapter = Keeping()
    Evaluator(batch_size=4).run(adapter, TinyTask())
    assert adapter.kept == []


def test_what_is_kept_gives_way_to_a_trace_that_does_not_fit():
    adapter = Keeping(fits=0)
    with pytest.warns(UserWarning, match="trace"):
        results = Evaluator(batch_size=4, features=TinyFeatures()).run(adapter, TinyTask())
    assert results.counts["failed"] == 0
    assert len(adapter.kept) == 4  # of the first batch; from then on nothing is kept
    assert not any(any(batch) for batch in adapter.with_cache)
