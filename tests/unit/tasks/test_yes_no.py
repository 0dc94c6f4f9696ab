"""The table of what each parser reads out of an answer."""

import pytest

from stethoscope.tasks.yes_no import PARSERS

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
