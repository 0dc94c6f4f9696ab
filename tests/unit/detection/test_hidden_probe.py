"""Two scores of hidden states: what labels say of them, and what the model says of itself when it is asked."""

import numpy as np
import pytest
import torch
from helpers.token_tables import halves, token_table
from scipy.special import expit
from torch import nn

from stethoscope.core.errors import ArtefactError, ConfigError
from stethoscope.core.token_table import mention_rows
from stethoscope.detection.design_matrix import is_hidden
from stethoscope.detection.detector import Detector
from stethoscope.detection.hidden_probe import COLUMNS, DECAY, RATE, AdamW, HiddenProbe, backward
from stethoscope.detection.recalibration import FREEDOM, mixture_line, reply_boundary
from stethoscope.metrics import classification

SIZE = 12


def with_states(table, seed=0):
    """States whose direction 0 is what ``nll`` is blurred from, behind a bend; the model when asked knows it too."""
    rng = np.random.default_rng(seed)
    mixed = np.linalg.qr(np.random.default_rng(7).normal(size=(SIZE, SIZE)))[0]
    latent = rng.normal(size=(len(table), SIZE))
    truth = np.where(table["label"] < 0, rng.integers(0, 2, len(table)), table["label"])
    latent[:, 0] = (2 * truth - 1) * np.abs(rng.normal(size=len(table)) + 0.8) * rng.choice([1, 1, 1, -0.5], len(table))
    states = np.tanh(latent) @ mixed
    columns = {f"hidden_last_q_d{i:04d}": states[:, i].astype(np.float32) for i in range(SIZE)}
    odds = (-3 * latent[:, 0] + 0.5 * rng.normal(size=len(table))).astype(np.float32)
    return table.assign(**columns, verify_odds=np.where(table["mention_index"] < 0, np.nan, odds))


TRAIN, CALIBRATION = halves(with_states(token_table(400)))
TEST = mention_rows(with_states(token_table(400, seed=9), seed=9))
LABELS = TEST["label"].to_numpy()
STATES = [name for name in TEST if is_hidden(name)]
UNTAUGHT = TEST.drop(columns="verify_odds")


def area(detector, rows=UNTAUGHT):
    return classification.auroc(LABELS, detector.predict(rows))


def test_scores_are_those_of_the_networks():
    states = TEST[STATES].to_numpy(np.float64)
    targets = np.column_stack([LABELS, np.full(len(LABELS), np.nan)])
    probe = HiddenProbe.fit(states, targets, members=2)
    total = 0
    for member in range(2):
        first, last = nn.Linear(*probe.hidden[member].shape), nn.Linear(*probe.output[member].shape)
        with torch.no_grad():
            for layer, weights, bias in (
                (first, probe.hidden[member], probe.hidden_bias[member]),
                (last, probe.output[member], probe.bias[member]),
            ):
                layer.weight.copy_(torch.tensor(weights.T))
                layer.bias.copy_(torch.tensor(bias))
            inputs = torch.tensor((states - states.mean(0)) / states.std(0)).float()
            total = total + last(first(inputs).relu()).numpy()
    scores = probe.transform(states)
    np.testing.assert_allclose(scores[:, 0], total[:, 0] / 2, atol=1e-4)
    assert classification.auroc(LABELS, scores[:, 0]) > 0.8
    assert (scores[:, 1] == 0).all()  # a score without a single target
    holes = states.copy()
    holes[:, 3] = np.nan
    filled = np.where(np.isnan(holes), states.mean(0), holes)
    np.testing.assert_allclose(probe.transform(holes), probe.transform(filled))


