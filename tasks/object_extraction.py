"""Find the 80 COCO objects in a text, word for word as CHAIR defines it.

The definition is that of Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, as their code applies
it: lower-case, tokenise as nltk's ``word_tokenize`` does, make every word singular as ``pattern.en`` does, merge pairs
of words, look the words up. This module gives the same objects without either library, and says where they stand.

Words repeat, so the analysis of every piece of text between blanks is cached: reading a caption is one pass of a
regular expression and one look-up per word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

import yaml

from stethoscope.core.types import Mention


class TextMention(NamedTuple):
    """An object that a text names.

    Attributes:
        name: canonical COCO name.
        start, end: character span of all its words in the text ("stop signs", "baby elephant").
    """

    name: str
    start: int
    end: int


MentionExtractor = Callable[[str], list[TextMention]]
"""A function that lists the objects a text names, in reading order."""


def label_mentions(mentions: Sequence[TextMention], labels: Sequence[int]) -> tuple[Mention, ...]:
    """Give mentions of a text their labels, numbers and repetitions.

    Args:
        mentions: mentions in reading order.
        labels: of every mention 1 hallucinated, 0 grounded, -1 not to be judged.
    """
    before: Counter[str] = Counter()
    labelled = []
    for index, (mention, label) in enumerate(zip(mentions, labels, strict=True)):
        labelled.append(Mention(mention.start, mention.end, mention.name, label, index, before[mention.name]))
        before[mention.name] += 1
    return tuple(labelled)


_Word = tuple[int, str, int, int]
"""A word that can matter: its index among all tokens, its singular, its first character and the one after its last."""


def _load() -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """Load the vocabulary: word or merged pair -> canonical name, pair of words -> the word that it is read as."""
    data = yaml.safe_load(files("stethoscope.tasks").joinpath("data", "coco_objects.yaml").read_text("utf-8"))
    names = {word: name for name, words in data["objects"].items() for word in (name, *words)}
    pairs = {tuple(pair.split()): word for pair, word in data["pairs"].items()}
    for qualifier, words in data["qualifiers"].items():
        pairs |= {(qualifier, word): word for word in words}
    return names, pairs


NAMES, PAIRS = _load()
"""Words and merged pairs -> canonical name; pairs of words -> the word that they are read as."""

OBJECTS = tuple(dict.fromkeys(NAMES.values()))
"""The 80 canonical names, in COCO's order."""

_RELEVANT = frozenset(NAMES) | {word for pair in PAIRS for word in pair}

