"""Baselines and the leaderboard: who wins where it is known who must."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from helpers.token_tables import halves, token_table
from sklearn.ensemble import HistGradientBoostingClassifier

from stethoscope.core.errors import ArtefactError, ConfigError, DataError
from stethoscope.core.token_table import mention_rows
from stethoscope.detection import leaderboard as board
from stethoscope.detection.array_classifiers import MAX_TREES
from stethoscope.detection.baselines import Constant, PositionOnly, TextPrior, baselines
from stethoscope.detection.calibrated_model import CalibratedModel
from stethoscope.detection.detector import Detector
from stethoscope.detection.detector_results import Leaderboard
from stethoscope.detection.estimators import DRAFT_TREES
from stethoscope.detection.leaderboard import AREAS, METRICS, build_leaderboard
from stethoscope.detection.training import ablate, feature_groups, train_detector
from stethoscope.metrics import classification
from stethoscope.metrics.bootstrap import Interval, split_groups

TABLE = token_table(300)
FRACTIONS = {"train": 0.5, "calibration": 0.2, "test": 0.3}


@pytest.fixture(autouse=True)
def few_shuffles(monkeypatch, request):
    """Twenty refits are for the test of what they show."""
    if "sits_at_one_half" not in request.node.name:
        monkeypatch.setattr(board, "SHUFFLES", 2)


@pytest.fixture(scope="module")
def trained():
    return train_detector(TABLE, Detector(), seed=1, replicates=200)


def figure(results, name, metric):
    row = next(row for row in results["leaderboard"]["rows"] if row["name"] == name)
    return Interval.from_dict(row["metrics"][metric])


def difference(results, other, metric):
    differences = results["leaderboard"]["differences"]
    return next(row for row in differences if (row["other"], row["metric"]) == (other, metric))


def test_rows_and_figures_are_complete_and_json(trained):
    detector, results, folds = trained.detector, trained.results.to_dict(), trained.folds
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    rows = results["leaderboard"]["rows"]
    baselines = ["constant", "position only", "text prior", "shuffled labels"]
    assert [row["name"] for row in rows[:5]] == ["detector", *baselines]
    assert {row["name"] for row in rows[5:]} == {"nll", "mass", "noise", "position"}
    known = set(METRICS) - {"auroc_first"}  # only first mentions are measured
    assert all(set(row["metrics"]) == known for row in rows[:5])
    assert all(set(row["metrics"]) == known - {"ece", "brier"} for row in rows[5:])
    assert {name: mask.tolist() for name, mask in folds.items()} == {
        name: mask.tolist() for name, mask in split_groups(TABLE["group"].to_numpy(str), FRACTIONS, seed=1).items()
    }
    assert detector.notes["split"] == results["split"]
    assert detector.notes["figures"]["auroc"]["value"] == figure(results, "detector", "auroc").value
    others = [results["leaderboard"]["best_features"][metric] for metric in AREAS]
    assert len(results["leaderboard"]["differences"]) == 3 * len(others)


def test_the_figures_are_those_of_the_test_fold(trained):
    detector, results, folds = trained.detector, trained.results.to_dict(), trained.folds
    test = mention_rows(TABLE[folds["test"]])
    labels, probabilities = test["label"].to_numpy(), detector.predict(test)
    auroc = figure(results, "detector", "auroc")
    assert auroc.value == pytest.approx(classification.auroc(labels, probabilities))
    assert (auroc.items, auroc.groups) == (len(test), test["group"].nunique())
    assert auroc.low < auroc.value < auroc.high
    assert figure(results, "mass", "auroc").value == pytest.approx(
        classification.auroc(labels, -test["mass"].to_numpy())
    )
    assert figure(results, "detector", "ece").value == pytest.approx(classification.ece(labels, probabilities))
    assert sum(point["count"] for point in results["reliability"]) == len(test)
    assert sum(fold["images"] for fold in results["split"]["folds"].values()) == 300


def test_signs_come_from_training(trained):
    signs = {row["name"]: row["sign"] for row in trained.results.to_dict()["leaderboard"]["rows"]}
    assert (signs["nll"], signs["mass"], signs["position"]) == (1, -1, 1)


def test_who_is_ahead(trained):
    results = trained.results.to_dict()
    assert results["leaderboard"]["best_features"]["auroc_controlled"] == "nll"
    assert figure(results, "detector", "auroc").value > figure(results, "text prior", "auroc").value > 0.55
    assert figure(results, "position only", "auroc_same_position").value == 0.5
    for other in ("position only", "text prior"):
        gain = difference(results, other, "auroc")
        assert gain["low"] > 0
        expected = figure(results, "detector", "auroc").value - figure(results, other, "auroc").value
        assert gain["value"] == pytest.approx(expected)


def test_a_constant_knows_the_base_rate_only(trained):
    results = trained.results.to_dict()
    assert figure(results, "constant", "auroc").value == 0.5
    rate = figure(results, "constant", "base_rate").value
    assert figure(results, "constant", "auprc_hallucinated").value == pytest.approx(rate)
    assert figure(results, "constant", "auprc_grounded").value == pytest.approx(1 - rate)


def test_shuffled_labels_cannot_be_told_apart():
    table = token_table(500, seed=3)
    judged = (table["label"] >= 0).to_numpy()
    labels = table["label"].to_numpy().copy()
    labels[judged] = np.random.default_rng(0).permutation(labels[judged])
    results = train_detector(table.assign(label=labels), Detector(C=0.01), replicates=20).results.to_dict()
    for name in ("detector", "position only", "text prior", "nll", "noise"):
        assert 0.43 < figure(results, name, "auroc").value < 0.57


def test_the_text_prior_beats_nothing_when_text_says_nothing():
    table = token_table(500, seed=5, prior=False)
    results = train_detector(table, Detector(), replicates=100).results.to_dict()
    prior = figure(results, "text prior", "auroc")
    assert prior.low < 0.5 + 0.03
    assert figure(results, "detector", "auroc").low > prior.high


def test_a_second_run_gives_the_same_figures(trained):
    again = train_detector(TABLE, Detector(), seed=1, replicates=200).results.to_dict()
    first = {**trained.results.to_dict()}
    boards = [results.pop("leaderboard") for results in (again, first)]
    for before, other in zip(
        *([row for row in leaderboard["rows"] if row["name"] != board.SHUFFLED] for leaderboard in boards), strict=True
    ):
        assert before == other  # the number of shuffles may differ, nothing else
    assert [leaderboard["differences"] for leaderboard in boards[:1]] == [
        leaderboard["differences"] for leaderboard in boards[1:]
    ]
    assert again == first


def test_the_text_prior_meets_objects_and_numbers_it_does_not_know():
    first, second = halves(TABLE)
    prior = TextPrior().fit(first, second)
    strange = second.assign(object="zebra", mention_index=99, repeat_index=7, token=1000)
    assert np.isfinite(prior.predict(strange)).all()
    assert prior.predict(second).shape == (len(second),)


def test_answers_judged_at_one_position_leave_position_nothing_to_say():
    first, second = (half[half["label"] >= 0].assign(token=0, mention_index=0) for half in halves(TABLE))
    assert np.ptp(PositionOnly().fit(first, second).predict(second)) == 0
    labels = second["label"].to_numpy()
    assert classification.auroc(labels, TextPrior().fit(first, second).predict(second)) > 0.55


def test_baselines_that_cannot_learn_say_so():
    first, second = halves(TABLE)
    for baseline in baselines().values():
        with pytest.raises(DataError, match="no judged mention"):
            type(baseline)().fit(first[:0], second[:0])
    with pytest.raises(ArtefactError, match="not fitted"):
        PositionOnly().predict(first)
    assert math.isnan(Constant().predict(first)[0])


def test_baselines_of_no_mention_have_no_probability():
    table = token_table(40)
    for baseline in baselines().values():
        assert baseline.fit(table).predict(table[:0]).shape == (0,)


def test_shares_of_two_folds_are_refused():
    with pytest.raises(ConfigError, match=r"\[0\.5, 0\.5\] should be three, for train, calibration, test"):
        train_detector(token_table(40), Detector(), (0.5, 0.5))


def test_a_test_fold_of_one_kind_is_refused():
    folds = split_groups(TABLE["group"].to_numpy(str), FRACTIONS)
    one_kind = TABLE.assign(label=np.where(folds["test"] & (TABLE["label"] == 1), -1, TABLE["label"]))
    with pytest.raises(DataError, match="of 1 kinds"):
        build_leaderboard(one_kind, {}, folds)
    with pytest.raises(ConfigError, match="add up to 1"):
        train_detector(TABLE, Detector(), fractions=(0.5, 0.5, 0.5))


def test_features_with_gaps_are_measured_and_empty_ones_skipped():
    table = TABLE.assign(gappy=TABLE["nll"].where(TABLE["token"] > 4), empty=np.float32(np.nan))
    results = train_detector(table, Detector(exclude=["empty"]), replicates=20).results.to_dict()
    assert results["leaderboard"]["skipped_features"] == ["empty"]
    assert results["leaderboard"]["constant_features"] == []  # a gap may say something
    assert figure(results, "gappy", "auroc").value > 0.5


def test_features_that_never_change_are_named_once(recwarn):
    """By the training images alone, which are what a detector learns from."""
    folds = split_groups(TABLE["group"].to_numpy(str), FRACTIONS)
    table = TABLE.assign(flat=np.float32(3), elsewhere=np.where(folds["test"], TABLE["nll"], 0).astype(np.float32))
    board = build_leaderboard(table, {}, folds, replicates=20)
    assert (board.constant, board.skipped) == (("flat", "elsewhere"), ())
    assert Leaderboard.from_dict(board.to_dict()).constant == board.constant
    assert not len(recwarn)


def test_a_detector_of_shuffled_labels_sits_at_one_half():
    """With true labels in training the same detector is far above: what it shows is not a leak."""
    intervals = []
    for seed in range(4):
        results = train_detector(token_table(200, seed=seed), Detector(), seed=seed, replicates=100).results.to_dict()
        intervals.append(figure(results, "shuffled labels", "auroc"))
        assert figure(results, "detector", "auroc").low > intervals[-1].high
    # one shuffle has a standard deviation of 0.17 with these four features, twenty of four tables 0.02
    assert abs(np.mean([interval.value for interval in intervals]) - 0.5) < 0.06
    assert sum(interval.low < 0.5 < interval.high for interval in intervals) >= 3


def test_shuffled_labels_are_learned_from_fewer_trees(monkeypatch):
    fitted = []
    fit = CalibratedModel.fit.__func__
    monkeypatch.setattr(board.CalibratedModel, "fit", lambda *a: fitted.append(a[0]) or fit(CalibratedModel, *a))
    train_detector(TABLE, Detector("boosting"), replicates=20)
    trees = [estimator.max_iter for estimator in fitted if isinstance(estimator, HistGradientBoostingClassifier)]
    assert trees == [MAX_TREES, *[DRAFT_TREES] * board.SHUFFLES]


def test_matched_pairs_are_counted_by_hand():
    """Position and word: the same object within ten tokens of the answer, whatever answer."""
    judged = mention_rows(TABLE[split_groups(TABLE["group"].to_numpy(str), FRACTIONS, seed=1)["test"]])
    scores = judged["nll"].to_numpy(float)
    pairs, right, members = 0, 0.0, set()
    for index in np.flatnonzero(judged["label"] == 1):
        for other in np.flatnonzero(judged["label"] == 0):
            same_word = judged["object"][index] == judged["object"][other]
            if same_word and judged["token"][index] // 10 == judged["token"][other] // 10:
                pairs += 1
                members |= {index, other}
                right += (scores[index] > scores[other]) + (scores[index] == scores[other]) / 2
    results = train_detector(TABLE, Detector(), seed=1, replicates=5).results.to_dict()
    matched = results["leaderboard"]["controls"]["auroc_matched"]
    assert matched == {"pairs": pairs, "items": len(members), "share": len(members) / len(judged)}
    assert figure(results, "nll", "auroc_matched").value == pytest.approx(right / pairs)


def test_the_object_says_nothing_once_it_is_held_fixed():
    table = token_table(600, seed=4).assign(nll=np.float32(0), mass=np.float32(0))
    known = pd.factorize(table["object"])[0].astype(np.float32)
    table = table.assign(known=known * (table["mention_index"] >= 0))  # nothing but which object it is
    results = train_detector(table, Detector(exclude=["nll", "mass"]), replicates=50).results.to_dict()
    assert figure(results, "known", "auroc_matched").value == 0.5
    assert figure(results, "text prior", "auroc").low > 0.55


def test_recall_at_precision_is_that_of_the_best_threshold(trained):
    judged = mention_rows(TABLE[trained.folds["test"]])
    labels, scores = judged["label"].to_numpy(), trained.detector.predict(judged)
    reached = [(scores >= t)[labels == 1].mean() for t in scores if labels[scores >= t].mean() >= 0.9]
    assert figure(trained.results.to_dict(), "detector", "recall_at_90precision").value == pytest.approx(
        max(reached, default=0)
    )


def test_detectors_side_by_side_are_compared_in_pairs():
    beside = {"blind": Detector(features=["noise"]), "boosting": Detector("boosting")}
    results = train_detector(TABLE, Detector(), seed=1, replicates=200, compare_with=beside).results.to_dict()
    kinds = {row["name"]: row["kind"] for row in results["leaderboard"]["rows"]}
    assert [name for name, kind in kinds.items() if kind == "detector"] == ["detector", "blind", "boosting"]
    blind, boosting = difference(results, "blind", "auroc"), difference(results, "boosting", "auroc")
    assert blind["value"] == pytest.approx(
        figure(results, "detector", "auroc").value - figure(results, "blind", "auroc").value
    )
    assert blind["p"] < 0.02
    assert boosting["p"] > 0.02
    assert boosting["low"] < 0 < boosting["high"] or abs(boosting["value"]) < 0.05
    with pytest.raises(ConfigError, match="no mentions in common"):
        train_detector(TABLE, Detector(), replicates=5, compare_with={"other": Detector(repeats="all")})
    with pytest.raises(ConfigError, match="name of the main one"):
        train_detector(TABLE, Detector(), compare_with={"detector": Detector()})


def test_ablation_says_what_a_group_is_worth():
    """The noise is in a group of its own and worth nothing; what carries the evidence is worth much."""
    table = TABLE.rename(columns={"mass": "attn_image_l00", "noise": "lens_rank_l00"})
    assert feature_groups(["nll", "attn_image_l00", "lens_rank_l00", "position"]) == {
        "uncertainty": ("nll",), "attention": ("attn_image_l00",), "lens": ("lens_rank_l00",), "position": ("position",)
    }  # fmt: skip
    lines = []
    results = train_detector(
        table, Detector(), seed=1, replicates=200, ablation=True, progress=lines.append
    ).results.to_dict()
    gains = {row["other"]: row for row in results["ablation"] if row["metric"] == "auroc"}
    assert set(gains) == {"without uncertainty", "without attention", "without lens", "without position"}
    assert gains["without uncertainty"]["low"] > 0
    assert gains["without uncertainty"]["p"] < 0.05
    assert abs(gains["without lens"]["value"]) < 0.01
    assert sum(line.startswith("fitting without") for line in lines) == 4
    alone = Detector(features=["nll"]).fit(*halves(table))
    assert (
        ablate(table, alone, {"train": table.index < 0, "calibration": table.index < 0, "test": table.index >= 0}) == ()
    )


def test_what_the_threshold_does_on_the_test_fold(trained):
    judged = mention_rows(TABLE[trained.folds["test"]])
    labels, warned = judged["label"].to_numpy(), trained.detector.predict(judged) >= trained.detector.threshold
    threshold = trained.results.to_dict()["threshold"]
    expected = {
        "precision": labels[warned].mean(),
        "recall": warned[labels == 1].mean(),
        "false_alarms": warned[labels == 0].mean(),
        "missed": 1 - warned[labels == 1].mean(),
        "flagged": warned.mean(),
    }
    for name, value in expected.items():
        assert threshold[name]["value"] == pytest.approx(value)
        assert threshold[name]["low"] <= value <= threshold[name]["high"]
    assert threshold["certificate"] is None


def test_later_mentions_are_measured_where_they_are_learned_from():
    later = TABLE[TABLE["label"] >= 0].assign(repeat_index=1, label=0)
    both = pd.concat([TABLE, later], ignore_index=True)
    results = train_detector(both, Detector(repeats="all"), seed=1, replicates=20).results.to_dict()
    first = train_detector(TABLE, Detector(), seed=1, replicates=20).results.to_dict()
    assert figure(results, "nll", "auroc_first").value == pytest.approx(figure(first, "nll", "auroc").value)
    assert figure(results, "nll", "auroc").value != pytest.approx(figure(first, "nll", "auroc").value, abs=0.01)
