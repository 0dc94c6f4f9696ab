"""Evidence x prior: what each part knows, that they add up, and what single features push."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers.token_tables import halves, token_table
from scipy.special import expit, logit

from stethoscope.core.errors import ConfigError
from stethoscope.core.token_table import mention_rows
from stethoscope.detection.detector import Detector
from stethoscope.detection.evidence_prior import REST
from stethoscope.detection.lookup import WARNING_COLUMNS, mention_warnings, write_warnings
from stethoscope.metrics import classification

TRAIN, CALIBRATION = halves(token_table(700))
TEST = mention_rows(token_table(700, seed=9))
LABELS = TEST["label"].to_numpy()


@pytest.fixture(scope="module")
def factored():
    return Detector(factored=True).fit(TRAIN, CALIBRATION)


@pytest.fixture(scope="module")
def plain():
    return Detector().fit(TRAIN, CALIBRATION)


@pytest.mark.parametrize("kind", ["logistic", "boosting", "per_head"])
def test_evidence_and_prior_add_up_to_the_probability(kind):
    detector = Detector(kind, factored=True, C=None if kind == "logistic" else 0.1).fit(TRAIN, CALIBRATION)
    why = detector.explain(TEST)
    assert expit(why.evidence + why.prior) == pytest.approx(detector.predict(TEST), abs=1e-12)
    # not to the last bit: that of a product depends on where NumPy 1.26 has it in memory
    assert why.probability == pytest.approx(detector.predict(TEST), abs=1e-15)
    assert (why.contributions is None) == (kind != "logistic")
    assert classification.ece(LABELS, why.probability) < 0.05
    assert classification.auroc(LABELS, why.probability) > 0.8


def test_the_prior_knows_place_and_name_alone(factored):
    """It does not change with the features, follows the truth from which the table was made, and costs no accuracy."""
    why, blind = factored.explain(TEST), factored.explain(TEST.assign(nll=np.float32(0), mass=np.float32(0)))
    assert (why.prior == blind.prior).all()
    kind = TEST["object"].map({"dog": 0, "cat": 1, "cup": 2, "car": 3}).to_numpy()
    truth = TEST["token"].to_numpy() / 12 + 0.8 * kind
    assert np.corrcoef(why.prior, truth)[0, 1] > 0.97
    knowing = Detector(objects=True).fit(TRAIN, CALIBRATION)
    assert classification.auroc(LABELS, why.probability) > classification.auroc(LABELS, knowing.predict(TEST)) - 0.01


def test_the_evidence_is_fair_to_place_and_name(factored, plain):
    """The hidden evidence depends on neither in this table, nor does the learned one; a plain detector's score does."""
    evidence = factored.explain(TEST).evidence
    position = TEST["token"].to_numpy()
    assert abs(np.corrcoef(evidence, position)[0, 1]) < 0.12
    assert np.corrcoef(logit(plain.predict(TEST)), position)[0, 1] > 0.3
    assert classification.auroc(LABELS, evidence) > 0.7


def test_without_evidence_the_prior_decides(factored):
    """Features that say nothing: the posterior is the prior, and that is right about the base rates."""
    table = token_table(900, seed=4, signal=0.0)
    train, calibration = halves(table)
    detector = Detector(factored=True).fit(train, calibration)
    test = mention_rows(token_table(900, seed=5, signal=0.0))
    why = detector.explain(test)
    assert np.std(why.evidence) < 0.3 * np.std(why.prior)
    assert classification.ece(test["label"].to_numpy(), expit(why.prior)) < 0.05


def test_pushes_add_up_to_the_evidence(factored, plain):
    for detector in (factored, plain):
        why = detector.explain(TEST)
        assert list(why.contributions.columns) == [*detector.features, REST]
        assert why.contributions.sum(axis=1).to_numpy() == pytest.approx(why.evidence, abs=1e-9)
        high = TEST.assign(nll=TEST["nll"] + 1)
        moved = detector.explain(high)
        change = moved.contributions["nll"] - why.contributions["nll"]
        assert change.to_numpy() == pytest.approx(moved.evidence - why.evidence, abs=1e-9)
        assert change.median() > 0
        strongest = why.top(0, count=2)
        assert len(strongest) == 2
        assert abs(strongest[0][1]) >= abs(strongest[1][1])
        assert why.contributions.loc[0, strongest[0][0]] == strongest[0][1]


def test_a_missing_value_pushes_under_its_own_name():
    holes = np.random.default_rng(0).random(len(TRAIN)) < 0.2
    detector = Detector().fit(TRAIN.assign(mass=TRAIN["mass"].where(~holes)), CALIBRATION)
    gappy = TEST.assign(mass=np.float32(np.nan))
    why = detector.explain(gappy)
    assert why.contributions.sum(axis=1).to_numpy() == pytest.approx(why.evidence, abs=1e-9)
    assert why.contributions["mass"].nunique() == 1


