"""The monitor of a detector: exact false-alarm rates, silence where promises hold, a word where not; recalibration."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers.token_tables import halves, token_table
from scipy.special import expit, logit
from scipy.stats import kstest

from stethoscope.core.errors import ArtefactError, ConfigError, DataError
from stethoscope.core.picture_profile import PROFILE_LENGTH
from stethoscope.detection import recalibration
from stethoscope.detection.detector import Detector
from stethoscope.detection.lookup import mention_warnings, write_warnings
from stethoscope.detection.shift import FEWEST, ShiftMonitor
from stethoscope.detection.shift_measures import (
    RUN_LEVEL,
    TOLERANCE,
    Readings,
    RunShift,
    View,
    estimated_risk,
    linear_map,
    rank_p_values,
    share_intercept,
)
from stethoscope.metrics.classification import ece

COLUMNS = ("nll", "max_prob", "attn_image_l00")
"""Three columns, of which a made-up detector reads the first two, and the third as good as not at all."""


def with_pictures(table, seed=0, shift=0.0):
    """The table with a made-up profile of every picture."""
    rng = np.random.default_rng(seed)
    texts = {
        group: " ".join(f"{value:.6g}" for value in rng.normal(size=PROFILE_LENGTH) + shift)
        for group in table["group"].unique()
    }
    return table.assign(picture=table["group"].map(texts))


def readings(images, seed, shift=0.0, moved=(0.0, 0.0, 0.0), objects=None, per_image=4):
    """What a made-up detector reads of mentions: shifted profiles and columns, and how often pictures show objects."""
    table = with_pictures(token_table(images, seed=seed, per_image=per_image), seed, shift)
    rows = table[table["mention_index"] >= 0].reset_index(drop=True)
    rng = np.random.default_rng(seed)
    columns = rows[["nll", "mass", "noise"]].to_numpy(dtype=float) + np.array(moved)
    log_odds = -1.5 + 1.2 * columns[:, 0] - 2 * (columns[:, 1] - 0.5) + 0.01 * columns[:, 2]
    shown = {group: expit(rng.normal(size=3)) + np.array(objects or 0.0) for group in rows["group"].unique()}
    contents = None if objects is None else np.stack([shown[group] for group in rows["group"]])
    return Readings(rows, columns, log_odds, contents)


@pytest.fixture(scope="module")
def monitor():
    return ShiftMonitor.fit(COLUMNS, readings(300, 1), readings(200, 2))


@pytest.fixture(scope="module")
def seeing():
    """A monitor that knows which objects pictures show."""
    return ShiftMonitor.fit(COLUMNS, readings(300, 1, objects=(0, 0, 0)), readings(200, 2, objects=(0, 0, 0)))


def test_p_values_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    reference, values = np.sort(rng.integers(0, 30, 99)).astype(float), rng.integers(-2, 33, 50).astype(float)
    expected = [(1 + sum(held_out >= value for held_out in reference)) / 100 for value in values]
    assert rank_p_values(reference, values).tolist() == expected


def test_distance_is_that_of_a_regularised_covariance():
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4)) + 5
    view = View.fit(rows, np.arange(500))
    standard = (rows - rows.mean(0)) / rows.std(0)
    correlation = 0.95 * np.corrcoef(rows.T) + 0.05 * np.eye(4)
    expected = np.einsum("ij,jk,ik->i", standard, np.linalg.inv(correlation), standard)
    np.testing.assert_allclose(view.distances(rows, np.arange(500)) / view.per_unit, expected, rtol=1e-8)
    pairs = view.distances(rows, np.arange(500) // 2) / view.per_unit
    np.testing.assert_allclose(pairs, expected.reshape(-1, 2).mean(1), rtol=1e-8)


def test_with_a_floor_columns_that_vary_less_count_less():
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(500, 2)) * [2.0, 0.01]
    view = View.fit(rows, np.arange(500), floor=0.2)
    standard = (rows - rows.mean(0)) / np.hypot(rows.std(0), 0.2)
    noisy = standard.T @ standard / 500 + np.diag(0.04 / (rows.var(0) + 0.04))
    np.testing.assert_allclose(np.diag(noisy), 1)
    expected = np.einsum("ij,jk,ik->i", standard, np.linalg.inv(0.95 * noisy + 0.05 * np.eye(2)), standard)
    np.testing.assert_allclose(view.distances(rows, np.arange(500)) / view.per_unit, expected, rtol=1e-8)
    far = np.array([[0.0, 0.1], [6.0, 0.0]])  # ten standard deviations of the second, three of the first
    assert np.argmax(view.distances(far, np.arange(2))) == 1


def test_of_many_columns_the_rest_counts_by_its_mean_variance():
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(400, 90))
    view = View.fit(rows, np.arange(400))
    assert view.components.shape == (64, 90)
    assert np.corrcoef(view.distances(rows, np.arange(400)), (rows**2).sum(1))[0, 1] > 0.8


def test_a_linear_map_is_found_again():
    rng = np.random.default_rng(5)
    columns = rng.normal(size=(400, 3)) * [1, 10, 0] + 2
    center, weights = linear_map(columns, 1 + columns @ [0.5, -0.2, 3.0])
    np.testing.assert_allclose(weights, [0.5, -0.2, 0], rtol=5e-3)
    np.testing.assert_allclose(center, columns.mean(0))


def test_p_values_of_exchangeable_pictures_are_uniform_and_alarms_as_rare_as_stated():
    p_values, alarms = [], []
    for seed in range(60):
        monitor = ShiftMonitor.fit(COLUMNS, readings(40, 3 * seed), readings(60, 3 * seed + 1))
        fresh = readings(30, 3 * seed + 2)
        p_values.append(monitor.pictures(fresh)["p"].to_numpy()[0])
        alarms.append(monitor.run(fresh).p <= RUN_LEVEL)  # which is needed to speak
    assert kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(alarms) <= RUN_LEVEL + 2 * np.sqrt(RUN_LEVEL * (1 - RUN_LEVEL) / 60)


def test_chance_of_flagged_pictures_is_that_of_ranks():
    rng, small = np.random.default_rng(0), SimpleNamespace(reference=np.zeros(30), level=1 / 31)
    above = np.array([(rng.random(50) > rng.random(30).max()).sum() for _ in range(4000)])
    for count in (1, 3, 6):
        single = pd.DataFrame({"unlike": np.arange(50) < count, "view": "picture"})
        exact = ShiftMonitor._chance_far_out(small, single, "picture", 0.0)
        assert np.mean(above >= count) == pytest.approx(exact, abs=0.03)
        assert ShiftMonitor._chance_far_out(small, single, "answer", 0.0) == 1
        assert ShiftMonitor._chance_far_out(small, single, "picture", 0.12) == 1


def test_the_level_is_stated_exactly_for_few_pictures(monitor):
    assert monitor.level == 0.01
    small = ShiftMonitor.fit(COLUMNS, readings(60, 1), readings(30, 2))
    assert small.level == 1 / 31
    assert ShiftMonitor.fit(COLUMNS, readings(60, 1), readings(FEWEST - 1, 2)) is None


# --- whole runs ----------------------------------------------------------------------------------------------------


def test_silent_where_nothing_or_nothing_of_weight_has_changed(monitor):
    same = monitor.run(readings(100, 9))
    assert not same.shifted
    assert same.pictures == 100
    assert "no shift seen" in same.sentence
    light = monitor.run(readings(100, 9, moved=(0, 0, 6)))  # moves the log-odds by 0.06
    assert not light.shifted
    assert light.unlike <= 5
    shorter = readings(200, 9, per_image=1)
    assert not monitor.run(shorter).shifted


def test_speaks_where_what_moves_the_score_has_changed(monitor):
    odd = monitor.run(readings(100, 9, moved=(1.5, 0, 0)))
    assert odd.shifted
    assert odd.view == "scores"
    assert odd.error > TOLERANCE
    assert f"probabilities may be off by {odd.error:.0%}" in odd.sentence
    assert monitor.run(readings(100, 9, moved=(9, 0, 0))).unlike > 80


def test_pictures_of_another_kind_are_told_one_by_one_and_weak_changes_do_not_matter(monitor):
    photographs = readings(100, 9, shift=8.0)
    single = monitor.pictures(photographs)
    assert single["unlike"].all()
    assert set(single["view"]) == {"picture"}
    assert monitor.run(photographs).shifted
    assert monitor.run(photographs).view == "picture"
    weak = monitor.run(readings(100, 9, shift=0.3))
    assert not weak.shifted
    assert weak.changes["picture"] < 0.01
    assert "no shift in what the probabilities rest on, though the pictures have changed" in weak.sentence


def test_a_changed_share_counts_only_if_the_pictures_have_changed(seeing):
    alike = seeing.run(readings(100, 9, moved=(0.6, 0, 0), objects=(0, 0, 0)))
    assert alike.changes["scores"] < 0.01
    assert not alike.shifted  # the answers have changed, and the probabilities follow them
    assert alike.error == 0
    others = seeing.run(readings(100, 9, moved=(0.6, 0, 0), objects=(1, 0, 0)))
    assert others.shifted
    assert others.view == "scores"
    assert not seeing.run(readings(100, 9, objects=(1, 0, 0))).shifted  # other objects, and the same scores


def test_a_guarantee_that_its_own_probabilities_break_is_void(seeing):
    harder = readings(100, 9, moved=(0.6, 0, 0), objects=(0, 0, 0))
    promise = SimpleNamespace(risk="max_false_alarms", most=0.05)
    broken = seeing.run(harder, 0.5, promise)
    assert broken.shifted
    assert broken.view == "alarms"
    assert broken.risk == estimated_risk(expit(harder.log_odds), 0.5, "max_false_alarms") > 0.05
    assert "5.0% guaranteed" in broken.sentence
    assert not seeing.run(harder, 0.5, SimpleNamespace(risk="max_false_alarms", most=0.5)).shifted


def test_risks_estimated_from_right_probabilities_are_right():
    rng = np.random.default_rng(0)
    p = rng.beta(0.5, 2, 100_000)
    labels, warned = rng.random(len(p)) < p, p >= 0.4
    assert estimated_risk(p, 0.4, "max_false_alarms") == pytest.approx(warned[~labels].mean(), abs=0.005)
    assert estimated_risk(p, 0.4, "max_missed") == pytest.approx((~warned)[labels].mean(), abs=0.01)


def test_the_intercept_of_a_changed_share_is_found_again():
    rng = np.random.default_rng(0)
    rates = np.where(rng.random(60_000) < 0.5, 0.1, 0.4)  # at two places of an answer
    labels = rng.random(len(rates)) < expit(logit(rates) + 1.0)
    evidence = rng.normal(size=len(rates)) + 2 * labels
    before = expit(2 * evidence - 2 + logit(rates))  # right for the shares of before
    assert share_intercept(before, rates) == pytest.approx(1.0, abs=0.05)


def test_a_detector_that_was_calibrated_again_is_not_told_of_the_same_shift():
    train, calibration = halves(with_pictures(token_table(600)))
    detector, fresh = Detector(C=1.0).fit(train, calibration), with_pictures(token_table(300, seed=9))
    assert not detector.shift(fresh).shifted
    assert not detector.shift(fresh[fresh["mention_index"] < 2]).shifted  # shorter answers
    evidence = fresh.assign(nll=fresh["nll"] - 0.7, mass=fresh["mass"] + 0.07)
    shift = detector.shift(evidence)
    assert shift.shifted
    assert shift.view == "scores"
    assert "share of hallucinations" in shift.sentence
    assert not detector.recalibrate(evidence).shift(evidence).shifted
    assert detector.shift(fresh[:0]) is None


def test_without_scores_of_held_out_pictures_it_speaks_of_any_change():
    monitor = ShiftMonitor.fit(COLUMNS, readings(300, 1))
    assert not monitor.run(readings(100, 9)).shifted
    weak = monitor.run(readings(100, 9, shift=0.7))
    assert weak.shifted
    assert weak.view == "picture"


def test_only_first_mentions_are_compared_where_only_they_count():
    train, calibration = halves(token_table(200))
    detector, fresh = Detector(C=1.0).fit(train, calibration), token_table(60, seed=9)
    later = fresh[fresh["mention_index"] == 3].assign(repeat_index=1, nll=50.0)
    both = pd.concat([fresh, later], ignore_index=True)
    assert detector.shift(both) == detector.shift(fresh)
    assert len(detector.readings(both).mentions) == 60 * 4


def test_warnings_carry_the_p_value_of_their_picture(tmp_path):
    train, calibration = halves(with_pictures(token_table(200)))
    detector, odd = Detector(C=1.0).fit(train, calibration), with_pictures(token_table(20, seed=9), shift=8.0)
    rows = mention_warnings(odd, detector)
    assert rows["unlike"].all()
    assert (rows["shift_p"] == 1 / 101).all()
    write_warnings(rows, tmp_path / "warnings.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert lines[0]["unlike"] is True
    assert lines[0]["shift_p"] == 0.009901
    detector.monitor = None
    assert mention_warnings(odd, detector)["unlike"].isna().all()


def test_tables_without_pictures_are_compared_by_their_answers(monitor):
    train, calibration = halves(token_table(200))
    detector, fresh = Detector(C=1.0).fit(train, calibration), token_table(100, seed=9)
    assert detector.monitor.views.keys() == {"answer"}
    assert not detector.shift(fresh).shifted
    assert detector.shift(fresh.assign(nll=fresh["nll"] + 6)).shifted
    assert monitor.run(readings(100, 9).select(np.zeros(400, dtype=bool))) is None


def test_a_detector_carries_its_monitor_to_a_file_and_back(tmp_path):
    train, calibration = halves(with_pictures(token_table(200)))
    detector = Detector(C=1.0).fit(train, calibration)
    detector.save(tmp_path / "detector")
    loaded, fresh = Detector.load(tmp_path / "detector"), with_pictures(token_table(50, seed=9), 9)
    pd.testing.assert_frame_equal(*(fitted.monitor.pictures(fitted.readings(fresh)) for fitted in (loaded, detector)))
    assert loaded.shift(fresh) == detector.shift(fresh)
    assert loaded.manifest["monitor"] == detector.manifest["monitor"]
    loaded.save(tmp_path / "again")
    assert Detector.load(tmp_path / "again").shift(fresh) == detector.shift(fresh)
    detector.monitor = None
    detector.save(tmp_path / "older")
    assert Detector.load(tmp_path / "older").monitor is None


def test_a_monitor_of_foreign_columns_is_refused(tmp_path):
    train, calibration = halves(token_table(200))
    detector = Detector(C=1.0).fit(train, calibration)
    detector.monitor = replace(detector.monitor, columns=("other", *detector.monitor.columns[1:]))
    with pytest.raises(ArtefactError, match="columns that the detector reads"):
        detector.save(tmp_path / "detector")


# --- recalibration -------------------------------------------------------------------------------------------------


def test_shrunk_line_minimises_its_penalised_loss():
    rng = np.random.default_rng(1)
    x = rng.normal(size=80) * 2
    y = (rng.random(80) < expit(0.5 * x + 1)).astype(int)

    def loss(a, b):
        p = expit(a * x + b)
        return -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum() + (a - 1) ** 2 / 0.5 + b**2 / 4.5

    a, b = recalibration.shrunk_line(x, y)
    best = loss(a, b)
    assert all(loss(a + da, b + db) > best for da, db in ((1e-2, 0), (-1e-2, 0), (0, 1e-2), (0, -1e-2)))


def test_share_of_hallucinated_is_found_under_label_shift():
    rng = np.random.default_rng(2)
    labels = rng.random(20_000) < 0.6  # the detector was calibrated where the share was 0.2
    scores = rng.normal(size=20_000) + 1.5 * labels
    p = expit(1.5 * scores - 1.5**2 / 2 + logit(0.2))
    share = recalibration.share_of_hallucinated(p, 0.2)
    assert abs(share - 0.6) < 0.02
    assert abs(p.mean() - 0.6) > 0.05
    assert recalibration.share_of_hallucinated(p[:0], 0.2) == 0.2


@pytest.mark.parametrize("labelled", [True, False])
def test_a_recalibrated_detector_is_calibrated_and_makes_no_old_promise(tmp_path, labelled):
    train, calibration = halves(token_table(900, seed=3))
    detector = Detector(C=1.0, threshold={"max_false_alarms": 0.3}).fit(train, calibration)
    shifted = token_table(600, seed=8)
    if labelled:
        shifted = shifted.assign(nll=shifted["nll"] + 2)
    else:  # grounded mentions are rarer, and look as before
        keep = np.random.default_rng(0).random(len(shifted)) < 0.3
        shifted = shifted[(shifted["label"] != 0) | keep].reset_index(drop=True)
    few, test = shifted[shifted["group"].isin([f"image-{i}" for i in range(50)])], detector.select_mentions(shifted)
    few = few if labelled else shifted.assign(label=np.where(shifted["label"] >= 0, 0, -1))
    new = detector.recalibrate(few, labelled)
    before, after = (ece(test["label"].to_numpy(), part.predict(test)) for part in (detector, new))
    assert after < 0.5 * before
    assert after < 0.06
    assert new.certificate is None
    assert detector.certificate is not None
    assert "recalibrated" in new.notes or "labelled pictures" in new.warning_threshold.chosen
    new.save(tmp_path / "new")
    np.testing.assert_array_equal(Detector.load(tmp_path / "new").predict(test), new.predict(test))


def test_recalibration_needs_mentions_and_a_line():
    train, calibration = halves(token_table(200))
    detector = Detector(C=1.0).fit(train, calibration)
    with pytest.raises(DataError, match="no judged mention"):
        detector.recalibrate(token_table(10).assign(label=-1))
    isotonic = Detector(C=1.0, calibration="isotonic").fit(train, calibration)
    with pytest.raises(ConfigError, match="isotonic"):
        isotonic.recalibrate(token_table(10))


def test_recalibrated_without_labels_where_it_was_calibrated_it_stays_the_same():
    train, calibration = halves(token_table(300))
    kept = (calibration["label"] != 1) | (np.random.default_rng(0).random(len(calibration)) < 0.5)
    calibration = calibration[kept].reset_index(drop=True)  # fewer hallucinated mentions than in training
    detector = Detector(C=1.0).fit(train, calibration)
    detector.monitor = None  # which would refuse pictures that are as before
    same = detector.recalibrate(calibration, labelled=False)
    np.testing.assert_allclose(same.predict(calibration), detector.predict(calibration), atol=1e-3)


@pytest.mark.parametrize(
    ("features", "pictures", "seen"),
    [
        (0.0, 0.0, "no shift is seen"),
        (9.0, 0.0, "above all the answers have changed"),
        (0.0, 4.0, "above all the pictures have changed"),
    ],
)
def test_without_labels_nothing_but_a_changed_share_is_mended(features, pictures, seen):
    train, calibration = (with_pictures(fold, seed) for seed, fold in enumerate(halves(token_table(300))))
    detector = Detector(C=1.0).fit(train, calibration)
    table = with_pictures(token_table(200, seed=4), 4, shift=pictures)
    table = table.assign(nll=table["nll"] + features, mass=table["mass"] + features)
    with pytest.raises(DataError, match=f"^{seen} .*labels=50"):
        detector.recalibrate(table, labelled=False)
    assert detector.recalibrate(table).notes["recalibrated"]["labelled"]


def test_recalibrated_on_few_pictures_it_has_no_monitor():
    train, calibration = halves(token_table(200))
    detector = Detector(C=1.0).fit(train, calibration)
    assert detector.recalibrate(token_table(FEWEST - 1, seed=4)).monitor is None  # it would flag one picture in 20
    assert detector.recalibrate(token_table(FEWEST, seed=4)).monitor is not None
    unknown = token_table(60, seed=4).assign(**dict.fromkeys(("nll", "mass", "noise", "position"), np.nan))
    assert detector.recalibrate(unknown).shift(token_table(60, seed=5)) is not None  # nothing to compare answers with


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_recalibrated_it_still_warns_of_everything_or_nothing(threshold):
    train, calibration = halves(token_table(200))
    detector = Detector(C=1.0).fit(train, calibration)
    detector.threshold, detector.monitor = threshold, None
    assert detector.recalibrate(token_table(50, seed=4), labelled=False).threshold == threshold


def test_sentences_name_the_remedy():
    report = RunShift(100, 97, 0.01, 1e-9, "picture", True)
    assert report.sentence.startswith("shift in the pictures (97 of 100 pictures are unlike those")
    assert "recalibrate=" in report.sentence
    assert report.to_dict()["shifted"]
