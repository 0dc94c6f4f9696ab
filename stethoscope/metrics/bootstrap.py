"""Confidence intervals from a seeded bootstrap over images, paired comparisons, and data splits by image.

Everything is a *replicate array*: element 0 is the value on the data as they are, elements 1 ... R are its bootstrap
replicates. Two arrays made with the same groups, number of replicates and seed rest on the same resampled images, so
their difference is a paired comparison, element by element.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from stethoscope.tasks.base import Totals

REPLICATES = 1000
CHUNK = 100  # replicates at a time: few enough for the weights of some thousand items to stay in the cache


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % percentile interval.

    Attributes:
        value: the figure itself, NaN if it is not defined.
        low, high: 2.5th and 97.5th percentile of its bootstrap replicates.
        items: how many items it rests on (mentions, samples).
        groups: how many images they come from.
    """

    value: float
    low: float
    high: float
    items: int
    groups: int

    @classmethod
    def of(cls, replicates: np.ndarray, items: int, groups: int) -> Interval:
        """From a replicate array (1 + R,). Replicates in which the figure is not defined are left out.

        >>> print(Interval.of(np.r_[0.5, np.linspace(0, 1, 101)], items=80, groups=20))
        0.500 [0.025, 0.975]
        """
        rest = replicates[1:][np.isfinite(replicates[1:])]
        low, high = np.percentile(rest, [2.5, 97.5]) if rest.size else (math.nan, math.nan)
        return cls(float(replicates[0]), float(low), float(high), int(items), int(groups))

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "not defined"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON: figures that are not defined become None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Interval:
        """Undoes ``to_dict``."""
        return cls(**{key: math.nan if value is None else value for key, value in plain.items()})


