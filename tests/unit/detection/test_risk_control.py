"""Promised thresholds: kept on simulated images of which the truth is known, not wasteful, and refused when too few."""

import itertools
import math

import numpy as np
import pytest
from helpers.token_tables import halves, token_table

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.token_table import mention_rows
from stethoscope.detection.detector import Detector
from stethoscope.detection.risk_control import (
    MAX_BET,
    ORDER_SEED,
    Certificate,
    RiskGuarantee,
    certify,
    choose_limit,
    images_needed,
    log_wealth,
    per_image,
)
from stethoscope.detection.training import train_detector

REPETITIONS = 200
MOST_BROKEN = 18  # of 200 at 5 %: a binomial variable is above that once in 500


def images(count, seed):
    """Clustered mentions: images differ in how high all their scores are, and busier images have higher ones."""
    rng = np.random.default_rng(seed)
    level = rng.normal(size=count)
    sizes = np.minimum(1 + rng.poisson(np.exp(0.8 + 0.3 * level)), 8)
    groups = np.repeat(np.arange(count), sizes)
    labels = (rng.random(len(groups)) < 0.3).astype(int)
    scores = 0.8 * level[groups] + rng.normal(size=len(groups)) + 2 * labels
    return scores, labels, groups


def risk(promise, threshold, population):
    """Share of errors among all mentions of many images."""
    scores, labels, _ = population
    if promise.risk == "max_false_alarms":
        return (scores[labels == 0] >= threshold).mean()
    return (scores[labels == 1] < threshold).mean()


def reference(promise, drawn):
    """Mentions per image that can be in error, as the training fold would give them."""
    _, labels, groups = drawn
    return per_image(groups, labels == (0 if promise.risk == "max_false_alarms" else 1))


@pytest.fixture(scope="module")
def population():
    return images(40_000, seed=10**6)


@pytest.mark.parametrize(
    ("promise", "count", "least"),
    [
        (RiskGuarantee("max_false_alarms", 0.1), 400, 0.06),
        (RiskGuarantee("max_false_alarms", 0.05), 600, 0.025),
        (RiskGuarantee("max_missed", 0.2), 400, 0.12),
        (RiskGuarantee("max_missed", 0.2, confidence=0.8), 400, 0.15),
    ],
    ids=str,
)
def test_promises_are_kept_and_not_wasteful(promise, count, least, population):
    """200 times new calibration images: the true risk is above the promise in at most 5 % of them, and near it."""
    shares, naive = [], 0
    known = reference(promise, images(500, seed=10**7))
    side = 1 if promise.risk == "max_false_alarms" else -1
    for seed in range(REPETITIONS):
        drawn = images(count, seed)
        shares.append(risk(promise, certify(*map(np.asarray, drawn), promise, known).threshold, population))
        at_risk = side * drawn[0][drawn[1] == (0 if side > 0 else 1)]
        naive += risk(promise, side * np.quantile(at_risk, 1 - promise.most), population) > promise.most
    allowed = MOST_BROKEN if promise.confidence == 0.95 else 58  # of 200 at 20 %, the same once in 500
    assert (np.array(shares) > promise.most).sum() <= allowed
    assert np.mean(shares) >= least
    assert naive > 60, "a threshold that only fits the calibration images breaks the promise half of the time"


def wealth_by_hand(errors, n_at_risk, most, delta, limit, mean):
    """Bet with plain numbers, as the docstring of the module says: second moment, wealth still lacking, least bet."""
    wealth, squares = 1.0, 10 * 1.5 * most * (1 - most) * mean
    for i, (wrong, size) in enumerate(zip(errors, n_at_risk, strict=True)):
        left = len(errors) - i
        lacking = max(math.log(1 / (delta * wealth)), 0)
        bet = max(
            math.sqrt(2 * lacking / (left * squares / (10 + i))),
            1.05 * (math.exp(min(lacking / left, 50)) - 1) / (most * mean),
        )
        loss = (wrong - most * size) * (1 if size <= limit else limit / size)
        wealth *= 1 - min(bet, MAX_BET / ((1 - most) * limit)) * loss
        squares += loss**2
    return wealth


