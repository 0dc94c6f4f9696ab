"""Does the place that a name was written from look like what it names?"""

import json

import numpy as np
import pandas as pd
import pytest
from helpers.token_tables import OBJECTS, halves, token_table
from scipy.special import expit

from stethoscope.core.errors import ArtefactError, ConfigError, DataError
from stethoscope.core.token_table import mention_rows
from stethoscope.detection.design_matrix import frequent_objects
from stethoscope.detection.detector import Detector
from stethoscope.detection.lookup import mention_warnings, write_warnings
from stethoscope.detection.visual_consistency import COLUMNS, GroundingClassifier
from stethoscope.features import relevancy
from stethoscope.metrics import classification

SIZE = 6


def with_places(table, seed=0, noise=0.5):
    """Grounded mentions look like their object, invented ones like another or like nothing that has a name."""
    rng = np.random.default_rng(seed)
    looks = np.random.default_rng(99).normal(size=(len(OBJECTS) + 1, SIZE))
    kind = table["object"].map({name: number for number, name in enumerate(OBJECTS)}).fillna(len(OBJECTS)).to_numpy(int)
    other = (kind + rng.integers(1, len(OBJECTS) + 1, len(table))) % (len(OBJECTS) + 1)
    seen = looks[np.where(table["label"] == 1, other, kind)] + noise * rng.normal(size=(len(table), SIZE))
    return table.assign(**{f"attended_embedding_d{i:04d}": seen[:, i].astype(np.float32) for i in range(SIZE)})


TRAIN, CALIBRATION = halves(with_places(token_table(600)))
TEST = mention_rows(with_places(token_table(400, seed=9), seed=9))
LABELS = TEST["label"].to_numpy()
PLACES = [name for name in TEST if name.startswith("attended_embedding")]


def area(detector):
    return classification.auroc(LABELS, detector.predict(TEST))


@pytest.mark.parametrize("kind", ["logistic", "boosting", "per_head"])
def test_the_place_tells_more_than_its_dimensions_alone(kind):
    strength = None if kind == "logistic" else 0.1
    seeing = Detector(kind, C=strength).fit(TRAIN, CALIBRATION)
    blind = Detector(kind, C=strength, visual_consistency=False).fit(TRAIN, CALIBRATION)
    assert not set(PLACES) & set(blind.features)
    assert area(seeing) > area(blind) + 0.05
    assert classification.ece(LABELS, seeing.predict(TEST)) < 0.05


def test_without_labels_the_place_tells_more_too():
    random = np.random.default_rng(4)

    def with_replies(table):
        wrong = (table["label"] == 1).to_numpy()
        states = {f"hidden_last_q_d{i:04d}": wrong + random.normal(size=len(table)) for i in range(2)}
        return table.assign(**states, verify_odds=np.where(wrong, 2, 6) + random.normal(size=len(table)))

    train, test = with_replies(TRAIN).assign(label=-1), with_replies(TEST)
    seeing, blind = (
        Detector(labels="none", C=0.1, visual_consistency=kind).fit(train).predict(test) for kind in (True, False)
    )
    assert classification.auroc(LABELS, seeing) > classification.auroc(LABELS, blind) + 0.03


def test_mentions_without_a_label_say_nothing_of_places():
    table = TRAIN.assign(hidden_last_q_d0000=TRAIN["nll"], verify_odds=-TRAIN["nll"])
    known = table["group"].isin(table["group"].unique()[::2])
    settings = {"exclude": ["verify_odds"], "C": 0.1}
    mixed = Detector(**settings).fit(table.assign(label=np.where(known, table["label"], -1)))
    alone = Detector(**settings).fit(table[known])
    for name, array in mixed.model.classifier.grounding_.arrays().items():
        assert np.array_equal(array, alone.model.classifier.grounding_.arrays()[name]), name


