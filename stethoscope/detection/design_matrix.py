"""What a detector's classifier reads of a token table, column by column, and the classifier for these columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator

from stethoscope.core.token_table import feature_matrix, require
from stethoscope.detection.estimators import make_estimator
from stethoscope.detection.evidence_prior import EXTERNAL, Factored, codes, external
from stethoscope.detection.visual_consistency import COLUMNS, FEATURE, VisualConsistency
from stethoscope.features.columns import feature_of

RARE = 5
"""Mentions that an object needs in training to be told apart from others."""


@dataclass(frozen=True)
class Inputs:
    """Columns in their order: ``plain`` features; a column per object or the external ones; places and object.

    Attributes:
        features: names of all columns of the table that are read.
        objects: canonical names that are told apart.
        named: a column for each of them. ``factored``: external columns, for evidence and prior. Not both.
    """

    features: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    named: bool = False
    factored: bool = False

    @property
    def places(self) -> tuple[str, ...]:
        """The columns that ``sight`` reads, and nothing else."""
        return tuple(name for name in self.features if feature_of(name) == FEATURE)

    @property
    def plain(self) -> tuple[str, ...]:
        """All others."""
        return tuple(name for name in self.features if feature_of(name) != FEATURE)

    @property
    def shown(self) -> tuple[str, ...]:
        """Names of the first columns that the classifier behind ``sight`` reads, for explanations."""
        return (*COLUMNS, *self.plain) if self.places else self.plain

    @property
    def needs_objects(self) -> bool:
        """Whether the objects matter."""
        return self.named or self.factored or bool(self.places)

    @property
    def width(self) -> int:
        """The number of columns of ``matrix``."""
        names = len(EXTERNAL) if self.factored else len(self.objects) if self.named else 0
        return len(self.plain) + names + (len(self.places) + 1 if self.places else 0)

    def matrix(self, table: pd.DataFrame) -> np.ndarray:
        """(rows, columns) float64, NaN where a value is missing.

        Raises:
            DataError: a column is missing, or a value is infinite.
        """
        parts, places = [feature_matrix(table, self.plain)], self.places
        if self.needs_objects:
            require(table, ("object",))
        if self.factored:
            parts.append(external(table, self.objects))
        elif self.named:
            parts.append(table["object"].to_numpy(dtype=str)[:, None] == np.array(self.objects, dtype=str))
        if places:
            parts += [feature_matrix(table, places), codes(table, self.objects)[:, None]]
        return np.hstack(parts)

    def classifier(self, kind: str, C: float | None, seed: int) -> BaseEstimator:
        """A classifier of ``matrix`` that has not been fitted.

        Args:
            kind: of ``ESTIMATORS``.
            C: inverse regularisation strength of parts with fits of their own; None chooses it.
            seed: of everything random.
        """
        count, places = len(self.objects), self.places
        model = Factored(kind, count, C, seed) if self.factored else make_estimator(kind, seed)
        return VisualConsistency(model, len(places) + 1, count, C) if places else model


def told_apart(rows: pd.DataFrame) -> tuple[str, ...]:
    """The objects of mentions that are named often enough, sorted."""
    firsts = rows["is_first_subtoken"].astype(bool)  # a mention may have several rows
    counts = rows.loc[firsts, "object"].value_counts()
    return tuple(sorted(str(name) for name, count in counts.items() if count >= RARE and name))