def test_wealth_is_that_of_the_bets_in_the_docstring():
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 6, 60)
    errors = rng.binomial(sizes[:, None], [0.0, 0.01, 0.05, 0.2], size=(60, 4))
    promise = RiskGuarantee("max_false_alarms", 0.1, confidence=0.9)
    computed = log_wealth(errors, sizes[:, None], promise, 3, 2.2)
    by_hand = [wealth_by_hand(column, sizes, 0.1, 0.1, 3, 2.2) for column in errors.T]
    assert np.exp(computed) == pytest.approx(by_hand, rel=1e-9)
    assert computed[0] >= promise.required > computed[3]


@pytest.mark.parametrize(
    "outcomes",
    [
        {(0, 1): 0.8, (1, 1): 0.2},  # single mentions
        {(0, 3): 0.8, (3, 3): 0.2},  # all mentions of an image are wrong, or none
        {(0, 1): 0.5, (0, 2): 0.275, (2, 2): 0.225 - 0.2 * 0.125, (0, 4): 0.025},  # errors where there are more
        {(0, 1): 0.4, (1, 3): 0.6},
    ],
    ids=["single", "together", "size", "even"],
)
def test_wealth_is_a_fair_game_for_every_sequence_of_eight_images(outcomes):
    """At a risk of exactly alpha the mean wealth over all sequences is 1; 1 / delta is reached with delta at most."""
    chances = np.array(list(outcomes.values()))
    errors, sizes = np.array(list(outcomes)).T
    most = float(chances @ errors / (chances @ sizes))
    sequences = np.array(list(itertools.product(range(len(outcomes)), repeat=8))).T
    weights = np.prod(chances[sequences], axis=0)
    for confidence in (0.5, 0.8, 0.95):
        promise = RiskGuarantee("max_false_alarms", most, confidence)
        wealth = log_wealth(errors[sequences], sizes[sequences], promise, sizes.max(), chances @ sizes)
        assert weights @ np.exp(wealth) == pytest.approx(weights.sum())
        assert weights[wealth >= promise.required].sum() <= 1 - confidence


def test_a_limit_promises_the_share_in_which_an_image_counts_no_more_than_it():
    """The game is fair at the clipped risk; the docstring bounds how far that of all mentions is from it."""
    sizes, errors, chances = np.array([1, 2, 6]), np.array([0, 0, 3]), np.array([0.5, 0.3, 0.2])
    share = np.minimum(1, 2 / sizes)
    most = float(chances @ (share * errors) / (chances @ (share * sizes)))
    sequences = np.array(list(itertools.product(range(3), repeat=8))).T
    weights = np.prod(chances[sequences], axis=0)
    promise = RiskGuarantee("max_false_alarms", most, 0.8)
    wealth = log_wealth(errors[sequences], sizes[sequences], promise, 2, 1.4)
    assert weights @ np.exp(wealth) == pytest.approx(1)
    beyond = 1 - chances @ (share * sizes) / (chances @ sizes)
    assert most < chances @ errors / (chances @ sizes) <= most + (1 - most) * beyond


def test_a_bolder_promise_gives_a_bolder_threshold():
    drawn = images(600, seed=1)
    known = reference(RiskGuarantee("max_false_alarms", 0.1), drawn)
    given = [certify(*drawn, RiskGuarantee("max_false_alarms", most), known) for most in (0.05, 0.1, 0.2, 0.4)]
    assert [bound.threshold for bound in given] == sorted((bound.threshold for bound in given), reverse=True)
    assert [bound.observed for bound in given] == sorted(bound.observed for bound in given)
    assert all(bound.observed < bound.most for bound in given)
    surer = certify(*drawn, RiskGuarantee("max_false_alarms", 0.1, confidence=0.999), known)
    assert surer.threshold > given[1].threshold


@pytest.mark.parametrize("count", [100, 300])
def test_the_found_threshold_is_the_boldest_that_passes(count):
    """Against a slow search: every distinct score as threshold, from the most cautious, until the test fails."""
    drawn = scores, labels, groups = images(count, seed=2)
    promise = RiskGuarantee("max_false_alarms", 0.1)
    known = reference(promise, drawn)
    limit = choose_limit(known, count, promise)
    chances, order = per_image(groups, labels == 0), np.random.default_rng(ORDER_SEED).permutation(count)
    passed = np.inf
    for threshold in np.unique(scores)[::-1]:
        errors = per_image(groups, (labels == 0) & (scores >= threshold))
        wealth = log_wealth(errors[order, None], chances[order, None], promise, limit, np.minimum(known, limit).mean())
        if wealth[0] < np.log(20):
            break
        passed = threshold
    certificate = certify(*drawn, promise, known)
    assert ((scores >= certificate.threshold) == (scores >= passed)).all()
    assert certificate.observed == (scores[labels == 0] >= passed).mean()
    assert (certificate.images, certificate.mentions, certificate.most_per_image) == (count, (labels == 0).sum(), limit)
    assert certificate.counted == np.minimum(chances, limit).sum() / chances.sum()