def test_what_it_learns_from_was_made_without_the_image():
    """A classifier that had seen an image would be trusted too much, and one that knew how often an object is
    hallucinated would pass that on: with pure noise as evidence nothing is gained or lost."""
    noise = {name: np.random.default_rng(3).normal(size=len(TRAIN)).astype(np.float32) for name in PLACES}
    seeing = Detector(features=["nll", *PLACES], C=1.0).fit(TRAIN.assign(**noise), CALIBRATION)
    plain = Detector(features=["nll"], C=1.0).fit(TRAIN, CALIBRATION)
    assert area(seeing) == pytest.approx(area(plain), abs=0.03)


def test_it_works_beside_the_prior():
    detector = Detector(factored=True, C=0.1).fit(TRAIN, CALIBRATION)
    why = detector.explain(TEST)
    assert expit(why.evidence + why.prior) == pytest.approx(detector.predict(TEST), abs=1e-12)
    assert list(why.contributions)[:2] == list(COLUMNS)
    moved = TEST.assign(**{name: -TEST[name] for name in PLACES})
    assert (detector.explain(moved).prior == why.prior).all()


def test_explanations_name_it_and_add_up():
    why = Detector(C=0.1).fit(TRAIN, CALIBRATION).explain(TEST)
    assert list(why.contributions)[:2] == list(COLUMNS)
    assert why.contributions.sum(axis=1).to_numpy() == pytest.approx(why.evidence)
    assert why.contributions["grounding_named"].abs().mean() > why.contributions["noise"].abs().mean()


def test_a_name_that_was_never_seen_has_no_visual_evidence():
    detector = Detector(C=0.1).fit(TRAIN, CALIBRATION)
    unseen = TEST.assign(object="unicorn")
    assert np.isfinite(detector.predict(unseen)).all()
    moved = unseen.assign(**{name: -unseen[name] for name in PLACES})
    assert (detector.predict(unseen) == detector.predict(moved)).all()


def test_probabilities_of_looks_add_up_and_unseen_looks_have_none():
    places = np.random.default_rng(0).normal(size=(60, 3))
    labels, named = np.arange(60) % 2, np.arange(60) % 3
    fitted = GroundingClassifier(objects=4).fit(np.hstack([places, named[:, None]]), labels)  # object 3 is never named
    looks = fitted.log_probabilities(places)
    assert np.exp(looks).sum(1) == pytest.approx(np.ones(60))
    assert np.isneginf(looks[:, 3]).all()
    transformed = fitted.transform(np.hstack([places, named[:, None]]))
    nothing, each = labels.sum(), np.bincount(named[labels == 0], minlength=3)
    ratio = looks[:, :3] - np.log(each) - (looks[:, 4:] - np.log(nothing))
    others = [ratio[row, [k for k in range(3) if k != named[row]]].max() for row in range(60)]
    assert transformed == pytest.approx(np.column_stack([ratio[np.arange(60), named], others]))
    assert (fitted.transform(np.array([[0.0, 0.0, 0.0, -1.0]])) == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["logistic", "boosting", "per_head"])
def test_few_and_strange_places_are_no_reason_to_fail(kind):
    def fitted(table):
        return Detector(kind, C=0.1).fit(table)

    dogs = TRAIN.assign(object=np.where(TRAIN["object"] == "", "", "dog"))
    rare = TRAIN.assign(object=[name and f"{name} {row}" for row, name in enumerate(TRAIN["object"])])
    nothing = TRAIN[(TRAIN["label"] == 1) | (TRAIN["object"] != "dog")]  # a dog was never there
    gaps = TRAIN.assign(**{PLACES[0]: TRAIN[PLACES[0]].where(TRAIN["token"] % 5 > 0)})
    for table in (dogs, rare, nothing, gaps):
        detector = fitted(table)
        assert np.isfinite(detector.predict(TEST)).all()
        assert area(detector) > 0.6
        holes = TEST.assign(**{PLACES[1]: np.float32(np.nan)})
        assert np.isfinite(detector.predict(holes)).all()
        assert detector.visual_evidence(holes) == [()] * len(holes)
    far = TEST.assign(**{name: TEST[name] * 1000 for name in PLACES})
    assert np.isfinite(fitted(TRAIN).predict(far)).all()


def test_a_place_column_without_any_value_is_named():
    with pytest.raises(DataError, match=f"without any value: {PLACES[0]}"):
        Detector(C=0.1).fit(TRAIN.assign(**{PLACES[0]: np.float32(np.nan)}))


