"""The detector: what it learns, what it refuses, and that it comes back from disk as it was."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from helpers.token_tables import halves, token_table
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from stethoscope.core.errors import ArtefactError, ConfigError, DataError
from stethoscope.core.token_table import FeatureSchema, mention_rows
from stethoscope.detection.detector import Detector
from stethoscope.detection.estimators import C_VALUES, inner_folds, make_estimator, set_C
from stethoscope.detection.lookup import mention_warnings
from stethoscope.detection.warning_threshold import best_threshold
from stethoscope.metrics import classification

TRAIN, CALIBRATION = halves(token_table(400))
TEST = mention_rows(token_table(400, seed=9))


@pytest.fixture(scope="module")
def fitted():
    return Detector().fit(TRAIN, CALIBRATION)


FOREST = "sklearn.ensemble.RandomForestClassifier"


@pytest.mark.parametrize(
    ("estimator", "calibration"),
    [
        ("logistic", "platt"),
        ("logistic", "isotonic"),
        ("logistic", "none"),
        ("boosting", "platt"),
        ("per_head", "platt"),
    ],
)
def test_it_learns_and_its_probabilities_are_right(estimator, calibration):
    detector = Detector(estimator=estimator, calibration=calibration).fit(TRAIN, CALIBRATION)
    probabilities = detector.predict(TEST)
    assert probabilities.shape == (len(TEST),)
    assert 0 <= probabilities.min() <= probabilities.max() <= 1
    labels = TEST["label"].to_numpy()
    assert classification.auroc(labels, probabilities) > 0.75
    assert classification.ece(labels, probabilities) < 0.06


def test_it_is_the_logistic_regression_of_scikit_learn():
    detector = Detector(calibration="none", features=["nll", "mass"], C=1.0).fit(TRAIN)
    rows, names = mention_rows(TRAIN), ["nll", "mass"]
    low, high = np.quantile(rows[names].to_numpy(np.float64), [0.001, 0.999], axis=0)
    clipped = [np.clip(part[names].to_numpy(np.float64), low, high) for part in (rows, TEST)]
    scaler = StandardScaler().fit(clipped[0])
    plain = LogisticRegression(C=1.0, max_iter=2000).fit(scaler.transform(clipped[0]), rows["label"])
    assert detector.predict(TEST) == pytest.approx(plain.predict_proba(scaler.transform(clipped[1]))[:, 1], abs=1e-9)


@pytest.mark.parametrize("estimator", ["logistic", "boosting"])
def test_the_fit_is_deterministic(estimator):
    first, other = (Detector(estimator=estimator, seed=3).fit(TRAIN, CALIBRATION) for _ in range(2))
    assert (first.predict(TEST) == other.predict(TEST)).all()
    assert first.threshold == other.threshold


def test_it_calibrates_on_out_of_fold_scores_without_a_calibration_fold():
    probabilities = Detector().fit(TRAIN).predict(TEST)
    assert classification.ece(TEST["label"].to_numpy(), probabilities) < 0.06


def test_it_predicts_for_tokens_that_name_nothing_and_for_empty_tables(fitted):
    assert np.isfinite(fitted.predict(CALIBRATION)).all()
    assert fitted.predict(CALIBRATION[:0]).shape == (0,)


def test_only_judged_first_mentions_count(fitted):
    changed = TRAIN.copy()
    changed.loc[changed["label"] < 0, "nll"] = 100
    later = TRAIN.assign(repeat_index=1, label=1)  # second mentions, all hallucinated
    both = Detector().fit(changed.merge(later, how="outer"), CALIBRATION)
    assert both.predict(TEST) == pytest.approx(fitted.predict(TEST), abs=1e-6)
    assert Detector(repeats="all").fit(changed.merge(later, how="outer"), CALIBRATION).predict(TEST) != pytest.approx(
        fitted.predict(TEST), abs=1e-3
    )


def test_objects_can_be_told_apart(fitted):
    labels = TEST["label"].to_numpy()
    informed = Detector(objects=True).fit(TRAIN, CALIBRATION)
    assert (
        classification.auroc(labels, informed.predict(TEST)) > classification.auroc(labels, fitted.predict(TEST)) + 0.02
    )
    strange = TEST.assign(object="zebra")
    assert np.isfinite(informed.predict(strange)).all()


def test_features_are_chosen_by_name_and_pattern():
    assert Detector(features=["n*"], exclude=["noise"]).fit(TRAIN, CALIBRATION).features == ("nll",)
    with pytest.raises(ConfigError, match="unknown feature 'nil'; did you mean 'nll'"):
        Detector(features=["nil"]).fit(TRAIN, CALIBRATION)
    with pytest.raises(ConfigError, match="unknown feature to exclude 'nil'; did you mean 'nll'"):
        Detector(exclude=["nil"]).fit(TRAIN, CALIBRATION)
    with pytest.raises(ConfigError, match="leaves no feature"):
        Detector(exclude=["*"]).fit(TRAIN, CALIBRATION)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "boost"}, "did you mean 'boosting'"),
        ({"estimator": {"n_estimators": 5}}, "should be one of logistic"),
        ({"estimator": ["logistic"]}, "should be one of logistic"),
        ({"estimator": {"_target_": FOREST, "n_trees": 5}}, "unknown setting of detector.estimator 'n_trees'"),
        ({"estimator": {"_target_": FOREST, "max_depth": "deep"}}, f"{FOREST} refuses its settings.*max_depth"),
        ({"calibration": "plat"}, "did you mean 'platt'"),
        ({"repeats": "last"}, "There are: all, first"),
        ({"C": 0}, "above 0"),
        ({"C": "small"}, "detector.C='small' should be a number above 0"),
        ({"C": float("inf")}, "should be a number"),  # no file could hold it
        ({"seed": -1}, "detector.seed=-1 should be a whole number from 0"),
        ({"seed": None}, "should be a whole number"),
        ({"features": "nll"}, "detector.features='nll' should be a list"),
        ({"features": [1]}, "should be a list of names"),
        ({"exclude": None}, "detector.exclude=None should be a list"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Detector(**settings)


def test_without_the_threshold_that_was_asked_for_it_is_not_fitted():
    detector = Detector(C=1.0, threshold={"max_false_alarms": 0.001})
    with pytest.raises(DataError, match="no threshold can guarantee"):
        detector.fit(TRAIN, CALIBRATION)
    assert not detector.fitted


def test_training_data_that_teach_nothing_are_refused():
    with pytest.raises(DataError, match="training fold are grounded"):
        Detector().fit(TRAIN[TRAIN["label"] < 1], CALIBRATION)
    with pytest.raises(DataError, match="calibration fold are hallucinated"):
        Detector().fit(TRAIN, CALIBRATION[CALIBRATION["label"] == 1])
    with pytest.raises(DataError, match="no judged mention"):
        Detector().fit(TRAIN[:0], CALIBRATION)
    with pytest.raises(DataError, match="without any value: mass"):
        Detector().fit(TRAIN.assign(mass=np.float32(np.nan)), CALIBRATION)
    with pytest.raises(DataError, match="infinite values: mass"):
        Detector().fit(TRAIN.assign(mass=np.float32(np.inf)), CALIBRATION)
    with pytest.raises(DataError, match="200 images are in both folds, 'image-0' for one"):
        Detector().fit(TRAIN, TRAIN)
    with pytest.raises(DataError, match="no column label"):
        Detector().fit(TRAIN.drop(columns="label"), CALIBRATION)
    with pytest.raises(DataError, match="no column object"):
        Detector(objects=True).fit(TRAIN.drop(columns="object"), CALIBRATION)


@pytest.mark.parametrize("estimator", ["logistic", "boosting"])
def test_gaps_are_bridged(estimator):
    holes = np.random.default_rng(0).random(len(TRAIN)) < 0.2
    gappy = TRAIN.assign(mass=TRAIN["mass"].where(~holes))
    detector = Detector(estimator=estimator).fit(gappy, CALIBRATION)
    assert classification.auroc(TEST["label"].to_numpy(), detector.predict(TEST)) > 0.75
    assert np.isfinite(detector.predict(TEST.assign(nll=np.float32(np.nan)))).all()


def test_inner_folds_that_lack_a_class_are_no_choice():
    table = TRAIN[TRAIN["mention_index"] == 0].reset_index(drop=True).iloc[:60]
    groups, labels = [f"image-{row:02d}" for row in range(60)], [int(row % 5 == 0) for row in range(60)]
    table = table.assign(group=groups, label=labels)
    assert inner_folds(table["group"].to_numpy(), table["label"].to_numpy()) is None
    assert 0 < Detector(calibration="none").fit(table).predict(table).mean() < 1


@pytest.mark.parametrize("flipped", [0.0, 0.3, 0.45])
def test_C_is_the_best_of_all(flipped):
    """Larger values than the first that is worse are not tried: the loss has one minimum."""
    rows = mention_rows(TRAIN)
    flips = np.random.default_rng(1).random(len(rows)) < flipped
    rows = rows.assign(label=np.where(flips, 1 - rows["label"], rows["label"]))
    matrix, labels = rows[["nll", "mass", "noise", "position"]].to_numpy(float), rows["label"].to_numpy()
    losses = []
    for C in C_VALUES:
        odds = np.zeros(len(rows))
        for train, test in inner_folds(rows["group"].to_numpy(), labels):
            fitted = set_C(make_estimator("logistic"), C).fit(matrix[train], labels[train])
            odds[test] = fitted.decision_function(matrix[test])
        losses.append(np.logaddexp(0, np.where(labels == 1, -odds, odds)).mean())
    assert C_VALUES[np.argmin(losses)] == Detector(features=["nll", "mass", "noise", "position"]).fit(rows).C


def test_a_fit_that_fails_leaves_nothing_to_predict_with():
    detector = Detector(C=0.1).fit(TRAIN)
    with pytest.raises(DataError):
        detector.fit(TRAIN.drop(columns="noise").assign(label=0))
    assert not detector.fitted
    with pytest.raises(ArtefactError, match="not fitted"):
        detector.predict(TRAIN.drop(columns="noise"))


def test_a_wild_value_does_not_decide_alone():
    detector = Detector().fit(TRAIN, CALIBRATION)
    usual, wild = detector.predict(TEST), detector.predict(TEST.assign(noise=np.float32(1e6)))
    assert np.abs(usual - wild).max() < 0.2


def test_a_table_with_other_features_is_refused(fitted):
    with pytest.raises(ArtefactError, match="missing: mass; not expected: weight"):
        fitted.predict(TEST.rename(columns={"mass": "weight"}))
    with pytest.raises(ArtefactError, match="not expected: extra"):
        fitted.predict(TEST.assign(extra=np.float32(0)))
    shuffled = TEST[list(TEST.columns[::-1])]
    assert (fitted.predict(shuffled) == fitted.predict(TEST)).all(), "the order of columns does not matter"
    with pytest.raises(ArtefactError, match="not fitted"):
        Detector().predict(TEST)


@pytest.mark.parametrize(
    ("estimator", "calibration", "settings"),
    [
        ("logistic", "platt", {"threshold": {"max_missed": 0.3}}),
        ("logistic", "none", {"objects": True}),
        ("boosting", "isotonic", {"objects": True}),
        ("per_head", "platt", {"factored": True, "C": 0.1}),
        ("boosting", "none", {"factored": True}),
        ({"_target_": FOREST, "n_estimators": 20}, "platt", {"objects": True}),
        ({"_target_": "sklearn.ensemble.ExtraTreesClassifier", "n_estimators": 5}, "none", {"factored": True}),
        ("sklearn.tree.DecisionTreeClassifier", "isotonic", {}),
    ],
)
def test_it_comes_back_from_disk_as_it_was(tmp_path, estimator, calibration, settings):
    detector = Detector(estimator, calibration, exclude=["noise"], **settings).fit(TRAIN, CALIBRATION)
    detector.save(tmp_path / "detector", {"model": {"name": "testbed"}, "task": "chair", "anything": [1]})
    again = Detector.load(tmp_path / "detector")
    assert (again.predict(CALIBRATION) == detector.predict(CALIBRATION)).all()
    assert (again.threshold, again.settings, again.notes) == (detector.threshold, detector.settings, detector.notes)
    assert again.manifest == detector.manifest
    assert again.certificate == detector.certificate
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "README.md",
        "detector",
        "detector.safetensors",
        "manifest.json",
    ]
    again.save(tmp_path / "detector")  # replaces the old one
    assert Detector.load(tmp_path / "detector").notes == detector.notes


def test_the_manifest_says_what_it_is(tmp_path, fitted):
    fitted.save(tmp_path / "d")
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert manifest["schema_version"] == 3
    assert manifest["features"] == ["nll", "mass", "noise", "position"]
    assert manifest["feature_schema_hash"] == FeatureSchema.of(TRAIN).hash
    assert set(manifest["versions"]) >= {"scikit-learn", "numpy"}
    digest = hashlib.sha256((tmp_path / "d" / "detector.safetensors").read_bytes()).hexdigest()
    assert manifest["sha256"] == {"detector.safetensors": digest}
    assert {"model", "task", "label", "split", "figures", "settings", "threshold", "created"} <= set(manifest)


def test_saving_replaces_no_foreign_folder(tmp_path, fitted):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtefactError, match="is not a detector"):
        fitted.save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    with pytest.raises(ArtefactError, match="not fitted"):
        Detector().save(tmp_path / "new")


def rewrite(folder, **changes):
    """Changes a manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_changed_file_is_refused(tmp_path, fitted):
    fitted.save(tmp_path / "d")
    path = tmp_path / "d" / "detector.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="was changed"):
        Detector.load(tmp_path / "d")
    rewrite(tmp_path / "d", sha256={"detector.safetensors": hashlib.sha256(b"junk").hexdigest()})
    path.write_bytes(b"junk")
    with pytest.raises(ArtefactError, match="cannot be read"):
        Detector.load(tmp_path / "d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": ["mass", "nll", "noise", "position"]}, "do not belong together"),
        ({"schema_version": 99}, "schema version 99"),
        ({"settings": {"estimator": "oracle"}}, "damaged"),
        ({"threshold": None}, "damaged"),
        ({"sha256": None}, "was changed"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path, fitted, changes, message):
    fitted.save(tmp_path / "d")
    rewrite(tmp_path / "d", **changes)
    with pytest.raises(ArtefactError, match=message):
        Detector.load(tmp_path / "d")