def test_each_score_has_networks_of_its_own():
    states = TEST[STATES].to_numpy(np.float64)
    targets = np.column_stack([LABELS, expit(-TEST["verify_odds"])])
    both = HiddenProbe.fit(states, targets, seed=3, members=2, epochs=4, taught_epochs=6)
    labels = HiddenProbe.fit(states, targets, seed=3, members=2, epochs=4)
    replies = HiddenProbe.fit(states, targets * [np.nan, 1], seed=3, members=2, epochs=6)
    expected = np.column_stack([labels.transform(states)[:, 0], replies.transform(states)[:, 1]])
    np.testing.assert_allclose(both.transform(states), expected, atol=1e-12)
    unasked = np.arange(len(states)) % 3 == 0
    targets[unasked, 1] = np.nan
    part = HiddenProbe.fit(states, targets, members=1, epochs=1, taught_epochs=6)
    targets[unasked, 0] = 1 - targets[unasked, 0]  # the labels of others do not reach the second score
    other = HiddenProbe.fit(states, targets, members=1, epochs=1, taught_epochs=6)
    assert np.array_equal(part.transform(states)[:, 1], other.transform(states)[:, 1])


def test_gradient_and_steps_are_those_of_torch():
    random = np.random.default_rng(0)
    shapes = (5, 4), (4,), (4, 2), (2,)
    parts = [random.normal(size=shape).astype(np.float32) for shape in shapes]
    slopes = [np.zeros_like(part) for part in parts]
    rows, kept = random.normal(size=(9, 5)).astype(np.float32), (random.random((9, 4)) > 0.3).astype(np.float32) / 0.7
    wanted, share = random.random((9, 2)).astype(np.float32), random.random((9, 2)).astype(np.float32)
    backward(parts, rows, kept, wanted, share, slopes)
    leaves = [torch.tensor(part, requires_grad=True) for part in parts]
    odds = ((torch.tensor(rows) @ leaves[0] + leaves[1]).relu() * torch.tensor(kept)) @ leaves[2] + leaves[3]
    losses = nn.functional.binary_cross_entropy_with_logits(odds, torch.tensor(wanted), reduction="none")
    (losses * torch.tensor(share)).mean(0).sum().backward()
    for slope, leaf in zip(slopes, leaves, strict=True):
        np.testing.assert_allclose(slope, leaf.grad, atol=1e-6)

    steps, weights = 23, random.normal(size=6).astype(np.float32)
    leaf = torch.tensor(weights, requires_grad=True)
    optimiser = torch.optim.AdamW([leaf], RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    ours = AdamW(weights, steps)
    for _ in range(steps):
        gradient = random.normal(size=6).astype(np.float32)
        leaf.grad = torch.tensor(gradient)
        optimiser.step()
        schedule.step()
        ours.step(gradient)
        np.testing.assert_allclose(weights, leaf.detach(), rtol=1e-5, atol=1e-6)


def test_a_seed_gives_the_same_probe():
    states, targets = TEST[STATES].to_numpy(np.float64), np.column_stack([LABELS, LABELS])
    first, again, other = (HiddenProbe.fit(states, targets, seed, members=1) for seed in (0, 0, 1))
    assert np.array_equal(first.hidden, again.hidden)
    assert not np.array_equal(first.hidden, other.hidden)


@pytest.mark.parametrize("kind", ["logistic", "boosting"])
def test_the_probe_gains_and_prediction_needs_no_verification(kind):
    strength = 0.1 if kind == "logistic" else None
    probed = Detector(kind, C=strength, exclude=["verify_odds"]).fit(TRAIN, CALIBRATION)
    without = Detector(kind, C=strength, exclude=["verify_odds", *STATES]).fit(TRAIN, CALIBRATION)
    assert area(probed) > area(without, TEST) + 0.03
    assert "verify_odds" not in probed.schema.names
    assert np.array_equal(probed.predict(UNTAUGHT), probed.predict(TEST))
    assert classification.ece(LABELS, probed.predict(UNTAUGHT)) < 0.05


def test_verification_teaches():
    """The labels of 30 images say little of the states; the model's verification of the same mentions says more."""
    few = TRAIN[TRAIN["group"].isin(TRAIN["group"].unique()[:30])]
    taught = Detector(exclude=["verify_odds"], C=0.1).fit(few, CALIBRATION)
    alone = Detector(exclude=["verify_odds"], C=0.1).fit(few.assign(verify_odds=np.nan), CALIBRATION)
    assert area(taught) > area(alone)


def test_replies_of_all_labelled_mentions_are_parted_too():
    rows = TRAIN.assign(verify_odds=TRAIN["verify_odds"] + 4)
    ready, readier = (
        Detector(exclude=["verify_odds"], C=0.1).fit(rows.assign(verify_odds=rows["verify_odds"] + more), CALIBRATION)
        for more in (0, 4)
    )
    np.testing.assert_allclose(ready.predict(UNTAUGHT), readier.predict(UNTAUGHT), atol=1e-3)


def test_mentions_without_a_label_teach_by_their_replies():
    known = TRAIN["group"].isin(TRAIN["group"].unique()[:20])
    asked = TRAIN["verify_odds"].where(~known)
    more, untold = (TRAIN.assign(label=TRAIN["label"].where(known, -1), verify_odds=odds) for odds in (asked, np.nan))
    settings = {"exclude": ["verify_odds"], "C": 0.1}
    taught = Detector(**settings).fit(more, CALIBRATION)
    alone, without = (Detector(**settings).fit(rows, CALIBRATION) for rows in (more[known], untold))
    assert area(taught) > area(alone) + 0.02
    assert np.array_equal(alone.predict(UNTAUGHT), without.predict(UNTAUGHT))


def test_scores_of_training_rows_are_made_without_the_image():
    """With noise for states a probe that had seen the row would be trusted too much."""
    noise = {name: np.random.default_rng(3).normal(size=len(TRAIN)).astype(np.float32) for name in STATES}
    probed = Detector(features=["nll", *STATES], C=1.0).fit(
        TRAIN.assign(**noise).drop(columns="verify_odds"), CALIBRATION.drop(columns="verify_odds")
    )
    plain = Detector(features=["nll"], C=1.0).fit(TRAIN, CALIBRATION)
    assert area(probed) == pytest.approx(area(plain, TEST), abs=0.03)


def test_without_labels_no_label_is_read():
    detectors = [
        Detector(labels="none").fit(train, calibration)
        for train, calibration in ((TRAIN, CALIBRATION), (unjudged(TRAIN), unjudged(CALIBRATION)))
    ]
    assert np.array_equal(*(detector.predict(UNTAUGHT) for detector in detectors))
    assert area(detectors[0]) > 0.8
    assert set(detectors[0].features) == set(STATES)
    with pytest.raises(ConfigError, match="needs labels"):
        Detector(labels="none", threshold={"max_false_alarms": 0.1})


def test_without_labels_the_parts_of_the_scores_calibrate():
    """The model says no far too rarely; where scores have no two parts, its replies are all there is."""
    random = np.random.default_rng(5)

    def parted(table):
        latent = random.normal(size=(len(table), SIZE))
        latent[:, 0] += np.where(table["label"] == 1, 3, -1)
        states = {name: latent[:, i].astype(np.float32) for i, name in enumerate(STATES)}
        return table.assign(**states, verify_odds=12 - 4 * latent[:, 0] + random.normal(size=len(table)))

    train, calibration, test = map(parted, (TRAIN, CALIBRATION, TEST))
    detector, by_replies = (
        Detector(labels="none", calibration=kind).fit(unjudged(train), unjudged(calibration))
        for kind in ("platt", "none")
    )
    errors = [classification.ece(LABELS, each.predict(test)) for each in (detector, by_replies)]
    assert errors[0] < 0.05 < errors[1]
    assert "highest expected F1" in detector.manifest["threshold"]["chosen"]
    whole = Detector(labels="none").fit(unjudged(TRAIN), unjudged(CALIBRATION))
    assert "highest F1" in whole.manifest["threshold"]["chosen"]


def test_a_mixture_gives_the_line_of_its_upper_part():
    random = np.random.default_rng(0)
    labels = (random.random(4000) < 0.3).astype(int)
    scores = random.standard_t(FREEDOM, 4000) * np.where(labels, 1, 2) + np.where(labels, 3, -5)
    slope, intercept = mixture_line(scores)
    assert classification.ece(labels, expit(slope * scores + intercept)) < 0.02
    assert mixture_line(scores[:50]) is None
    assert mixture_line(np.zeros(500)) is None


def unjudged(table):
    return table.assign(label=-1)


def test_few_labels_are_enough_beside_many_mentions_without():
    known = TRAIN["group"].isin(TRAIN["group"].unique()[:60])
    mixed = TRAIN.assign(label=np.where(known, TRAIN["label"], -1))
    few = Detector(labels="few").fit(mixed)
    alone = Detector(features=STATES).fit(TRAIN[known].drop(columns="verify_odds"))
    assert area(few) > area(alone) + 0.02
    assert classification.ece(LABELS, few.predict(UNTAUGHT)) < 0.1


@pytest.mark.parametrize("labels", ["few", "none"])
def test_a_model_that_says_yes_too_readily_teaches_as_well(labels):
    known = TRAIN["group"].isin(TRAIN["group"].unique()[:60]) & (labels == "few")
    rows = TRAIN.assign(label=np.where(known, TRAIN["label"], -1))
    ready, readier = (
        Detector(labels=labels, C=0.1).fit(rows.assign(verify_odds=rows["verify_odds"] + readiness))
        for readiness in (4, 8)
    )
    np.testing.assert_allclose(ready.predict(UNTAUGHT), readier.predict(UNTAUGHT), atol=1e-3)
    assert area(ready) > 0.8


def test_replies_are_parted_where_the_labels_say_or_below_most():
    random, unknown = np.random.default_rng(1), np.full(5000, -1)
    wrong = random.random(5000) < 0.2
    odds = np.where(wrong, 1, 7) + random.normal(size=5000)
    assert 3 < reply_boundary(odds, unknown) < 5
    labels = np.where(random.random(5000) < 0.1, wrong, -1)
    assert np.mean(odds < reply_boundary(odds, labels)) == pytest.approx(0.2, abs=0.05)
    assert reply_boundary(odds, np.where(wrong, -1, 0)) == reply_boundary(odds, unknown)  # a single kind says nothing
    assert reply_boundary(odds - 7, unknown) == 0  # a model that says no by itself
    assert reply_boundary(np.zeros(0), np.zeros(0)) == 0


@pytest.mark.parametrize("labels", ["few", "none"])
def test_what_has_no_verification_is_refused(labels):
    with pytest.raises(ConfigError, match="default_verified"):
        Detector(labels=labels).fit(TRAIN.drop(columns="verify_odds"), CALIBRATION)
    with pytest.raises(ConfigError, match="hidden_probe"):
        Detector(labels=labels, hidden_probe=False)


@pytest.mark.parametrize("settings", [{}, {"labels": "few"}, {"labels": "none"}, {"factored": True}])
def test_saved_and_loaded_it_predicts_the_same(tmp_path, settings):
    detector = Detector(C=0.1, exclude=() if "labels" in settings else ["verify_odds"], **settings)
    detector.fit(TRAIN, CALIBRATION)
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector")
    assert np.array_equal(loaded.predict(UNTAUGHT), detector.predict(UNTAUGHT))
    explained = loaded.explain(UNTAUGHT)
    assert set(COLUMNS) <= set(explained.contributions)
    assert not any(is_hidden(name) for name in explained.contributions)
    with pytest.raises(ArtefactError, match="missing"):
        loaded.predict(UNTAUGHT.drop(columns=STATES[0]))


def test_every_dimension_is_a_feature_without_the_probe():
    plain = Detector(hidden_probe=False, C=0.1).fit(TRAIN, CALIBRATION)
    assert set(STATES) <= set(plain.explain(TEST).contributions)


def test_without_visual_consistency_the_states_are_read():
    blind = Detector(visual_consistency=False, C=0.1, exclude=["verify_odds"]).fit(TRAIN, CALIBRATION)
    assert set(STATES) <= set(blind.features)