def test_a_plain_detector_takes_the_base_rate_for_its_prior(plain, tmp_path):
    why = plain.explain(TEST)
    assert expit(why.evidence + why.prior) == pytest.approx(why.probability, abs=1e-12)
    assert expit(why.prior[0]) == pytest.approx(mention_rows(CALIBRATION)["label"].mean())
    assert np.ptp(why.prior) == 0
    plain.save(tmp_path / "d")
    assert (Detector.load(tmp_path / "d").explain(TEST).prior == why.prior).all()


def test_isotonic_probabilities_are_not_split():
    detector = Detector(calibration="isotonic").fit(TRAIN, CALIBRATION)
    with pytest.raises(ConfigError, match="isotonic calibration has no slope"):
        detector.explain(TEST)
    assert mention_warnings(TEST, detector)["evidence"].isna().all()
    with pytest.raises(ConfigError, match="the prior knows the objects"):
        Detector(objects=True, factored=True)


def test_it_meets_objects_numbers_and_tokens_it_does_not_know(factored):
    strange = TEST.assign(object="zebra", mention_index=99, repeat_index=7, token=1000)
    assert np.isfinite(factored.predict(strange)).all()
    assert np.isfinite(factored.predict(CALIBRATION)).all(), "tokens that name nothing"
    assert len(factored.explain(TEST[:0]).evidence) == 0


def test_few_images_are_learned_from_without_inner_folds():
    detector = Detector(factored=True).fit(token_table(8), token_table(40, seed=3).assign(
        group=lambda table: "other-" + table["group"]))  # fmt: skip
    assert np.isfinite(detector.predict(TEST)).all()


def test_warnings_carry_evidence_and_prior(factored, tmp_path):
    table = pd.concat([TRAIN, CALIBRATION], ignore_index=True)
    folds = {"train": table["group"].isin(set(TRAIN["group"])).to_numpy()}
    rows = mention_warnings(table, factored, folds)
    assert list(rows.columns) == list(WARNING_COLUMNS)
    assert len(rows) == (table["mention_index"] >= 0).sum()
    assert (rows["fold"] == "train").sum() == (TRAIN["mention_index"] >= 0).sum()
    write_warnings(rows, tmp_path / "warnings.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    for line in lines[:50]:
        assert expit(line["evidence"] + line["prior"]) == pytest.approx(line["probability"], abs=1e-5)
    assert any(line["prior"] < 0 < line["evidence"] for line in lines)


def test_subtokens_are_put_together_before_a_mention_is_judged():
    """Two sub-tokens per mention, the second with the opposite of the first's noise: their mean knows more."""
    noise = np.random.default_rng(1).normal(size=len(TRAIN) + len(CALIBRATION)).astype(np.float32)

    def doubled(table):
        hum = 3 * noise[: len(table)]
        named = (table["mention_index"] >= 0).to_numpy()
        noisy = table.assign(nll=table["nll"] + hum, mass=np.float32(0), at=np.arange(len(table)))
        two = noisy[named].assign(nll=(table["nll"] - hum)[named], is_first_subtoken=False, start=99, end=107)
        return pd.concat([noisy, two]).sort_values("at", kind="stable").drop(columns="at").reset_index(drop=True)

    train, calibration, test = doubled(TRAIN), doubled(CALIBRATION), doubled(TEST)
    probabilities = {}
    for subtokens in ("first", "mean", "all"):
        detector = Detector(exclude=["mass"], subtokens=subtokens).fit(train, calibration)
        rows = mention_warnings(test, detector)
        assert len(rows) == len(TEST)
        assert (rows["end"] == 107).all()
        probabilities[subtokens] = classification.auroc(rows["label"].to_numpy(), rows["probability"].to_numpy(float))
    assert probabilities["mean"] > probabilities["first"] + 0.05


def test_an_object_is_judged_once_by_a_detector_of_first_mentions():
    """The second mention of an object, whose features say the opposite, changes nothing."""
    test = TEST.assign(object=TEST["object"] + TEST["mention_index"].astype(str))
    later = TEST["mention_index"] + 1000
    again = test.assign(nll=-TEST["nll"], mention_index=later, repeat_index=1, start=TEST["start"] + 500)
    both = pd.concat([again, test], ignore_index=True)
    for repeats, same in (("first", True), ("all", False)):
        rows = mention_warnings(both, Detector(repeats=repeats).fit(TRAIN, CALIBRATION))
        later, first = rows[: len(TEST)], rows[len(TEST) :]
        equal = np.allclose(later["probability"].astype(float), first["probability"].astype(float))
        assert equal == same
        assert later["start"].tolist() == again["start"].tolist()
