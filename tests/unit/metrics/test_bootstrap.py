"""Bootstrap over images, paired differences, count metrics and splits."""

import math

import numpy as np
import pandas as pd
import pytest

from stethoscope.core.errors import ConfigError
from stethoscope.metrics import classification
from stethoscope.metrics.bootstrap import (
    Interval,
    bootstrap,
    count_metrics,
    count_replicates,
    group_weights,
    mean_interval,
    p_value,
    split_groups,
)


def test_every_replicate_draws_as_many_images_as_there_are():
    drawn = group_weights(["b", "a", "b", "c"], replicates=50, seed=1)
    assert drawn.counts.shape == (51, 3)
    assert (drawn.counts.sum(axis=1) == 3).all()
    assert (drawn.counts[0] == 1).all()
    weights = drawn.weights()
    assert (weights[:, 0] == weights[:, 2]).all(), "items of one image share their weight"


def test_draws_depend_on_ids_and_seed_but_not_on_order():
    first, second = group_weights(["a", "b", "c"], 20, seed=3), group_weights(["c", "a", "b"], 20, seed=3)
    assert (first.weights()[:, [2, 0, 1]] == second.weights()).all()
    assert not (first.counts == group_weights(["a", "b", "c"], 20, seed=4).counts).all()


def test_bootstrap_is_what_resampling_by_hand_gives():
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(0, 30, 200)).astype(str)
    labels = (rng.random(200) < 0.4).astype(int)
    scores = rng.normal(size=200) + labels
    drawn = group_weights(groups, replicates=40, seed=7)
    replicates = drawn.apply(lambda weights: {"auroc": classification.auroc(labels, scores, weights)})["auroc"]
    for row in (0, 5, 40):
        items = np.repeat(np.arange(200), drawn.weights()[row].astype(int))
        assert replicates[row] == pytest.approx(classification.auroc(labels[items], scores[items]))
    interval = bootstrap(classification.auroc, labels, scores, groups, replicates=40, seed=7)
    assert interval == drawn.interval(replicates)
    assert (interval.items, interval.groups) == (200, len(np.unique(groups)))
    assert interval == bootstrap(classification.auroc, labels, scores, groups, replicates=40, seed=7)


def test_the_mean_is_resampled_by_image():
    random = np.random.default_rng(3)
    values, groups = random.normal(size=90), random.integers(30, size=90).astype(str)
    names, draws = np.unique(groups), np.random.default_rng(5)
    means = [values.mean()]
    for drawn in draws.integers(len(names), size=(200, len(names))):
        means.append(np.concatenate([values[groups == names[index]] for index in drawn]).mean())
    assert mean_interval(values, groups, 200, 5).to_dict() == pytest.approx(
        Interval.of(np.array(means), 90, len(names)).to_dict()
    )


def test_intervals_cover_the_truth_on_clustered_data():
    rng = np.random.default_rng(0)
    covered, naive = 0, 0
    for trial in range(150):
        share = rng.beta(1.5, 1.5, size=60)  # every image has its own rate; the mean is 0.5
        groups = np.repeat(np.arange(60), 5).astype(str)
        labels = (rng.random(300) < np.repeat(share, 5)).astype(int)
        for unit, name in ((groups, "image"), (np.arange(300).astype(str), "item")):
            drawn = group_weights(unit, replicates=200, seed=trial)
            interval = drawn.interval(drawn.apply(lambda w, y=labels: {"rate": classification.base_rate(y, w)})["rate"])
            inside = interval.low <= 0.5 <= interval.high
            covered, naive = covered + (inside and name == "image"), naive + (inside and name == "item")
    assert 0.89 <= covered / 150 <= 0.99
    assert naive < covered, "resampling items instead of images is too sure of itself"


def test_paired_differences_are_narrower_than_unpaired_ones():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 5).astype(str)
    labels = (rng.random(500) < 0.3).astype(int)
    first = rng.normal(size=500) + labels
    other = first + 0.1 * rng.normal(size=500)
    drawn = group_weights(groups, 300)
    areas = drawn.apply(lambda w: {i: classification.auroc(labels, s, w) for i, s in enumerate((first, other))})
    paired = drawn.interval(areas[0] - areas[1])
    apart = [
        bootstrap(classification.auroc, labels, values, groups, replicates=300, seed=1) for values in (first, other)
    ]
    assert paired.value == pytest.approx(apart[0].value - apart[1].value)
    assert paired.high - paired.low < 0.5 * (apart[0].high - apart[0].low)


def test_an_interval_prints_and_survives_json():
    interval = Interval(0.8713, 0.8421, 0.8989, items=10, groups=4)
    assert str(interval) == "0.871 [0.842, 0.899]"
    assert Interval.from_dict(interval.to_dict()) == interval
    nothing = Interval.of(np.full(11, np.nan), 0, 0)
    assert str(nothing) == "not defined"
    assert nothing.to_dict()["value"] is None
    assert math.isnan(Interval.from_dict(nothing.to_dict()).low)


def test_replicates_that_are_not_defined_are_left_out():
    interval = Interval.of(np.array([0.5, np.nan, 0.4, 0.6]), 30, 30)
    assert 0.4 <= interval.low <= interval.high <= 0.6


PRECISION = {
    "precision": lambda totals: totals["hits"] / totals["flagged"],
    "accuracy": lambda totals: totals["right"] / totals["n"],
}


