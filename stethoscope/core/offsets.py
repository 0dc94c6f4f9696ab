"""Map the tokens of an answer to character spans of its decoded text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

CONTEXT = 6
"""Number of preceding tokens that can change how a token is decoded."""


def decode_with_offsets(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Decode token ids to text without leading white space, and a character span for every token.

    A token ends where the decoded prefix up to it agrees with the whole text. So the bytes of a character that is not
    complete yet (U+FFFD in the prefix) count for the token that completes it, and SentencePiece's spaces are where the
    whole text has them. The spans are adjacent and cover the text.

    Args:
        ids: of the answer's tokens.
        decode: decodes a list of ids as a whole.

    Returns:
        The text, and a (start, end) pair for every id.

    >>> words = {1: b"a", 2: b" caf", 3: bytes([0xC3]), 4: bytes([0xA9])}
    >>> decode_with_offsets([1, 2, 3, 4], lambda ids: b"".join(words[i] for i in ids).decode(errors="replace"))
    ('a café', ((0, 1), (1, 5), (5, 5), (5, 6)))
    """
    ids = list(ids)
    text = decode(ids)
    ends, end = [], 0
    for count in range(1, len(ids)):
        prefix = decode(ids[:count])
        while not text.startswith(prefix[end:], end):  # the prefix ends in an incomplete character, rarely in several
            prefix = prefix[:-1]
        end = max(end, len(prefix))
        ends.append(end)
    ends.append(len(text))
    lead = len(text) - len(text.lstrip())
    ends = [max(end - lead, 0) for end in ends[: len(ids)]]
    return text[lead:], tuple(zip([0, *ends[:-1]], ends, strict=True)) if ids else ()


class GrowingText:
    """Decodes tokens one by one, with the spans of ``decode_with_offsets``.

    Only the newest tokens, which can change how the next one is decoded, are decoded each time: decoding all of them
    would take time that grows with the answer.

    Args:
        decode: decodes a list of ids as a whole.

    >>> words = {1: b" a", 2: b" caf", 3: bytes([0xC3]), 4: bytes([0xA9])}
    >>> text = GrowingText(lambda ids: b"".join(words[i] for i in ids).decode(errors="replace"))
    >>> [text.add(token) for token in (1, 2, 3, 4)]
    [('a', 0, 1), (' caf', 1, 5), ('', 5, 5), ('é', 5, 6)]
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the newest tokens
        self._returned = 0  # characters of their text that have been returned
        self._end = 0  # length of the answer so far

    def add(self, token: int) -> tuple[str, int, int]:
        """Decode one more token; return the characters that it completes, and their start and end in the answer."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text.rstrip("\ufffd")  # U+FFFD stands for an incomplete character
        if not self._end:
            self._returned = len(whole) - len(whole.lstrip())
        start, more = self._end, whole[self._returned :]
        self._end, self._returned = start + len(more), max(self._returned, len(whole))
        if len(self._ids) >= 2 * CONTEXT and whole == text:
            recent = self._decode(self._ids[-CONTEXT:])
            if "\ufffd" not in recent and text.endswith(recent.lstrip()):  # it does not begin within a character
                self._ids, self._returned = self._ids[-CONTEXT:], len(recent)
        return more, start, self._end