def test_a_miss_is_a_false_alarm_turned_round():
    scores, labels, groups = images(500, seed=3)
    missed = certify(scores, labels, groups, RiskGuarantee("max_missed", 0.2), np.array([2, 8]))
    turned = certify(-scores, 1 - labels, groups, RiskGuarantee("max_false_alarms", 0.2), np.array([2, 8]))
    assert missed.threshold == pytest.approx(-turned.threshold)
    assert missed.observed == turned.observed == (scores[labels == 1] < missed.threshold).mean()


def test_equal_scores_are_flagged_together():
    scores, labels, groups = images(400, seed=4)
    coarse = np.round(scores)
    certificate = certify(coarse, labels, groups, RiskGuarantee("max_false_alarms", 0.2), np.array([8]))
    assert certificate.threshold % 1 == 0.5, "between two values"


def test_images_with_more_mentions_than_known_count_no_more_than_those():
    """One image with a hundred false alarms neither breaks the test nor decides alone."""
    scores, labels, groups = images(400, seed=5)
    promise = RiskGuarantee("max_false_alarms", 0.1)
    many = np.r_[scores, np.full(100, 9.0)], np.r_[labels, np.zeros(100, int)], np.r_[groups, np.full(100, 999)]
    certificate = certify(*many, promise, reference(promise, images(400, seed=6)))
    assert certificate.most_per_image <= 8
    assert certificate.observed < 0.2


@pytest.mark.parametrize(("count", "enough"), [(25, False), (50, False), (120, True), (400, True)])
def test_too_few_images_are_refused_with_how_many_are_needed(count, enough):
    drawn = images(count, seed=7)
    promise = RiskGuarantee("max_false_alarms", 0.05)
    known = reference(promise, images(500, seed=8))
    if enough:
        certify(*drawn, promise, known)
        return
    with pytest.raises(DataError, match=rf"the {count} calibration images .* at least about \d+ are needed") as error:
        certify(*drawn, promise, known)
    needed = images_needed(reference(promise, drawn), promise, int(known.max()))
    assert str(needed) in str(error.value)
    assert needed > count


def test_two_hundred_images_suffice_for_five_percent_whatever_the_largest_image():
    """With every mention counted the largest image decides, and most draws of calibration images are refused."""
    refused = {None: 0, 100: 0}
    for seed in range(40):
        drawn = images(200, seed)
        for per_image_limit in refused:
            promise = RiskGuarantee("max_false_alarms", 0.05, per_image=per_image_limit)
            try:
                certificate = certify(*drawn, promise, np.r_[reference(promise, images(500, seed + 1000)), 14])
            except DataError:
                refused[per_image_limit] += 1
            else:
                assert certificate.most_per_image < 14
                assert certificate.counted < 1
                assert str(certificate).endswith("% count)")
    assert refused[None] <= 4
    assert refused[100] == 40


def test_more_images_count_more_mentions_and_then_all():
    known = reference(RiskGuarantee("max_false_alarms", 0.05), images(1000, seed=1))
    limits = [choose_limit(known, count, RiskGuarantee("max_false_alarms", 0.05)) for count in (50, 200, 400, 2000)]
    assert limits == sorted(limits)
    assert limits[0] < limits[-1] == known.max()
    for per_image_limit, limit in ((1, 1), (3, 3), (100, known.max())):
        promise = RiskGuarantee("max_false_alarms", 0.05, per_image=per_image_limit)
        assert choose_limit(known, 200, promise) == limit
    certificate = certify(*images(2000, seed=2), RiskGuarantee("max_false_alarms", 0.05), np.r_[known, 8])
    assert certificate.counted == 1
    assert str(certificate) == "at most 0.05 of the grounded mentions get a warning, at confidence 0.95"


