"""Who follows one sample through the code opens few files, and seldom changes between them."""

import pytest

from scripts.check import walk


@pytest.mark.parametrize("features", ["default", "default_relevancy"])
def test_a_warm_sample_crosses_few_borders_between_files(features):
    """``python scripts/check/walk.py --pairs`` lists which files call which."""
    counted = walk.count_calls(features)
    assert counted.crossings <= walk.MOST, counted.pairs.most_common(10)
