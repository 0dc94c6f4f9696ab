"""The tables of what each parser reads out of an answer."""

import pytest

from stethoscope.tasks.yes_no import PARSERS, claim

TABLE = [
    # answer, official, strict, first_word
    ("Yes", "yes", "yes", "yes"),
    ("Yes.", "yes", "yes", "yes"),
    ("no", "no", "no", "no"),
    ("No.", "no", "no", "no"),
    (" yes \n", "yes", "yes", "yes"),
    ("YES!", "yes", "yes", "yes"),
    ("NO", "yes", "no", "no"),
    ("No, there is not.", "no", None, "no"),
    ("Yes, there is a dog.", "yes", None, "yes"),
    ("There is no dog in the image.", "no", None, None),
    ("There isn't", "yes", None, None),
    ("Not sure", "yes", None, None),
    ("It is not.", "no", None, None),
    ("I cannot see", "yes", None, None),
    ("Yes. There is no doubt.", "yes", None, "yes"),
    ("A dog. No cat.", "yes", None, None),
    ("no\nyes", "yes", None, "no"),
    ("\"No\"", "yes", None, "no"),
    ("**Yes**", "yes", None, "yes"),
    ("yesterday", "yes", None, None),
    ("Nope", "yes", None, None),
    (".", "yes", None, None),
    ("42", "yes", None, None),
    ("", None, None, None),
    ("  \n", None, None, None),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=lambda row: repr(row[0]))
def test_what_each_parser_reads(row):
    text, *expected = row
    assert [PARSERS[name](text) for name in ("official", "strict", "first_word")] == expected


MORE = [
    # answer, exact, prefix, either
    ("Yes", "yes", "yes", "yes"),
    ("No", "no", "no", "no"),
    ("yes", None, "yes", "yes"),
    ("No.", None, "no", "no"),
    (" No", None, "no", "no"),
    ("Y", None, "yes", None),
    ("n", None, "no", None),
    ("N.", None, "no", None),
    ("Nothing", None, "no", None),
    ("Snow", None, "no", None),
    ("A no", None, "no", "no"),
    ("The answer is no", None, None, "no"),
    ("Not yes", None, "no", "yes"),
    ("Yes, no doubt", None, "yes", None),
    ("yes-no", None, "yes", None),
    ("yesterday", None, "yes", None),
    ("is", None, None, None),
    ("", None, None, None),
]  # fmt: skip


@pytest.mark.parametrize("row", MORE, ids=lambda row: repr(row[0]))
def test_what_the_other_parsers_read(row):
    text, *expected = row
    assert [PARSERS[name](text) for name in ("exact", "prefix", "either")] == expected


def test_a_claim_is_the_word_yes():
    (mention,) = claim('"Yes", yes', "yes", "no", "dog")
    assert (mention.start, mention.end, mention.object, mention.label) == (1, 4, "dog", 1)
    (mention,) = claim("There is.", "yes", "yes", "dog")
    assert (mention.start, mention.end, mention.label) == (0, 5, 0)
    assert claim("No", "no", "yes", "dog") == claim("", None, "yes", "dog") == ()
