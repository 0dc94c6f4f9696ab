"""Which characters of a decoded answer each token wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence


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
