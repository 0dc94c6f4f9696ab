"""CHAIR's extraction against results worked out by hand from the published rules."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import pytest

from stethoscope.tasks.object_extraction import NAMES, OBJECTS, mentions, singular

ROOT = Path(__file__).parents[3]

CASES = {
    # text: (name, surface text) of every mention
    "A baby elephant": [("elephant", "baby elephant")],
    "adult bears, baby cubs": [("bear", "adult bears")],
    "a baby with a dog": [("person", "baby"), ("dog", "dog")],
    "a passenger train and a passenger": [("train", "passenger train"), ("person", "passenger")],
    "passenger jets": [("airplane", "passenger jets")],
    "a bow tie": [("tie", "bow tie")],
    "bow ties": [("tie", "bow")],
    "ties": [],
    "wine glasses and a wine glass": [("wine glass", "wine glasses"), ("wine glass", "wine glass")],
    "a glass of wine": [],
    "the toilet seat": [("toilet", "toilet seat")],
    "the seat of the toilet": [("toilet", "toilet")],
    "a seat by the window": [("chair", "seat")],
    "Hot dogs with a hot, dog": [("hot dog", "Hot dogs"), ("dog", "dog")],
    "stove top oven": [("oven", "stove"), ("oven", "oven")],
    "Stop signs near traffic\nlights": [("stop sign", "Stop signs"), ("traffic light", "traffic\nlights")],
    "a stop sign's post": [("stop sign", "stop sign")],
    "train tracks": [],
    "a motor bike": [],
    "a motor cycle": [("motorcycle", "motor cycle")],
    "two buses, one bus": [("bus", "buses")],
    "skis, scissors, sheep, oxen": [("skis", "skis"), ("scissors", "scissors"), ("sheep", "sheep"), ("cow", "oxen")],
    "people and women and a policeman": [("person", "people"), ("person", "women"), ("person", "policeman")],
    "Knives; mice: geese, calves!": [("knife", "Knives"), ("mouse", "mice"), ("bird", "geese"), ("cow", "calves")],
    "puppies but collies": [("dog", "puppies")],
    "a tennis racket, a sports ball": [("tennis racket", "racket"), ("sports ball", "ball")],
    "a dining table": [("dining table", "table")],
    "the children's book.": [("person", "children"), ("book", "book")],
    "the dogs' bed": [("dog", "dogs"), ("bed", "bed")],
    "'cat' and \"dog\" (bird).": [("cat", "cat"), ("dog", "dog"), ("bird", "bird")],
    "cat. dog.\n\nbird": [("cat", "cat"), ("dog", "dog"), ("bird", "bird")],
    "a cat... a dog—a bird--a cow": [("cat", "cat"), ("dog", "dog"), ("bird", "bird"), ("cow", "cow")],
    "**Dog:** [cat]": [("dog", "Dog"), ("cat", "cat")],
    "cat/dog, fire-hydrant, dog.the, cup,2": [],
    "an orange cat": [("orange", "orange"), ("cat", "cat")],
    "a fire. hydrant": [("fire hydrant", "hydrant")],
    "İstanbul has a cat": [("cat", "cat")],
    "": [],
    " \n ": [],
}


@pytest.mark.parametrize("text", CASES)
def test_objects_and_the_words_that_name_them(text):
    assert [(name, text[start:end]) for name, start, end in mentions(text)] == CASES[text]


def test_the_same_piece_of_text_in_the_middle_and_at_the_end():
    for ending in (".", '."', ".)", "!", "...", "'s", ",", ":", "?!", ".,", ".;"):
        alone = [mention.name for mention in mentions(f"a dog{ending}")]
        followed = [mention.name for mention in mentions(f"a dog{ending} and more")]
        assert alone == followed == ([] if ending == ".," else ["dog"]), ending


def test_spans_are_in_order_and_do_not_overlap():
    text = "Two wine glasses, baby elephants; traffic lights and a bow tie near the men's toilet seat."
    spans = [(start, end) for _, start, end in mentions(text)]
    assert spans == sorted(spans)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_every_name_names_itself_unless_the_definition_keeps_it_from_it():
    assert len(OBJECTS) == 80
    lost = {word for word in NAMES if [mention.name for mention in mentions(word)] != [NAMES[word]]}
    assert lost == {"bus", "minibus", "airbus"}
    assert all(name in NAMES.values() for name in OBJECTS)


def test_singular_of_what_matters():
    table = {
        "sandwiches": "sandwich",
        "glasses": "glass",
        "glass": "glas",
        "foxes": "fox",
        "toothbrushes": "toothbrush",
        "buffaloes": "buffalo",
        "canoes": "cano",
        "ladies": "lady",
        "doggies": "doggies",
        "grandchildren": "grandchild",
        "servicemen": "serviceman",
        "pocketknives": "pocketknife",
        "horses": "horse",
        "vases": "vase",
        "pizzae": "pizza",
        "s": "",
    }
    assert {word: singular(word) for word in table} == table


def test_thousand_real_captions(shared):
    files = sorted((shared / "captions").glob("*.jsonl"))
    captions = [json.loads(line)["caption"] for file in files for line in file.read_text().splitlines()]
    assert len(captions) == 1000
    extracted = [mentions(caption) for caption in captions]
    assert sum(bool(objects) for objects in extracted) >= 970
    for caption, objects in zip(captions, extracted, strict=True):
        for name, start, end in objects:
            assert caption[start:end].strip() == caption[start:end] != ""
            assert name in OBJECTS


def test_benchmark_script_makes_captions_of_80_words():
    spec = importlib.util.spec_from_file_location("bench_mentions", ROOT / "scripts" / "bench" / "mentions.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    captions = bench.built_in(20)
    assert {len(caption.split()) for caption in captions} == {80}
    assert bench.rate(captions) > 0
