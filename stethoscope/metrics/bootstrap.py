"""Compute confidence intervals by a seeded bootstrap over images, paired comparisons, and data splits by image.

Results are *replicate arrays*: element 0 is the value on the original data, elements 1 ... R are its bootstrap
replicates. Two arrays with the same groups, number of replicates and seed use the same resampled images, so their
difference is a paired comparison, element by element.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from stethoscope.core.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from stethoscope.tasks.base import Metric

Name = TypeVar("Name", bound=Hashable)

REPLICATES = 1000
MIN_IMAGES = 10
"""Images from which an interval or a p-value is given; resamples of fewer are too much alike to say how sure it is."""
FOLDS = ("train", "calibration", "test")
"""Folds of a token table: to learn from, to calibrate and choose the threshold on, and to measure on."""
CHUNK = 100  # replicates at a time: few enough for the weights of some thousand items to stay in the cache


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % percentile interval.

    Attributes:
        value: the value itself, NaN if it is not defined.
        low, high: 2.5th and 97.5th percentile of its bootstrap replicates; NaN below ``MIN_IMAGES`` images.
        items: number of items that it is computed from (mentions, samples).
        groups: number of images that they come from.
    """

    value: float
    low: float
    high: float
    items: int
    groups: int

    @classmethod
    def of(cls, replicates: np.ndarray, items: int, groups: int) -> Interval:
        """Build an interval from a replicate array, ignoring replicates in which the value is not defined.

        Args:
            replicates: (1 + R,), the value and its replicates.
            items: number of items.
            groups: number of images.

        >>> print(Interval.of(np.r_[0.5, np.linspace(0, 1, 101)], items=80, groups=20))
        0.500 [0.025, 0.975]
        """
        finite = replicates[1:][np.isfinite(replicates[1:])]
        is_known = finite.size and groups >= MIN_IMAGES
        low, high = np.percentile(finite, [2.5, 97.5]) if is_known else (math.nan, math.nan)
        return cls(float(replicates[0]), float(low), float(high), int(items), int(groups))

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "not defined"
        if not self.has_bounds:
            return f"{self.value:.3f} –"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def has_bounds(self) -> bool:
        """Whether the interval is known, and not only the value."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def to_dict(self) -> dict[str, float | int | None]:
        """Convert to a JSON object, with None for values that are not defined."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Interval:
        """Rebuild an interval from the result of ``to_dict``."""
        values: dict[str, Any] = {key: math.nan if value is None else value for key, value in plain.items()}
        return cls(**values)


@dataclass(frozen=True)
class Resamples:
    """Images drawn with replacement, as the number of times each image was drawn.

    Attributes:
        names: (G,) sorted ids of the images, so that the order of the items does not matter.
        index: (n,) index into ``names`` of the image of each item.
        counts: (1 + R, G) number of times each image was drawn; row 0 is all ones, the original data.
    """

    names: np.ndarray
    index: np.ndarray
    counts: np.ndarray

    def select(self, keep: np.ndarray) -> Resamples:
        """Keep the same resampled images for a subset of the items, given by a mask or by indices."""
        return replace(self, index=self.index[keep])

    @cached_property
    def groups(self) -> int:
        """Number of images that the items come from."""
        return len(np.unique(self.index))

    def weights(self, chunk: slice = slice(None)) -> np.ndarray:
        """Return the weight of every item in each replicate of a chunk, (replicates, n)."""
        return np.ascontiguousarray(self.counts[chunk].T, dtype=np.float64)[self.index].T

    def apply(self, function: Callable[[np.ndarray], Mapping[Name, np.ndarray]]) -> dict[Name, np.ndarray]:
        """Evaluate a function of item weights on all replicates.

        Args:
            function: maps weights (replicates, n) to named arrays (replicates,); called chunk by chunk.

        Returns:
            Replicate arrays (1 + R,) by name.
        """
        parts = [function(self.weights(slice(start, start + CHUNK))) for start in range(0, len(self.counts), CHUNK)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def interval(self, replicates: np.ndarray) -> Interval:
        """Build the interval of a replicate array that was computed from these items."""
        return Interval.of(replicates, len(self.index), self.groups)

    def p_value(self, differences: np.ndarray) -> float:
        """Compute ``p_value`` of a replicate array; NaN below ``MIN_IMAGES`` images."""
        return p_value(differences) if self.groups >= MIN_IMAGES else math.nan


def group_weights(groups: Sequence[str] | np.ndarray, replicates: int = REPLICATES, seed: int = 0) -> Resamples:
    """Draw G of the G images with replacement for each replicate.

    Args:
        groups: (n,) image id of every item.
        replicates: number of replicates R, at least 0.
        seed: of the draws; equal ids, replicates and seed give equal draws, whatever the order of the items.

    Raises:
        ConfigError: ``replicates`` is negative.

    >>> resamples = group_weights(["a", "a", "b"], replicates=2)
    >>> resamples.weights().shape, resamples.weights()[0].tolist()
    ((3, 3), [1.0, 1.0, 1.0])
    """
    if replicates < 0:
        raise ConfigError(f"replicates={replicates} should be at least 0")
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    counts = np.ones((1 + replicates, len(names)), dtype=np.float64)
    if len(names):
        draws = np.random.default_rng(seed).integers(len(names), size=(replicates, len(names)))
        draws += len(names) * np.arange(replicates)[:, None]
        counts[1:] = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape)
    return Resamples(names, index.ravel(), counts)


