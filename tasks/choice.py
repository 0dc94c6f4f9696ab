"""Published ways to read the letter of an option out of an answer to a multiple-choice question.

They disagree, as those for yes and no do: the parser is part of a figure. Each is a pure function from the answer's
text and the options to one of their letters, or to None for an answer that it cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from stethoscope.core.types import UNKNOWN, Mention

Options = Mapping[str, str]
"""Letter of every option -> its text; empty where the text is part of the question alone."""


def lone_letter(text: str, options: Options) -> str | None:
    """Read the only letter of an option that occurs as a word, in any case; so the article "a" is a choice of A.

    HumbleBench's rule. Source: utils/metrics.py of maifoundations/HumbleBench.

    >>> abc = dict.fromkeys("ABC", "")
    >>> [lone_letter(text, abc) for text in ("B", "The answer is (c).", "A or B", "It is a dog.", "None")]
    ['B', 'C', None, 'A', None]
    """
    letters = {word.upper() for word in re.findall(r"\w+", text)}.intersection(options)
    return letters.pop() if len(letters) == 1 else None


def leading_letter(text: str, options: Options) -> str | None:
    """Read the first character if it is an option's capital letter, else the one option whose text occurs.

    VLMEvalKit's rule for CRPE, except that blanks before the answer do not count; so "Cats" is a choice of C. Source:
    vlmeval/dataset/utils/crpe.py of open-compass/VLMEvalKit, which asks only for the text of the right option.

    >>> ab = {"A": "a dog", "B": "a cat"}
    >>> [leading_letter(text, ab) for text in ("B. a dog", "the answer is a cat", "a dog or a cat", "(A)")]
    ['B', 'B', None, None]
    """
    text = text.strip()
    if text[:1] in options and text:
        return text[0]
    named = [letter for letter, option in options.items() if option and option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def earlier_letter(text: str, options: Options) -> str | None:
    """Read the first letter of an option that occurs as a word, in any case; so the article "a" is a choice of A.

    NaturalBench's rule. Source: naturalbench/utils.py of lmms-eval.

    >>> [earlier_letter(text, {"A": "", "B": ""}) for text in ("B", "b, not A", "It is a cat: B", "Both")]
    ['B', 'B', 'A', None]
    """
    match = re.search(rf"\b([{''.join(options)}])\b", text, re.IGNORECASE)
    return match[1].upper() if match else None


_DIRECTIONS = (
    r"^\(?([{}])\)?\.?$",  # the letter is the answer
    r"^\(?([{}])\)?[.\s]",  # the answer begins with it
    r"answer\s+is\s+\(?([{}])",
    r"option\s+\(?([{}])",
    r"([{}])\)?(?:\s|$)",  # the last letter of a word
    r"^([{}])",
)


def directed_letter(text: str, options: Options) -> str | None:
    """Read a letter that an answer is or begins with, or that follows "answer is" or "option", or that ends a word.

    What is looked for first counts, in any case; so "A tail" is a choice of A, and so is "Panda". lmms-eval's rule for
    MMVP. Source: mmvp/utils.py.

    >>> ab = {"A": "", "B": ""}
    >>> [directed_letter(text, ab) for text in ("(b).", "B. Closed", "The answer is A", "Option B", "Open")]
    ['B', 'B', 'A', 'B', None]
    """
    letters, text = "".join(options), text.strip()
    matches = (re.search(pattern.replace("{}", letters), text, re.IGNORECASE) for pattern in _DIRECTIONS)
    return next((match[1].upper() for match in matches if match), None)


PARSERS: dict[str, Callable[[str, Options], str | None]] = {
    "lone_letter": lone_letter,
    "leading_letter": leading_letter,
    "earlier_letter": earlier_letter,
    "directed_letter": directed_letter,
}
"""The parsers by name."""


def bare_letter(label: str) -> str:
    """Strip brackets, full stop and blanks from a letter as data sets write it.

    >>> bare_letter("(a)"), bare_letter("B."), bare_letter(" c ")
    ('A', 'B', 'C')
    """
    return label.strip().strip("().: ").upper()


def list_options(options: Options) -> str:
    """Write the options as lines below a question.

    >>> print(list_options({"A": "dog", "B": "cat"}))
    A. dog
    B. cat
    """
    return "\n".join(f"{letter}. {option}" for letter, option in options.items())


def reply_counts(reply: str | None, label: str, letters: Iterable[str]) -> dict[str, float]:
    """Count one answer for the totals.

    Args:
        reply: letter that was read; None for an answer that could not be.
        label: letter of the right option.
        letters: of all options that questions of the task have.

    Returns:
        ``asked``, ``read`` and ``right``; ``chose_<letter>`` for every letter.

    >>> reply_counts("B", "A", "AB")
    {'asked': 1.0, 'read': 1.0, 'right': 0.0, 'chose_A': 0.0, 'chose_B': 1.0}
    """
    counts = {"asked": 1.0, "read": float(reply is not None), "right": float(reply == label)}
    return counts | {f"chose_{letter}": float(reply == letter) for letter in letters}


def claim(text: str, reply: str | None, label: str, options: Options) -> tuple[Mention, ...]:
    """Return the letter of the chosen option as a mention, hallucinated if another one is right.

    Where the letter is no word of the answer, the first word stands for it.

    Args:
        text: the answer.
        reply: what the parser read; None claims nothing.
        label: letter of the right option.
        options: of the question; the chosen one's text is the object, where it has one.
    """
    if reply is None:
        return ()
    match = re.search(rf"\b{re.escape(reply)}\b", text) or re.search(rf"\b{re.escape(reply)}\b", text, re.IGNORECASE)
    match = match or re.search(r"\w+|\S+", text)
    if match is None:
        return ()
    return (Mention(match.start(), match.end(), options.get(reply) or UNKNOWN, label=int(reply != label)),)
