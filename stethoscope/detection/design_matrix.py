"""Build the design matrix of a detector from a token table, and the classifier for its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator

from stethoscope.core.token_table import feature_matrix, require
from stethoscope.detection.cooccurrence import object_index
from stethoscope.detection.estimators import make_estimator
from stethoscope.detection.evidence_prior import EXTERNAL, Factored, external_columns
from stethoscope.detection.hidden_probe import COLUMNS as HIDDEN_COLUMNS
from stethoscope.detection.hidden_probe import TEACHER, Probed
from stethoscope.detection.visual_consistency import COLUMNS, FEATURE, VisualConsistency
from stethoscope.features.columns import feature_of, group_of

RARE = 5
"""Mentions that an object needs in training to get a category of its own."""


@dataclass(frozen=True)
class Inputs:
    """Columns of the design matrix: plain, objects or external, hidden states and teacher, visual evidence and object.

    Attributes:
        features: names of all feature columns of the table that are read.
        objects: canonical names with a category of their own.
        named: add an indicator column for each object. Excludes ``factored``.
        factored: add the external columns, for evidence and prior.
        probed: give hidden states to a probe; otherwise they are plain features.
        taught: probe and evidence learn from the model's verification instead of from labels.
    """

    features: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    named: bool = False
    factored: bool = False
    probed: bool = True
    taught: bool = False

    @cached_property
    def hidden(self) -> tuple[str, ...]:
        """Columns that only the probe of hidden states reads."""
        return tuple(name for name in self.features if self.probed and is_hidden(name))

    @cached_property
    def evidence_columns(self) -> tuple[str, ...]:
        """Columns that only the visual-consistency classifier reads."""
        return tuple(name for name in self.features if feature_of(name) == FEATURE)

    @property
    def without_evidence(self) -> tuple[str, ...]:
        """The features that are left without visual consistency."""
        return tuple(name for name in self.features if name not in set(self.evidence_columns))

    @cached_property
    def plain(self) -> tuple[str, ...]:
        """All other feature columns."""
        others = {*self.evidence_columns, *self.hidden}
        return tuple(name for name in self.features if name not in others)

    @property
    def explained_columns(self) -> tuple[str, ...]:
        """Names of the first columns that the final classifier reads, for explanations."""
        probes = HIDDEN_COLUMNS if self.hidden else ()
        return (*probes, *(COLUMNS if self.evidence_columns else ()), *self.plain)

    @property
    def needs_objects(self) -> bool:
        """Whether the matrix depends on the named object."""
        return self.named or self.factored or bool(self.evidence_columns)

    @property
    def width(self) -> int:
        """Number of columns of ``matrix``."""
        names = len(EXTERNAL) if self.factored else len(self.objects) if self.named else 0
        parts = sum(len(columns) + 1 for columns in (self.hidden, self.evidence_columns) if columns)
        return len(self.plain) + names + parts

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
        if self.hidden:
            teacher = table[TEACHER].to_numpy(dtype=float) if TEACHER in table else np.full(len(table), np.nan)
            parts += [feature_matrix(table, self.hidden), teacher[:, None]]
        if evidence:
            parts += [feature_matrix(table, evidence), object_index(table, self.objects)[:, None]]
        return np.hstack(parts)

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """Arrange values without a table as ``matrix`` does: for detectors that read neither objects nor evidence.

        Args:
            values: (rows, features) in the order of ``features``.
        """
        if not self.hidden:
            return values
        untaught = np.full((len(values), 1), np.nan)
        return np.hstack([values[:, self._order[0]], values[:, self._order[1]], untaught])

    @cached_property
    def _order(self) -> tuple[list[int], list[int]]:
        """Return where plain and hidden columns stand among ``features``."""
        index = {name: position for position, name in enumerate(self.features)}
        return [index[name] for name in self.plain], [index[name] for name in self.hidden]

    def classifier(
        self,
        kind: str | Mapping[str, Any],
        C: float | None,
        seed: int,
        unlabelled: np.ndarray | None = None,
        draft: bool = False,
    ) -> BaseEstimator:
        """Create an unfitted classifier of ``matrix``.

        Args:
            kind: see ``make_estimator``.
            C: inverse regularisation strength of nested fits; None chooses it by inner folds.
            seed: seed of everything random.
            unlabelled: (rows, columns) of ``matrix`` of mentions without labels, for the probe; None for none.
            draft: with fewer inner folds and shorter training of what has any, a tenth of the time.
        """
        count, evidence = len(self.objects), self.evidence_columns
        model = Factored(kind, count, C, seed) if self.factored else make_estimator(kind, seed)
        if self.hidden:
            more = None if unlabelled is None else self._before_evidence(unlabelled)
            model = Probed(model, len(self.hidden), C, seed, self.taught, more, draft)
        if not evidence:
            return model
        taught = self.taught and bool(self.hidden)
        more = unlabelled if taught else None  # the evidence of others learns from labels alone
        return VisualConsistency(model, len(evidence) + 1, count, C, taught, more, draft)

    def _before_evidence(self, matrix: np.ndarray) -> np.ndarray:
        """Return the own columns of rows of ``matrix`` as the classifier inside ``VisualConsistency`` gets them."""
        size = len(self.evidence_columns)
        return np.hstack([np.zeros((len(matrix), len(COLUMNS))), matrix[:, : -size - 1]]) if size else matrix


def is_hidden(column: str) -> bool:
    """Whether a column is a dimension of a hidden state.

    >>> is_hidden("hidden_last_q_d0003"), is_hidden("nll")
    (True, False)
    """
    return group_of(column) == "hidden"


def frequent_objects(rows: pd.DataFrame) -> tuple[str, ...]:
    """Return the sorted objects with at least ``RARE`` mentions."""
    require(rows, ("object", "is_first_subtoken"))
    first = rows["is_first_subtoken"].astype(bool)  # a mention may have several rows
    counts = rows.loc[first, "object"].value_counts()
    return tuple(sorted(str(name) for name, count in counts.items() if count >= RARE and name))
