"""What holds for all published features."""

from pathlib import Path

import numpy as np
import pytest
from helpers.plain_pass import PICTURE, load

from stethoscope.core.errors import CapabilityError
from stethoscope.core.types import Generation
from stethoscope.features import COSTS, FEATURES, FeatureSet
from stethoscope.tracing.trace import EXTRA_REQUIREMENTS, MENTION_REQUIREMENTS, REQUIREMENTS


def test_every_feature_is_transcribed():
    """A feature that is added without a transcription is named by this test."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
    stems = {item.name.removesuffix("_q").removesuffix("_c") for item in FEATURES.values() if item.group != "position"}
    assert not {stem for stem in stems if not stem.startswith("lookback_") and f'"{stem}' not in text}


def test_every_need_has_a_cost():
    """Also those that a run pays for every object that is named."""
    assert {*REQUIREMENTS, *EXTRA_REQUIREMENTS, *MENTION_REQUIREMENTS} == set(COSTS)
    assert all(item.requires <= set(COSTS) for item in FEATURES.values())


def test_every_new_feature_says_what_it_reads(adapter, encoded, answer):
    """A feature works when the trace was asked for exactly the parts that it declares."""
    traces = {}
    for item in FEATURES.values():
        if item.requires & set(EXTRA_REQUIREMENTS) and not item.mentions_only:
            if item.requires not in traces:
                traces[item.requires] = adapter.trace(encoded, answer, item.requires)
            values = item.function(traces[item.requires])
            assert len(values) == len(answer.token_ids)
            assert item.higher_means in ("hallucinated", "grounded", "depends")
            assert item.summary.endswith(".")


def test_the_two_rows_are_neighbours(columns):
    """The row that consumes a token predicts the next one."""
    for name in ("glsim_global", "pas", "attention_peak_{}_l01", "top20_mean_{}_l00h01", "overtrust"):
        q, c = (columns[name.format(row) if "{" in name else f"{name}_{row}"] for row in ("q", "c"))
        np.testing.assert_allclose(q[1:], c[:-1], atol=1e-6)


def test_models_that_lack_a_thing_say_so():
    adapter = load("blip-2-t5", "Question: {question} Answer:")
    encoded = adapter.encode(PICTURE, "Is there a dog?")
    answer = adapter.generate([encoded], Generation(max_new_tokens=4))[0]
    with pytest.raises(
        CapabilityError, match=r"reads the image in an encoder.*exclude=\[sinks,states\].*glsim_local_q"
    ):
        adapter.trace(encoded, answer, ["states"])
    trace = adapter.trace(encoded, answer, ["heads"])
    with pytest.raises(CapabilityError, match=r"dispersion_score.*exclude=\[grid\]"):
        FeatureSet(["grid"]).compute(trace)
