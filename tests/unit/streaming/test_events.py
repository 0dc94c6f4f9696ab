"""Mentions are told as soon as their names are complete, although the extraction is asked only where names begin."""

import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stethoscope.streaming.events import MentionTracker
from stethoscope.tasks.extraction import Extraction, as_extraction
from stethoscope.tasks.noun_extraction import NounExtractor, Vocabulary
from stethoscope.tasks.object_extraction import NAMES, PAIRS

OWN = Vocabulary({"café table": ["bistro table"], "t-shirt": ["Top"], "Σίσυφος": [], "İbrik": [], "old oak leaf": []})
NOUNS = NounExtractor(["dog", "TV", "leaf", "can", "person", "watch"])
EXTRACTIONS = {
    "coco": as_extraction("coco"),
    "own": Extraction("own", OWN.mentions, None, name_forms=OWN.name_forms),
    "amber": Extraction("amber", NOUNS, None, name_forms=NOUNS.name_forms),
}
WORDS = sorted(
    {
        *NAMES,
        *(word for pair in PAIRS for word in pair),
        *OWN.names,
        *NOUNS.vocabulary,
        "ΣΊΣΥΦΟΣ",
        "Café",
        "İBRİK",
        "dogs",
    }
)
TEXTS = st.lists(
    st.one_of(
        *[st.sampled_from(WORDS)] * 3,
        st.sampled_from(["the", "to", "you", "sits", "hot      ", "leaves", "n't", "'s", ".", ",", "-", "/", "\n"]),
        st.text(max_size=2),
    ),
    max_size=20,
).flatmap(lambda parts: st.sampled_from(["", " ", " ", " "]).map(lambda blank: blank.join(parts)))


def told(text, ends, extraction, back=None):
    """The mentions with the length of the text at which they were told, and how often the extraction was asked."""
    asked = []

    def counted(text):
        asked.append(text)
        return extraction.mentions(text)

    tracker, mentions = MentionTracker(replace(extraction, mentions=counted), None), []
    for end in [*ends, None]:
        for mention in tracker.new(text[:end], end is None):
            mentions.append((end, mention))
            tracker.add(mention, [])
        if end is not None and end == back:
            tracker.rewind(end // 2)
    return mentions, len(asked)


@pytest.mark.parametrize("name", EXTRACTIONS)
@settings(max_examples=100, deadline=None)
@given(text=TEXTS, seed=st.integers(0, 9))
@example(text="you watch a dogn't can and a hot      dog sits on hot days", seed=0)
@example(text="an old    oak\n leaf falls off an old oak  tree, or t-shirts", seed=1)
def test_no_mention_comes_later_than_if_every_word_were_looked_at(name, text, seed):
    drawn, extraction = random.Random(f"{text}{seed}"), EXTRACTIONS[name]
    ends = [end for end in range(1, len(text) + 1) if seed % 2 == 0 or drawn.random() < 0.3]
    back = drawn.choice([*ends, None])
    expected, _ = told(text, ends, replace(extraction, name_forms=None), back)
    assert told(text, ends, extraction, back)[0] == expected


def test_the_extraction_is_asked_for_names_alone():
    text = (
        "The image shows a hot day in the streets of an old town, with a dog near two parked cars and a large fountain."
    )
    ends = [index for index, letter in enumerate(text) if letter == " "]
    mentions, asked = told(text, [end + 2 for end in ends], EXTRACTIONS["coco"])
    assert [mention.name for _, mention in mentions] == ["dog", "car"]
    assert asked == len(mentions) + 1  # and at the end
