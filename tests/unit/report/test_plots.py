"""Curves against scikit-learn, drawings by their coordinates, the gallery by hand."""

import re

import numpy as np
import pandas as pd
import pytest
from helpers.token_tables import token_table
from sklearn import metrics as sklearn

from stethoscope.core.token_table import mention_rows
from stethoscope.report import curves, gallery, svg


@pytest.fixture(scope="module")
def rows():
    """Mentions with probabilities, some of them equal."""
    found = mention_rows(token_table(150, seed=1))
    return found.assign(probability=(1 / (1 + np.exp(-found["nll"]))).round(2))


def test_areas_under_the_curves_are_scikit_learns(rows):
    labels, scores = rows["label"].to_numpy(), rows["probability"].to_numpy()
    false, true = curves.roc(labels, scores)
    assert np.trapezoid(true, false) == pytest.approx(sklearn.roc_auc_score(labels, scores))
    recall, precision = curves.precision_recall(labels, scores)
    area = np.sum(np.diff(recall, prepend=0) * precision)
    assert area == pytest.approx(sklearn.average_precision_score(labels, scores))


def test_a_long_curve_keeps_its_ends():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 5000), rng.random(5000)
    x, y = curves.roc(labels, scores)
    assert len(x) == curves.POINTS
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(sklearn.roc_auc_score(labels, scores), abs=0.005)


def test_bins_hold_every_mention_once(rows):
    positions, bins = curves.by_position(rows), curves.reliability(rows)
    for found in (positions, bins):
        assert sum(one.mentions for one in found) == len(rows)
        assert sum(one.hallucinated for one in found) == rows["label"].sum()
    part = rows[rows["token"] // 10 == 1]
    second = next(one for one in positions if one.name == "10–19")
    assert second.figure.value == pytest.approx(sklearn.roc_auc_score(part["label"], part["probability"]))
    assert second.figure.low < second.figure.value < second.figure.high
    for one in bins:
        low = float(one.name[:3])
        inside = rows[(rows["probability"] >= low - 1e-9) & (rows["probability"] < low + 0.1 - 1e-9)]
        assert one.mentions == len(inside)
        assert one.figure.value == pytest.approx(inside["label"].mean())


def test_a_bin_of_one_kind_has_no_area_and_long_answers_wider_bins(rows):
    one = rows.assign(label=0)
    assert all(found.figure is None for found in curves.by_position(one))
    wide = curves.by_position(rows.assign(token=rows["token"] * 50))
    assert len(wide) <= curves.MOST_BINS
    assert wide[0].name == "90–179"  # the first mentions are at 150


def test_points_lie_where_the_axes_say():
    axes = svg.Axes("a", "b & <c>")
    text = svg.plot("t", axes, [svg.Series([0, 0.5, 1], [0, 1, float("nan")], "s<i>", marks=True)])
    points = re.search(r'polyline class="line s0" points="([^"]*)"', text).group(1).split()
    left, right, bottom, top = svg.LEFT, svg.WIDTH - svg.RIGHT, svg.HEIGHT - svg.BOTTOM, svg.TOP
    assert points == [f"{left:.1f},{bottom:.1f}", f"{(left + right) / 2:.1f},{top:.1f}"]
    assert "b &amp; &lt;c&gt;" in text
    assert "s&lt;i&gt;" in text
    assert "nan" not in text


def test_bars_are_as_long_as_their_values():
    text = svg.bars("t", [("a", 0.2, 0.1, 0.4), ("b", 0.1, 0.0, 0.2), ("c", -0.1, -0.2, 0.0)], "x")
    bars = [
        tuple(map(float, pair))
        for pair in re.findall(r'class="fill s0" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', text)
    ]
    assert bars[0][1] == pytest.approx(2 * bars[1][1], abs=0.2)
    assert bars[2][0] + bars[2][1] == pytest.approx(bars[0][0], abs=0.2)  # it ends where the others begin


def test_the_gallery_takes_the_clearest_and_different_ones():
    rows = pd.DataFrame(
        {
            "label": [1, 1, 1, 1, 0, 0],
            "warned": [True, True, True, False, True, False],
            "probability": [0.9, 0.8, 0.7, 0.1, 0.6, 0.05],
            "object": ["cat", "cat", "dog", "cup", "car", "car"],
            "sample_id": ["a", "b", "c", "a", "b", "c"],
        }
    )
    found = {kind: list(some.index) for kind, some in gallery.pick(rows, 2).items()}
    assert found == {"caught": [0, 2], "missed": [3], "false alarm": [4]}
    assert list(gallery.pick(rows, 3)["caught"].index) == [0, 1, 2]


def test_pieces_spell_the_answer():
    text = "A cat and a dog and a cat."
    pieces = list(gallery._pieces(text, (11, 15), [(1, 5), (11, 15), (21, 25)]))
    assert pieces == [
        ("A ", ""), ("cat", "warned"), (" and a ", ""), ("dog", "this"), (" and a ", ""), ("cat", "warned"), (".", ""),
    ]  # fmt: skip
    long = "x " * 400 + "dog" + " y" * 400
    pieces = list(gallery._pieces(long, (800, 803), []))
    assert (pieces[0], pieces[-1]) == (("… ", ""), (" …", ""))
    assert ("dog", "this") in pieces
    assert sum(len(part) for part, _ in pieces) < 2 * gallery.CONTEXT + 10
