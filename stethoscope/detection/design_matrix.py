"""Build the design matrix of a detector from a token table, and the classifier for its columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator

from stethoscope.core.token_table import feature_matrix, require
from stethoscope.detection.estimators import make_estimator
from stethoscope.detection.evidence_prior import EXTERNAL, Factored, external_columns, object_codes
from stethoscope.detection.visual_consistency import COLUMNS, FEATURE, VisualConsistency
from stethoscope.features.columns import feature_of

RARE = 5
"""Mentions that an object needs in training to get a category of its own."""


@dataclass(frozen=True)
class Inputs:
    """Columns of the design matrix: plain features, objects or external columns, visual evidence and object.

    Attributes:
        features: names of all feature columns of the table that are read.
        objects: canonical names with a category of their own.
        named: add an indicator column for each object. Excludes ``factored``.
        factored: add the external columns, for evidence and prior.
    """

    features: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    named: bool = False
    factored: bool = False

    @property
    def evidence_columns(self) -> tuple[str, ...]:
        """Columns that only the visual-consistency classifier reads."""
        return tuple(name for name in self.features if feature_of(name) == FEATURE)

    @property
    def plain(self) -> tuple[str, ...]:
        """All other feature columns."""
        return tuple(name for name in self.features if feature_of(name) != FEATURE)

    @property
    def explained_columns(self) -> tuple[str, ...]:
        """Names of the first columns that the final classifier reads, for explanations."""
        return (*COLUMNS, *self.plain) if self.evidence_columns else self.plain

    @property
    def needs_objects(self) -> bool:
        """Whether the matrix depends on the named object."""
        return self.named or self.factored or bool(self.evidence_columns)

    @property
    def width(self) -> int:
        """Number of columns of ``matrix``."""
        names = len(EXTERNAL) if self.factored else len(self.objects) if self.named else 0
        return len(self.plain) + names + (len(self.evidence_columns) + 1 if self.evidence_columns else 0)

    def matrix(self, table: pd.DataFrame) -> np.ndarray:
        """Build the design matrix, (rows, columns) float64, NaN where a value is missing.

        Raises:
            DataError: a column is missing, or a value is infinite.
        """
        parts, evidence = [feature_matrix(table, self.plain)], self.evidence_columns
        if self.needs_objects:
            require(table, ("object",))
        if self.factored:
            parts.append(external_columns(table, self.objects))
        elif self.named:
            parts.append(table["object"].to_numpy(dtype=str)[:, None] == np.array(self.objects, dtype=str))
        if evidence:
            parts += [feature_matrix(table, evidence), object_codes(table, self.objects)[:, None]]
        return np.hstack(parts)

    def classifier(self, kind: str, C: float | None, seed: int) -> BaseEstimator:
        """Create an unfitted classifier of ``matrix``.

        Args:
            kind: one of ``ESTIMATORS``.
            C: inverse regularisation strength of nested fits; None chooses it by inner folds.
            seed: seed of everything random.
        """
        count, evidence = len(self.objects), self.evidence_columns
        model = Factored(kind, count, C, seed) if self.factored else make_estimator(kind, seed)
        return VisualConsistency(model, len(evidence) + 1, count, C) if evidence else model


def frequent_objects(rows: pd.DataFrame) -> tuple[str, ...]:
    """Return the sorted objects with at least ``RARE`` mentions."""
    counts = rows.loc[
        rows["is_first_subtoken"].astype(bool), "object"
    ].value_counts()  # a mention may have several rows
    return tuple(sorted(str(name) for name, count in counts.items() if count >= RARE and name))
