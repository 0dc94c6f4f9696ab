"""Nouns of a vocabulary and names of several words, on sentences read by hand."""

import doctest

import pytest

from stethoscope.tasks import annotations, counts, halloc, noun_extraction, yes_no
from stethoscope.tasks.noun_extraction import NounExtractor, Vocabulary, singulars

WORDS = (
    *(
        "TV",
        "can",
        "dog",
        "man",
        "woman",
        "person",
        "child",
        "people",
        "knife",
        "shelf",
        "box",
        "bus",
        "glass",
        "board",
    ),
    *("watch", "tree", "sheep", "berry", "light", "water", "hot", "bear", "leave", "e-book"),
)

SENTENCES = [
    # text, nouns that it has
    ("A dog and two dogs.", ["dog", "dog"]),
    ("men, women, children and people with a TV", ["man", "woman", "child", "people", "TV"]),
    ("They watch the bus; she wears a watch.", ["bus", "watch"]),
    ("A chair can be seen. He can board a bus.", ["bus"]),
    ("a can, the trash can and three cans", ["can", "can", "can"]),
    ("He wants to board. The dog is next to boards, close to board games.", ["dog", "board", "board"]),
    ("knives on shelves in boxes, buses, glasses, berries", ["knife", "shelf", "box", "bus", "glass", "berry"]),
    ("The dog's bowl, the dogs' bowls, an e-book, e-books", ["dog", "dog", "e-book", "e-book"]),
    ("Many leaves, about to leave; hot dogs on hot days", ["dog"]),
    ("Dog. TREE. doghouse bus-stop watery", []),
    ("a tree.A dog,a sheep(box)", ["tree", "dog", "sheep", "box"]),
    ("naïve señor 犬 dog\u0000dog\n\ndog", ["dog", "dog", "dog"]),
    ("", []),
]


@pytest.mark.parametrize(("text", "expected"), SENTENCES)
def test_nouns_of_a_sentence(text, expected):
    nouns = NounExtractor(WORDS)(text)
    assert [noun.name for noun in nouns] == expected
    assert all(text[noun.start : noun.end].isprintable() for noun in nouns)
    assert [noun.start for noun in nouns] == sorted(noun.start for noun in nouns)


PLURALS = {
    "dogs": "dog", "benches": "bench", "foxes": "fox", "bushes": "bush", "cherries": "cherry", "scarves": "scarf",
    "knives": "knife", "women": "woman", "children": "child", "geese": "goose", "mice": "mouse", "potatoes": "potato",
    "tomatoes": "tomato", "sheep": "sheep", "ties": "tie", "pies": "pie", "glasses": "glass", "buses": "bus",
    "pianos": "piano", "skis": "ski", "keys": "key", "gas": "gas", "leaves": "leaf", "s": "s",
}  # fmt: skip


@pytest.mark.parametrize(("plural", "single"), PLURALS.items())
def test_singulars(plural, single):
    assert single in list(singulars(plural))
    assert next(iter(singulars(plural))) == plural


def test_vocabulary_of_several_words():
    words = Vocabulary({"traffic light": ["stop  Light"], "light": ["lamp"], "dog": [], "hot dog": []})
    text = "A Traffic Light, two stop\nlights, lamps; a hot, dog and HOT DOGS under traffic. Light"
    mentions = words.mentions(text)
    assert [word.name for word in mentions] == ["traffic light", "traffic light", "light", "dog", "hot dog", "light"]
    assert text[mentions[1].start : mentions[1].end] == "stop\nlights"
    assert Vocabulary({}).mentions(text) == []


@pytest.mark.parametrize(
    "module", [annotations, counts, halloc, noun_extraction, yes_no], ids=lambda module: module.__name__
)
def test_examples_of_the_docstrings(module):
    assert doctest.testmod(module).failed == 0
