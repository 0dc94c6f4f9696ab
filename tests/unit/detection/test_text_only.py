"""The text-only detector: what it learns, that it gives mentions as CHAIR finds them, and that its file is data."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stethoscope.core.errors import ArtefactError, DataError
from stethoscope.detection.artifact import dump_arrays, load_arrays
from stethoscope.detection.caption_objects import read_caption
from stethoscope.detection.text_only import (
    BATCH,
    COLUMNS,
    PSEUDO_COUNT,
    RISING,
    SHIPPED,
    NameRates,
    TextOnlyDetector,
)
from stethoscope.metrics.classification import auroc, ece
from stethoscope.tasks.object_extraction import OBJECTS, mentions

FILLER = "with light and shade and lines and many things that nobody could ever name in one breath"


def made_captions(count, seed):
    """Kitchens and streets: what is named late, and what does not fit, is more often invented."""
    random = np.random.default_rng(seed)
    texts, truths = [], []
    for _ in range(count):
        fitting, other = ("bowl", "cup", "oven"), ("car", "bus", "bench")
        kind, objects, foreign = ("kitchen", fitting, other) if random.random() < 0.5 else ("street", other, fitting)
        named = [objects[index] for index in random.permutation(3)[:2]]
        named += [foreign[random.integers(3)]] * (random.random() < 0.5)
        rates = [0.05, 0.3, 0.7]
        truths.append({name for name, rate in zip(named, rates, strict=False) if random.random() > rate})
        texts.append(f"A {kind} {FILLER} has " + f" {FILLER} and a ".join(named) + ".")
    return texts, truths


@pytest.fixture(scope="module")
def trained():
    texts, truths = made_captions(400, 0)
    return TextOnlyDetector().fit(texts, truths, [index // 2 for index in range(400)], {"data": "made"})


@pytest.fixture(scope="module")
def shipped():
    return TextOnlyDetector.load()


def test_it_learns_on_some_images_and_is_right_and_calibrated_on_others(trained):
    texts, truths = made_captions(600, 1)
    judged = [
        (mention.name not in truth, mention.probability)
        for truth, named in zip(truths, trained.predict(texts), strict=True)
        for mention in named
    ]
    labels, probabilities = map(np.array, zip(*judged, strict=True))
    assert auroc(labels, probabilities) > 0.75
    assert ece(labels, probabilities) < 0.06
    assert trained.facts == {"captions": 400, "pictures": 200, "objects": trained.facts["objects"],
                             "hallucinated": trained.facts["hallucinated"], "data": "made"}  # fmt: skip


def test_mentions_are_those_of_the_extractor_with_one_probability_per_object(trained):
    text = "A dog, dogs\nand a bowl; the puppy eats from bowls."
    judged = trained.predict_one(text)
    assert [mention[:3] for mention in judged] == [tuple(mention) for mention in mentions(text)]
    assert len({mention.probability for mention in judged}) == 2
    assert all(0 < mention.probability < 1 for mention in judged)


def test_a_caption_is_judged_alike_alone_and_among_others(trained):
    texts, _ = made_captions(BATCH + 9, 2)
    texts[3] = ""
    for text, judged in zip(texts, trained.predict(texts), strict=True):
        alone = trained.predict_one(text)
        assert [mention[:3] for mention in judged] == [mention[:3] for mention in alone]
        assert [mention.probability for mention in judged] == pytest.approx([m.probability for m in alone], abs=1e-12)
    assert list(trained.predict([])) == []
    assert trained.predict_one("nothing of note") == []


def test_it_reads_back_what_it_wrote_bit_for_bit(trained, tmp_path):
    trained.save(tmp_path / "mine.safetensors")
    again = TextOnlyDetector.load(tmp_path / "mine.safetensors")
    texts, _ = made_captions(20, 3)
    assert list(again.predict(texts)) == list(trained.predict(texts))
    assert again.facts == trained.facts


def test_the_same_captions_give_the_same_file(trained, tmp_path):
    texts, truths = made_captions(400, 0)
    again = TextOnlyDetector().fit(texts, truths, [index // 2 for index in range(400)], {"data": "made"})
    for name, detector in (("a", trained), ("b", again)):
        detector.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_rates_are_counts_shrunk_towards_what_is_more_general():
    texts = ["a couch", "a sofa"] * 6 + ["a dog"] * 4
    labels = [np.array([float(index in (0, 2, 4, 1))]) for index in range(12)] + [np.zeros(1)] * 4
    rates = NameRates.fit([read_caption(text) for text in texts], labels)
    couch, overall = OBJECTS.index("couch"), 4 / 16
    of_name = (4 + PSEUDO_COUNT * overall) / (12 + PSEUDO_COUNT)
    assert rates.names[couch] == pytest.approx(of_name)
    assert rates.columns(read_caption("a couch")).tolist() == [
        pytest.approx([of_name, (3 + PSEUDO_COUNT * of_name) / (6 + PSEUDO_COUNT)])
    ]
    assert rates.columns(read_caption("couches"))[0] == pytest.approx([of_name, of_name])  # a word it does not know
    assert rates.names[OBJECTS.index("toaster")] == pytest.approx(overall)


@pytest.mark.parametrize(
    ("texts", "truths", "groups", "words"),
    [
        (["a dog"], [], [1], "differ"),
        (["a dog"], [{"wolf"}], [1], "unknown COCO object 'wolf'"),
        (["a dog"] * 19, [{"dog"}] * 18 + [set()], range(19), "not enough"),
        (["a dog"] * 40, [{"dog"}] * 40, range(40), "both labels"),
        ([], [], [], "not enough"),
    ],
)
def test_what_cannot_be_learned_from_is_named(texts, truths, groups, words):
    with pytest.raises(DataError, match=words):
        TextOnlyDetector().fit(texts, truths, list(groups))


def test_a_single_text_is_no_list_of_captions():
    with pytest.raises(DataError, match="predict_one judges a single caption"):
        list(TextOnlyDetector.load().predict("A dog."))


def test_an_unfitted_detector_says_so(tmp_path):
    with pytest.raises(ArtefactError, match="not fitted"):
        TextOnlyDetector().predict_one("a dog")
    with pytest.raises(ArtefactError, match="not fitted"):
        TextOnlyDetector().save(tmp_path / "x")


def changed(path, arrays=None, **header):
    """Write a detector's file again with other arrays or another header."""
    own, columns = load_arrays(path.read_bytes())
    values = {**own._values, **(arrays or {})}
    columns = {key: value for key, value in {**columns, **header}.items() if value is not None}
    path.write_bytes(dump_arrays({name: value for name, value in values.items() if value is not None}, columns))


