"""Counts that tasks add up: answers to yes/no questions, sets of answers, objects in captions, and their quotients.

Captions are scored by the objects that they name, as CHAIR does (Rohrbach et al., EMNLP 2018).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence

import numpy as np

from stethoscope.core.types import Sample, Score
from stethoscope.metrics.ranking import divide
from stethoscope.tasks.base import Metric, ScoredSample, Totals

# --- quotients and yes/no answers -------------------------------------------------------------------------------------


def total(totals: Totals, *names: str) -> np.ndarray:
    """Add up counts by name; one that no sample has is 0.

    >>> total({"tp": np.array([2.0, 1.0])}, "tp", "fn").tolist()
    [2.0, 1.0]
    """
    nothing = np.zeros_like(next(iter(totals.values())), dtype=float)
    return np.sum([totals.get(name, nothing) for name in names], axis=0)


def share(part: str, *whole: str) -> Metric:
    """Return the metric that divides a count by a sum of others; NaN where that is 0."""
    return lambda totals: divide(total(totals, part), total(totals, *whole))


def harmonic_mean(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return 2 x y / (x + y) element by element, 0 where both are 0.

    >>> harmonic_mean(np.array([0.5, 0.0]), np.array([1.0, 0.0])).round(3).tolist()
    [0.667, 0.0]
    """
    both = np.asarray(first + second, float)
    return np.where(both == 0, 0.0, divide(2 * first * second, both)) + 0 * both  # NaN stays NaN


def harmonic(first: Metric, second: Metric) -> Metric:
    """Return the metric that is the harmonic mean of two others, such as of two rates of right answers."""
    return lambda totals: harmonic_mean(first(totals), second(totals))


def accuracy(totals: Totals) -> np.ndarray:
    """Return the share of right answers (``tp``, ``tn``) among all that could be read (also ``fp``, ``fn``).

    >>> float(accuracy({"tp": np.array(2), "fp": np.array(1), "tn": np.array(1), "fn": np.array(0)}))
    0.75
    """
    return divide(totals["tp"] + totals["tn"], totals["tp"] + totals["fp"] + totals["tn"] + totals["fn"])


def precision(totals: Totals) -> np.ndarray:
    """Return the share of right answers among those that claim the positive class."""
    return divide(totals["tp"], totals["tp"] + totals["fp"])


def recall(totals: Totals) -> np.ndarray:
    """Return the share of questions with the positive class as their truth that get that answer."""
    return divide(totals["tp"], totals["tp"] + totals["fn"])


def f1(totals: Totals) -> np.ndarray:
    """Return the harmonic mean of precision and recall."""
    return divide(2 * totals["tp"], 2 * totals["tp"] + totals["fp"] + totals["fn"])


def yes_rate(totals: Totals) -> np.ndarray:
    """Return how often the model says yes, where yes is the positive class."""
    return divide(totals["tp"] + totals["fp"], totals["tp"] + totals["fp"] + totals["tn"] + totals["fn"])


def tnr(totals: Totals) -> np.ndarray:
    """Return the share of questions with the negative class as their truth that get that answer."""
    return divide(totals["tn"], totals["tn"] + totals["fp"])


def balanced_accuracy(totals: Totals) -> np.ndarray:
    """Return the mean of recall and ``tnr``, 0.5 for a constant answer whatever the share of the classes.

    >>> float(balanced_accuracy({"tp": np.array(9), "fp": np.array(1), "tn": np.array(0), "fn": np.array(0)}))
    0.5
    """
    return (recall(totals) + tnr(totals)) / 2


YES_NO_METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "precision": precision,
    "recall": recall,
    "f1": f1,
    "tpr": recall,
    "tnr": tnr,
    "yes_rate": yes_rate,
}
"""Figures of yes/no questions, all from 0 to 1. ``recall`` and ``tpr`` (true positive rate) are one and the same."""

CONFUSION = ("tp", "fp", "tn", "fn")
"""Names of the counts that these functions take."""


def confusion(reply: str | None, label: str, positive: str) -> dict[str, float]:
    """Count one answer to a question with two possible replies; all 0 for an answer that was not read.

    >>> confusion("no", "yes", positive="yes")
    {'tp': 0.0, 'fp': 0.0, 'tn': 0.0, 'fn': 1.0}
    """
    counts = dict.fromkeys(CONFUSION, 0.0)
    if reply is not None:
        counts[("t" if reply == label else "f") + ("p" if reply == positive else "n")] = 1.0
    return counts


