"""Learners of published detectors: Adam as in torch, HaloProbe by hand, declared in the feature sets."""

import math

import numpy as np
import pytest
import torch
from helpers.token_tables import halves, token_table
from scipy.special import logit

from stethoscope.core.errors import ArtefactError, ConfigError, DataError
from stethoscope.core.token_table import mention_rows
from stethoscope.detection.detector import Detector
from stethoscope.detection.evidence_prior import MAX_WEIGHT, balance
from stethoscope.detection.learners import (
    AdamNetwork,
    LayerNetworks,
    NetworkLearner,
    NetworkSettings,
    describe_learner,
    make_learner,
)
from stethoscope.features import FeatureSet, named_set, set_names
from stethoscope.metrics import classification

TRAIN, CALIBRATION = halves(token_table(500))
TEST = mention_rows(token_table(400, seed=9))
LABELS = TEST["label"].to_numpy()
COLUMNS = ["nll", "mass", "noise", "position"]
HALOPROBE = NetworkSettings(external=("position",))


@pytest.mark.parametrize("hidden", [(5,), (6, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_network_is_fitted_as_by_torch(hidden, weighted):
    """The same first weights and batches, cross-entropy and ``torch.optim.Adam`` with its weight decay."""
    random = np.random.default_rng(0)
    X, y = random.normal(size=(80, 4)), (random.random(80) < 0.4).astype(int)
    weight = random.uniform(0.2, 3, (5, 16)) if weighted else np.ones((5, 16))
    weight = (weight / weight.mean(axis=1, keepdims=True)).ravel()  # else the decay of a batch is another
    settings = NetworkSettings(hidden, epochs=6, batch_size=16, learning_rate=0.01, weight_decay=0.05)
    fitted = AdamNetwork(settings, shuffle=False).fit(X, y, weight)
    first = AdamNetwork(NetworkSettings(hidden, 1, 16, 1e-30, 0.0), shuffle=False).fit(X, y)

    weights = [torch.tensor(part, requires_grad=True) for part in first.coefs_]
    biases = [torch.tensor(part, requires_grad=True) for part in first.intercepts_]
    groups = [{"params": weights, "weight_decay": 0.05}, {"params": biases, "weight_decay": 0.0}]
    optimiser = torch.optim.Adam(groups, lr=0.01)

    def forward(states):
        for index, (matrix, bias) in enumerate(zip(weights, biases, strict=True)):
            states = (states.relu() if index else states) @ matrix + bias
        return states[:, 0]

    inputs, targets, each = torch.tensor(X), torch.tensor(y).double(), torch.tensor(weight)
    for _ in range(6):
        for start in range(0, 80, 16):
            part = slice(start, start + 16)
            losses = torch.nn.functional.binary_cross_entropy_with_logits(
                forward(inputs[part]), targets[part], reduction="none"
            )
            optimiser.zero_grad()
            ((losses * each[part]).sum() / each[part].sum()).backward()
            optimiser.step()
    # the two put Adam's epsilon of 1e-8 at slightly different places
    np.testing.assert_allclose(fitted.decision_function(X), forward(inputs).detach(), atol=1e-4)
    assert np.abs(fitted.coefs_[0] - first.coefs_[0]).max() > 0.05


def test_haloprobe_is_evidence_times_prior():
    """p = f g / (f g + (1 - f)(1 - g)), f with weights 1 / g(label), g on the external columns alone."""
    learner = NetworkLearner(COLUMNS, HALOPROBE, seed=3).fit(TRAIN)
    rows = mention_rows(TRAIN)
    labels, position = rows["label"].to_numpy(), rows["position"].to_numpy(dtype=float)
    slope, intercept = np.polynomial.polynomial.polyfit(position, prior_logit(learner, rows), 1)[::-1]
    g = [1 / (1 + math.exp(-(slope * value + intercept))) for value in position]
    # the optimum of a logistic regression: no residual is left on the input or on average
    assert abs(np.mean(labels - g)) < 1e-3
    assert abs(np.mean((labels - g) * position)) < 1e-2
    weights = balance(prior_logit(learner, rows), labels)
    by_hand = np.array([1 / value if label else 1 / (1 - value) for value, label in zip(g, labels, strict=True)])
    np.testing.assert_allclose(weights, np.minimum(by_hand / np.mean(by_hand), MAX_WEIGHT), rtol=1e-6)
    for low in range(0, 24, 6):  # with these weights the classes are balanced wherever the mention is
        inside = (position >= low) & (position < low + 6)
        assert np.average(labels[inside], weights=weights[inside]) == pytest.approx(0.5, abs=0.1)
    f = 1 / (1 + np.exp(-(learner.scores(TEST) - prior_logit(learner, TEST))))
    g = 1 / (1 + np.exp(-prior_logit(learner, TEST)))
    np.testing.assert_allclose(learner.predict(TEST), f * g / (f * g + (1 - f) * (1 - g)), rtol=1e-9)
    plain = Detector(features=COLUMNS).fit(TRAIN).predict(TEST)
    assert classification.auroc(LABELS, learner.predict(TEST)) > classification.auroc(LABELS, plain) - 0.01


def prior_logit(learner, rows):
    return learner._prior.decision_function(rows[["position"]].to_numpy(dtype=float))


def test_calibration_changes_no_ranking():
    raw = NetworkLearner(COLUMNS, HALOPROBE).fit(TRAIN)
    calibrated = NetworkLearner(COLUMNS, HALOPROBE).fit(TRAIN, CALIBRATION)
    assert (np.argsort(raw.scores(TEST)) == np.argsort(calibrated.scores(TEST))).all()
    line = np.polyfit(raw.scores(TEST), logit(calibrated.predict(TEST)), 1)
    np.testing.assert_allclose(np.polyval(line, raw.scores(TEST)), logit(calibrated.predict(TEST)), atol=1e-8)
    assert classification.ece(LABELS, calibrated.predict(TEST)) < 0.06


def test_the_same_seed_gives_the_same_scores_and_gaps_are_filled():
    settings = NetworkSettings((8,), class_weights=True)
    first, second = (NetworkLearner(COLUMNS, settings, seed=1).fit(TRAIN).scores(TEST) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(NetworkLearner(COLUMNS, settings).fit(TRAIN).scores(TEST[:0])) == 0
    holes = TRAIN.assign(nll=TRAIN["nll"].where(TRAIN.index % 5 > 0))
    assert np.isfinite(NetworkLearner(COLUMNS, settings).fit(holes).predict(TEST)).all()
    with pytest.raises(ArtefactError, match="was not fitted"):
        NetworkLearner(COLUMNS, settings).predict(TEST)


def test_class_weights_move_the_scores_to_an_even_prior():
    means = []
    for class_weights in (False, True):
        learner = NetworkLearner(COLUMNS, NetworkSettings(epochs=40, class_weights=class_weights)).fit(TRAIN)
        rows = mention_rows(TRAIN)
        p, label = learner.predict(rows), rows["label"].to_numpy()
        weight = np.where(label == 1, 1 / label.mean(), 1 / (1 - label.mean()))
        means.append((p.mean() - label.mean(), np.average(p, weights=weight) - 0.5))
    assert abs(means[0][0]) < 0.03 < abs(means[0][1])
    assert abs(means[1][1]) < 0.03 < abs(means[1][0])


def test_every_set_declares_a_learner_that_can_be_made():
    kinds = {}
    for name in set_names():
        features = named_set(name)
        if features.learner is not None:
            assert features.score is None
            learner = make_learner(features.names, features.learner, {})
            kinds[name] = features.learner["kind"]
            classes = {"boosting": Detector, "layer_networks": LayerNetworks}
            assert isinstance(learner, classes.get(kinds[name], NetworkLearner))
    assert kinds["paper/haloprobe"] == "balanced_network"
    assert all(name.startswith("paper/") for name in kinds)
    halo = make_learner(named_set("paper/haloprobe").names, named_set("paper/haloprobe").learner, {})
    assert (halo.settings, halo.external) == (
        NetworkSettings((128,), 10, 128, 1e-3, 1e-3, external=("position", "repetition")),
        ("position", "repetition"),
    )


def test_a_wrong_declaration_is_refused():
    with pytest.raises(ConfigError, match=r"learner.kind 'netwrk'; did you mean 'network'"):
        make_learner(COLUMNS, {"kind": "netwrk"}, {})
    with pytest.raises(ConfigError, match="learner setting 'epoch'; did you mean 'epochs'"):
        make_learner(COLUMNS, {"kind": "network", "epoch": 3}, {})
    with pytest.raises(ConfigError, match="kind=boosting has no settings, but epochs is given"):
        make_learner(COLUMNS, {"kind": "boosting", "epochs": 3}, {})
    with pytest.raises(ConfigError, match="external should be given for balanced_network"):
        make_learner(COLUMNS, {"kind": "network", "external": ["position"]}, {})
    with pytest.raises(ConfigError, match="no column of the method"):
        make_learner(["nll"], {"kind": "balanced_network", "external": ["position"]}, {})
    with pytest.raises(ConfigError, match="learns nothing"):
        FeatureSet([], ["nll"], score="nll", learner={"kind": "network"})


@pytest.mark.parametrize("kind", ["network", "layer_networks"])
def test_a_calibration_fold_of_one_label_is_refused(kind):
    learner = make_learner(COLUMNS[:2], {"kind": kind, "epochs": 1}, {})
    with pytest.raises(DataError, match="calibration fold are grounded"):
        learner.fit(TRAIN, CALIBRATION[CALIBRATION["label"] < 1])


def test_hidden_units_are_a_list_of_numbers():
    with pytest.raises(ConfigError, match=r"learner\.hidden=128 should be a list"):
        make_learner(COLUMNS, {"kind": "network", "hidden": 128}, {})


def test_a_row_says_how_its_method_learned():
    assert describe_learner(None, 7) == "logistic regression on 7 columns"
    text = describe_learner({"kind": "balanced_network", "external": ["position"]}, 69)
    assert text == "balanced network and prior (128 hidden units, 10 epochs) on 69 columns"


def test_a_network_per_layer_is_the_mean_of_their_probabilities():
    def layered(table):
        return table.rename(columns={"nll": "state_l00_d0000", "mass": "state_l00_d0001", "noise": "state_l01_d0000"})

    train, calibration, test = map(layered, (TRAIN, CALIBRATION, TEST))
    names, settings = ["state_l00_d0000", "state_l01_d0000", "state_l00_d0001"], NetworkSettings((8,), epochs=20)
    fitted = LayerNetworks(names, settings, seed=4).fit(train, calibration)
    assert [network.columns for network in fitted.networks] == [(names[0], names[2]), (names[1],)]
    parts = [NetworkLearner(n.columns, settings, 4).fit(train).scores(test) for n in fitted.networks]
    mean = sum(1 / (1 + np.exp(-part)) for part in parts) / 2
    np.testing.assert_allclose(fitted.scores(test), logit(mean), rtol=1e-6)
    assert abs(fitted.predict(calibration).mean() - mention_rows(calibration)["label"].mean()) < 0.02
    assert classification.auroc(LABELS, fitted.predict(test)) == classification.auroc(LABELS, mean)
    assert [network.columns for network in LayerNetworks([*names[:1], "nll", "mass"], settings).networks] == [
        (names[0],), ("nll", "mass")
    ]  # fmt: skip
