"""Decide which tokens of a growing answer a detector scores: those that can begin the name of an object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stethoscope.tasks.extraction import NamePrefixes

_Decisions = dict[tuple[str, int, str], bool | None]

_decisions: WeakKeyDictionary[PreTrainedTokenizerBase, WeakKeyDictionary[NamePrefixes, _Decisions]] = (
    WeakKeyDictionary()
)

_FUNCTION_WORDS = frozenset((
    "a", "an", "as", "at", "be", "but", "by", "can", "do", "for", "he", "her", "his", "in", "is", "it", "its",
    "me", "my", "no", "not", "of", "on", "or", "our", "out", "she", "so", "the", "their", "there", "they",
    "this", "to", "up", "us", "we", "who", "with", "you",
))  # fmt: skip
"""English words with which names begin ("to" in "toaster"), but which are nearly always words of their own."""


class Candidates:
    """Tokens of one answer that can begin a name, by their text.

    Whether a piece such as " a" begins " airplane" the next token tells. The decision waits for it where the piece is a
    function word, or where the model would have to spell the name as its tokenizer never does.

    Args:
        names: None where any word can be a name, so that every token is a candidate.
        tokenizer: of the model.
        every: whether all tokens that can belong to a name are candidates, not only those that can begin one.
    """

    def __init__(self, names: NamePrefixes | None, tokenizer: PreTrainedTokenizerBase, every: bool = False) -> None:
        self._names, self._tokenizer, self._every = names, tokenizer, every
        self._known: _Decisions = {}
        if names is not None:
            self._known = _decisions.setdefault(tokenizer, WeakKeyDictionary()).setdefault(names, {})

    def decide(self, pieces: Sequence[str], ids: Sequence[int], index: int, finished: bool = False) -> bool | None:
        """Decide whether a token is a candidate; None if only the next token will tell.

        Args:
            pieces: the text that every token so far adds.
            ids: of these tokens.
            index: of the token.
            finished: whether the answer ends with these tokens.
        """
        names, piece = self._names, pieces[index]
        if names is None:
            return True
        last = index == len(pieces) - 1
        if self._every:  # a token without text of its own may be part of a character of the name
            after = "".join(pieces[index + 1 :]) + " " * finished
            return not piece or names.can_belong("".join(pieces[:index]), piece, after)
        if not piece:
            return False
        before = next((text[-1] for text in reversed(pieces[:index]) if text), "")
        if not last or finished:
            return names.can_begin(before, piece, "".join(pieces[index + 1 :]) + " " * finished)
        key = before, ids[index], piece
        if key not in self._known:
            self._known[key] = names.can_begin(before, piece) and (self._spells(*key) or None)
        return self._known[key]

    def _spells(self, before: str, token: int, piece: str) -> bool:
        """Decide whether the tokenizer itself spells a name with this token, which is no function word."""
        continuations = set(self._names.continuations(before, piece)) if self._names is not None else {""}
        if not continuations or "" in continuations:  # a word is complete
            return True
        if piece.strip().lower() in _FUNCTION_WORDS:
            return False
        if piece.isupper():
            continuations |= {letters.upper() for letters in continuations}
        texts = [before + piece + letters for letters in sorted(continuations)]
        return any(token in ids for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"])
