"""Removing objects from texts, by hand and on real captions."""

import json
import random
import re
from collections import Counter

import pytest

from stethoscope.mitigation.editing import NOTHING_LEFT, remove_mentions
from stethoscope.tasks.object_extraction import mentions


def without(text, *names):
    words = mentions(text)
    unwanted = {index for index, mention in enumerate(words) if mention.name in names}
    return remove_mentions(text, [(mention.start, mention.end) for mention in words], unwanted)


@pytest.mark.parametrize(
    ("text", "names", "expected", "kinds"),
    [
        # lists
        ("A cat and a dog are on a couch.", ["dog"], "A cat is on a couch.", ["item"]),
        ("A cat and a dog are on a couch.", ["cat"], "A dog is on a couch.", ["item"]),
        ("There are a cup and a bowl.", ["bowl"], "There is a cup.", ["item"]),
        ("There are two cups and a bowl.", ["bowl"], "There are two cups.", ["item"]),
        ("There is a cup, a fork, and a bowl.", ["fork"], "There is a cup and a bowl.", ["item"]),
        ("There is a cup, a fork, and a bowl.", ["cup", "bowl"], "There is a fork.", ["item", "item"]),
        ("I see a cup, a fork, a knife and a bowl here.", ["fork"], "I see a cup, a knife, and a bowl here.", ["item"]),
        ("The table has cups, forks, and bowls.", ["cup"], "The table has forks and bowls.", ["item"]),
        ("The old bench and the red car stand there.", ["car"], NOTHING_LEFT, ["sentence"]),  # "stand" would be wrong
        ("It lies between a cup and a bowl.", ["cup"], NOTHING_LEFT, ["sentence"]),
        ("A cup or a bowl can be seen.", ["cup"], "A bowl can be seen.", ["item"]),
        ("A man carrying some cats and two dogs.", ["cat"], "A man carrying two dogs.", ["item"]),
        ("A stove top oven and a cup.", ["cup"], "A stove top oven.", ["item"]),  # both words name the oven
        # the end of a sentence
        ("A man rides a horse, with a dog behind him.", ["dog"], "A man rides a horse.", ["clause"]),
        ("A man rides a horse, and there is a dog!", ["dog"], "A man rides a horse!", ["clause"]),
        ("A street with several cars.", ["car"], NOTHING_LEFT, ["sentence"]),
        ("A man stands in a street filled with cars.", ["car"], NOTHING_LEFT, ["sentence"]),
        # sentences
        ("A cat sleeps. A dog barks. A bird sings.", ["dog"], "A cat sleeps. A bird sings.", ["sentence"]),
        ("A cat sleeps. A dog barks. It is loud.", ["dog"], "A cat sleeps.", ["sentence", "reference"]),
        ("A cat sleeps.\n\nA dog barks. A bird sings.", ["dog"], "A cat sleeps.\n\nA bird sings.", ["sentence"]),
        ("A cat of 3.5 kg sleeps. A dog barks.", ["dog"], "A cat of 3.5 kg sleeps.", ["sentence"]),
        ("A dog", ["dog"], NOTHING_LEFT, ["sentence"]),
        ("A cat.", ["dog"], "A cat.", []),
        ("", ["dog"], "", []),
    ],
)
def test_by_hand(text, names, expected, kinds):
    edited = without(text, *names)
    assert edited.text == expected
    assert [removal.kind for removal in edited.removals] == kinds


def test_all_that_is_not_removed_remains():
    """Whatever a sentence looks like: no unwanted mention stays, and none goes that is not told of."""
    random_ = random.Random(0)
    joints = [" and ", ", ", ", and ", " or ", " as well as ", " with ", " carrying ", ". ", "; ", " (", "'s "]
    nouns = ["a cat", "two dogs", "the man", "his red car", "some cups", "several books", "an old stove top oven"]
    for _ in range(2000):
        text = "".join(random_.choice(nouns) + random_.choice(joints) for _ in range(random_.randint(1, 8)))
        words = mentions(text)
        unwanted = {index for index in range(len(words)) if random_.random() < 0.4}
        edited = remove_mentions(text, [(word.start, word.end) for word in words], unwanted)
        assert unwanted <= set(edited.removed)
        left = [word.name for index, word in enumerate(words) if index not in edited.removed]
        assert [word.name for word in mentions(edited.text)] == left, text


def test_what_was_removed_is_told():
    text = "A cat and a dog are on a couch. A bird sings next to a cup. They are happy."
    words = mentions(text)
    edited = without(text, "dog", "bird")
    parts = [text[removal.start : removal.end] for removal in edited.removals]
    assert parts == ["dog", "A bird sings next to a cup.", "They are happy."]
    assert [words[index].name for index in edited.removed] == ["dog", "bird", "cup"]
    assert edited.text == "A cat is on a couch."


def captions(folder, count=200):
    """Real captions of all families, a fixed sample."""
    files = sorted((folder / "real_captions").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [json.loads(line)["caption"] for line in random.Random(0).sample(lines, count)]


FAULTS = re.compile(
    r" [,.]|,,|(?<!\.)\.\.(?!\.)|,\.|  |\band and\b|\b(?:and|or|a|an|the|with|of)[.,]|\ba an?\b", re.IGNORECASE
)


@pytest.mark.parametrize("seed", range(3))
def test_real_captions_stay_grammatical(shared, seed):
    chance = random.Random(seed)
    for text in captions(shared):
        text = re.sub(r" +", " ", text.strip())
        words = mentions(text)
        names = sorted({mention.name for mention in words})
        if not names:
            continue
        unwanted = set(chance.sample(names, max(1, len(names) // 4)))
        edited = without(text, *unwanted)
        left = Counter(mention.name for mention in mentions(edited.text))
        assert not unwanted & set(left)  # none is left
        kept = [mention.name for index, mention in enumerate(words) if index not in edited.removed]
        assert left == Counter(kept)  # all others are there, but for those that are told
        assert all(line[0] == line[0].upper() for line in filter(None, edited.text.split("\n")))
        assert len(FAULTS.findall(edited.text)) <= len(FAULTS.findall(text)), edited.text
