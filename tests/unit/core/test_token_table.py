"""The token table's columns and the choice of judged rows."""

import numpy as np
import pandas as pd
import pytest

from stethoscope.core.errors import DataError
from stethoscope.core.token_table import KEY_COLUMNS, FeatureSchema, feature_matrix, feature_names, mention_rows
from stethoscope.storage.tokens import SCHEMA

ROWS = pd.DataFrame(
    [
        {"text": "a", "label": -1, "object": "", "repeat_index": -1, "is_first_subtoken": False},
        {"text": " traffic", "label": 1, "object": "traffic light", "repeat_index": 0, "is_first_subtoken": True},
        {"text": " light", "label": 1, "object": "traffic light", "repeat_index": 0, "is_first_subtoken": False},
        {"text": " car", "label": 0, "object": "car", "repeat_index": 0, "is_first_subtoken": True},
        {"text": " car", "label": 0, "object": "car", "repeat_index": 1, "is_first_subtoken": True},
        {"text": " thing", "label": -1, "object": "thing", "repeat_index": 0, "is_first_subtoken": True},
    ]
)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [1, 3]),
        ({"repeats": "all"}, [1, 3, 4]),
        ({"subtokens": "all"}, [1, 2, 3]),
        ({"subtokens": "all", "repeats": "all"}, [1, 2, 3, 4]),
    ],
)
def test_judged_rows(settings, kept):
    rows = mention_rows(ROWS.assign(mention_index=range(6)), **settings)
    assert rows["mention_index"].tolist() == kept
    assert rows.index.tolist() == list(range(len(kept)))


@pytest.mark.parametrize("settings", [{"subtokens": "last"}, {"repeats": "some"}])
def test_unknown_choices_are_named(settings):
    with pytest.raises(DataError, match="should be"):
        mention_rows(ROWS, **settings)


@pytest.mark.parametrize(("subtokens", "light"), [("first", 3.0), ("mean", 2.5), ("max", 4.0), ("min", 0.5)])
def test_subtokens_of_a_mention_become_one_row(subtokens, light):
    """Two answers name a traffic light: sub-tokens of the same number in another answer stay out of it."""
    labelled = ROWS.assign(task="chair", mention_index=[-1, 0, 0, 1, 2, 3])
    more = {
        "text": " s",
        "label": 1,
        "object": "traffic light",
        "repeat_index": 0,
        "is_first_subtoken": False,
        "task": "chair",
        "mention_index": 0,
    }
    labelled = pd.concat([labelled, pd.DataFrame([more])], ignore_index=True)
    values = np.array([9, 3, 4, 1, 2, 5, 0.5], dtype=np.float32)
    labelled = labelled.assign(attended_embedding_d0000=values)
    table = pd.concat([labelled.assign(sample_id="a", nll=values), labelled.assign(sample_id="b", nll=values + 100)])
    rows = mention_rows(table, subtokens, repeats="all")
    assert rows["text"].tolist() == [" traffic", " car", " car"] * 2
    assert rows["nll"].tolist() == [light, 1.0, 2.0, light + 100, 101.0, 102.0]
    assert rows["nll"].dtype == np.float32
    embedding = rows["attended_embedding_d0000"].tolist()
    assert embedding[:3] == [3.0 if subtokens == "first" else 2.5, 1.0, 2.0]  # a vector's
    pd.testing.assert_frame_equal(mention_rows(rows, subtokens, repeats="all"), rows)
    assert len(mention_rows(table, subtokens, repeats="all", judged=False)) == 8


def test_what_is_written_is_what_is_explained():
    assert list(KEY_COLUMNS) == SCHEMA.names
    assert feature_names(ROWS) == ()


def test_a_schema_says_how_another_differs():
    schema = FeatureSchema(("nll", "entropy"))
    assert schema.difference(FeatureSchema(("entropy", "nll"))) == ""
    assert schema.hash != FeatureSchema(("nll",)).hash
    many = FeatureSchema(tuple(f"layer_{number}" for number in range(10)))
    assert schema.difference(many).endswith("layer_5 and 4 more")


def test_infinite_features_are_named():
    table = pd.DataFrame({"good": [0.0, np.nan], "bad": [np.inf, 0.0]})
    assert np.isnan(feature_matrix(table, ["good"])[1, 0])
    with pytest.raises(DataError, match="infinite values: bad;"):
        feature_matrix(table, ["good", "bad"])


def test_features_that_are_no_numbers_are_named():
    table = pd.DataFrame({"good": [0.0, np.nan], "note": ["blurred", ""]})
    with pytest.raises(DataError, match=r"should hold numbers; note does not: .*'blurred'"):
        feature_matrix(table, ["good", "note"])
