"""Published ways to read a yes or a no out of an answer.

They disagree on real answers ("Yes, there is.", "There isn't"), and so do scores made with them: the parser is part of
a POPE figure. Each is a pure function from the answer's text to ``"yes"``, ``"no"`` or None for an answer that it
cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from stethoscope.core.types import Mention

Reply = str | None
"""What a parser reads in an answer: ``yes``, ``no``, or None for neither."""


def official(text: str) -> Reply:
    """Apply POPE's own rule: a lone word "No", "no" or "not" in the first sentence is a no, everything else is a yes.

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
    """Read an answer that is "yes" or "no" as a whole, in any case, with or without final punctuation.

    The exact match of lmms-eval, except that "Yes." is not held against the model.

    >>> [strict(text) for text in ("Yes.", "no", "No, there is not.")]
    ['yes', 'no', None]
    """
    word = text.strip().rstrip(".!,;:").rstrip().lower()
    return word if word in ("yes", "no") else None


def first_word(text: str) -> Reply:
    """Read the first word, letters only, if it is "yes" or "no", in any case.

    >>> [first_word(text) for text in ("Yes, a dog.", '"No"', "Not sure", "There is")]
    ['yes', 'no', None, None]
    """
    match = re.search(r"[^\W\d_]+", text)
    word = match.group().lower() if match else ""
    return word if word in ("yes", "no") else None


def exact(text: str) -> Reply:
    """Read an answer that is the very word "Yes" or "No".

    AMBER's rule. Source: inference.py of junyangwang0410/AMBER.

    >>> [exact(text) for text in ("Yes", "No", "no", "Yes.")]
    ['yes', 'no', None, None]
    """
    return {"Yes": "yes", "No": "no"}.get(text)


def prefix(text: str) -> Reply:
    """Find a yes, or else a no, within the first four characters, in any case and without full stops.

    MME's rule, in the form of lmms-eval (mme/utils.py), which also takes the single letters "y" and "n"; so "Not sure"
    and "Snow" are a no.

    >>> [prefix(text) for text in ("Yes, a dog", "No.", "Nothing", "It is", "Y")]
    ['yes', 'no', 'no', None, 'yes']
    """
    start = text.lower().strip().replace(".", "")
    if len(start) == 1:
        return {"y": "yes", "n": "no"}.get(start)
    return next((word for word in ("yes", "no") if word in start[:4]), None)


def either(text: str) -> Reply:
    """Read the one of the words "yes" and "no" that occurs anywhere, in any case, if the other does not.

    What VLMEvalKit does first with HallusionBench, and all it does without a judge model.

    >>> [either(text) for text in ("The answer is yes.", "No, it isn't", "Yes and no", "Nothing")]
    ['yes', 'no', None, None]
    """
    replies = {"yes", "no"}.intersection(re.findall(r"[^\W\d_]+", text.lower()))
    return replies.pop() if len(replies) == 1 else None


def contains(text: str) -> Reply:
    """Find "yes" anywhere, or else "no" anywhere, in any case, inside other words too.

    The rule of DASH-B, BEAF and RePOPE: "cannot", "nothing" and "I do not know" are a no, "eyes" and "yesterday" a yes,
    "There isn't." is not read. Source: eval_utils.py of YanNeu/DASH-B and of YanNeu/RePOPE (whose further "not" is
    always a "no"), beaf_metric.py of postech-ami/BEAF (which takes an answer with neither for that of the row before).

    >>> [contains(text) for text in ("Known: yes", "No, but yes for the cat", "I cannot see one.", "There isn't.")]
    ['yes', 'yes', 'no', None]
    """
    return next((word for word in ("yes", "no") if word in text.lower()), None)


def earlier(text: str) -> Reply:
    """Read the one of the words "yes" and "no" that comes first, anywhere, in any case.

    NaturalBench's rule. Source: naturalbench/utils.py of lmms-eval.

    >>> [earlier(text) for text in ("No, but yes for the cat", "Known: yes", "I cannot see one.")]
    ['no', 'yes', None]
    """
    match = re.search(r"\b(yes|no)\b", text, re.IGNORECASE)
    return match[1].lower() if match else None


PARSERS: dict[str, Callable[[str], Reply]] = {
    "official": official,
    "repope": contains,
    "strict": strict,
    "first_word": first_word,
    "exact": exact,
    "prefix": prefix,
    "either": either,
    "contains": contains,
    "earlier": earlier,
}
"""The parsers by name."""


def claim(text: str, reply: Reply, label: str, claimed: str) -> tuple[Mention, ...]:
    """Return the word yes as a mention, hallucinated if the truth is no; a no claims nothing.

    Some parsers read a yes into answers without that word ("There is."); there the first word stands for it.

    Args:
        text: the answer.
        reply: what the parser read.
        label: the truth, ``yes`` or ``no``.
        claimed: the object, or what else is asked about.
    """
    match = re.search(r"\byes\b", text, re.IGNORECASE) or re.search(r"\w+|\S+", text)
    if reply != "yes" or match is None:
        return ()
    return (Mention(match.start(), match.end(), object=claimed, label=int(label == "no")),)