@dataclass(frozen=True)
class Resamples:
    """Images drawn with replacement, as the number of times each image was drawn.

    Attributes:
        names: (G,) sorted ids of the images, so that the order of the items does not matter.
        index: (n,) which image each item belongs to.
        counts: (1 + R, G) how often each image was drawn; row 0 is all ones, the data as they are.
    """

    names: np.ndarray
    index: np.ndarray
    counts: np.ndarray

    def select(self, keep: np.ndarray) -> Resamples:
        """The same resampled images for some of the items, given by a mask or by indices."""
        return replace(self, index=self.index[keep])

    @cached_property
    def groups(self) -> int:
        """How many images the items come from."""
        return len(np.unique(self.index))

    def weights(self, chunk: slice = slice(None)) -> np.ndarray:
        """(replicates of the chunk, n) weight of every item in each replicate."""
        return np.ascontiguousarray(self.counts[chunk].T, dtype=np.float64)[self.index].T

    def apply(self, function: Callable[[np.ndarray], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Replicate arrays of a function of item weights.

        Args:
            function: takes weights (replicates, n) and gives named arrays (replicates,); called chunk by chunk.

        Returns:
            Replicate arrays (1 + R,) by name.
        """
        parts = [function(self.weights(slice(at, at + CHUNK))) for at in range(0, len(self.counts), CHUNK)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def interval(self, replicates: np.ndarray) -> Interval:
        """Interval of a replicate array that was made from these items."""
        return Interval.of(replicates, len(self.index), self.groups)


def group_weights(groups: Sequence[str] | np.ndarray, replicates: int = REPLICATES, seed: int = 0) -> Resamples:
    """Resamples images: in each replicate G of the G images are drawn with replacement.

    Args:
        groups: (n,) image id of every item.
        replicates: number of replicates R, at least 0.
        seed: of the draws; the same ids, replicates and seed give the same draws whatever the order of the items.

    Raises:
        ConfigError: ``replicates`` is negative.

    >>> drawn = group_weights(["a", "a", "b"], replicates=2)
    >>> drawn.weights().shape, drawn.weights()[0].tolist()
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
    """Interval of one weighted metric of item scores.

    Args:
        metric: function of (labels, scores, weights) as in ``stethoscope.metrics.classification``.
        labels, scores: (n,) as the metric takes them.
        groups: (n,) image ids.
        replicates, seed: as in ``group_weights``.

    >>> from stethoscope.metrics.classification import auroc
    >>> print(bootstrap(auroc, [0, 1] * 50, [0.1, 0.9] * 50, list(range(100))))
    1.000 [1.000, 1.000]
    """
    drawn = group_weights(groups, replicates, seed)
    return drawn.interval(drawn.apply(lambda weights: {"value": metric(labels, scores, weights)})["value"])


def paired_difference(
    metric: Callable[..., Any],
    labels: np.ndarray,
    scores: np.ndarray,
    other: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Interval:
    """Interval of metric(scores) - metric(other) on the same items, both under the same resampled images."""
    drawn = group_weights(groups, replicates, seed)

    def difference(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"value": metric(labels, scores, weights) - metric(labels, other, weights)}

    return drawn.interval(drawn.apply(difference)["value"])


def p_value(differences: np.ndarray) -> float:
    """Two-sided bootstrap p-value of a difference: twice the smaller share of its replicates beyond 0, at most 1.

    One is added to both counts, so that R replicates never claim less than 2 / (R + 1) (Davison & Hinkley 1997, eq.
    4.11). NaN where the difference is not defined.

    Args:
        differences: replicate array (1 + R,).

    >>> p_value(np.r_[0.3, np.full(99, 0.3)]), p_value(np.r_[0.0, -1.0, 0.0, 1.0])
    (0.02, 1.0)
    """
    rest = differences[1:][np.isfinite(differences[1:])]
    if not rest.size or not math.isfinite(differences[0]):
        return math.nan
    beyond = min((rest <= 0).sum(), (rest >= 0).sum())
    return float(min(2 * (1 + beyond) / (1 + rest.size), 1.0))


@dataclass(frozen=True)
class MetricRow:
    """One figure of a task: its name, the subset it was computed on (``mean``: over subsets), value and interval."""

    metric: str
    subset: str
    interval: Interval

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"metric": self.metric, "subset": self.subset, **self.interval.to_dict()}


def _group_sums(counts: np.ndarray, drawn: Resamples) -> np.ndarray:
    """(G, names) counts added up within images."""
    sums = np.zeros((len(drawn.names), counts.shape[1]))
    np.add.at(sums, drawn.index, counts)
    return sums


def count_replicates(
    metrics: Mapping[str, Callable[[Totals], np.ndarray]],
    counts: Mapping[str, Sequence[float] | np.ndarray] | pd.DataFrame,
    subsets: Sequence[str] | np.ndarray,
    drawn: Resamples,
    macro: Iterable[str] = (),
    asked: Iterable[str] = (),
) -> dict[tuple[str, str], np.ndarray]:
    """Replicate arrays of metrics that are functions of totals, by (metric, subset).

    Args:
        metrics: what ``Task.metrics`` gives.
        counts: by name of ``Score.counts``, (samples,) numbers; a data frame will do.
        subsets: (samples,) subset of every sample.
        drawn: resampled images of the samples. To compare two runs, use one set of images for both.
        macro: metrics of which the mean over subsets (as subset ``mean``) is wanted too, if there is more than one.
        asked: subsets that the mean is over. If all samples of one of them are missing, it is not defined.
    """
    subsets, names, made = np.asarray(subsets, dtype=str), list(counts), {}
    matrix = np.zeros((len(subsets), len(names)))
    for column, name in enumerate(names):
        matrix[:, column] = counts[name]
    order = list(dict.fromkeys(subsets.tolist()))
    for subset in order:
        inside = subsets == subset
        totals = drawn.counts @ _group_sums(matrix[inside], drawn.select(inside))
        named = {str(name): totals[:, column] for column, name in enumerate(names)}
        with np.errstate(all="ignore"):  # 0 / 0 is how a metric says that it is not defined
            made |= {(name, subset): np.asarray(metric(named), dtype=float) for name, metric in metrics.items()}
    over = list(dict.fromkeys([*order, *asked]))
    if len(over) > 1:
        nothing = np.full(len(drawn.counts), np.nan)
        made |= {(name, "mean"): np.mean([made.get((name, one), nothing) for one in over], axis=0) for name in macro}
    return made


def count_metrics(
    metrics: Mapping[str, Callable[[Totals], np.ndarray]],
    counts: Mapping[str, Sequence[float] | np.ndarray] | pd.DataFrame,
    groups: Sequence[str] | np.ndarray,
    subsets: Sequence[str] | np.ndarray,
    macro: Iterable[str] = (),
    replicates: int = REPLICATES,
    seed: int = 0,
    asked: Iterable[str] = (),
) -> list[MetricRow]:
    """A task's metrics for every subset, and their means over subsets, each with its interval over images.

    Arguments as in ``count_replicates`` and ``group_weights``.

    >>> counts = {"right": [1, 0, 1, 1], "answers": [1, 1, 1, 1]}
    >>> accuracy = {"accuracy": lambda totals: totals["right"] / totals["answers"]}
    >>> rows = count_metrics(accuracy, counts, ["a", "b", "a", "b"], ["easy", "easy", "hard", "hard"], ["accuracy"])
    >>> [(row.subset, row.interval.value) for row in rows]
    [('easy', 0.5), ('hard', 1.0), ('mean', 0.75)]
    """
    drawn, subsets = group_weights(groups, replicates, seed), np.asarray(subsets, dtype=str)
    rows = []
    for (metric, subset), values in count_replicates(metrics, counts, subsets, drawn, macro, asked).items():
        inside = drawn if subset not in subsets else drawn.select(subsets == subset)
        rows.append(MetricRow(metric, subset, inside.interval(values)))
    return rows


def split_groups(
    groups: Sequence[str] | np.ndarray, fractions: Mapping[str, float], seed: int = 0
) -> dict[str, np.ndarray]:
    """Splits items into folds by image. An image's fold depends on its id and the seed alone, so that adding images
    never moves others; the sizes are therefore only about right.

    Args:
        groups: (n,) image ids.
        fractions: share of the images for each fold, adding up to 1.
        seed: another seed gives another split.

    Returns:
        A boolean mask (n,) for every fold; each item is in exactly one.

    Raises:
        ConfigError: fractions are negative or do not add up to 1.

    >>> folds = split_groups(["a", "b", "a"], {"train": 0.5, "test": 0.5})
    >>> bool(folds["train"][0] == folds["train"][2]), int(sum(mask.sum() for mask in folds.values()))
    (True, 3)
    """
    shares = np.array(list(fractions.values()), dtype=float)
    if not shares.size or (shares < 0).any() or not math.isclose(shares.sum(), 1, abs_tol=1e-6):
        raise ConfigError(f"split fractions {dict(fractions)} should not be negative and should add up to 1")
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    place = np.array([_uniform(f"{seed}:{name}") for name in names])
    fold = np.searchsorted(np.cumsum(shares)[:-1], place, side="right")[index.ravel()]
    return {name: fold == number for number, name in enumerate(fractions)}


def _uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56
