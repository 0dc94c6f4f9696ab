"""Figures of mitigations from made-up counts."""

import math

import pandas as pd
import pytest

from stethoscope.core.errors import DataError
from stethoscope.detection.shift_measures import RunShift
from stethoscope.metrics.bootstrap import Interval, holm
from stethoscope.report import mitigation_table as table
from stethoscope.report.method_answers import DetectorFigures, MethodAnswers
from stethoscope.report.mitigation_table import compare_methods
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


def test_holm_is_monotone_and_passes_over_what_is_not_known():
    assert holm([0.01, math.nan, 0.04, 0.03]) == [pytest.approx(0.03), pytest.approx(math.nan, nan_ok=True), 0.06, 0.06]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def judged(auroc, p):
    return DetectorFigures(
        Interval(auroc, 0, 1, 9, 40), Interval(0.02, 0, 1, 9, 40), RunShift(40, 1, 0.01, p, "answer", p <= 0.05)
    )


@pytest.fixture
def comparison():
    methods = [
        answers("greedy", 10, (1, 3), 8, words=(30, 40), passes=1.0, seconds=0.1, detector=judged(0.9, 0.4)),
        answers("better", 9, (0, 2), 8, words=(28, 38), passes=2.0, seconds=0.2, detector=judged(0.7, 0.0002)),
        answers("shorter", 10, (1, 2), 4, words=(14, 20), passes=1.0, peak_memory=3 * 2**20, promised=0.16),
        answers("stop at 8", 10, 4, 4, words=8, trivial=True, promised=0.3),
    ]
    return compare_methods(methods, METRICS)


@pytest.fixture
def figures(comparison):
    return comparison.methods


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
    assert compare_methods([greedy, fewer], METRICS).methods[0].metrics["chair_i"].items == 12
    with pytest.raises(DataError, match="no description is left"):
        compare_methods([greedy, MethodAnswers("none", other.captions.iloc[:0])], METRICS)
    without = MethodAnswers("greedy", greedy.captions.drop(columns="words"))
    with pytest.raises(DataError, match="does not count words"):
        compare_methods([without, other], METRICS)


def test_tables_have_a_row_for_every_method(figures):
    text = render_tables(table.method_tables(figures, ["3 images are left out."]), "markdown")
    assert "3 images are left out." in text
    assert "### questions" not in text  # none were asked
    assert text.count("| stop at 8 |") == 4
    assert "| better | 2.00 | 0.200 | – |" in text
    assert "| shorter | 1.00 | – | 3 |" in text
    plain = [item.to_dict() for item in figures]
    assert plain[1]["differences"]["chair_i"]["p_holm"] == pytest.approx(4 / 1001)
    assert plain[3]["chair_i_at_common_length"]["fitted"]["value"] is None


def test_promises_are_kept_or_broken(figures):
    text = render_tables(table.method_tables(figures), "markdown")
    assert [item.kept for item in figures] == [None, None, True, False]
    assert "| shorter | 16.0% | 0.150 [" in text
    assert "] | kept | 106.2% |" in text  # (10 - 1.5) / (10 - 2)
    assert "] | broken | 75.0% |" in text
    assert figures[3].to_dict()["promise"] == {"most": 0.3, "kept": False}


def test_warnings_on_mitigated_answers_say_for_which_they_are_calibrated(figures):
    text = render_tables(table.method_tables(figures), "markdown")
    assert "calibrated on: better; there its probabilities are not calibrated" in text
    assert "| answer, p &lt; 0.001 |" in text
    assert "| **not seen, p 0.400** |" in text
    assert figures[1].to_dict()["detector"]["shift"]["shifted"]
    assert "keep their calibration" in render_tables(table.method_tables(figures[:1]), "markdown")


def test_the_frontier_shows_every_method(comparison):
    plot = table.frontier(comparison)
    assert plot.svg.startswith("<svg")
    assert plot.svg.count('class="point-') == 4
    assert plot.svg.count('class="band"') == 1
    for name in ("greedy", "better", "shorter", "stop at 8"):
        assert f">{name}</text>" in plot.svg
