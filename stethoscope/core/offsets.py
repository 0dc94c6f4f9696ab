"""Which characters of a decoded answer each token wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence

KEPT = 6
"""So many tokens before a token may change how it reads."""


def decode_with_offsets(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text of ``ids`` without leading white space, and a character span for every token.

    A token ends where the decoded prefix up to it agrees with the whole text, so bytes of a character that is not
    complete yet (shown as U+FFFD by the prefix) count for the token that completes it, and the spaces of
    SentencePiece fall where the whole text has them. The spans follow each other without gaps and cover the text.

    Args:
        decode: decodes a list of ids as a whole.

    >>> words = {1: b"a", 2: b" caf", 3: bytes([0xC3]), 4: bytes([0xA9])}
    >>> decode_with_offsets([1, 2, 3, 4], lambda ids: b"".join(words[i] for i in ids).decode(errors="replace"))
    ('a café', ((0, 1), (1, 5), (5, 5), (5, 6)))
    """
    ids = list(ids)
    text = decode(ids)
    ends, end = [], 0
    for count in range(1, len(ids)):
        prefix = decode(ids[:count])
        while not text.startswith(prefix[end:], end):  # the prefix ends in an incomplete character, seldom in more
            prefix = prefix[:-1]
        end = max(end, len(prefix))
        ends.append(end)
    ends.append(len(text))
    lead = len(text) - len(text.lstrip())
    ends = [max(end - lead, 0) for end in ends[: len(ids)]]
    return text[lead:], tuple(zip([0, *ends[:-1]], ends, strict=True)) if ids else ()


class GrowingText:
    """The text of tokens that come one by one, with the spans of ``decode_with_offsets``.

    The newest tokens are decoded together, as many as may change how they read; not all of them, since that would take
    time that grows with the answer.

    Args:
        decode: decodes a list of ids as a whole.

    >>> words = {1: b" a", 2: b" caf", 3: bytes([0xC3]), 4: bytes([0xA9])}
    >>> text = GrowingText(lambda ids: b"".join(words[i] for i in ids).decode(errors="replace"))
    >>> [text.add(token) for token in (1, 2, 3, 4)]
    [('a', 0, 1), (' caf', 1, 5), ('', 5, 5), ('é', 5, 6)]
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the newest
        self._told = 0  # characters of their text that have been told
        self._end = 0  # of the answer so far

    def add(self, token: int) -> tuple[str, int, int]:
        """The characters that a token completes, where they start in the answer and where they end."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text.rstrip("\ufffd")  # which stands for a character that is not complete
        if not self._end:
            self._told = len(whole) - len(whole.lstrip())
        start, more = self._end, whole[self._told :]
        self._end, self._told = start + len(more), max(self._told, len(whole))
        if len(self._ids) >= 2 * KEPT and whole == text:
            kept = self._decode(self._ids[-KEPT:])
            if "\ufffd" not in kept and text.endswith(kept.lstrip()):  # it does not begin within a character
                self._ids, self._told = self._ids[-KEPT:], len(kept)
        return more, start, self._end
