"""Decide from text alone whether a token can begin the name of an object, or be part of one.

A stream has to know this before the name is complete. Names are compared with the text that a token adds and with the
text around it, so the result holds for any tokenizer: sub-words, several words in one token, bytes of a character, with
or without a leading blank. It errs on one side only: no token of a mention is ever ruled out.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator

_LETTER = re.compile(r"[^\W\d_]")
"""A character within words; every extraction of a vocabulary begins a name at a letter, behind anything else."""
_BLANKS = re.compile(r"\s+")
_NOT = "n't"
"""The only letters behind a name: CHAIR's tokenizer sets this ending apart, whatever it follows."""


class NamePrefixes:
    """The names of objects by their prefixes.

    Args:
        forms: every way to write a name: singular and plural, synonyms, words joined by single blanks. Case is ignored,
            which can only let more tokens through.

    >>> names = NamePrefixes(["dog", "dogs", "hot dog", "hot dogs"])
    >>> [names.can_begin("A", piece) for piece in (" do", " hot", " dogs.", " dogma", "dog")]
    [True, True, True, False, False]
    >>> names.can_begin("A", " do", "es"), names.can_belong("A hot d", "og"), names.can_belong("A hot d", "rink")
    (False, True, False)
    """

    def __init__(self, forms: Iterable[str]) -> None:
        folded = {_fold(form) for form in forms}
        self._forms = frozenset(folded)
        self._sorted = sorted(folded)
        self._first_words = frozenset(form.partition(" ")[0] for form in folded)
        self._longest = max((len(form) for form in folded), default=0)

    def can_begin(self, before: str, piece: str, after: str = "") -> bool:
        """Decide whether a name can begin within a piece of text.

        Args:
            before: the text before it; only the last character matters.
            piece: the text that one token adds.
            after: the text behind it, as far as it is known.
        """
        return any(self._fits(piece[start:] + after, self._first_words) for start in _word_starts(before, piece))

    def can_belong(self, before: str, piece: str, after: str = "") -> bool:
        """Decide whether a piece of text can share a character with a name, which may have begun before it."""
        if not piece:
            return False
        text = before + piece + after
        return self.can_begin(before, piece, after) or any(
            self._fits(text[start:], self._forms, len(before) - start) for start in self._recent_starts(before)
        )

    def continuations(self, before: str, piece: str) -> Iterator[str]:
        """Yield the letters with which first words of names go on behind a piece that ends within them."""
        for start in _word_starts(before, piece):
            prefix = _fold(piece[start:])
            for index in range(bisect_left(self._sorted, prefix), len(self._sorted)):
                if not self._sorted[index].startswith(prefix):
                    break
                yield self._sorted[index].partition(" ")[0][len(prefix) :]

    def _recent_starts(self, text: str) -> Iterator[int]:
        """Yield the starts of words in which a name can have begun that is not over at the end of a text."""
        blanks = 0
        for start in range(len(text) - 1, -1, -1):
            blanks += text[start].isspace()
            if len(text) - start - blanks > self._longest:
                return
            if _LETTER.match(text[start]) and not (start and _LETTER.match(text[start - 1])):
                yield start

    def _fits(self, text: str, forms: Collection[str], least: int = 0) -> bool:
        """Decide whether a text is the start of a name, or begins with a form of more than ``least`` characters."""
        folded = _fold(text)
        index = bisect_left(self._sorted, folded)
        if index < len(self._sorted) and self._sorted[index].startswith(folded):
            return True
        ends = range(len(_fold(text[:least])) + 1, min(len(folded), self._longest + 1))
        return any(
            folded[:end] in forms
            for end in ends
            if not _LETTER.match(folded[end]) or _NOT.startswith(folded[end : end + len(_NOT)])
        )


def _word_starts(before: str, piece: str) -> list[int]:
    """List the indices in a piece at which a word begins."""
    text = before[-1:] + piece
    first = len(text) - len(piece)
    letters = [bool(_LETTER.match(character)) for character in text]
    return [index - first for index in range(first, len(text)) if letters[index] and not (index and letters[index - 1])]


def _fold(text: str) -> str:
    """Lower a text, with single blanks and one small sigma."""
    return _BLANKS.sub(" ", text.lower().replace("ς", "σ"))