@pytest.mark.parametrize("images", [8, 12, 20])
def test_a_handful_of_images_is_enough_to_fit(images):
    few = TRAIN[TRAIN["group"].isin(TRAIN["group"].unique()[:images])]
    detector = Detector(calibration="none").fit(few)
    assert np.isfinite(detector.predict(TEST)).all()


def test_objects_are_counted_by_their_mentions():
    rows = pd.DataFrame({"object": ["dog"] * 6 + ["cat"] * 5, "is_first_subtoken": [True] + [False] * 5 + [True] * 5})
    assert frequent_objects(rows) == ("cat",)


def test_it_tells_what_every_place_looks_like():
    detector = Detector(C=0.1).fit(TRAIN, CALIBRATION)
    named = TEST["object"].to_numpy()
    evidence = detector.visual_evidence(TEST, count=2)
    right = [looks[0][0] == name for looks, name in zip(evidence, named, strict=True)]
    assert np.mean(np.array(right)[LABELS == 0]) > 0.6
    assert np.mean(np.array(right)[LABELS == 1]) < 0.2
    assert all(len(looks) == 2 and looks[0][1] >= looks[1][1] > 0 for looks in evidence)
    every = detector.visual_evidence(TEST, count=len(OBJECTS) + 1)
    assert [sum(chance for _, chance in looks) for looks in every] == pytest.approx([1] * len(TEST))
    assert all(None in dict(looks) for looks in every)
    assert detector.visual_evidence(TEST.assign(object="")) == [()] * len(TEST)  # no name was written
    assert detector.visual_evidence(TEST.iloc[:0]) == []


def test_without_the_feature_there_is_no_visual_evidence():
    assert Detector(C=0.1, visual_consistency=False).fit(TRAIN, CALIBRATION).visual_evidence(TEST) == [()] * len(TEST)
    plain = TRAIN.drop(columns=PLACES)
    assert Detector(C=0.1).fit(plain).visual_evidence(plain) == [()] * len(plain)
    with pytest.raises(ArtefactError, match="not fitted"):
        Detector().visual_evidence(TEST)


def test_warnings_tell_it_too(tmp_path):
    detector = Detector(C=0.1).fit(TRAIN, CALIBRATION)
    rows = mention_warnings(TEST, detector)
    write_warnings(rows, tmp_path / "warnings.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    for line, looks in zip(lines, detector.visual_evidence(TEST), strict=True):
        assert line["visual_evidence"] == [[name, pytest.approx(chance, abs=1e-6)] for name, chance in looks]


def test_it_is_saved_and_read_again(tmp_path):
    detector = Detector("boosting").fit(TRAIN, CALIBRATION)
    detector.save(tmp_path / "detector")
    again = Detector.load(tmp_path / "detector")
    assert (again.predict(TEST) == detector.predict(TEST)).all()
    assert again.features == detector.features
    assert again.visual_evidence(TEST) == detector.visual_evidence(TEST)
    assert again.settings["visual_consistency"] is True


def test_places_alone_are_enough_and_their_absence_is_no_error():
    assert area(Detector(features=PLACES, C=0.1).fit(TRAIN, CALIBRATION)) > 0.9
    assert Detector(C=0.1).fit(TRAIN.drop(columns=PLACES)).fitted
    with pytest.raises(ConfigError, match="visual_consistency=false"):
        Detector(features=PLACES, visual_consistency=False).fit(TRAIN)


def test_wide_states_are_projected_and_keep_their_angles():
    drawn = np.random.default_rng(0).normal(size=(2, 3000)).astype(np.float32)
    drawn[1] += drawn[0]
    small = drawn @ relevancy._directions(3000, relevancy.DIMENSIONS)
    assert small.shape == (2, relevancy.DIMENSIONS)
    assert (small == drawn @ relevancy._directions(3000, relevancy.DIMENSIONS)).all()

    def cosine(rows):
        return rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])

    assert cosine(small) == pytest.approx(cosine(drawn), abs=0.12)