DAMAGE = {
    "no arrays": (lambda path: path.write_bytes(b"{}"), "not a file of arrays"),
    "missing": (lambda path: path.unlink(), "missing"),
    "another kind": (lambda path: changed(path, kind="other"), "no text-only detector"),
    "another version": (lambda path: changed(path, schema_version=99), "version"),
    "other columns": (lambda path: changed(path, columns=[*COLUMNS[1:], "x"]), "columns"),
    "no words": (lambda path: changed(path, words=None), "words is missing"),
    "words that are numbers": (lambda path: changed(path, words=[1, 2]), "words"),
    "a word of no object": (lambda path: changed(path, surfaces=[[80, "x"]]), "no object"),
    "a word without object": (lambda path: changed(path, surfaces=[["x"]]), "no object"),
    "too few words": (lambda path: changed(path, words=["a"]), "scene.mean"),
    "a number that is none": (lambda path: changed(path, {"rates.names": np.full(80, np.nan)}), "rates.names"),
    "a base rate of 1": (lambda path: changed(path, {"co_occurrence.base": np.ones(80)}), "co_occurrence.base"),
    "a tree outside": (lambda path: changed(path, {"trees.feature": np.full((250, 7), 99)}), "trees.feature"),
    "an array too many": (lambda path: changed(path, {"trees.more": np.zeros(1)}), "trees.more"),
    "an array too few": (lambda path: changed(path, {"trees.value": None}), "trees.value"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_with_a_reason(trained, tmp_path, damage):
    trained.save(tmp_path / "mine")
    break_it, words = DAMAGE[damage]
    break_it(tmp_path / "mine")
    with pytest.raises(ArtefactError, match=words) as error:
        TextOnlyDetector.load(tmp_path / "mine")
    assert "\n" not in str(error.value)


def test_the_shipped_one_follows_place_repetition_and_company(shipped):
    def probability(text, name):
        return next(mention.probability for mention in shipped.predict_one(text) if mention.name == name)

    def late(text):
        return f"The image shows a street on a sunny day. {FILLER}. {FILLER}. {text}"

    assert probability("A handbag.", "handbag") < probability(late("There is a handbag."), "handbag")
    assert probability(late("There is a car. The car is red. The car is old."), "car") < probability(
        late("There is a car."), "car"
    )
    assert probability("A man on a surfboard in the sea. There is an oven.", "oven") > probability(
        "A man at a sink in the kitchen. There is an oven.", "oven"
    )
    assert max(mention.probability for mention in shipped.predict_one("3 zebras in a field")) < 0.05


def test_the_shipped_one_obeys_its_constraints(shipped):
    rows = np.repeat(shipped._priors.columns([read_caption("A man with a dog. There is also a handbag.")]), 9, axis=0)
    for name, direction in RISING.items():
        changed_rows = rows.copy()
        changed_rows[:, COLUMNS.index(name)] += np.tile(np.linspace(-3, 30, 9), 3)
        scores = shipped._trees.decision_function(changed_rows).reshape(3, 9)
        assert (direction * np.diff(scores, axis=1) >= 0).all(), name


def test_the_shipped_one_says_what_it_learned_from(shipped):
    assert shipped.facts["captions"] == 4761
    assert len(shipped.facts["families"]) == 8
    size = (Path(sys.modules[TextOnlyDetector.__module__].__file__).parent / SHIPPED).stat().st_size
    assert size < 2**20


def test_markdown_and_odd_texts_are_judged(shipped):
    texts = [
        "**Main:**\n* **Train:** a `train`",
        "狗 dog İ dog",
        "dog" * 5000,
        "dog " * 5000,
        "\ud800 dog",
        "'",
    ]
    for text, judged in zip(texts, shipped.predict(texts), strict=True):
        assert [mention[:3] for mention in judged] == [tuple(mention) for mention in mentions(text)]
        assert all(0 <= mention.probability <= 1 for mention in judged)


def test_judging_imports_nothing_heavy():
    script = (
        "import sys\nfrom stethoscope.detection.text_only import TextOnlyDetector\n"
        "assert TextOnlyDetector.load().predict_one('a dog')\n"
        "heavy = {'torch', 'transformers', 'pandas', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_on_real_captions_of_its_own_families_it_is_calibrated(shared, shipped):
    folder = shared / "real_captions"
    if not folder.is_dir():
        pytest.skip(f"no real captions: {folder} is not there")
    truth = json.loads((folder / "objects.json").read_text())
    labels, probabilities = [], []
    for path in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()[:100]]
        for row, judged in zip(rows, shipped.predict(row["caption"] for row in rows), strict=True):
            objects = {mention.name: mention.probability for mention in judged}
            labels += [name not in truth[str(row["image_id"])] for name in objects]
            probabilities += objects.values()
    assert auroc(np.array(labels), np.array(probabilities)) > 0.85
    assert ece(np.array(labels), np.array(probabilities)) < 0.05
