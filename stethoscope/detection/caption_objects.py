"""Read a caption as the text-only detector sees it, and compute how well each object fits it.

Of a caption it sees the words, and each object with its position and repetition. An object fits by the objects named
beside it, and by all of the caption's words. Both priors learn from which objects *are* in pictures, not from which
mentions were right: every caption of a picture with known content is an example for all objects, also for those that
it does not name.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stethoscope.detection.artifact import Arrays
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


SMOOTHING = 5.0  # pictures that every co-occurrence counts as if seen at the base rate
WORDS, LEAST = 600, 10  # most words of the scene prior, and captions that a word must be in
RIDGE = 30.0
RAREST = 0.01  # smallest presence whose logarithm is taken

CO_OCCURRENCE = (
    "base_log_odds", "fit_before_mean", "fit_before_best", "fit_before_sum", "fit_all_mean", "fit_all_best",
    "fit_all_sum",
)  # fmt: skip
SCENE = ("scene", "scene_gain", "scene_log_gain")
"""Columns of the two priors."""


@dataclass(frozen=True)
class PairPrior:
    """Base rates of objects, and how much likelier each is where another is.

    Attributes:
        base: (objects,) share of the pictures that have the object, in (0, 1).
        gain: (objects, objects) log P(column is there | row is there) - log P(column is there), in nats.
    """

    base: np.ndarray
    gain: np.ndarray

    @classmethod
    def fit(cls, presence: np.ndarray) -> PairPrior:
        """Count pictures.

        P(o | c) = (n_co + s P(o)) / (n_c + s) with s = ``SMOOTHING`` pictures at the base rate.

        Args:
            presence: (pictures, objects) of 0 and 1, a row for each picture.

        >>> prior = PairPrior.fit(np.array([[1, 1], [1, 1], [0, 0], [0, 0]]))
        >>> prior.base.tolist(), np.exp(prior.gain[0, 1]).round(3).tolist()
        ([0.5, 0.5], 1.286)
        """
        counts = presence.sum(axis=0)
        base = (counts + 0.5) / (len(presence) + 1)
        together = presence.T @ presence
        conditional = (together + SMOOTHING * base) / (counts[:, None] + SMOOTHING)
        return cls(base, np.log(conditional / base))

    @classmethod
    def restore(cls, arrays: Arrays) -> PairPrior:
        """Restore and check what ``arrays`` returned."""
        base = arrays.positive("base", len(INDEX))
        arrays.require((base < 1).all(), "base", "should be below 1 everywhere")
        return cls(base, arrays.numbers("gain", len(INDEX), len(INDEX)))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return vars(self)

    def columns(self, caption: ReadCaption) -> np.ndarray:
        """Compute the columns of ``CO_OCCURRENCE``, (objects of the caption, columns).

        The mean, best and sum of the gains over the objects named before, and over all others; 0 without any.
        """
        objects = caption.objects
        count = len(objects)
        gain = self.gain[np.ix_(objects, objects)].T  # rows: the object asked about
        parts = [np.log(self.base[objects] / (1 - self.base[objects]))]
        for beside in (np.tri(count, k=-1, dtype=bool), ~np.eye(count, dtype=bool)):
            number = beside.sum(axis=1)
            total = (gain * beside).sum(axis=1)
            best = np.where(beside, gain, -np.inf).max(axis=1, initial=-np.inf)
            parts += [total / np.maximum(number, 1), np.where(number > 0, best, 0.0), total]
        return np.stack(parts, axis=1)


@dataclass(frozen=True)
class ScenePrior:
    """Ridge regression of what is in the picture on the caption's words and the objects that it names.

    The words of an object, and its being named, have no weight for itself: the prior says whether it would be there
    if the caption were silent about it.

    Attributes:
        words: vocabulary.
        mean: (words + objects,) share of the captions with each word, and naming each object.
        weights: (words + objects, objects) what each adds to the presence of an object.
        base: (objects,) share of the captions whose picture has the object.
    """

    words: tuple[str, ...]
    mean: np.ndarray
    weights: np.ndarray
    base: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {word: index for index, word in enumerate(self.words)})
        object.__setattr__(self, "_offset", self.base - self.mean @ self.weights)

    @classmethod
    def fit(cls, captions: Sequence[ReadCaption], presence: np.ndarray) -> ScenePrior:
        """Solve the ridge regression once, then leave the own words of every object out exactly.

        With A the inverse of the regularised Gram matrix and b the solution for an object, the solution without the
        columns S is b - A[:, S] A[S, S]^-1 b[S] (block inverse).

        Args:
            captions: n captions.
            presence: (n, objects) of 0 and 1, what the picture of each caption shows.
        """
        seen = Counter(word for caption in captions for word in caption.words)
        words = tuple(word for word, count in seen.most_common(WORDS) if count >= LEAST)
        plain = cls(words, np.zeros(len(words) + len(INDEX)), np.zeros((len(words) + len(INDEX), len(INDEX))),
                    np.zeros(len(INDEX)))  # fmt: skip
        X = np.zeros((len(captions), len(words) + len(INDEX)))
        for row, caption in enumerate(captions):
            X[row, plain._active(caption)] = 1
        mean, base = X.mean(axis=0), presence.mean(axis=0)
        X -= mean
        inverse = np.linalg.inv(X.T @ X + RIDGE * np.eye(X.shape[1]))
        weights = inverse @ (X.T @ (presence - base))
        own: list[list[int]] = [[len(words) + index] for index in range(len(INDEX))]
        for position, word in enumerate(words):
            for index in objects_of_word(word):
                own[index].append(position)
        for index, left_out in enumerate(own):
            part = np.linalg.solve(inverse[np.ix_(left_out, left_out)], weights[left_out, index])
            weights[:, index] -= inverse[:, left_out] @ part
            weights[left_out, index] = 0
        return cls(words, mean, weights, base)

    @classmethod
    def restore(cls, arrays: Arrays, words: Sequence[str]) -> ScenePrior:
        """Restore and check what ``arrays`` returned."""
        width = len(words) + len(INDEX)
        mean, weights = arrays.numbers("mean", width), arrays.numbers("weights", width, len(INDEX))
        return cls(tuple(words), mean, weights, arrays.numbers("base", len(INDEX)))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return {name: getattr(self, name) for name in ("mean", "weights", "base")}

    def _active(self, caption: ReadCaption) -> list[int]:
        """List the columns that are 1 for a caption."""
        index: dict[str, int] = self._index  # type: ignore[attr-defined]
        known = [index[word] for word in caption.words if word in index]
        return known + [len(self.words) + int(name) for name in caption.objects]

    def presence(self, caption: ReadCaption) -> np.ndarray:
        """Predict the presence of all objects from a caption, (objects,); about 0 to 1, not clipped."""
        return self.weights[self._active(caption)].sum(axis=0) + self._offset  # type: ignore[attr-defined]

    def columns(self, caption: ReadCaption) -> np.ndarray:
        """Compute the columns of ``SCENE``, (objects of the caption, columns).

        Presence, its difference to the base rate, and the logarithm of their ratio.
        """
        objects = caption.objects
        presence, base = self.presence(caption)[objects], self.base[objects]
        ratio = np.clip(presence, RAREST, 1) / np.clip(base, RAREST, 1)
        return np.stack([presence, presence - base, np.log(ratio)], axis=1)
