"""Three published ways to read a yes or a no out of an answer.

They disagree on real answers ("Yes, there is.", "There isn't"), and so do scores made with them: the parser is part of
a POPE figure. Each is a pure function from the answer's text to ``"yes"``, ``"no"`` or None for an answer that it
cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Reply = str | None


def official(text: str) -> Reply:
    """POPE's own rule: a lone word "No", "no" or "not" in the first sentence is a no, everything else is a yes.

    Commas are removed, then words are split at blanks, so "isn't", "No!" and "NO" are yes. Only an empty answer is not
    read. Source: evaluate.py of AoiDragon/POPE (Li et al., EMNLP 2023).

    >>> [official(text) for text in ("No, there is not.", "There isn't", "I cannot see", "")]
    ['no', 'yes', 'yes', None]
    """
    if not text.strip():
        return None
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def strict(text: str) -> Reply:
    """The whole answer must be "yes" or "no", in any case, with or without final punctuation.

    The exact match of lmms-eval, except that "Yes." is not held against the model.

    >>> [strict(text) for text in ("Yes.", "no", "No, there is not.")]
    ['yes', 'no', None]
    """
    word = text.strip().rstrip(".!,;:").rstrip().lower()
    return word if word in ("yes", "no") else None


def first_word(text: str) -> Reply:
    """The first word, letters only, must be "yes" or "no", in any case.

    >>> [first_word(text) for text in ("Yes, a dog.", '"No"', "Not sure", "There is")]
    ['yes', 'no', None, None]
    """
    found = re.search(r"[^\W\d_]+", text)
    word = found.group().lower() if found else ""
    return word if word in ("yes", "no") else None


PARSERS: dict[str, Callable[[str], Reply]] = {"official": official, "strict": strict, "first_word": first_word}
"""The parsers by name."""
