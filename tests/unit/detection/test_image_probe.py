"""Is the object that a mention names among the picture's tokens?"""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.token_tables import OBJECTS, halves, token_table
from safetensors.numpy import load_file, save_file
from torch import nn

from stethoscope.core.errors import ArtefactError, DataError
from stethoscope.core.token_table import mention_rows, pack_vectors, unpack_vectors
from stethoscope.detection import image_probe
from stethoscope.detection.artifact import Arrays
from stethoscope.detection.detector import Detector
from stethoscope.detection.estimators import SharedFits
from stethoscope.detection.image_probe import COLUMN, UNITS, ImageProbe, backward, fit_image_probe
from stethoscope.detection.leaderboard import shuffled_predictions
from stethoscope.detection.learners import make_learner
from stethoscope.metrics import classification

SIZE, TOKENS = 8, 5
transform = ImageProbe.transform
LOOKS = 2.5 * np.random.default_rng(99).normal(size=(len(OBJECTS), SIZE))


def pictures(shown, seed=0):
    """Tokens of noise, among them one for every object that is shown, at a random place."""
    random = np.random.default_rng(seed)
    tokens = random.normal(size=(len(shown), TOKENS, SIZE)).astype(np.float32)
    for picture, present in zip(tokens, shown, strict=True):
        picture[random.permutation(TOKENS)[: present.sum()]] += LOOKS[present]
    return tokens


def with_tokens(table, seed=0):
    """Every mention has a picture of its own kind: the picture of its answer, with what labels say that it shows."""
    truth = {}
    kept = table[(table["label"] < 0) | ~table.duplicated(["group", "object"])]  # labels of a picture do not differ
    for group, rows in kept.groupby("group"):
        present = set(rows.loc[rows["label"] == 0, "object"])
        truth[group] = [name in present for name in OBJECTS]
    texts = dict(zip(truth, map(pack_vectors, pictures(np.array(list(truth.values())), seed)), strict=True))
    places = np.random.default_rng(seed).normal(size=len(kept))
    return kept.assign(image_tokens=kept["group"].map(texts), attended_embedding_d0000=places.astype(np.float32))


TRAIN, CALIBRATION = halves(with_tokens(token_table(400)))
TEST = mention_rows(with_tokens(token_table(200, seed=9), seed=9))
LABELS = TEST["label"].to_numpy()


def area(detector, rows=TEST):
    return classification.auroc(rows["label"].to_numpy(), detector.predict(rows))


@pytest.fixture(scope="module")
def seeing():
    return Detector(C=0.1).fit(TRAIN, CALIBRATION)


def test_published_detectors_do_not_look_at_image_tokens():
    """Those of hidden states learn by our logistic regression, but not from what our detector adds to them."""
    train, calibration, test = (
        rows.rename(columns={"attended_embedding_d0000": "hidden_middle_q_d0000"})
        for rows in (TRAIN, CALIBRATION, TEST)
    )
    ours = Detector(features=["hidden_*"], hidden_probe=False, C=0.1).fit(train, calibration)
    assert area(ours, test) > 0.8

    def published(*tables):
        fitted = make_learner(["hidden_middle_q_d0000"], None, {}).fit(*tables[:2])
        return fitted.predict(tables[2])

    blind = [rows.drop(columns="image_tokens") for rows in (train, calibration, test)]
    assert np.array_equal(published(train, calibration, test), published(*blind))


def test_vectors_come_back_from_text():
    vectors = np.random.default_rng(0).normal(size=(3, 4))
    assert np.array_equal(unpack_vectors(pack_vectors(vectors)), vectors.astype(np.float16).astype(np.float32))
    for text in ("", "4 ", "5 " + pack_vectors(vectors)[2:], "x AAAA", "4 A", pack_vectors(vectors * np.nan)):
        with pytest.raises(DataError, match="image_tokens hold no vectors"):
            unpack_vectors(text)


def test_the_detector_says_where_it_sees_an_object(seeing):
    """The token that looks like it, of five; it has learned from labels of whole pictures."""
    hits = []
    for row in TEST[TEST["label"] == 0].itertuples():
        tokens = unpack_vectors(row.image_tokens)
        parts = seeing.design.locate(row.image_tokens, row.object)
        assert parts.shape == (TOKENS,)
        odds = seeing.design.image_probe.transform([tokens])[0, seeing.inputs.objects.index(row.object)]
        assert np.log((parts / (1 - parts)).sum()) == pytest.approx(odds)  # of the whole picture
        hits.append(parts.argmax() == (tokens @ LOOKS[list(OBJECTS).index(row.object)]).argmax())
    assert np.mean(hits) > 0.9
    assert seeing.design.locate(row.image_tokens, "unicorn") is None
    assert seeing.design.locate("", row.object) is None
    assert Detector(C=0.1, visual_consistency=False).fit(TRAIN).design.locate(row.image_tokens, row.object) is None


