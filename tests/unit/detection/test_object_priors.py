"""The two priors on what is in a picture, against computations by other means."""

import numpy as np
import pytest

from stethoscope.detection.caption_objects import (
    CO_OCCURRENCE,
    INDEX,
    LEAST,
    RIDGE,
    SCENE,
    SMOOTHING,
    PairPrior,
    ScenePrior,
    objects_of_word,
    read_caption,
)

DOG, CAT, CAR = (INDEX[name] for name in ("dog", "cat", "car"))


@pytest.fixture(scope="module")
def presence():
    return (np.random.default_rng(0).random((60, len(INDEX))) < 0.2).astype(float)


def test_co_occurrence_is_a_smoothed_conditional_probability(presence):
    prior = PairPrior.fit(presence)
    dogs = [row for row in presence if row[DOG]]
    base = (sum(row[CAT] for row in presence) + 0.5) / (len(presence) + 1)
    both = sum(row[CAT] for row in dogs)
    expected = np.log((both + SMOOTHING * base) / (len(dogs) + SMOOTHING) / base)
    assert prior.base[CAT] == pytest.approx(base)
    assert prior.gain[DOG, CAT] == pytest.approx(expected)


def test_co_occurrence_reads_what_is_named_before_and_all_else(presence):
    prior = PairPrior.fit(presence)
    rows = prior.columns(read_caption("a dog, a cat and a car"))
    gain, base = prior.gain, prior.base
    logit = np.log(base / (1 - base))
    cat = [logit[CAT], *[gain[DOG, CAT]] * 3, (gain[DOG, CAT] + gain[CAR, CAT]) / 2,
           max(gain[DOG, CAT], gain[CAR, CAT]), gain[DOG, CAT] + gain[CAR, CAT]]  # fmt: skip
    assert rows[1] == pytest.approx(cat)
    assert rows[0, 1:4].tolist() == [0, 0, 0]  # nothing is named before the first
    assert prior.columns(read_caption("a dog"))[0].tolist() == pytest.approx([logit[DOG], *[0] * 6])
    assert prior.columns(read_caption("nothing")).shape == (0, len(CO_OCCURRENCE))


@pytest.fixture(scope="module")
def scenes():
    """Captions in which a street goes with cars and a sofa with dogs, whether or not they are named."""
    random = np.random.default_rng(1)
    texts, rows = [], []
    for _ in range(120):
        outside, silent = random.random(2) < 0.5
        row = np.zeros(len(INDEX))
        row[CAR if outside else DOG] = 1
        row[CAT] = random.random() < 0.3
        named = "" if silent else (" with a car" if outside else " with dogs")
        texts.append(f"a {'busy street' if outside else 'soft carpet'}{named}{' and a cat' * int(row[CAT])}")
        rows.append(row)
    return [read_caption(text) for text in texts], np.array(rows)


def test_the_scene_prior_is_ridge_regression_without_the_own_words(scenes):
    captions, truth = scenes
    prior = ScenePrior.fit(captions, truth)
    for index in (DOG, CAR, CAT):  # a fit by least squares on the columns that are left, penalty as extra rows
        own = [len(prior.words) + index] + [i for i, word in enumerate(prior.words) if index in objects_of_word(word)]
        assert len(own) > 1
        X = np.zeros((len(captions), len(prior.mean)))
        for row, caption in enumerate(captions):
            X[row, [prior.words.index(word) for word in caption.words if word in prior.words]] = 1
            X[row, [len(prior.words) + name for name in caption.objects]] = 1
        X -= X.mean(axis=0)
        kept = np.setdiff1d(np.arange(X.shape[1]), own)
        y = truth[:, index] - truth[:, index].mean()
        stacked = np.vstack([X[:, kept], np.sqrt(RIDGE) * np.eye(len(kept))])
        solution = np.linalg.lstsq(stacked, np.concatenate([y, np.zeros(len(kept))]), rcond=None)[0]
        assert prior.weights[kept, index] == pytest.approx(solution, abs=1e-9)
        assert (prior.weights[own, index] == 0).all()


def test_the_scene_prior_knows_the_scene_and_ignores_the_name_itself(scenes):
    prior = ScenePrior.fit(*scenes)
    inside, outside = prior.presence(read_caption("a soft carpet")), prior.presence(read_caption("a busy street"))
    assert inside[DOG] - outside[DOG] > 0.3
    assert outside[CAR] - inside[CAR] > 0.3
    assert prior.presence(read_caption("a busy street with dogs"))[DOG] == pytest.approx(
        prior.presence(read_caption("a busy street with"))[DOG]
    )
    assert all(sum(word in caption.words for caption in scenes[0]) >= LEAST for word in prior.words)


def test_the_scene_columns_are_presence_gain_and_log_ratio(scenes):
    prior = ScenePrior.fit(*scenes)
    caption = read_caption("a soft carpet with a dog and a car")
    presence = prior.presence(caption)[[DOG, CAR]]
    columns = prior.columns(caption)
    assert columns.shape == (2, len(SCENE))
    assert columns[:, 0] == pytest.approx(presence)
    assert columns[:, 1] == pytest.approx(presence - prior.base[[DOG, CAR]])
    assert columns[0, 2] == pytest.approx(np.log(min(max(presence[0], 0.01), 1) / prior.base[DOG]))
