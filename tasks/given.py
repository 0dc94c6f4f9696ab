"""Answers that a file brings along: where their characters are in what the model's tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Sequence


def moved(text: str, spans: Sequence[tuple[int, int]], answer: str) -> list[tuple[int, int]] | None:
    """Character spans of a text, as spans of the same text after a tokenizer has split it up and put it together.

    Tokenizers take away blanks at the ends, make several blanks one, write small letters. What is no blank must come
    back, but for its case.

    Args:
        text: what the file says.
        spans: half-open spans in it, none of blanks alone.
        answer: what the tokenizer gives back.

    Returns:
        The same spans in ``answer``; None if that is another text (a letter that the tokenizer does not know).

    >>> moved(" A  dog.", [(4, 7)], "a dog.")
    [(2, 5)]
    >>> moved("A dog", [(2, 5)], "A ?")
    """
    before = [place for place, letter in enumerate(text) if not letter.isspace()]
    after = [place for place, letter in enumerate(answer) if not letter.isspace()]
    if [text[place].lower() for place in before] != [answer[place].lower() for place in after]:
        return None
    place = dict(zip(before, after, strict=True))
    inside = [[place[at] for at in range(start, end) if at in place] for start, end in spans]
    return [(places[0], places[-1] + 1) for places in inside]
