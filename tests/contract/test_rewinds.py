"""Answers of a batch are taken back as each alone is: what an answer reads and writes does not depend on the others."""

import numpy as np
import pytest
from helpers.rewinds import STEPWISE, streamed, streamer_of

from stethoscope.core.types import Generation
from stethoscope.streaming import TakenBack
from stethoscope.streaming.warning_streamer import WarningStreamer
from stethoscope.tracing.step_inputs import takes_rows_back

WAYS = {
    "greedy": Generation(max_new_tokens=16),
    "sampled": Generation(max_new_tokens=16, do_sample=True, seed=3, stop=("zq",)),
}


def streamers(adapter, encoded, way) -> list[WarningStreamer]:
    return [streamer_of(adapter, prompt, WAYS[way], STEPWISE) for prompt in encoded]


@pytest.mark.parametrize("way", WAYS)
def test_answers_of_a_batch_are_taken_back_as_each_alone(adapter, encoded, way):
    if not takes_rows_back(adapter.model):
        pytest.skip("answers are written one after another")
    alone = [streamed(streamer)[0] for streamer in streamers(adapter, encoded, way)]
    together = []
    for batch in adapter.batches(encoded):
        together += streamed(*streamers(adapter, [encoded[index] for index in batch], way))
    order = [index for batch in adapter.batches(encoded) for index in batch]
    taken = 0
    for streamer, index in zip(together, order, strict=True):
        single = alone[index]
        assert streamer.answer.token_ids == single.answer.token_ids
        assert np.allclose(streamer.answer.logprobs, single.answer.logprobs, atol=1e-4)
        assert streamer.steps.passes == single.steps.passes
        backs, others = ([event for event in item.events if type(event) is TakenBack] for item in (streamer, single))
        assert [event.tokens for event in backs] == [event.tokens for event in others]
        taken += len(backs)
        count = len(streamer.answer.token_ids)
        columns, expected = streamer.scorer.columns(count), single.scorer.columns(count)
        assert expected
        for name, values in expected.items():
            size = max(1.0, float(np.nanmax(np.abs(values), initial=0)))
            assert np.allclose(columns[name], values, rtol=0, atol=1e-4 * size, equal_nan=True), name
    assert taken
