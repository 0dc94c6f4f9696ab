"""Baselines that every detector must beat: a constant, the position in the answer, and the text prior.

They read key columns of the token table alone, never the model, and are fitted and calibrated on the same folds.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, SplineTransformer, StandardScaler

from stethoscope.core.errors import ArtefactError, DataError
from stethoscope.core.token_table import MentionSelection, Repeats, Subtokens, mention_rows, require
from stethoscope.detection.calibrated_model import CalibratedModel, Examples, check_labels
from stethoscope.detection.cooccurrence import COLUMNS, CoOccurrence

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


class TextPrior(_FromKeys):
    """Position, mention index, repetition, the named object and those named before: all that the text alone reveals.

    What goes with the objects named before is learned by ``CoOccurrence``, for training rows from other images.
    """

    columns = ("token", "repeat_index", *COLUMNS)

    def _fit_inputs(self, rows: pd.DataFrame) -> np.ndarray:
        self._encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
        self._cooccurrence = CoOccurrence()
        steps = (self._encoder.fit_transform(_categories(rows)), self._cooccurrence.fit_transform(rows))
        return np.hstack([super()._fit_inputs(rows), *steps])

    def _inputs(self, rows: pd.DataFrame) -> np.ndarray:
        steps = (self._encoder.transform(_categories(rows)), self._cooccurrence.transform(rows))
        return np.hstack([super()._inputs(rows), *steps])


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
