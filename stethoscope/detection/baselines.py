"""Baselines that every detector must beat: a constant, the position in the answer, and the text prior.

They read key columns of the token table alone, never the model, and are fitted and calibrated on the same folds.

The text prior learns how the objects that an answer named before a mention go with hallucinations. A fork is expected
after "a plate", whether there is one or not: LURE (arXiv 2310.00754) names co-occurrence with the objects named before
as one of three causes of hallucinated objects. Here it is learned from labels: for every pair of an object o and an
earlier one o', by how much the log-odds of a hallucination of o change.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, SplineTransformer, StandardScaler

from stethoscope.core.errors import ArtefactError, DataError
from stethoscope.core.token_table import MentionSelection, Repeats, Subtokens, mention_rows, object_index, require
from stethoscope.detection.calibrated_model import CalibratedModel, Examples, check_labels

# --- co-occurrence ----------------------------------------------------------------------------------------------------

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


# --- the baselines ----------------------------------------------------------------------------------------------------

KNOTS = 5
MAX_CATEGORY = 5  # mention indices and repetitions from here on share a column


class Predictor(Protocol):
    """A model that a leaderboard can measure: a detector or a baseline."""

    def fit(self, train: pd.DataFrame, calibration: pd.DataFrame | None = None) -> Predictor:
        """Fit on the judged rows of token tables of disjoint images."""

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Return (rows,) probabilities of hallucination in [0, 1]."""


class Constant:
    """The share of hallucinated mentions in training, for every token."""

    def __init__(self, repeats: Repeats = "first", subtokens: Subtokens = "first") -> None:
        self.selection = MentionSelection(repeats=repeats, subtokens=subtokens)
        self.share = np.nan

    def fit(self, train: pd.DataFrame, calibration: pd.DataFrame | None = None) -> Constant:
        """Count labels in both folds; the calibration fold counts too, as there is nothing to overfit.

        Raises:
            DataError: there are no judged rows.
        """
        folds = [mention_rows(part, **self.selection) for part in (train, calibration) if part is not None]
        labels = pd.concat([fold["label"] for fold in folds])
        if not len(labels):
            raise DataError("the training fold has no judged mention; run the task on more samples")
        self.share = float(labels.mean())
        return self

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Return the share for every row, (rows,)."""
        return np.full(len(table), self.share)


class _FromKeys:
    """Logistic regression on inputs made from key columns, which subclasses choose."""

    columns: tuple[str, ...]

    def __init__(self, repeats: Repeats = "first", subtokens: Subtokens = "first") -> None:
        self.selection = MentionSelection(repeats=repeats, subtokens=subtokens)
        self._model: CalibratedModel | None = None

    def _fit_inputs(self, rows: pd.DataFrame) -> np.ndarray:
        """Learn the inputs and return those of the training rows."""
        position = _position(rows)
        knots = np.unique(np.quantile(position, np.linspace(0, 1, KNOTS)))[:, None]
        # yes/no answers all have one position, to which no spline can be fitted
        constant = FunctionTransformer(np.zeros_like)
        self._spline = SplineTransformer(knots=knots, extrapolation="constant") if len(knots) > 1 else constant
        return self._spline.fit_transform(position)

    def _inputs(self, rows: pd.DataFrame) -> np.ndarray:
        return self._spline.transform(_position(rows))

    def fit(self, train: pd.DataFrame, calibration: pd.DataFrame | None = None) -> _FromKeys:
        """Fit on the judged rows and calibrate (Platt) on the judged rows of other images.

        Raises:
            DataError: a key column is missing, a fold has no judged rows or only one label.
        """
        train = mention_rows(train, **self.selection)
        require(train, ("group", *self.columns))
        check_labels(train["label"].to_numpy(), "training")
        examples, held_out = Examples.of(self._fit_inputs(train), train), None
        if calibration is not None:
            calibration = mention_rows(calibration, **self.selection)
            held_out = Examples.of(self._inputs(calibration), calibration)
        # the same search for C as the detector's: a weak baseline would flatter it
        estimator = Pipeline([("scale", StandardScaler()), ("classify", LogisticRegression(max_iter=2000))])
        self._model = CalibratedModel.fit(estimator, examples, held_out)
        return self

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Return (rows,) probabilities of hallucination in [0, 1].

        Raises:
            ArtefactError: it was not fitted.
        """
        if self._model is None:
            raise ArtefactError(f"the {type(self).__name__} baseline was not fitted")
        require(table, self.columns)
        return self._model.predict(self._inputs(table)) if len(table) else np.zeros(0)


class PositionOnly(_FromKeys):
    """A cubic spline of the token position (knots at its quantiles): any smooth course of the hallucination rate.

    On LLaVA-1.5 position alone reaches an AUROC of 0.83, more than most published detectors
    (``Looking Is Not Verifying``, re-evaluation on 16,426 mentions).
    """

    columns = ("token",)


class NamePrior(_FromKeys):
    """Position, mention index, repetition and the named object: what a mention reveals without those before it."""

    columns: tuple[str, ...] = ("token", "object", "mention_index", "repeat_index")

    def _fit_inputs(self, rows: pd.DataFrame) -> np.ndarray:
        self._encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
        return np.hstack([super()._fit_inputs(rows), self._encoder.fit_transform(_categories(rows))])

    def _inputs(self, rows: pd.DataFrame) -> np.ndarray:
        return np.hstack([super()._inputs(rows), self._encoder.transform(_categories(rows))])


class TextPrior(NamePrior):
    """The name prior and the objects named before: all that the text alone reveals.

    What goes with the objects named before is learned by ``CoOccurrence``, for training rows from other images.
    """

    columns = ("token", "repeat_index", *COLUMNS)

    def _fit_inputs(self, rows: pd.DataFrame) -> np.ndarray:
        self._cooccurrence = CoOccurrence()
        return np.hstack([super()._fit_inputs(rows), self._cooccurrence.fit_transform(rows)])

    def _inputs(self, rows: pd.DataFrame) -> np.ndarray:
        return np.hstack([super()._inputs(rows), self._cooccurrence.transform(rows)])


def _position(rows: pd.DataFrame) -> np.ndarray:
    """Return the token index of every row, (rows, 1)."""
    return rows["token"].to_numpy(dtype=float)[:, None]


def _categories(rows: pd.DataFrame) -> np.ndarray:
    """Return mention index and repetition, both capped, and object as text, (rows, 3)."""
    capped = [
        rows[name].to_numpy(dtype=int).clip(max=MAX_CATEGORY).astype(str) for name in ("mention_index", "repeat_index")
    ]
    return np.stack([*capped, rows["object"].to_numpy(dtype=str)], axis=1).astype(object)


def baselines(repeats: Repeats = "first", subtokens: Subtokens = "first") -> dict[str, Predictor]:
    """Create the three unfitted baselines by name; arguments as in ``mention_rows``."""
    return {
        "constant": Constant(repeats, subtokens),
        "position only": PositionOnly(repeats, subtokens),
        "text prior": TextPrior(repeats, subtokens),
    }