def counts(seed=0, samples=120):
    rng = np.random.default_rng(seed)
    flagged = rng.integers(0, 2, samples)
    hits, right = flagged * rng.integers(0, 2, samples), rng.integers(0, 2, samples)
    table = pd.DataFrame({"hits": hits, "flagged": flagged, "right": right, "n": 1})
    subsets = np.array(["random", "popular", "adversarial"])[np.arange(samples) % 3]
    return table, (np.arange(samples) // 6).astype(str), subsets


def test_count_metrics_are_metrics_of_totals():
    table, groups, subsets = counts()
    rows = count_metrics(PRECISION, table, groups, subsets, macro=["accuracy"], replicates=100)
    figures = {(row.metric, row.subset): row.interval for row in rows}
    assert [row.subset for row in rows] == ["random"] * 2 + ["popular"] * 2 + ["adversarial"] * 2 + ["mean"]
    inside = subsets == "popular"
    popular = figures["precision", "popular"]
    assert popular.value == pytest.approx(table["hits"][inside].sum() / table["flagged"][inside].sum())
    assert (popular.items, popular.groups) == (40, 20)
    means = [figures["accuracy", subset].value for subset in ("random", "popular", "adversarial")]
    assert figures["accuracy", "mean"].value == pytest.approx(np.mean(means))
    assert figures["accuracy", "mean"].items == 120
    assert all(interval.low <= interval.value <= interval.high for interval in figures.values())


def test_count_replicates_equal_resampling_by_hand():
    table, groups, subsets = counts()
    drawn = group_weights(groups, replicates=10, seed=2)
    arrays = count_replicates(PRECISION, table, subsets, drawn, macro=["precision"])
    weights = drawn.weights()[7]
    by_hand = []
    for subset in ("random", "popular", "adversarial"):
        inside = subsets == subset
        by_hand.append((weights * table["hits"])[inside].sum() / (weights * table["flagged"])[inside].sum())
        assert arrays["precision", subset][7] == pytest.approx(by_hand[-1])
    assert arrays["precision", "mean"][7] == pytest.approx(np.mean(by_hand))


def test_a_mean_over_subsets_needs_all_that_were_asked():
    counts, images = {"right": [1, 0, 1], "answers": [1, 1, 1]}, ["a", "b", "a"]
    accuracy = {"accuracy": lambda totals: totals["right"] / totals["answers"]}

    def mean(**asked):
        rows = count_metrics(accuracy, counts, images, ["easy", "easy", "hard"], ["accuracy"], **asked)
        return next(row.interval.value for row in rows if row.subset == "mean")

    assert mean() == mean(expected=["hard", "easy"]) == 0.75
    assert np.isnan(mean(expected=["easy", "hard", "all failed"]))


def test_a_metric_that_is_not_defined_is_nan():
    table = pd.DataFrame({"hits": [0, 0], "flagged": [0, 0], "right": [1, 0], "n": [1, 1]})
    rows = count_metrics(PRECISION, table, ["a", "b"], ["all", "all"], macro=["accuracy"], replicates=20)
    assert [(row.metric, row.subset) for row in rows] == [("precision", "all"), ("accuracy", "all")]
    assert math.isnan(rows[0].interval.value)
    assert rows[0].to_dict()["value"] is None


FRACTIONS = {"train": 0.5, "calibration": 0.2, "test": 0.3}


def test_a_split_never_parts_an_image():
    groups = np.random.default_rng(0).integers(0, 500, 3000).astype(str)
    folds = split_groups(groups, FRACTIONS, seed=1)
    assert (sum(mask.astype(int) for mask in folds.values()) == 1).all()
    seen = [set(groups[mask]) for mask in folds.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == len(set(groups))
    assert [len(part) / 500 for part in seen] == pytest.approx(list(FRACTIONS.values()), abs=0.06)


def test_adding_images_moves_no_other():
    groups = np.arange(200).astype(str)
    few, many = split_groups(groups[:100], FRACTIONS), split_groups(groups, FRACTIONS)
    for name in FRACTIONS:
        assert (few[name] == many[name][:100]).all()
    assert not (split_groups(groups, FRACTIONS, seed=1)["test"] == many["test"]).all()


@pytest.mark.parametrize("fractions", [{"train": 0.5, "test": 0.6}, {"train": 1.5, "test": -0.5}, {}])
def test_fractions_must_add_up(fractions):
    with pytest.raises(ConfigError, match="add up to 1"):
        split_groups(["a"], fractions)


def test_p_values_of_no_difference_are_uniform_and_of_a_real_one_small():
    """Two scores of equal worth, 300 times: p below 0.1 in about a tenth of them; a better one is found out."""
    small, p_values = 0, []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        difference = rng.normal(size=60)
        drawn = group_weights(np.arange(60), 200, seed)
        replicates = drawn.apply(lambda weights, d=difference: {"d": weights @ d / weights.sum(axis=1)})["d"]
        small += p_value(replicates) < 0.1
        p_values.append(p_value(replicates + 0.6))
    assert 0.05 < small / 300 < 0.16
    assert np.median(p_values) < 0.02
    assert p_value(np.r_[0.3, np.full(1000, 0.3)]) == p_value(np.r_[-0.3, np.full(1000, -0.3)]) == 2 / 1001
    assert np.isnan(p_value(np.array([np.nan, 0.1])))


def test_no_interval_and_no_p_value_below_ten_images():
    for count, known in ((9, False), (10, True)):
        resamples = group_weights([str(n) for n in range(count)] * 3, replicates=50)
        values = resamples.apply(lambda weights: {"mean": weights.sum(axis=1)})["mean"]
        assert resamples.interval(values).has_bounds == known
        assert math.isnan(resamples.p_value(values)) == (not known)
        assert (resamples.interval(values).to_dict()["low"] is None) == (not known)
