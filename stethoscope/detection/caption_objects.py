"""Read a caption as the text-only detector sees it: its words, and each object with its position and repetition."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stethoscope.tasks.object_extraction import NAMES, OBJECTS, TextMention, mentions, singular

INDEX = {name: index for index, name in enumerate(OBJECTS)}
"""Index of every COCO object, in COCO's order."""

SHAPE = (
    "first_word", "log_first_word", "relative_position", "order", "relative_order", "count", "words", "mentions",
    "objects", "density",
)  # fmt: skip
"""Columns of ``ReadCaption.shape``, none of which knows what the object is."""

_BLANK_SEPARATED = re.compile(r"\S+")
_LETTERS = re.compile(r"[^\W\d_]+(?:'[a-z]+)?")
_OWN_WORDS: dict[str, list[int]] = {}  # part of a name or synonym -> indices of its objects
for _phrase, _name in NAMES.items():
    for _part in _phrase.split():
        _OWN_WORDS.setdefault(_part, []).append(INDEX[_name])


@dataclass(frozen=True)
class ReadCaption:
    """A caption with the objects that it names, each once, in the order of their first mentions.

    Attributes:
        mentions: every mention, in reading order.
        mention_objects: (mentions,) index into ``objects`` of each.
        mention_words: (mentions,) word of the caption, from 0, at which each starts.
        objects: (k,) indices of the COCO objects.
        surfaces: (k,) how each is named first, in lower case: "couch", "orange", "people".
        shape: (k, len(SHAPE)) position, order and repetition of each object, and lengths of the caption. Positions are
            counted in words between blanks.
        words: the caption's distinct lower-case words, in reading order.
    """

    mentions: list[TextMention]
    mention_objects: list[int]
    mention_words: list[int]
    objects: np.ndarray
    surfaces: list[str]
    shape: np.ndarray
    words: list[str]


def read_caption(text: str) -> ReadCaption:
    """Read a caption.

    >>> caption = read_caption("A man feeds two dogs. The man sits on a couch.")
    >>> [OBJECTS[index] for index in caption.objects], caption.surfaces, caption.mention_objects
    (['person', 'dog', 'couch'], ['man', 'dogs', 'couch'], [0, 1, 0, 2])
    >>> caption.shape[:, SHAPE.index("first_word")].tolist(), caption.shape[:, SHAPE.index("count")].tolist()
    ([1.0, 4.0, 10.0], [2.0, 1.0, 1.0])
    """
    named = mentions(text)
    starts = [match.start() for match in _BLANK_SEPARATED.finditer(text)]
    mention_words = [bisect_right(starts, mention.start) - 1 for mention in named]
    order: dict[str, int] = {}
    first_words, surfaces, mention_objects, counts = [], [], [], list[int]()
    for mention, word in zip(named, mention_words, strict=True):
        index = order.setdefault(mention.name, len(order))
        if index == len(counts):
            counts.append(0)
            first_words.append(word)
            surfaces.append(" ".join(text[mention.start : mention.end].lower().split()))
        counts[index] += 1
        mention_objects.append(index)
    return ReadCaption(
        mentions=named,
        mention_objects=mention_objects,
        mention_words=mention_words,
        objects=np.array([INDEX[name] for name in order], dtype=np.int64),
        surfaces=surfaces,
        shape=_shape(first_words, counts, len(starts)),
        words=list(dict.fromkeys(_LETTERS.findall(text.lower()))),
    )


def _shape(first_words: Sequence[int], counts: Sequence[int], words: int) -> np.ndarray:
    """Compute the columns of ``SHAPE``, (objects, columns)."""
    first = np.array(first_words, dtype=float)
    total, order = len(first), np.arange(len(first), dtype=float)
    columns = {
        "first_word": first,
        "log_first_word": np.log1p(first),
        "relative_position": first / max(words, 1),
        "order": order,
        "relative_order": order / max(total, 1),
        "count": np.array(counts, dtype=float),
        "words": np.full(total, words, dtype=float),
        "mentions": np.full(total, sum(counts), dtype=float),
        "objects": np.full(total, total, dtype=float),
        "density": np.full(total, total / np.log1p(max(words, 1))),
    }
    return np.stack([columns[name] for name in SHAPE], axis=1)


def objects_of_word(word: str) -> list[int]:
    """Return the indices of the objects whose name or synonyms have this word, in the singular or plural.

    >>> [OBJECTS[index] for index in objects_of_word("women")], [OBJECTS[index] for index in objects_of_word("stop")]
    (['person'], ['traffic light', 'stop sign'])
    """
    return sorted({*_OWN_WORDS.get(word, ()), *_OWN_WORDS.get(singular(word), ())})