_IRREGULAR = (
    ("children", "child"),
    ("people", "person"),
    ("geese", "goose"),
    ("oxen", "ox"),
    ("men", "man"),
    ("mice", "mouse"),
)
_UNCHANGED = ("scissors", "collies", "doggies")
_ENDINGS = (  # the first that fits is applied
    ("buses", "bus"),
    ("oes", "o"),
    ("xes", "x"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("sses", "ss"),
    ("lves", "lf"),
    ("nives", "nife"),
    ("ae", "a"),
    ("s", ""),
)


def singular(word: str) -> str:
    """Return the singular of a lower-case word, for all words of which the singular is in the vocabulary.

    Agrees with ``pattern.en.singularize`` (De Smedt & Daelemans 2012), which CHAIR is defined by, on every word that
    either of them turns into a word of the vocabulary; of other words it only promises that they stay outside it. Its
    odd results are part of the definition: a final s goes ("bus" reads "bu"), "ties" reads "ty".

    >>> [singular(word) for word in ("knives", "women", "puppies", "benches", "buses", "bus", "ties")]
    ['knife', 'woman', 'puppy', 'bench', 'bus', 'bu', 'ty']
    """
    for plural, single in _IRREGULAR:
        if word.endswith(plural):
            return word[: -len(plural)] + single
    if word.endswith(_UNCHANGED):
        return word
    if word.endswith("ies") and word[-4:-3] not in ("", *"aeiouy"):
        return word[:-3] + "y"
    for ending, single in _ENDINGS:
        if word.endswith(ending):
            return word[: len(word) - len(ending)] + single
    return word


def _forms(word: str) -> set[str]:
    """Return all lower-case words of which the singular is this word."""
    rules = (*_IRREGULAR, *_ENDINGS, ("ies", "y"), ("", ""))
    forms = {word[: len(word) - len(single)] + plural for plural, single in rules if word.endswith(single)}
    return {plural for plural in forms if singular(plural) == word}


def name_forms() -> frozenset[str]:
    """Return everything that ``mentions`` reads as a mention: lower-case words, joined by single blanks.

    Pairs that only begin as one are among them: a train track is no train.

    >>> sorted(form for form in name_forms() if form.startswith(("buse", "wine")))
    ['buses', 'wine glass', 'wine glasses', 'wines glass', 'wines glasses']
    """
    words = {form for word in NAMES if " " not in word for form in _forms(word)}
    pairs = (pair for pair, word in PAIRS.items() if word in NAMES or pair[0] in NAMES)
    return frozenset(words | {f"{a} {b}" for first, last in pairs for a in _forms(first) for b in _forms(last)})


_CHUNK = re.compile(r"\S+")

# What word_tokenize sets apart wherever it stands. A comma or colon before a digit stays in its word; an apostrophe
# that opens a quotation is set apart, one that begins a clitic ('s, 'll) is not.
_APART = re.compile(
    r"""\.{2,} | -- | '' | `+ | [«“‘„»”’";@\#$%&?!*\[\](){}<>\u2012-\u2015] | (?<![:,])[:,](?=\D|$)
      | (?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)""",
    re.VERBOSE,
)
# Then it takes these off the end of a word, in this order, each once.
_CLITICS = tuple(re.compile(f"(?<=[^'])(?:{clitic})$") for clitic in ("'", "'[smd]", "'ll|'re|'ve|n't"))
_STOP = r"""[.?!](?=[)";}\]*:@'({\[‘’“”«»?!]%s)"""
_STOP_INSIDE, _STOP_OR_END = re.compile(_STOP % ""), re.compile(_STOP % "|$")
_FINAL_PERIOD = re.compile(r"""(?<=[^.])\.(?=[\])}>"'»”’]*$)""")


def _periods(chunk: str, last: bool) -> set[int]:
    """Return the indices of the periods of a chunk that end a sentence, and are therefore words of their own.

    Sentences are found as nltk's Punkt does; its abbreviations do not matter, since none of them is an object. Of
    several possible ends in one chunk Punkt takes the last.
    """
    periods: set[int] = set()
    rest = 0
    stops = [match.start() for match in (_STOP_INSIDE if last else _STOP_OR_END).finditer(chunk)]
    if stops:
        rest = stops[-1]
        if chunk[rest] == ".":
            periods.add(rest)
    if last and (final := _FINAL_PERIOD.search(chunk, rest)):
        periods.add(final.start())
    return periods


def _analyse(chunk: str, last: bool) -> tuple[int, tuple[_Word, ...]]:
    """Split a lower-case chunk without blanks: number of tokens, words that can matter with offsets into the chunk."""
    cuts = [match.span() for match in _APART.finditer(chunk)]
    periods = _periods(chunk, last)
    cuts += [(period, period + 1) for period in periods if not any(first <= period < end for first, end in cuts)]
    index, start, words = 0, 0, []
    for first, end in [*sorted(cuts), (len(chunk), len(chunk))]:
        if first > start:
            stem, count = chunk[start:first], 1
            for clitic in _CLITICS:
                if match := clitic.search(stem):
                    stem = stem[: match.start()]
                    count += 1
            word = singular(stem)
            if word in _RELEVANT:
                words.append((index, word, start, start + len(stem)))
            index += count
        index += end > first
        start = end
    return index, tuple(words)


@lru_cache(maxsize=1 << 17)
def _inner(chunk: str) -> tuple[int, tuple[_Word, ...]]:
    return _analyse(chunk, last=False)


@lru_cache(maxsize=1 << 14)
def _last(chunk: str) -> tuple[int, tuple[_Word, ...]]:
    return _analyse(chunk, last=True)


def _lower(text: str) -> str:
    """Lower a text without changing its length, so that offsets hold (one letter, İ, would become two)."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)


def _words(text: str) -> list[_Word]:
    """Return the words of a text that can matter, in reading order."""
    chunks = list(_CHUNK.finditer(_lower(text)))
    words: list[_Word] = []
    tokens = 0
    for index, chunk in enumerate(chunks, 1 - len(chunks)):
        count, relevant = _inner(chunk[0]) if index else _last(chunk[0])
        if relevant:
            base = chunk.start()
            words += [(tokens + number, word, base + start, base + end) for number, word, start, end in relevant]
        tokens += count
    return words


def mentions(text: str) -> list[TextMention]:
    """Return the COCO objects that a text names, every time it names them, in reading order.

    Args:
        text: any text; offsets of the result are positions in it.

    Returns:
        One mention for each word or pair of words. Source: ``caption_to_words`` of CHAIR (Rohrbach et al. 2018).

    >>> mentions("Baby elephants near a stop sign")
    [TextMention(name='elephant', start=0, end=14), TextMention(name='stop sign', start=22, end=31)]
    """
    return list(_mentions(text))


@lru_cache(maxsize=16)  # an answer is scored, and then its mentions are labelled
def _mentions(text: str) -> tuple[TextMention, ...]:
    words = _words(text)
    read: list[tuple[str, int, int]] = []
    index = 0
    while index < len(words):
        token, word, start, end = words[index]
        index += 1
        if index < len(words) and words[index][0] == token + 1:
            pair = PAIRS.get((word, words[index][1]))
            if pair is not None:
                word, end = pair, words[index][3]
                index += 1
        read.append((word, start, end))
    # "the seat of the toilet" is no chair
    toilet = any(word == "toilet" for word, _, _ in read)
    return tuple(
        TextMention(NAMES[word], start, end)
        for word, start, end in read
        if word in NAMES and not (toilet and word == "seat")
    )
