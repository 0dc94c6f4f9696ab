"""Baselines and the leaderboard: who wins where it is known who must."""

import json
import math

import numpy as np
import pytest
from token_tables import halves, token_table

from stethoscope import metrics
from stethoscope.baselines import Constant, PositionOnly, TextPrior, baselines
from stethoscope.detector import Detector
from stethoscope.errors import ArtefactError, ConfigError, DataError
from stethoscope.leaderboard import AREAS, METRICS, leaderboard, train_detector
from stethoscope.stats import Interval, split_groups
from stethoscope.table import mention_rows

TABLE = token_table(300)
FRACTIONS = {"train": 0.5, "calibration": 0.2, "test": 0.3}


@pytest.fixture(scope="module")
def trained():
    return train_detector(TABLE, Detector(), seed=1, replicates=200)


def figure(results, name, metric):
    row = next(row for row in results["leaderboard"]["rows"] if row["name"] == name)
    return Interval.from_dict(row["metrics"][metric])


def difference(results, other, metric):
    return next(
        entry for entry in results["leaderboard"]["differences"] if (entry["other"], entry["metric"]) == (other, metric)
    )


def test_rows_and_figures_are_complete_and_json(trained):
    detector, results = trained
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    rows = results["leaderboard"]["rows"]
    assert [row["name"] for row in rows[:4]] == ["detector", "constant", "position only", "text prior"]
    assert {row["name"] for row in rows[4:]} == {"nll", "mass", "noise", "position"}
    assert all(set(row["metrics"]) == set(METRICS) for row in rows[:4])
    assert all(set(row["metrics"]) == set(METRICS) - {"ece", "brier"} for row in rows[4:])
    assert detector.notes["split"] == results["split"]
    assert detector.notes["figures"]["auroc"]["value"] == figure(results, "detector", "auroc").value
    others = [results["leaderboard"]["best_features"][metric] for metric in AREAS]
    assert len(results["leaderboard"]["differences"]) == 3 * len(others)


def test_the_figures_are_those_of_the_test_fold(trained):
    detector, results = trained
    folds = split_groups(TABLE["group"].to_numpy(str), FRACTIONS, seed=1)
    test = mention_rows(TABLE[folds["test"]])
    labels, probabilities = test["label"].to_numpy(), detector.predict(test)
    auroc = figure(results, "detector", "auroc")
    assert auroc.value == pytest.approx(metrics.auroc(labels, probabilities))
    assert (auroc.items, auroc.groups) == (len(test), test["group"].nunique())
    assert auroc.low < auroc.value < auroc.high
    assert figure(results, "mass", "auroc").value == pytest.approx(metrics.auroc(labels, -test["mass"].to_numpy()))
    assert figure(results, "detector", "ece").value == pytest.approx(metrics.ece(labels, probabilities))
    assert sum(point["count"] for point in results["reliability"]) == len(test)
    assert sum(fold["images"] for fold in results["split"]["folds"].values()) == 300


def test_signs_come_from_training(trained):
    signs = {row["name"]: row["sign"] for row in trained[1]["leaderboard"]["rows"]}
    assert (signs["nll"], signs["mass"], signs["position"]) == (1, -1, 1)


def test_who_is_ahead(trained):
    _, results = trained
    assert results["leaderboard"]["best_features"]["auroc_controlled"] == "nll"
    assert figure(results, "detector", "auroc").value > figure(results, "text prior", "auroc").value > 0.55
    assert figure(results, "position only", "auroc_same_position").value == 0.5
    for other in ("position only", "text prior"):
        gain = difference(results, other, "auroc")
        assert gain["low"] > 0
        expected = figure(results, "detector", "auroc").value - figure(results, other, "auroc").value
        assert gain["value"] == pytest.approx(expected)


def test_a_constant_knows_the_base_rate_only(trained):
    _, results = trained
    assert figure(results, "constant", "auroc").value == 0.5
    rate = figure(results, "constant", "base_rate").value
    assert figure(results, "constant", "auprc_hallucinated").value == pytest.approx(rate)
    assert figure(results, "constant", "auprc_grounded").value == pytest.approx(1 - rate)


def test_shuffled_labels_cannot_be_told_apart():
    table = token_table(500, seed=3)
    judged = (table["label"] >= 0).to_numpy()
    labels = table["label"].to_numpy().copy()
    labels[judged] = np.random.default_rng(0).permutation(labels[judged])
    _, results = train_detector(table.assign(label=labels), Detector(strength=0.01), replicates=20)
    for name in ("detector", "position only", "text prior", "nll", "noise"):
        assert 0.43 < figure(results, name, "auroc").value < 0.57


def test_the_text_prior_beats_nothing_when_text_says_nothing():
    table = token_table(500, seed=5, prior=False)
    _, results = train_detector(table, Detector(), replicates=100)
    prior = figure(results, "text prior", "auroc")
    assert prior.low < 0.5 + 0.03
    assert figure(results, "detector", "auroc").low > prior.high


def test_a_second_run_gives_the_same_figures(trained):
    again = train_detector(TABLE, Detector(), seed=1, replicates=200)[1]
    assert again == trained[1]


def test_the_text_prior_meets_objects_and_numbers_it_does_not_know():
    first, second = halves(TABLE)
    prior = TextPrior().fit(first, second)
    strange = second.assign(object="zebra", number=99, repeat=7, token=1000)
    assert np.isfinite(prior.predict(strange)).all()
    assert prior.predict(second).shape == (len(second),)


def test_answers_judged_at_one_position_leave_position_nothing_to_say():
    first, second = (half[half["label"] >= 0].assign(token=0, number=0) for half in halves(TABLE))
    assert np.ptp(PositionOnly().fit(first, second).predict(second)) == 0
    labels = second["label"].to_numpy()
    assert metrics.auroc(labels, TextPrior().fit(first, second).predict(second)) > 0.55


def test_baselines_that_cannot_learn_say_so():
    first, second = halves(TABLE)
    for baseline in baselines().values():
        with pytest.raises(DataError, match="no judged mention"):
            type(baseline)().fit(first[:0], second[:0])
    with pytest.raises(ArtefactError, match="not fitted"):
        PositionOnly().predict(first)
    assert math.isnan(Constant().predict(first)[0])


def test_a_test_fold_of_one_kind_is_refused():
    folds = split_groups(TABLE["group"].to_numpy(str), FRACTIONS)
    one_kind = TABLE.assign(label=np.where(folds["test"] & (TABLE["label"] == 1), -1, TABLE["label"]))
    with pytest.raises(DataError, match="of 1 kinds"):
        leaderboard(one_kind, {}, folds)
    with pytest.raises(ConfigError, match="add up to 1"):
        train_detector(TABLE, Detector(), fractions=(0.5, 0.5, 0.5))


def test_features_with_gaps_are_measured_and_empty_ones_skipped():
    table = TABLE.assign(gappy=TABLE["nll"].where(TABLE["token"] > 4), empty=np.float32(np.nan))
    _, results = train_detector(table, Detector(exclude=["empty"]), replicates=20)
    assert results["leaderboard"]["skipped_features"] == ["empty"]
    assert figure(results, "gappy", "auroc").value > 0.5
