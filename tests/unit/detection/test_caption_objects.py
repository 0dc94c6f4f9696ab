"""How a caption is read: every object once, where it stands, how often, and what it is called."""

import numpy as np
import pytest

from stethoscope.detection.caption_objects import SHAPE, objects_of_word, read_caption
from stethoscope.tasks.object_extraction import OBJECTS, mentions

TEXT = "Two  dogs\nplay.  A *couch*; people and a dog, a woman on the Couch"


def column(caption, name):
    return caption.shape[:, SHAPE.index(name)].tolist()


def test_objects_stand_once_in_the_order_of_their_first_mentions():
    caption = read_caption(TEXT)
    assert [OBJECTS[index] for index in caption.objects] == ["dog", "couch", "person"]
    assert caption.surfaces == ["dogs", "couch", "people"]
    assert caption.mentions == mentions(TEXT)
    assert caption.mention_objects == [0, 1, 2, 0, 2, 1]


def test_positions_are_words_between_blanks():
    caption = read_caption(TEXT)
    words = TEXT.split()
    assert [words[index].strip("*;,.") for index in caption.mention_words] == [
        "dogs", "couch", "people", "dog", "woman", "Couch",
    ]  # fmt: skip
    assert column(caption, "first_word") == [1, 4, 5]
    assert column(caption, "relative_position") == pytest.approx([1 / 14, 4 / 14, 5 / 14])
    assert column(caption, "log_first_word") == pytest.approx(np.log1p([1, 4, 5]))
    assert column(caption, "order") == [0, 1, 2]
    assert column(caption, "count") == [2, 2, 2]
    for name, value in (("words", 14), ("mentions", 6), ("objects", 3), ("density", 3 / np.log1p(14))):
        assert column(caption, name) == pytest.approx([value] * 3)


def test_the_words_of_a_caption_are_its_distinct_words():
    assert read_caption("A dog's 2 dogs, a Dog; naïve—it isn't").words == [
        "a", "dog's", "dogs", "dog", "naïve", "it", "isn't",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "  \n ", "nothing of note", "12 34"])
def test_a_caption_may_name_nothing(text):
    caption = read_caption(text)
    assert caption.mentions == []
    assert caption.shape.shape == (0, len(SHAPE))
    assert len(caption.objects) == 0


@pytest.mark.parametrize(
    ("word", "names"),
    [("women", ["person"]), ("light", ["traffic light"]), ("knives", ["knife"]), ("bus", ["bus"]), ("green", [])],
)
def test_own_words_are_those_of_names_and_synonyms_in_both_numbers(word, names):
    assert [OBJECTS[index] for index in objects_of_word(word)] == names
