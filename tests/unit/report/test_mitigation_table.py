"""Figures of mitigations from made-up counts."""

import math

import numpy as np
import pandas as pd
import pytest

from stethoscope.core.errors import DataError
from stethoscope.metrics.bootstrap import holm
from stethoscope.report import mitigation_table as table
from stethoscope.report.mitigation_table import MethodAnswers, beyond_front, compare_methods, length_adjusted
from stethoscope.report.tables import render_tables
from stethoscope.tasks.chair import Chair

METRICS = Chair(scenes=1).metrics()
IMAGES = 40


def answers(name, mentions, hallucinated, named, words=10, **more):
    """Answers to as many images with 10 objects each: the given counts for every one, or the first for even ones."""
    rows = {}
    for index in range(IMAGES):
        counts = {"mentions": mentions, "hallucinated": hallucinated, "found": named, "words": words}
        counts = {key: value[index % 2] if isinstance(value, tuple) else value for key, value in counts.items()}
        invented = float(counts["hallucinated"] > 0)
        rows[f"s{index}"] = {
            "group": f"i{index}", "truth": 10, "captions": 1, "hallucinated_captions": invented, **counts,
        }  # fmt: skip
    return MethodAnswers(name, pd.DataFrame.from_dict(rows, orient="index"), **more)


def test_chair_i_at_another_length_is_what_one_computes_by_hand():
    words = np.array([10.0, 10, 20, 20])
    hallucinated = np.array([0.0, 2, 3, 5])  # 1 at 10 words, 4 at 20: at 15, halfway in logs, 2
    mentions = np.array([3.0, 5, 16, 16])  # 4 at 10, 16 at 20: 8 at 15; 10 on average
    adjusted = length_adjusted(words, mentions, hallucinated, 15)
    assert adjusted["raw"] == pytest.approx(2 / 10, rel=1e-5)
    assert adjusted["fitted"] == pytest.approx(2 / 8, rel=1e-5)
    at_the_mean = length_adjusted(words, mentions, hallucinated, 20)
    assert at_the_mean["fitted"] == pytest.approx(4 / 16, rel=1e-5)


def test_a_length_that_no_answer_has_is_not_extrapolated_to():
    counts = np.array([1.0, 1, 2])
    assert all(map(math.isnan, length_adjusted(np.array([5.0, 6, 7]), counts, counts, 9).values()))
    assert all(map(math.isnan, length_adjusted(np.array([5.0, 6, 7]), 0 * counts, 0 * counts, 6).values()))
    assert length_adjusted(np.array([5.0, 6, 7]), counts, 0 * counts, 6) == {"raw": 0.0, "fitted": 0.0}
    same = length_adjusted(np.array([6.0, 6, 6]), 4 * counts, counts, 6)
    assert same == {"raw": pytest.approx(0.25), "fitted": pytest.approx(0.25)}


def test_holm_is_monotone_and_passes_over_what_is_not_known():
    assert holm([0.01, math.nan, 0.04, 0.03]) == [pytest.approx(0.03), pytest.approx(math.nan, nan_ok=True), 0.06, 0.06]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_recall_beyond_the_front_is_measured_at_the_same_chair_i():
    trivial = [(np.array([0.2, 0.2]), np.array([0.8, 0.8])), (np.array([0.1, np.nan]), np.array([0.5, 0.0]))]
    beyond = beyond_front(np.array([0.15, 0.1]), np.array([0.7, 0.7]), trivial)
    assert beyond == pytest.approx([0.7 - 0.65, 0.7 - 0.4])  # the second replicate: halfway to saying nothing
    assert np.isnan(beyond_front(np.array([0.3, 0.1]), np.array([0.9, 0.9]), trivial)).all()
    assert math.isnan(beyond_front(np.array([np.nan]), np.array([0.0]), [])[0])


@pytest.fixture
def figures():
    methods = [
        answers("greedy", 10, (1, 3), 8, words=(30, 40), passes=1.0, seconds=0.1),
        answers("better", 9, (0, 2), 8, words=(28, 38), passes=2.0, seconds=0.2),
        answers("shorter", 10, (1, 2), 4, words=(14, 20), passes=1.0),
        answers("stop at 8", 10, 4, 4, words=8, trivial=True),
    ]
    return compare_methods(methods, METRICS)


def test_methods_are_compared_with_greedy_and_with_the_front(figures):
    greedy, better, shorter, stopped = figures
    assert greedy.metrics["chair_i"].value == pytest.approx(0.2)
    assert greedy.differences == {}
    assert better.metrics["mentions"].value == 9
    assert better.differences["chair_i"].interval.value == pytest.approx(1 / 9 - 2 / 10)
    assert better.differences["chair_i"].interval.high < 0
    assert better.differences["chair_i"].p == pytest.approx(2 * 2 / 1001)
    assert better.differences["recall"].interval.value == 0
    # the front: (0, 0), greedy (0.2, 0.8), stopping at 8 (0.4, 0.4) is worse
    assert better.differences["front"].interval.value == pytest.approx(0.8 - 0.8 * (1 / 9) / 0.2)
    assert shorter.differences["front"].interval.value == pytest.approx(-0.2)
    assert shorter.differences["front"].interval.high < 0
    assert stopped.differences["recall"].p is None
    assert "front" not in stopped.differences


def test_samples_that_failed_for_one_method_are_left_out_for_all():
    greedy, other = answers("greedy", 10, 1, 8), answers("other", 10, 2, 8)
    fewer = MethodAnswers("fewer", other.captions.iloc[:12])
    assert compare_methods([greedy, fewer], METRICS)[0].metrics["chair_i"].items == 12
    with pytest.raises(DataError, match="no description is left"):
        compare_methods([greedy, MethodAnswers("none", other.captions.iloc[:0])], METRICS)
    without = MethodAnswers("greedy", greedy.captions.drop(columns="words"))
    with pytest.raises(DataError, match="does not count words"):
        compare_methods([without, other], METRICS)


def test_tables_have_a_row_for_every_method(figures):
    text = render_tables(table.method_tables(figures, ["3 images are left out."]), "markdown")
    assert "3 images are left out." in text
    assert "### questions" not in text  # none were asked
    assert text.count("| stop at 8 |") == 3
    assert "| better | 2.00 | 0.200 |" in text
    plain = [item.to_dict() for item in figures]
    assert plain[1]["differences"]["chair_i"]["p_holm"] == pytest.approx(4 / 1001)
    assert plain[3]["chair_i_at_common_length"] == {"raw": None, "fitted": None}


def test_the_frontier_shows_every_method(figures):
    plot = table.frontier(figures)
    assert plot.svg.startswith("<svg")
    assert plot.svg.count('class="point-') == 4
    for name in ("greedy", "better", "shorter", "stop at 8"):
        assert f">{name}</text>" in plot.svg
