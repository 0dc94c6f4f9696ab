"""Mentions are told as soon as their names are complete, although the extraction is asked only where names begin."""

import random
import re
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


def folded(text):
    return re.sub(r"\s+", " ", text.lower().replace("ς", "σ"))


def by_hand(text, ends, extraction, back=None):
    """The same mentions, looking at every word and at every name at every step."""
    forms, mentions, completed = [folded(form) for form in extraction.name_forms()], [], []
    for end in [*ends, None]:
        known = text[:end]
        starts = [match.start() for match in re.finditer(r"[^\W\d_]+", known)]
        growing = [start for start in starts if any(form.startswith(folded(known[start:])) for form in forms)]
        for mention in sorted(extraction.mentions(known), key=lambda mention: mention.start):
            over = re.match(r"\S*\s", known[mention.end :]) and mention.start < min([*growing, len(text) + 1])
            if mention.start >= max([other.end for other in completed], default=0) and (over or end is None):
                mentions.append((end, mention))
                completed.append(mention)
        if end is not None and end == back:
            completed = [mention for mention in completed if mention.end <= end // 2]
    return mentions


@pytest.mark.parametrize("name", EXTRACTIONS)
@settings(max_examples=100, deadline=None)
@given(text=TEXTS, seed=st.integers(0, 9))
@example(text="you watch a dogn't can and a hot      dog sits on hot days", seed=0)
@example(text="an old    oak\n leaf falls off an old oak  tree, or t-shirts", seed=1)
@example(text="a baby sits, a baby ele phant, a train tracks home, a train trip, a wine glassy", seed=0)
def test_no_mention_comes_later_than_if_every_word_were_looked_at(name, text, seed):
    drawn, extraction = random.Random(f"{text}{seed}"), EXTRACTIONS[name]
    ends = [end for end in range(1, len(text) + 1) if seed % 2 == 0 or drawn.random() < 0.3]
    back = drawn.choice([*ends, None])
    mentions, _ = told(text, ends, extraction, back)
    assert mentions == by_hand(text, ends, extraction, back)
    slower, _ = told(text, ends, replace(extraction, name_forms=None))  # where a further word must be complete
    if not re.search("seat|toilet", text, re.IGNORECASE):  # "the seat of the toilet" is no chair
        early, _ = told(text, ends, extraction)
        assert [mention for _, mention in early] == [mention for _, mention in slower] == extraction.mentions(text)
        ends_told = [[end or len(text) + 1 for end, _ in mentions] for mentions in (early, slower)]
        assert all(first <= last for first, last in zip(*ends_told, strict=True))


def test_the_extraction_is_asked_for_names_alone():
    text = (
        "The image shows a hot day in the streets of an old town, with a dog near two parked cars and a large fountain."
    )
    ends = [index for index, letter in enumerate(text) if letter == " "]
    mentions, asked = told(text, [end + 2 for end in ends], EXTRACTIONS["coco"])
    assert [mention.name for _, mention in mentions] == ["dog", "car"]
    assert asked == len(mentions) + 1  # and at the end
