"""Co-occurrence with the objects named before: against counting by hand, out of fold, and what the text prior gains."""

import math

import numpy as np
import pytest
from helpers.token_tables import halves, token_table

from stethoscope.core.token_table import mention_rows
from stethoscope.detection.baselines import SMOOTHING, CoOccurrence, NamePrior, TextPrior, named_before
from stethoscope.metrics import classification


def paired_table(images=400, seed=0):
    """A made-up table in which a dog is mostly invented if a cat was named before, and mostly there if a car was."""
    table = token_table(images, seed, prior=False, signal=0.0)
    random = np.random.default_rng(seed)
    mentions = table[table["label"] >= 0]
    before = mentions.groupby("sample_id")["object"].transform(
        lambda names: [set(names[:k]) for k in range(len(names))]
    )
    for index, earlier in before.items():
        if table.loc[index, "object"] == "dog":
            rate = 0.3 + 0.5 * ("cat" in earlier) - 0.25 * ("car" in earlier)
            table.loc[index, "label"] = int(random.random() < rate)
    return table


TABLE = paired_table()
ROWS = mention_rows(TABLE, repeats="all")
OBJECTS = tuple(sorted(set(ROWS["object"])))


def earlier_objects(rows):
    """Sets of other names by a loop over answers."""
    sets = [None] * len(rows)
    for _, answer in rows.reset_index(drop=True).groupby("sample_id"):
        for index, row in answer.iterrows():
            names = answer.loc[answer["mention_index"] < row["mention_index"], "object"]
            sets[index] = set(names) - {row["object"]}
    return sets


def test_objects_named_before_are_those_of_a_loop():
    shuffled = ROWS.sample(frac=1, random_state=0).reset_index(drop=True)
    for rows in (ROWS, shuffled):
        marks = named_before(rows, OBJECTS)
        assert [{OBJECTS[i] for i in np.flatnonzero(row)} for row in marks] == earlier_objects(rows)


def test_tokens_that_name_nothing_and_unknown_objects_have_no_company():
    marks = named_before(TABLE, OBJECTS)
    assert not marks[(TABLE["mention_index"] < 0).to_numpy()].any()
    fitted = CoOccurrence().fit(ROWS)
    assert (fitted.transform(ROWS.assign(object="zebra")) == 0).all()
    assert fitted.transform(ROWS[:0]).shape == (0, 3)


def test_shifts_are_counted():
    fitted, before = CoOccurrence().fit(ROWS), earlier_objects(ROWS)
    for first, name in enumerate(OBJECTS):
        own = [label for label, other in zip(ROWS["label"], ROWS["object"], strict=True) if other == name]
        rate = (sum(own) + 1) / (len(own) + 2)
        for second, other in enumerate(OBJECTS):
            pairs = zip(ROWS["label"], ROWS["object"], before, strict=True)
            labels = [label for label, named, earlier in pairs if named == name and other in earlier]
            wrong, right = sum(labels) + SMOOTHING * rate, len(labels) - sum(labels) + SMOOTHING * (1 - rate)
            expected = math.log(wrong / right) - math.log(rate / (1 - rate))
            assert fitted.shifts[first, second] == pytest.approx(expected)
    dog, cat, car = (OBJECTS.index(name) for name in ("dog", "cat", "car"))
    assert fitted.shifts[dog, cat] > 0.3 > -0.3 > fitted.shifts[dog, car]


def test_a_row_gets_sum_largest_and_smallest():
    fitted, values = CoOccurrence().fit(ROWS), CoOccurrence().fit(ROWS).transform(ROWS)
    for name, earlier, row in zip(ROWS["object"], earlier_objects(ROWS), values, strict=True):
        shifts = [fitted.shifts[OBJECTS.index(name), OBJECTS.index(other)] for other in earlier]
        assert row == pytest.approx([sum(shifts), max(shifts), min(shifts)] if shifts else [0, 0, 0])


def test_training_rows_learn_from_other_images():
    """Changing the labels of an image changes nothing about its own rows."""
    first = CoOccurrence().fit_transform(ROWS)
    inside = (ROWS["group"] == "image-7").to_numpy()
    other = CoOccurrence().fit_transform(ROWS.assign(label=np.where(inside, 1 - ROWS["label"], ROWS["label"])))
    np.testing.assert_array_equal(first[inside], other[inside])
    assert (first[~inside] != other[~inside]).any()
    one_image = ROWS[inside].reset_index(drop=True)
    assert (CoOccurrence().fit_transform(one_image) == 0).all()


def test_labels_without_any_pattern_give_no_gain():
    """Fitted in sample, three hundred pairs would seem to tell: out of fold they do not."""
    table = token_table(300, seed=5, prior=False, signal=0.0)
    train, test = halves(table)
    rows = mention_rows(test)
    assert abs(classification.auroc(rows["label"].to_numpy(), TextPrior().fit(train).predict(rows)) - 0.5) < 0.06


def test_the_text_prior_reads_what_was_named_before():
    train, test = halves(TABLE)
    prior = TextPrior().fit(train)
    rows = mention_rows(test)
    dogs = (rows["object"] == "dog").to_numpy()
    assert classification.auroc(rows["label"][dogs].to_numpy(), prior.predict(rows)[dogs]) > 0.65
    # a whole table gives the mentions what they get among themselves
    whole = test.reset_index(drop=True)
    chosen = ((whole["label"] >= 0) & (whole["repeat_index"] == 0)).to_numpy()
    np.testing.assert_allclose(prior.predict(whole)[chosen], prior.predict(rows))
    assert not np.allclose(
        prior.predict(rows.assign(sample_id=rows.index.astype(str)))[dogs], prior.predict(rows)[dogs]
    )


def test_the_name_prior_reads_nothing_that_was_named_before():
    """It differs from the text prior, and not by what else an answer names."""
    train, test = halves(TABLE)
    prior, rows = NamePrior().fit(train), mention_rows(test)
    alone = rows.assign(sample_id=rows.index.astype(str))
    np.testing.assert_array_equal(prior.predict(alone), prior.predict(rows))
    assert not np.allclose(prior.predict(rows), TextPrior().fit(train).predict(rows), atol=0.01)
