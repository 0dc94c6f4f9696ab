"""AMBER with a spaCy model: a small one, made here, with hand-written tags and vectors."""

import json

import numpy as np
import pytest
from helpers import amber_published
from helpers.by_hand import reply, totals_of

from stethoscope.core.errors import ConfigError
from stethoscope.tasks.amber import Amber
from stethoscope.tasks.extraction import load_extraction

spacy = pytest.importorskip("spacy", reason="spaCy is not installed: pip install 'lvlm-stethoscope[amber]'")

VECTORS = {"dog": (1, 0, 0), "puppy": (0.9, 0.2, 0), "cat": (0.6, 0.8, 0), "kitten": (0.55, 0.83, 0), "sea": (0, 0, 1)}


def pipeline(folder, tags=True, vectors=True):
    """Saves a model: "dog", "kitten" and the like are nouns, "watch" is one behind an article alone."""
    model = spacy.blank("en")
    if vectors:
        for word, vector in VECTORS.items():
            model.vocab.set_vector(word, np.array(vector, dtype=np.float32))
    if tags:
        ruler = model.add_pipe("attribute_ruler")
        for word in (*VECTORS, "dogs"):
            ruler.add([[{"LOWER": word}]], {"TAG": "NN", "LEMMA": word.removesuffix("s")})
        ruler.add([[{"LOWER": "a"}, {"LOWER": "watch"}]], {"TAG": "NN", "LEMMA": "watch"}, index=1)
    model.to_disk(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path, images):
    words = {word: [] for word in (*VECTORS, "watch")}
    (tmp_path / "relation.json").write_text(json.dumps(words))
    (tmp_path / "safe_words.txt").write_text("")
    rows = [{"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]}]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    (tmp_path / "query_all.json").write_text('[{"id": 1, "image": "a.png", "query": "Describe this image."}]')
    return tmp_path


def made(folder, images, model, similarity=0.8):
    task = Amber(str(folder), str(images), spacy=model, similarity=similarity)
    task.setup()
    return task


def test_a_likeness_excuses_and_convicts(folder, images):
    """A puppy is like a dog, which is there; a kitten is like a cat, which is expected; the sea like neither."""
    task = made(folder, images, pipeline(folder / "model"))
    sample, text = task.samples()[0], "A puppy, a kitten, the sea"
    score = task.score(sample, reply(text))
    assert score.detail == {"nouns": ["puppy", "kitten", "sea"], "invented": ["kitten", "sea"], "fallen_for": ["cat"]}
    assert score.counts["covered"] == 1
    assert [mention.label for mention in task.mentions(sample, reply(text))] == [0, 1, 1]


def test_the_threshold_is_exclusive(folder, images):
    model = pipeline(folder / "model")
    cosine = float(np.dot((1, 0, 0), (0.6, 0.8, 0)))
    for similarity, label in ((cosine - 0.01, 0), (cosine + 0.01, 1)):
        task = made(folder, images, model, similarity)
        assert [m.label for m in task.mentions(task.samples()[0], reply("a cat"))] == [label]


def test_nouns_are_those_of_the_tagger(folder, images):
    task = made(folder, images, pipeline(folder / "model"))
    text = "Two dogs watch a watch"
    assert [(noun.name, text[noun.start : noun.end]) for noun in task._nouns(text)] == [
        ("dog", "dogs"),
        ("watch", "watch"),
    ]
    assert task._nouns(text)[1].start == len("Two dogs watch a ")
    without = made(folder, images, pipeline(folder / "untagged", tags=False))
    assert [noun.name for noun in without._nouns(text)] == ["dog", "watch", "watch"]


def test_against_the_transcription(folder, images):
    task = made(folder, images, pipeline(folder / "model"))
    text = "A puppy and a kitten and a sea and a cat and a dog and a watch"
    annotation = {1: {"truth": ["dog"], "hallu": ["cat"]}}
    association = json.loads((folder / "relation.json").read_text())

    def alike(first, other):
        if first == other:
            return True
        if first not in VECTORS or other not in VECTORS:
            return False
        a, b = np.array(VECTORS[first]), np.array(VECTORS[other])
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) > 0.8

    nouns = [noun.name for noun in task._nouns(text)]
    theirs = amber_published.describe({1: text}, annotation, association, (), lambda _: nouns, alike)
    totals = totals_of([task.score(task.samples()[0], reply(text)).counts])
    for name, value in theirs.items():
        assert float(task.metrics()[name](totals)) == pytest.approx(value), name


def test_a_model_without_vectors_is_refused(folder, images):
    with pytest.raises(ConfigError, match="has no word vectors"):
        made(folder, images, pipeline(folder / "model", vectors=False))


def test_all_common_nouns(tmp_path):
    """Nouns side by side are one name in the singular of the last; words about the picture are left out."""
    model = spacy.blank("en")
    ruler = model.add_pipe("attribute_ruler")
    tags = {"dog": "NN", "dogs": "NNS", "tennis": "NN", "rackets": "NNS", "picture": "NN", "Rex": "NNP", "love": "NN"}
    for word, tag in tags.items():
        ruler.add([[{"TEXT": word}]], {"TAG": tag, "LEMMA": word.removesuffix("s") if tag == "NNS" else word})
    model.to_disk(tmp_path / "model")
    extraction = load_extraction(f"nouns:{tmp_path}/model")
    text = "The picture shows Rex, two dogs with tennis rackets, and love."
    found_names = [(noun.name, text[noun.start : noun.end]) for noun in extraction(text)]
    assert found_names == [("dog", "dogs"), ("tennis racket", "tennis rackets"), ("love", "love")]
    assert (extraction.identity, extraction.objects) == ("nouns:model", None)
    with pytest.raises(ConfigError, match="has no tagger, which finds nouns; en_core_web_sm has one"):
        load_extraction(f"nouns:{pipeline(tmp_path / 'untagged', tags=False)}")
