"""Score whether the object that a mention names is among the image tokens, the vectors by which a model sees a picture.

A small network gives every image token a score for every object, and the log-sum-exp of an object's scores over tokens
says whether the picture shows it (multiple-instance learning: which token shows it need not be known). It learns from
what is known about the names in answers: their labels, the model's replies when it was asked, or the mean of both.
Prediction costs no pass: the tokens are what the language model read. ``attended_embedding`` reduces the same ones to
one vector before anything is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.model_selection import GroupKFold

from stethoscope.core.cache import LRUCache
from stethoscope.core.errors import DataError
from stethoscope.core.token_table import IMAGE_TOKENS, object_index, unpack_vectors
from stethoscope.detection.artifact import Arrays
from stethoscope.detection.estimators import SharedFits, inner_folds, make_once
from stethoscope.detection.hidden_probe import (
    TEACHER,
    UNITS,
    AdamW,
    Masks,
    hidden_units,
    in_single_precision,
    initial_weights,
    propagate,
)
from stethoscope.detection.recalibration import reply_boundary
from stethoscope.metrics.ranking import divide

COLUMN = "image_objects"
"""Name of the score, for explanations: log-odds that the named object is not in the picture."""
EPOCHS, BATCH, RATE, DROPOUT = 20, 64, 3e-3, 0.2
"""Training by AdamW with one cycle of the learning rate; dropout of inputs and hidden units."""
FOLDS = 3
"""In which training mentions are scored; with 5 the AUROC of detectors is the same, for 1.8 times the time."""
LARGEST_ODDS = 20.0
KNOWN_TEXT = 2**27
"""Characters of text whose odds a probe knows, 6,000 pictures of the embedded model's 64 tokens."""


def _text_length(known: tuple[str, np.ndarray]) -> int:
    return len(known[0])