def test_the_gradient_is_that_of_autograd():
    random = np.random.default_rng(1)
    shapes = ((SIZE, 7), (7,), (7, 3), (3,))
    parts = [random.normal(size=shape) for shape in shapes]
    rows, kept = random.normal(size=(6, TOKENS, SIZE)), random.integers(0, 2, (6, TOKENS, 7)) / 0.5
    wanted, known = random.random((6, 3)), random.random((6, 3)) < 0.7
    slopes = [np.zeros(shape) for shape in shapes]
    backward(parts, rows.copy(), kept, wanted, known, slopes)
    weights = [torch.tensor(part, requires_grad=True) for part in parts]
    units = (torch.tensor(rows) @ weights[0] + weights[1]).relu() * torch.tensor(kept)
    odds = (units @ weights[2] + weights[3]).logsumexp(1) - np.log(TOKENS)
    losses = nn.functional.binary_cross_entropy_with_logits(odds, torch.tensor(wanted), reduction="none")
    losses[torch.tensor(known)].mean().backward()
    for slope, weight in zip(slopes, weights, strict=True):
        assert slope == pytest.approx(weight.grad.numpy(), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("ragged", [False, True])
def test_objects_are_recognised_in_other_pictures(ragged):
    shown = np.random.default_rng(3).random((900, len(OBJECTS))) < 0.4
    tokens = list(pictures(shown, seed=4))
    if ragged:
        tokens = [np.vstack([part, part[: index % 3]]) for index, part in enumerate(tokens)]
    known = np.where(np.random.default_rng(5).random(shown.shape) < 0.5, shown, np.nan)
    probe = ImageProbe.fit(tokens[:600], known[:600], seed=1)
    odds = probe.transform(tokens[600:])
    assert classification.auroc(shown[600:].ravel().astype(int), odds.ravel()) > 0.93
    units = (torch.tensor((tokens[600] - probe.mean) / probe.scale) @ torch.tensor(probe.hidden)).numpy()
    scores = np.maximum(units + probe.hidden_bias, 0) @ probe.output + probe.bias
    assert odds[0] == pytest.approx(np.log(np.exp(scores).mean(0)))


def test_a_detector_that_looks_at_the_picture_tells_more(seeing):
    blind = Detector(C=0.1, visual_consistency=False).fit(TRAIN, CALIBRATION)
    assert area(seeing) > area(blind) + 0.05
    assert COLUMN in seeing.inputs.explained_columns
    assert COLUMN not in blind.inputs.explained_columns
    assert classification.ece(LABELS, seeing.predict(TEST)) < 0.06
    assert np.isfinite(seeing.explain(TEST).probability).all()


def test_tokens_are_read_beside_hidden_states_too():
    def renamed(table):
        return table.rename(columns={"attended_embedding_d0000": "hidden_last_q_d0000"})

    train, calibration, test = map(renamed, (TRAIN, CALIBRATION, TEST))
    seeing = Detector(C=0.1).fit(train, calibration)
    blind = Detector(C=0.1, visual_consistency=False).fit(train, calibration)
    assert seeing.inputs.imaged
    assert not blind.inputs.imaged
    assert area(seeing, test) > area(blind, test) + 0.05
    without = Detector(C=0.1).fit(*(fold.drop(columns="image_tokens") for fold in (train, calibration)))
    assert np.array_equal(without.predict(test), blind.predict(test))
    assert (without.inputs.objects, without.inputs.imaged) == ((), False)
    plain = Detector(C=0.1, exclude=["hidden_*"]).fit(train, calibration)
    assert not plain.inputs.imaged


def test_mentions_of_a_picture_are_scored_by_a_probe_without_it(seeing):
    scores = seeing.matrix(mention_rows(TRAIN))[:, len(seeing.inputs.plain) :][:, 0]
    other = TRAIN.assign(label=np.where(TRAIN["group"] == "image-0", 1 - TRAIN["label"], TRAIN["label"]))
    first = mention_rows(TRAIN), None, seeing.inputs.objects, False, 0
    changed = fit_image_probe(mention_rows(other[other["label"] < 2]), *first[1:])
    own = fit_image_probe(*first)
    rows = (first[0]["group"] == "image-0").to_numpy()
    assert own[1][rows] == pytest.approx(changed[1][rows])
    assert own[0].scores(first[0], seeing.inputs.objects) == pytest.approx(scores)
    assert not np.allclose(own[1], scores)


def test_fits_in_common_are_made_once_and_change_nothing():
    def with_states(table):
        states = {f"hidden_last_q_d{i:04d}": table["attended_embedding_d0000"] * (i + 1) % 1 for i in range(4)}
        return table.assign(**states, verify_odds=np.where(table["mention_index"] < 0, np.nan, 1 - 2 * table["label"]))

    train, calibration, test = map(with_states, (TRAIN, CALIBRATION, TEST))
    shared, sets = SharedFits(), (None, ["mass", "hidden_*", "attended_*"], ["nll", "hidden_*"])
    first, second, third = (
        Detector(C=0.1, features=features).sharing(shared).fit(train, calibration) for features in sets
    )
    for detector, features in zip((first, second, third), sets, strict=True):
        alone = Detector(C=0.1, features=features).fit(train, calibration)
        assert np.array_equal(detector.predict(test), alone.predict(test))
    probes = [detector.design.image_probe for detector in (first, second, third)]
    assert probes[0] is probes[1] is probes[2] is not None
    looks, others = first.model.classifier, second.model.classifier
    assert looks.grounding_ is others.grounding_
    assert looks.classifier_.probe_ is others.classifier_.probe_ is third.model.classifier.probe_
    fifth = Detector(C=0.1, features=sets[2], seed=5).sharing(shared).fit(train, calibration)
    assert fifth.design.image_probe is not probes[0]
    assert fifth.model.classifier.probe_ is not third.model.classifier.probe_


def test_pictures_are_looked_at_once_as_long_as_their_texts_fit(seeing, monkeypatch):
    """Copies of a detector, also by pickle, predict the same and look again."""
    texts = TEST["image_tokens"].drop_duplicates().tolist()
    monkeypatch.setattr(image_probe, "KNOWN_TEXT", sum(map(len, texts[:2])))
    own = seeing.design.image_probe
    probe, looked_at = dataclasses.replace(own), []
    monkeypatch.setattr(ImageProbe, "transform", lambda self, tokens: looked_at.append(1) or transform(self, tokens))
    for read, count in (([0, 1], 2), ([0, 1, 0], 2), ([2], 3), ([0], 3), ([1, 2], 5)):
        odds = probe._odds([texts[index] for index in read])
        assert np.array_equal(odds, transform(own, [unpack_vectors(texts[index]) for index in read]))
        assert len(looked_at) == count
    for copied in (copy.deepcopy(seeing), pickle.loads(pickle.dumps(seeing))):
        assert not copied.design.image_probe.known_odds.values
        assert np.array_equal(copied.predict(TEST), seeing.predict(TEST))


def test_only_equal_fits_are_shared():
    calls = []

    def fit(*inputs):
        calls.append(inputs)
        return len(calls)

    shared, values = SharedFits(), np.arange(6.0)
    assert shared.make(fit, values, None, "a") == copy.deepcopy(shared).make(fit, values[::-1][::-1], None, "a") == 1
    for other in (values.reshape(2, 3), values.astype(int), values[1:], values[None], np.zeros(0), [values]):
        count = len(calls)
        assert shared.make(fit, other, None, "a") == count + 1
    assert shared.make(fit, ["ab", "c"]) != shared.make(fit, ["a", "bc"])
    assert shared.make(fit, np.array(["ab", "c"])) != shared.make(fit, np.array(["a", "bc"]))
    with pytest.raises(TypeError):
        shared.make(fit, np.array([None]))  # whose bytes do not say what it holds


def test_names_that_are_not_known_get_a_probability(seeing):
    odd = TEST.assign(object="unicorn")
    assert np.isnan(seeing.matrix(odd)[:, len(seeing.inputs.plain)]).all()
    assert np.isfinite(seeing.predict(odd)).all()
    single = TEST.iloc[[7]]
    assert seeing.predict(single) == pytest.approx(seeing.predict(TEST)[[7]])


def test_tables_without_tokens_are_refused_or_learned_from_without_them(seeing):
    for lacking in (TEST.drop(columns="image_tokens"), TEST.assign(image_tokens="")):
        with pytest.raises(DataError, match="no image tokens, which the detector reads"):
            seeing.predict(lacking)
    with pytest.raises(DataError, match="have 3 dimensions; the detector learned from 8"):
        seeing.predict(TEST.assign(image_tokens=pack_vectors(np.ones((2, 3)))))
    older = Detector(C=0.1).fit(TRAIN.drop(columns="image_tokens"), CALIBRATION.drop(columns="image_tokens"))
    assert older.predict(TEST) == pytest.approx(older.predict(TEST.drop(columns="image_tokens")))
    assert COLUMN not in older.inputs.explained_columns


@pytest.mark.parametrize("labels", ["none", "few"])
def test_replies_teach_without_labels(labels):
    def asked(table, seed):
        random = np.random.default_rng(seed)
        wrong = (table["label"] == 1).to_numpy()
        states = {f"hidden_last_q_d{i:04d}": random.normal(size=len(table)) for i in range(2)}
        return table.assign(**states, verify_odds=np.where(wrong, -2, 3) + random.normal(size=len(table)))

    train = asked(TRAIN, 1)
    if labels == "few":
        few = train["group"].isin(train["group"].unique()[:60])
        train = train.assign(label=np.where(few, train["label"], -1))
    detector = Detector(C=0.1, labels=labels).fit(train)
    blind = Detector(C=0.1, labels=labels).fit(train.drop(columns="image_tokens"))
    assert area(detector, asked(TEST, 2)) > area(blind, asked(TEST, 2)) + 0.2


def test_shuffled_labels_know_nothing(seeing):
    table = pd.concat([TRAIN, CALIBRATION, with_tokens(token_table(200, seed=9), seed=9).assign(group="t")])
    table = table.reset_index(drop=True)
    number = np.arange(len(table))
    folds = {
        "train": number < len(TRAIN),
        "calibration": (number >= len(TRAIN)) & (number < len(TRAIN) + len(CALIBRATION)),
        "test": number >= len(TRAIN) + len(CALIBRATION),
    }
    areas = [classification.auroc(LABELS, predicted) for predicted in shuffled_predictions(table, seeing, folds, 0)]
    assert abs(np.mean(areas) - 0.5) < 0.15


def test_it_is_saved_beside_hidden_states(tmp_path):
    states = {"attended_embedding_d0000": "hidden_last_q_d0000"}
    detector = Detector(C=0.1).fit(TRAIN.rename(columns=states), CALIBRATION.rename(columns=states))
    detector.save(tmp_path)
    test = TEST.rename(columns=states)
    assert np.array_equal(Detector.load(tmp_path).predict(test), detector.predict(test))
    with pytest.raises(DataError, match="no image tokens"):
        detector.predict(test.drop(columns="image_tokens"))


def test_it_is_saved_as_checked_arrays(seeing, tmp_path):
    seeing.save(tmp_path)
    loaded = Detector.load(tmp_path)
    assert np.array_equal(loaded.predict(TEST), seeing.predict(TEST))
    arrays = load_file(tmp_path / "detector.safetensors")
    assert arrays["image_probe.hidden"].shape == (SIZE, UNITS)
    for name, value, message in (
        ("image_probe.output", arrays["image_probe.output"][:, :2].copy(), "by the manifest it should be"),
        ("image_probe.bias", np.full(len(OBJECTS), np.nan, np.float32), "not finite"),
        ("image_probe.bias", np.zeros(len(OBJECTS)), "float64; it should be float32"),
        ("image_probe.scale", np.zeros(SIZE), "above 0"),
    ):
        probe = {key.partition(".")[2]: part for key, part in arrays.items() if key.startswith("image_probe.")}
        damaged = Arrays(probe | {name.partition(".")[2]: value})
        with pytest.raises(ArtefactError, match=message):
            ImageProbe.restore(damaged, len(OBJECTS))
    save_file(
        {key: part for key, part in arrays.items() if key != "image_probe.mean"}, tmp_path / "detector.safetensors"
    )
    assert json.loads((tmp_path / "manifest.json").read_text())["objects"] == sorted(OBJECTS)
    with pytest.raises(ArtefactError):
        Detector.load(tmp_path)


def test_odds_are_bounded():
    probe = ImageProbe(
        *(np.zeros(SIZE), np.ones(SIZE)),
        np.full((SIZE, UNITS), 9.0),
        *(np.ones(UNITS),),
        np.full((UNITS, 1), 9.0),
        np.zeros(1),
    )
    assert probe.transform([np.ones((2, SIZE))]).max() == 20