def test_missing_and_broken_files_are_named(tmp_path, fitted):
    with pytest.raises(ArtefactError, match=r"no detector in .*nowhere: there is no such folder"):
        Detector.load(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match=r"no manifest\.json"):
        Detector.load(tmp_path)
    fitted.save(tmp_path / "d")
    (tmp_path / "d" / "detector.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"detector\.safetensors is missing"):
        Detector.load(tmp_path / "d")
    (tmp_path / "d" / "manifest.json").write_text("{")
    with pytest.raises(ArtefactError, match="is damaged"):
        Detector.load(tmp_path / "d")


def split_up(table, pieces=4):
    """Every mention as several sub-tokens, of which the later ones tell more than the first."""
    parts = [table.assign(nll=table["nll"] * (0.2 if piece == 0 else 1), 
                          is_first_subtoken=table["is_first_subtoken"] & (piece == 0))
             for piece in range(pieces)]  # fmt: skip
    return pd.concat([parts[0], *(part[part["label"] >= 0] for part in parts[1:])]).sort_index(kind="stable")


def test_a_promise_is_about_mentions_where_all_sub_tokens_are_rows():
    train, calibration = (split_up(part) for part in halves(token_table(800, seed=4)))
    promise = {"max_false_alarms": 0.1}
    detector = Detector(features=["nll"], subtokens="all", C=1.0, threshold=promise).fit(train, calibration)
    grounded = calibration[calibration["is_first_subtoken"] & (calibration["label"] == 0)]
    assert detector.certificate.mentions == len(grounded)
    warned = mention_warnings(split_up(token_table(800, seed=5)), detector)
    assert warned[warned["label"] == 0]["warned"].mean() < 0.13


def test_without_a_calibration_fold_the_threshold_is_chosen_out_of_fold():
    """A detector knows its own training images too well: their best threshold is too high for others."""
    random = np.random.default_rng(0)
    table = token_table(250, seed=6)
    noise = {f"noise_{n}": random.normal(size=len(table)).astype(np.float32) for n in range(40)}
    table = table.assign(**noise)
    detector = Detector("boosting").fit(table)
    rows = mention_rows(table)
    own = best_threshold(rows["label"].to_numpy(int), detector.predict(rows))
    assert detector.threshold < own - 0.02
    assert "out of fold" in detector.manifest["threshold"]["chosen"]
    plain = Detector("boosting", calibration="none").fit(table)
    assert plain.manifest["threshold"]["chosen"].startswith("highest F1 on the training fold, first")


def test_a_run_stands_for_its_detector_and_a_path_for_no_repository(fitted, tmp_path):
    fitted.save(tmp_path / "run" / "detector")
    assert Detector.load(tmp_path / "run").threshold == Detector.from_pretrained(tmp_path / "run").threshold
    with pytest.raises(ArtefactError, match="is a path, not a repository"):
        fitted.push_to_hub("./here")
    with pytest.raises(ArtefactError, match=r"there is no folder \./nowhere"):
        Detector.from_pretrained("./nowhere")