# --- several right answers at once ------------------------------------------------------------------------------------

Key = Callable[[Sample], Hashable | None]
"""Which set a sample belongs to; None for none."""


def complete_sets(scored: Sequence[ScoredSample], samples: Iterable[Sample], key: Key) -> list[list[int]]:
    """Return the indices of samples that belong together, for the sets of which every sample was scored.

    A set with a sample that failed, or that a limited run did not ask, is left out: its outcome is not known, and
    scoring it by the rest would keep the wrong sets and drop the right ones.

    Args:
        scored: samples of a run.
        samples: all samples of the task.
        key: which set a sample belongs to.

    Returns:
        Indices into ``scored`` set by set, in the order of the sets' first samples.
    """
    sizes = Counter(name for sample in samples if (name := key(sample)) is not None)
    indices: dict[Hashable, list[int]] = defaultdict(list)
    for index, (sample, _) in enumerate(scored):
        if (name := key(sample)) is not None:
            indices[name].append(index)
    return [members for name, members in indices.items() if len(members) == sizes[name]]


def set_counts(name: str, rights: Sequence[float], reads: Sequence[float]) -> Mapping[str, float]:
    """Count one complete set for the totals.

    Args:
        name: prefix of the counts.
        rights: 1 for every answer of the set that is right, else 0.
        reads: 1 for every answer that could be read, else 0.

    Returns:
        ``<name>``: sets of which every answer was read; ``<name>_right``: those with every answer right;
        ``<name>_asked``: all sets.

    >>> dict(set_counts("pairs", [1, 0], [1, 1]))
    {'pairs': 1.0, 'pairs_right': 0.0, 'pairs_asked': 1.0}
    """
    values = {"": all(reads), "_right": all(rights), "_asked": True}
    return {name + end: float(value) for end, value in values.items()}


# --- captions ---------------------------------------------------------------------------------------------------------

_COUNTS = ("mentions", "hallucinated", "captions", "hallucinated_captions", "truth", "found", "words")
_SENTENCE_END = re.compile(r"""[.?!]["'”’)]*(?=\s|$)""")


def complete_sentences(text: str) -> str:
    """Drop the last sentence of a text if it is unfinished; a text of one sentence stays as it is.

    >>> complete_sentences("A dog. A cat (black.) And a")
    'A dog. A cat (black.)'
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text


def score_caption(text: str, named: Sequence[str], truth: Collection[str]) -> Score:
    """Count mentions, hallucinated mentions, true objects named and words; an empty caption is ``unparsed``.

    Args:
        text: the caption.
        named: canonical names of the objects that it names, once for every mention.
        truth: canonical names of the objects in the picture.
    """
    if not text.strip():
        return Score("unparsed", dict.fromkeys(_COUNTS, 0.0), {"objects": [], "hallucinated": []})
    truth = set(truth)
    invented = [name for name in named if name not in truth]
    counts = {
        "mentions": len(named),
        "hallucinated": len(invented),
        "captions": 1,
        "hallucinated_captions": bool(invented),
        "truth": len(truth),
        "found": len(truth & set(named)),
        "words": len(text.split()),
    }
    detail = {"objects": list(named), "hallucinated": invented}
    return Score("ok", {name: float(count) for name, count in counts.items()}, detail)


def unjudged_caption(text: str) -> Score:
    """Count the words of a caption without a truth; an empty one is ``unparsed``.

    >>> unjudged_caption("A dog.").counts["words"]
    2.0
    """
    status = "ok" if text.strip() else "unparsed"
    return Score(status, dict.fromkeys(_COUNTS, 0.0) | {"words": float(len(text.split())), "unjudged": 1.0})


CHAIR_METRICS: Mapping[str, Metric] = {
    "chair_i": share("hallucinated", "mentions"),
    "chair_s": share("hallucinated_captions", "captions"),
    "recall": share("found", "truth"),
    "length": share("words", "captions"),
}
"""CHAIR_i, CHAIR_s, object recall and length in words.

``chair_i``: hallucinated mentions among all mentions. ``chair_s``: captions with at least one, among all captions.
``recall``: true objects that are named, among all true objects. ``length``: words per caption.
"""