@dataclass(frozen=True)
class ImageProbe:
    """A network with one hidden layer of rectified units behind a standardisation, applied to every image token.

    Attributes:
        mean, scale: (D,) of the standardisation.
        hidden, hidden_bias: (D, ``UNITS``) and (``UNITS``,).
        output, bias: (``UNITS``, objects) and (objects,).
        known_odds: (objects,) of ``transform`` by the text of a picture's tokens, with that text; a run is read several
            times.
    """

    mean: np.ndarray
    scale: np.ndarray
    hidden: np.ndarray
    hidden_bias: np.ndarray
    output: np.ndarray
    bias: np.ndarray
    known_odds: LRUCache = field(
        default_factory=lambda: LRUCache(KNOWN_TEXT, _text_length), init=False, repr=False, compare=False
    )

    @classmethod
    def fit(cls, pictures: Sequence[np.ndarray], targets: np.ndarray, seed: int = 0) -> ImageProbe:
        """Fit on pictures.

        Args:
            pictures: (N, D) float32 image tokens of each; N may differ, then a mean number is drawn from each.
            targets: (pictures, objects) probabilities that a picture shows an object, NaN where not known.
            seed: of weights, order and dropout.
        """
        counts = np.array([len(tokens) for tokens in pictures])
        starts, drawn = np.cumsum(counts) - counts, round(float(counts.mean()))
        flat = np.concatenate(pictures)
        mean, spread = flat.mean(0, dtype=float), flat.std(0, dtype=float)
        scale = np.where(spread > 1e-6, spread, 1.0)
        flat = ((flat - mean) / scale).astype(np.float32)
        random, columns = np.random.default_rng(seed), flat.shape[1]
        known, wanted = np.isfinite(targets), np.nan_to_num(targets).astype(np.float32)
        weights, parts, gradient, slopes = initial_weights(columns, targets.shape[1], random)
        drop_inputs, drop_units = (Masks(DROPOUT, BATCH * drawn * width, random) for width in (columns, UNITS))
        optimiser = AdamW(weights, EPOCHS * math.ceil(len(pictures) / BATCH), RATE)
        for _ in range(EPOCHS):
            order = random.permutation(len(pictures))
            for first in range(0, len(order), BATCH):
                chosen = order[first : first + BATCH]
                tokens = np.arange(drawn)
                if (counts != drawn).any():
                    tokens = (random.random((len(chosen), drawn)) * counts[chosen, None]).astype(int)
                rows = flat[starts[chosen, None] + tokens]
                rows *= drop_inputs.draw(*rows.shape)
                kept = drop_units.draw(*rows.shape[:2], UNITS)
                backward(parts, rows, kept, wanted[chosen], known[chosen], slopes)
                optimiser.step(gradient)
        return cls(mean, scale, *(part.astype(np.float64) for part in parts))

    @classmethod
    def restore(cls, arrays: Arrays, objects: int) -> ImageProbe:
        """Restore and check what ``arrays`` returned.

        Args:
            arrays: arrays of a file by name.
            objects: number of objects.

        Raises:
            ArtefactError: an array is missing, has another shape or type, or holds invalid numbers.
        """
        mean = arrays.numbers("mean", None)
        return cls(
            mean,
            arrays.positive("scale", len(mean)),
            arrays.weights("hidden", len(mean), UNITS),
            arrays.weights("hidden_bias", UNITS),
            arrays.weights("output", UNITS, objects),
            arrays.weights("bias", objects),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return in_single_precision({name: part for name, part in vars(self).items() if name != "known_odds"})

    def transform(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Compute the log-odds that each picture shows each object, (pictures, objects).

        Args:
            pictures: (N, D) image tokens of each.

        Raises:
            DataError: the tokens have another number of dimensions than those of training.
        """
        odds = np.zeros((len(pictures), len(self.bias)))
        for index, tokens in enumerate(pictures):
            scores = self._token_scores(tokens)
            largest = scores.max(0)
            odds[index] = largest + np.log(np.exp(scores - largest).mean(0))
        return np.clip(odds, -LARGEST_ODDS, LARGEST_ODDS)

    def locate(self, tokens: np.ndarray, index: int) -> np.ndarray:
        """Compute how probable each image token alone makes it that the picture shows an object, (N,) in [0, 1].

        The odds of ``transform`` are a mean over tokens; each one's part of that sum, as odds, gives its probability.

        Args:
            tokens: (N, D) image tokens.
            index: of the object.

        Raises:
            DataError: as ``transform``.
        """
        return expit(np.clip(self._token_scores(tokens)[:, index] - math.log(len(tokens)), -LARGEST_ODDS, LARGEST_ODDS))

    def _token_scores(self, tokens: np.ndarray) -> np.ndarray:
        """Compute (N, objects) scores of (N, D) image tokens."""
        if tokens.shape[1] != len(self.mean):
            raise DataError(
                f"image tokens have {tokens.shape[1]} dimensions; the detector learned from {len(self.mean)}"
            )
        units = np.maximum(((tokens - self.mean) / self.scale) @ self.hidden + self.hidden_bias, 0)
        return units @ self.output + self.bias

    def scores(self, rows: pd.DataFrame, objects: tuple[str, ...]) -> np.ndarray:
        """Score mentions, (rows,): the log-odds that the picture lacks the named object; NaN if not known.

        Args:
            rows: of a token table.
            objects: names of the objects, as in training.

        Raises:
            DataError: the table has no image tokens, or some of another kind.
        """
        named = object_index(rows, objects)
        if IMAGE_TOKENS not in rows or ((named >= 0).any() and not has_tokens(rows)):
            raise DataError(
                "the token table has no image tokens, which the detector reads; compute its features again with "
                "`stethoscope extract`"
            )
        codes, texts = _pictures(rows)
        return _named_scores(lambda read: self._odds([texts[index] for index in read]), codes, named)

    def _odds(self, texts: Sequence[str]) -> np.ndarray:
        """Return ``transform`` of pictures given as text, (pictures, objects), each of which is computed once."""
        odds = np.zeros((len(texts), len(self.bias)))
        for index, text in enumerate(texts):
            known = self.known_odds.get(text)
            if known is None:
                known = self.known_odds.put(text, (text, self.transform([unpack_vectors(text)])[0]))
            odds[index] = known[1]
        return odds

    def contents(self, rows: pd.DataFrame) -> np.ndarray:
        """Compute the probability that each row's picture shows each object, (rows, objects); NaN without tokens.

        Args:
            rows: of a token table with image tokens.

        Raises:
            DataError: the tokens are of another kind.
        """
        codes, texts = _pictures(rows)
        contents = np.full((len(rows), len(self.bias)), np.nan)
        contents[codes >= 0] = expit(self._odds(texts))[codes[codes >= 0]]
        return contents


def _named_scores(odds: Callable[[list[int]], np.ndarray], codes: np.ndarray, named: np.ndarray) -> np.ndarray:
    """Score mentions by the indices of their pictures and objects, -1 for none.

    Args:
        odds: returns (pictures, objects) of ``ImageProbe.transform`` for the pictures of these indices.
        codes: (rows,) index of every mention's picture.
        named: (rows,) index of its object.

    Returns:
        (rows,) as ``ImageProbe.scores``.
    """
    usable = (named >= 0) & (codes >= 0)
    scores = np.full(len(codes), np.nan)
    if usable.any():
        read, row_of = np.unique(codes[usable], return_inverse=True)
        scores[usable] = -odds(read.tolist())[row_of, named[usable]]
    return scores


def backward(
    parts: Sequence[np.ndarray],
    rows: np.ndarray,
    kept: np.ndarray,
    wanted: np.ndarray,
    known: np.ndarray,
    slopes: Sequence[np.ndarray],
) -> None:
    """Compute the gradient of the mean cross-entropy of a batch of pictures over all that is known about them.

    Args:
        parts: weights and biases, (D, units), (units,), (units, objects) and (objects,).
        rows: (pictures, N, D) tokens after dropout.
        kept: (pictures, N, units) factors of dropout, 0 for units that are dropped.
        wanted: (pictures, objects) probabilities.
        known: (pictures, objects) whether the probability is known.
        slopes: arrays of the shapes of ``parts``, to which the derivatives are written.
    """
    count, tokens = rows.shape[:2]
    rows, kept = rows.reshape(-1, rows.shape[-1]), kept.reshape(-1, kept.shape[-1])
    units = hidden_units(parts, rows, kept)
    scores = (units @ parts[2] + parts[3]).reshape(count, tokens, -1)
    largest = scores.max(1, keepdims=True)
    scores -= largest
    np.exp(scores, out=scores)
    total = scores.sum(1)
    error = expit(largest[:, 0] + np.log(total / np.float32(tokens))) - wanted
    error *= known / np.float32(max(known.sum(), 1))
    scores *= (error / total)[:, None]
    propagate(parts, rows, kept, units, scores.reshape(len(rows), -1), slopes)


def fit_image_probe(
    train: pd.DataFrame,
    unlabelled: pd.DataFrame | None,
    objects: tuple[str, ...],
    taught: bool,
    seed: int,
    shared: SharedFits | None = None,
) -> tuple[ImageProbe, np.ndarray] | None:
    """Fit a probe on mentions, and score each of them by one that was fitted without its picture.

    Args:
        train: mentions with labels.
        unlabelled: further mentions without labels, of which the model's replies are known; None for none.
        objects: names of the objects to know.
        taught: learn from the model's replies alone, whose boundary is 0.
        seed: of everything random.
        shared: fits in common with other detectors; None for none.

    Returns:
        The probe and the scores of ``train``, (rows,); None where the table has no image tokens or too few pictures.

    Raises:
        DataError: image tokens are of another kind.
    """
    rows = train if unlabelled is None else pd.concat([train, unlabelled], ignore_index=True)
    labels, groups = train["label"].to_numpy(dtype=int), train["group"].to_numpy(dtype=str)
    if inner_folds(groups, labels) is None or not objects or not has_tokens(rows):
        return None
    codes, texts = _pictures(rows)
    pictures, named = [unpack_vectors(text) for text in texts], object_index(rows, objects)
    targets = _targets(rows, codes, named, (len(pictures), len(objects)), taught)
    group_of = pd.Series(rows["group"].to_numpy(dtype=str)[codes >= 0]).groupby(codes[codes >= 0]).first().to_numpy()
    mentions = (codes[: len(train)], named[: len(train)], labels, groups)
    probe, scores = make_once(shared, _cross_fit, pictures, targets, group_of.astype(str), *mentions, seed)
    return (probe, scores) if np.isfinite(scores).any() else None


def _cross_fit(
    pictures: Sequence[np.ndarray],
    targets: np.ndarray,
    group_of: np.ndarray,
    codes: np.ndarray,
    named: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    seed: int,
) -> tuple[ImageProbe, np.ndarray]:
    """Fit a probe on pictures, and score every mention by one that was fitted without its picture.

    Args:
        pictures: (N, D) image tokens of each.
        targets: (pictures, objects) of ``_targets``.
        group_of: (pictures,) image ids.
        codes: (rows,) index of every mention's picture, -1 for none.
        named: (rows,) index of its object, -1 for any other.
        labels: (rows,) of 0 and 1.
        groups: (rows,) image ids.
        seed: of everything random.
    """
    learnable = np.isfinite(targets).any(1)

    def fitted_without(left_out: np.ndarray) -> ImageProbe:
        chosen = np.flatnonzero(learnable & ~np.isin(group_of, left_out))
        return ImageProbe.fit([pictures[index] for index in chosen.tolist()], targets[chosen], seed)

    def scored_without(test: np.ndarray) -> np.ndarray:
        probe = fitted_without(np.unique(groups[test]))
        return _named_scores(lambda read: probe.transform([pictures[i] for i in read]), codes[test], named[test])

    scores = np.full(len(labels), np.nan)
    for _, test in GroupKFold(FOLDS).split(labels, labels, groups):
        scores[test] = scored_without(test)
    return fitted_without(groups[:0]), scores


def has_tokens(rows: pd.DataFrame) -> bool:
    """Whether any row of a token table has image tokens."""
    return IMAGE_TOKENS in rows and bool((rows[IMAGE_TOKENS].fillna("") != "").any())


def _pictures(rows: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Return for every row the index of its picture, (rows,) int, -1 for none, and the tokens of all as text."""
    index: dict[str, int] = {}  # Python hashes a text once, pandas all its characters at every call
    texts = rows[IMAGE_TOKENS].fillna("").tolist()
    codes = [index.setdefault(text, len(index)) if text else -1 for text in texts]
    return np.array(codes, dtype=np.intp), list(index)


def _targets(
    rows: pd.DataFrame, codes: np.ndarray, named: np.ndarray, shape: tuple[int, int], taught: bool
) -> np.ndarray:
    """Return (pictures, objects) probabilities that a picture shows an object, NaN where nothing is known."""
    labels = rows["label"].to_numpy(dtype=float)
    odds = rows[TEACHER].to_numpy(dtype=float) if TEACHER in rows else np.full(len(rows), np.nan)
    boundary = 0.0 if taught else reply_boundary(odds, labels)
    label = np.where((labels >= 0) & (not taught), 1 - labels, np.nan)
    total, count = np.zeros(shape), np.zeros(shape)
    for source in (label, expit(odds - boundary)):
        usable = np.isfinite(source) & (codes >= 0) & (named >= 0)
        np.add.at(total, (codes[usable], named[usable]), source[usable])
        np.add.at(count, (codes[usable], named[usable]), 1)
    return divide(total, count)
