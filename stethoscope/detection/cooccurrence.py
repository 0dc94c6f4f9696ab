"""Learn how the objects that an answer named before a mention go with hallucinations.

A fork is expected after "a plate", whether there is one or not. LURE (arXiv 2310.00754) names co-occurrence with the
objects named before as one of three causes of hallucinated objects. Here it is learned from labels: for every pair of
an object o and an earlier one o', by how much the log-odds of a hallucination of o change.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold

COLUMNS = ("task", "sample_id", "object", "mention_index")
"""Key columns that tell which objects were named before a mention."""
FOLDS = 10
SMOOTHING = 10.0  # mentions at the object's own rate that are added to every pair; 30 does as well


def named_before(rows: pd.DataFrame, objects: tuple[str, ...]) -> np.ndarray:
    """Tell which other objects the answer named before each row, (rows, objects) bool, from the mentions in the table.

    Args:
        rows: rows of a token table with ``COLUMNS``; those of earlier mentions should be among them.
        objects: canonical names.

    >>> rows = pd.DataFrame({"task": "t", "sample_id": "s", "object": ["cup", "dog"], "mention_index": [0, 1]})
    >>> named_before(rows, ("cup", "dog")).tolist()
    [[False, False], [True, False]]
    """
    answer = rows.groupby(["task", "sample_id"], sort=False).ngroup().to_numpy()
    mention, code = rows["mention_index"].to_numpy(dtype=float), object_index(rows, objects)
    first = np.full((answer.max(initial=-1) + 1, len(objects)), np.inf)
    known = (code >= 0) & (mention >= 0)
    np.minimum.at(first, (answer[known], code[known]), mention[known])
    before = first[answer] < mention[:, None]
    before[np.flatnonzero(code >= 0), code[code >= 0]] = False
    return before


def object_index(rows: pd.DataFrame, objects: tuple[str, ...]) -> np.ndarray:
    """Return the index in ``objects`` of every row's object, (rows,) int, -1 for any other."""
    return pd.Index(objects).get_indexer(pd.Index(rows["object"].to_numpy(dtype=str)))


class CoOccurrence:
    """Change of the log-odds of hallucination by the objects named before: its sum, largest and smallest over them.

    Attributes:
        objects: canonical names of the objects of training.
        shifts: (objects, objects) change of the log-odds of the first when the second was named before, in nats.
    """

    def __init__(self) -> None:
        self.objects: tuple[str, ...] = ()
        self.shifts = np.zeros((0, 0))

    def fit(self, rows: pd.DataFrame) -> CoOccurrence:
        """Count pairs in labelled mention rows."""
        self.objects = tuple(sorted(rows["object"].astype(str).unique()))
        code, before = object_index(rows, self.objects), named_before(rows, self.objects)
        self.shifts = pair_shifts(code, before, rows["label"].to_numpy(dtype=int))
        return self

    def transform(self, rows: pd.DataFrame) -> np.ndarray:
        """Return sum, largest and smallest change in nats, (rows, 3); 0 where nothing known was named before."""
        return _summarise(object_index(rows, self.objects), named_before(rows, self.objects), self.shifts)

    def fit_transform(self, rows: pd.DataFrame) -> np.ndarray:
        """Fit, and return for every row what is learned from other images, (rows, 3); 0 if there is one image only."""
        self.fit(rows)
        groups, labels = rows["group"].to_numpy(dtype=str), rows["label"].to_numpy(dtype=int)
        code, before = object_index(rows, self.objects), named_before(rows, self.objects)
        values = np.zeros((len(rows), 3))
        folds = min(FOLDS, len(np.unique(groups)))
        for train, test in GroupKFold(folds).split(code, labels, groups) if folds > 1 else ():
            shifts = pair_shifts(code[train], before[train], labels[train])
            values[test] = _summarise(code[test], before[test], shifts)
        return values


def pair_shifts(code: np.ndarray, before: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute by how much the log-odds of hallucination of o change when o' was named before.

    log((h + k r) / (n - h + k (1 - r))) - log(r / (1 - r)), where n mentions of o come after o', h of them are
    hallucinated, r = (h_o + 1) / (n_o + 2) is the rate of o alone, and k is ``SMOOTHING``.

    Args:
        code: (rows,) index of the mention's object.
        before: (rows, objects) of ``named_before``.
        labels: (rows,) of 0 and 1.

    Returns:
        (objects, objects), o down and o' across, in nats.

    >>> pair_shifts(np.array([1, 1]), np.array([[True, False], [False, False]]), np.array([1, 0])).round(3).tolist()
    [[0.0, 0.0], [0.182, 0.0]]
    """
    size = before.shape[1]
    own = (code[:, None] == np.arange(size)).astype(np.float64)
    after, wrong = own.T @ before, (own * labels[:, None]).T @ before
    rate = ((own.T @ labels + 1) / (own.sum(axis=0) + 2))[:, None]
    odds = (wrong + SMOOTHING * rate) / (after - wrong + SMOOTHING * (1 - rate))
    return np.log(odds) - np.log(rate / (1 - rate))


def _summarise(code: np.ndarray, before: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Reduce the changes over the objects named before, (rows, 3); an unknown object has none."""
    table = np.vstack([shifts, np.zeros((1, shifts.shape[1]))])  # index -1 is the row of zeros
    values, any_before = table[code], before.any(axis=1)
    largest, smallest = (np.where(before, values, fill) for fill in (-np.inf, np.inf))
    summary = np.zeros((len(code), 3))
    if before.shape[1]:
        parts = (values * before).sum(axis=1), largest.max(axis=1), smallest.min(axis=1)
        summary[any_before] = np.column_stack(parts)[any_before]
    return summary