def test_certificates_from_before_the_limit_was_stated_can_be_read():
    values = certify(*images(400, seed=1), RiskGuarantee("max_missed", 0.2), np.array([2, 8])).to_dict()
    assert Certificate.parse(values).to_dict() == values
    del values["counted"]
    assert Certificate.parse(values).counted == 1


def test_the_number_of_images_needed_is_where_a_faultless_detector_passes():
    promise, known = RiskGuarantee("max_false_alarms", 0.1), np.array([2])
    needed = images_needed(np.array([2, 2]), promise, 2)

    def perfect(count):
        groups = np.repeat(np.arange(count), 3)
        labels = np.tile([0, 0, 1], count)
        return certify(labels + 0.0, labels, groups, promise, known)

    assert perfect(needed).observed == 0
    with pytest.raises(DataError, match="no threshold"):
        perfect(needed - 1)


def test_a_detector_that_is_sure_of_what_is_wrong_gets_no_threshold():
    _, labels, groups = images(300, seed=9)
    with pytest.raises(DataError, match="only a useless threshold"):
        certify(np.where(labels == 0, 5.0, 0.0), labels, groups, RiskGuarantee("max_false_alarms", 0.1), np.array([8]))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"max_false_alarm": 0.05}, "did you mean 'max_false_alarms'"),
        ({"max_false_alarms": 5}, "max_false_alarms=5 should be a number between 0 and 1"),
        ({"max_false_alarms": 0.05, "max_missed": 0.1}, "should name one of"),
        ({"confidence": 0.9}, "should name one of"),
        ({"max_missed": 0.1, "confidence": 1.0}, r"confidence=1\.0 should be"),
        ({"max_missed": True}, "max_missed=True should be"),
        ({"max_missed": 0.1, "per_image": 0}, "per_image=0 should be a whole number of at least 1"),
        ({"max_missed": 0.1, "per_image": 2.5}, r"per_image=2\.5 should be a whole number"),
    ],
)
def test_wrong_promises_are_named(wanted, message):
    with pytest.raises(ConfigError, match=message):
        Detector(threshold=wanted)


def test_settings_that_cannot_promise_are_refused():
    with pytest.raises(ConfigError, match="should be f1 or"):
        Detector(threshold="best")
    with pytest.raises(ConfigError, match="use platt or none"):
        Detector(calibration="isotonic", threshold={"max_missed": 0.1})
    with pytest.raises(DataError, match="needs a calibration fold"):
        Detector(threshold={"max_missed": 0.2}).fit(token_table(100))
    train, calibration = halves(token_table(60))
    with pytest.raises(
        DataError, match=r"no threshold can guarantee at most 0\.01 of the grounded mentions get a warning"
    ):
        Detector(threshold={"max_false_alarms": 0.01}).fit(train, calibration)


@pytest.mark.parametrize("settings", [{}, {"calibration": "none"}, {"factored": True}], ids=str)
def test_a_detector_warns_as_certified(settings):
    """On the calibration fold its warnings are the certified ones, and the manifest says what was promised."""
    train, calibration = halves(token_table(800, seed=2))
    detector = Detector(threshold={"max_false_alarms": 0.1}, **settings).fit(train, calibration)
    judged = mention_rows(calibration)
    flagged = detector.predict(judged) >= detector.threshold
    certificate = detector.manifest["threshold"]["certificate"]
    assert flagged[judged["label"] == 0].mean() == pytest.approx(certificate["observed"])
    assert 0.04 < certificate["observed"] < 0.1
    assert certificate["images"] == calibration["group"].nunique()
    assert (certificate["risk"], certificate["most"], certificate["confidence"]) == ("max_false_alarms", 0.1, 0.95)
    chosen = "at most 0.1 of the grounded mentions get a warning, at confidence 0.95, first mentions of an object only"
    assert detector.manifest["threshold"]["chosen"] == chosen


def test_training_reports_the_promise_and_what_came_of_it():
    results = train_detector(
        token_table(900, seed=3), Detector(threshold={"max_missed": 0.2}), replicates=50
    ).results.to_dict()
    certificate = results["threshold"]
    assert certificate["certificate"]["risk"] == "max_missed"
    assert certificate["missed"]["value"] < 0.2
    assert certificate["missed"]["value"] == pytest.approx(1 - certificate["recall"]["value"])