def bootstrap(
    metric: Callable[..., Any],
    labels: np.ndarray,
    scores: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Interval:
    """Compute a weighted metric of item scores with its interval.

    Args:
        metric: function of (labels, scores, weights) as in ``stethoscope.metrics.classification``.
        labels: (n,) of 0 and 1.
        scores: (n,) as the metric takes them.
        groups: (n,) image ids.
        replicates: number of replicates.
        seed: of the draws.

    >>> from stethoscope.metrics.classification import auroc
    >>> print(bootstrap(auroc, [0, 1] * 50, [0.1, 0.9] * 50, list(range(100))))
    1.000 [1.000, 1.000]
    """
    resamples = group_weights(groups, replicates, seed)
    return resamples.interval(resamples.apply(lambda weights: {"value": metric(labels, scores, weights)})["value"])


def mean_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[str] | np.ndarray,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Interval:
    """Compute the mean of items with its interval.

    Args:
        values: (n,) finite numbers, 0 and 1 for a share.
        groups: (n,) image ids.
        replicates: number of replicates.
        seed: of the draws.

    >>> print(mean_interval([0, 1] * 50, [image for image in range(50) for _ in range(2)]))
    0.500 [0.500, 0.500]
    """
    numbers, resamples = np.asarray(values, dtype=float), group_weights(groups, replicates, seed)

    def mean(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"mean": weights @ numbers / weights.sum(axis=1)}

    return resamples.interval(resamples.apply(mean)["mean"])


def p_value(differences: np.ndarray) -> float:
    """Compute a two-sided p-value: twice the smaller share of replicates beyond 0, at most 1.

    One is added to both counts, so that R replicates never claim less than 2 / (R + 1) (Davison & Hinkley 1997, eq.
    4.11). NaN where the difference is not defined.

    Args:
        differences: replicate array (1 + R,).

    >>> p_value(np.r_[0.3, np.full(99, 0.3)]), p_value(np.r_[0.0, -1.0, 0.0, 1.0])
    (0.02, 1.0)
    """
    finite = differences[1:][np.isfinite(differences[1:])]
    if not finite.size or not math.isfinite(differences[0]):
        return math.nan
    beyond = min((finite <= 0).sum(), (finite >= 0).sum())
    return float(min(2 * (1 + beyond) / (1 + finite.size), 1.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down method; a NaN stays one and counts as no comparison.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.

    >>> [round(p, 2) for p in holm([0.03, 0.01, 0.04])]
    [0.06, 0.03, 0.06]
    """
    corrected = [math.nan] * len(p_values)
    known = sorted((index for index, p in enumerate(p_values) if math.isfinite(p)), key=lambda index: p_values[index])
    largest = 0.0
    for rank, index in enumerate(known):
        largest = max(largest, min((len(known) - rank) * p_values[index], 1.0))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True)
class MetricRow:
    """One metric of a task, on one subset or as the mean over subsets.

    Attributes:
        metric: name of the metric.
        subset: name of the subset; ``mean`` for the mean over subsets.
        interval: value and interval.
    """

    metric: str
    subset: str
    interval: Interval

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return {"metric": self.metric, "subset": self.subset, **self.interval.to_dict()}


def count_replicates(
    metrics: Mapping[str, Metric],
    counts: Mapping[str, Sequence[float] | np.ndarray] | pd.DataFrame,
    subsets: Sequence[str] | np.ndarray,
    resamples: Resamples,
    macro: Iterable[str] = (),
    expected: Iterable[str] = (),
) -> dict[tuple[str, str], np.ndarray]:
    """Evaluate metrics that are functions of totals on all replicates, by (metric, subset).

    Args:
        metrics: as returned by ``Task.metrics``.
        counts: (samples,) numbers by name of ``Score.counts``, or a data frame of them.
        subsets: (samples,) subset of every sample.
        resamples: resampled images of the samples. To compare two runs, use the same images for both.
        macro: metrics whose mean over subsets is computed too (as subset ``mean``), if there is more than one subset.
        expected: subsets that the mean is over. It is not defined if all samples of one of them are missing.

    Returns:
        Replicate arrays (1 + R,) by metric and subset.
    """
    subsets, names = np.asarray(subsets, dtype=str), [str(name) for name in counts]
    values: dict[tuple[str, str], np.ndarray] = {}
    matrix = np.zeros((len(subsets), len(names)))
    for column, name in enumerate(names):
        matrix[:, column] = counts[name]
    order = list(dict.fromkeys(subsets.tolist()))
    for subset in order:
        inside = subsets == subset
        group_sums = np.zeros((len(resamples.names), len(names)))  # counts added up within images
        np.add.at(group_sums, resamples.select(inside).index, matrix[inside])
        sums = resamples.counts @ group_sums
        totals = {name: sums[:, column] for column, name in enumerate(names)}
        with np.errstate(all="ignore"):  # a metric that is not defined divides 0 by 0
            values |= {(name, subset): np.asarray(metric(totals), dtype=float) for name, metric in metrics.items()}
    averaged = list(dict.fromkeys([*order, *expected]))
    if len(averaged) > 1:
        undefined = np.full(len(resamples.counts), np.nan)
        for name in macro:
            values[name, "mean"] = np.mean([values.get((name, subset), undefined) for subset in averaged], axis=0)
    return values


def count_metrics(
    metrics: Mapping[str, Metric],
    counts: Mapping[str, Sequence[float] | np.ndarray] | pd.DataFrame,
    groups: Sequence[str] | np.ndarray,
    subsets: Sequence[str] | np.ndarray,
    macro: Iterable[str] = (),
    replicates: int = REPLICATES,
    seed: int = 0,
    expected: Iterable[str] = (),
) -> list[MetricRow]:
    """Compute a task's metrics on every subset, and their means over subsets, with intervals over images.

    Arguments are those of ``count_replicates`` and ``group_weights``.

    >>> counts = {"right": [1, 0, 1, 1], "answers": [1, 1, 1, 1]}
    >>> accuracy = {"accuracy": lambda totals: totals["right"] / totals["answers"]}
    >>> rows = count_metrics(accuracy, counts, ["a", "b", "a", "b"], ["easy", "easy", "hard", "hard"], ["accuracy"])
    >>> [(row.subset, row.interval.value) for row in rows]
    [('easy', 0.5), ('hard', 1.0), ('mean', 0.75)]
    """
    resamples, subsets = group_weights(groups, replicates, seed), np.asarray(subsets, dtype=str)
    rows = []
    for (metric, subset), values in count_replicates(metrics, counts, subsets, resamples, macro, expected).items():
        inside = resamples if subset not in subsets else resamples.select(subsets == subset)
        rows.append(MetricRow(metric, subset, inside.interval(values)))
    return rows


def split_groups(
    groups: Sequence[str] | np.ndarray, fractions: Mapping[str, float], seed: int = 0
) -> dict[str, np.ndarray]:
    """Split items into folds by image.

    The fold of an image depends only on its id and the seed, so adding images never moves others; the sizes of the
    folds are therefore approximate.

    Args:
        groups: (n,) image ids.
        fractions: share of the images for each fold, in [0, 1] and adding up to 1.
        seed: another seed gives another split.

    Returns:
        A boolean mask (n,) for every fold; each item is in exactly one.

    Raises:
        ConfigError: a fraction is negative, or they do not add up to 1.

    >>> folds = split_groups(["a", "b", "a"], {"train": 0.5, "test": 0.5})
    >>> bool(folds["train"][0] == folds["train"][2]), int(sum(mask.sum() for mask in folds.values()))
    (True, 3)
    """
    shares = np.array(list(fractions.values()), dtype=float)
    if not shares.size or (shares < 0).any() or not math.isclose(shares.sum(), 1, abs_tol=1e-6):
        raise ConfigError(f"split fractions {dict(fractions)} should be at least 0 and add up to 1")
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    hashes = [hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest() for name in names]
    uniform = np.array([int.from_bytes(digest, "big") / 2**56 for digest in hashes])
    fold = np.searchsorted(np.cumsum(shares)[:-1], uniform, side="right")[index.ravel()]
    return {name: fold == index for index, name in enumerate(fractions)}


def split_folds(
    groups: Sequence[str] | np.ndarray | pd.Series, shares: Sequence[float] = (0.5, 0.2, 0.3), seed: int = 0
) -> dict[str, np.ndarray]:
    """Split items into ``FOLDS`` by image; see ``split_groups``.

    Args:
        groups: (n,) image ids.
        shares: of the images, for each fold.
        seed: another seed gives another split.

    Raises:
        ConfigError: there are not three shares, one is negative, or they do not add up to 1.
    """
    if len(shares) != len(FOLDS):
        raise ConfigError(f"split fractions {list(shares)} should be three, for {', '.join(FOLDS)}")
    return split_groups(np.asarray(groups, dtype=str), dict(zip(FOLDS, shares, strict=True)), seed)
