"""Turn mentions of a token table into the design matrix of a detector.

``Inputs`` are the columns of the matrix, and the classifier for them; ``Design`` is what a detector has learned to
build it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import logit
from sklearn.base import BaseEstimator

from stethoscope.core.errors import ArtefactError, ConfigError, DataError
from stethoscope.core.token_table import (
    FeatureSchema,
    feature_matrix,
    feature_names,
    object_index,
    require,
    select_features,
    unpack_vectors,
)
from stethoscope.detection.artifact import Arrays
from stethoscope.detection.calibrated_model import CalibratedModel
from stethoscope.detection.estimators import SharedFits, Stacked, make_estimator
from stethoscope.detection.evidence_prior import EXTERNAL, Factored, external_columns
from stethoscope.detection.hidden_probe import COLUMNS as HIDDEN_COLUMNS
from stethoscope.detection.hidden_probe import TEACHER, Probed
from stethoscope.detection.image_probe import COLUMN as IMAGE_COLUMN
from stethoscope.detection.image_probe import ImageProbe, fit_image_probe, has_tokens
from stethoscope.detection.shift_measures import Readings
from stethoscope.detection.visual_consistency import COLUMNS, FEATURE, VisualConsistency
from stethoscope.features.columns import feature_of, group_of

RARE = 5
"""Mentions that an object needs in training to get a category of its own."""
PROBABILITIES = (1e-9, 1 - 1e-9)  # to which they are cut off before log-odds are taken


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
        imaged: add the score of ``image_probe``.
        visual: may read image tokens.
    """

    features: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    named: bool = False
    factored: bool = False
    probed: bool = True
    taught: bool = False
    imaged: bool = False
    visual: bool = True

    @classmethod
    def of(cls, settings: Mapping[str, Any], names: Sequence[str], objects: Sequence[str] = ()) -> Inputs:
        """Select the columns that a detector's settings ask for.

        Args:
            settings: of the detector, as ``check_settings`` returns them.
            names: feature columns, as ``select_columns`` selects them.
            objects: names of the objects that get columns of their own.

        Raises:
            ConfigError: no column is left.
        """
        keys = ("objects", "factored", "hidden_probe", "visual_consistency")
        named, factored, probed, visual = (settings[key] for key in keys)
        taught = settings["labels"] != "all"
        inputs = cls(tuple(names), tuple(objects), named, factored, probed, taught, visual=visual)
        if visual:
            return inputs
        if not inputs.without_evidence:
            raise ConfigError("detector.visual_consistency=false leaves no feature: attended_embedding is the only one")
        return replace(inputs, features=inputs.without_evidence)

    @cached_property
    def hidden(self) -> tuple[str, ...]:
        """Columns that only the probe of hidden states reads."""
        return tuple(name for name in self.features if self.probed and is_hidden(name))

    @cached_property
    def evidence_columns(self) -> tuple[str, ...]:
        """Columns that only the visual-consistency classifier reads."""
        return tuple(name for name in self.features if feature_of(name) == FEATURE)

    @property
    def reads_tokens(self) -> bool:
        """Whether image tokens are read where the table has them: beside hidden states or image evidence."""
        return self.visual and (bool(self.evidence_columns) or any(map(is_hidden, self.features)))

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
        image = (IMAGE_COLUMN,) if self.imaged else ()
        return (*probes, *(COLUMNS if self.evidence_columns else ()), *self.plain, *image)

    @property
    def needs_objects(self) -> bool:
        """Whether the matrix depends on the named object."""
        return self.named or self.factored or self.imaged or bool(self.evidence_columns)

    @property
    def width(self) -> int:
        """Number of columns of ``matrix``."""
        names = len(EXTERNAL) if self.factored else len(self.objects) if self.named else 0
        parts = sum(len(columns) + 1 for columns in (self.hidden, self.evidence_columns) if columns)
        return len(self.plain) + self.imaged + names + parts

    def matrix(self, table: pd.DataFrame, image_scores: np.ndarray | None = None) -> np.ndarray:
        """Build the design matrix, (rows, columns) float64, NaN where a value is missing.

        Args:
            table: token table.
            image_scores: (rows,) of ``image_probe``, with ``imaged``; None for zeros.

        Raises:
            DataError: a column is missing, or a value is infinite.
        """
        if self.needs_objects:
            require(table, ("object",))
        named = object_index(table, self.objects) if self.needs_objects else None
        places = external_columns(table, self.objects)[:, :-1] if self.factored else None
        teacher = table[TEACHER].to_numpy(dtype=float) if self.hidden and TEACHER in table else None
        return self.arrange(feature_matrix(table, self.features), named, image_scores, places, teacher)

    def arrange(
        self,
        values: np.ndarray,
        named: np.ndarray | None = None,
        image_scores: np.ndarray | None = None,
        places: np.ndarray | None = None,
        teacher: np.ndarray | None = None,
    ) -> np.ndarray:
        """Arrange values as ``matrix`` does, which need not come from a table.

        Args:
            values: (rows, features) in the order of ``features``.
            named: (rows,) index in ``objects`` of the named object, -1 for any other, with ``needs_objects``.
            image_scores: as for ``matrix``.
            places: (rows, 3) columns of ``EXTERNAL`` but for the object, with ``factored``.
            teacher: (rows,) replies of the model, which training alone reads; None for none.
        """
        if not (self.hidden or self.needs_objects):
            return values
        plain, hidden, evidence = self._order
        objects = np.full(len(values), -1) if named is None else named
        parts = [values[:, plain]]
        if self.imaged:
            parts.append((np.zeros(len(values)) if image_scores is None else image_scores)[:, None])
        if self.factored:
            parts += [np.zeros((len(values), len(EXTERNAL) - 1)) if places is None else places, objects[:, None]]
        elif self.named:
            parts.append(objects[:, None] == np.arange(len(self.objects)))
        if self.hidden:
            parts += [values[:, hidden], (np.full(len(values), np.nan) if teacher is None else teacher)[:, None]]
        if self.evidence_columns:
            parts += [values[:, evidence], objects[:, None]]
        return np.hstack(parts)

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where plain, hidden and evidence columns stand among ``features``."""
        index = {name: position for position, name in enumerate(self.features)}
        plain, hidden, evidence = (
            np.array([index[name] for name in names], dtype=int)
            for names in (self.plain, self.hidden, self.evidence_columns)
        )
        return plain, hidden, evidence

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Index of every object in ``objects``."""
        return {name: index for index, name in enumerate(self.objects)}

    def classifier(
        self,
        kind: str | Mapping[str, Any],
        C: float | None,
        seed: int,
        unlabelled: np.ndarray | None = None,
        draft: bool = False,
        shared: SharedFits | None = None,
    ) -> BaseEstimator:
        """Create an unfitted classifier of ``matrix``.

        Args:
            kind: see ``make_estimator``.
            C: inverse regularisation strength of nested fits; None chooses it by inner folds.
            seed: seed of everything random.
            unlabelled: (rows, columns) of ``matrix`` of mentions without labels, for the probe; None for none.
            draft: with fewer inner folds and shorter training of what has any, a tenth of the time.
            shared: fits in common with other detectors; None for none.
        """
        count, evidence = len(self.objects), self.evidence_columns
        model = Factored(kind, count, C, seed) if self.factored else make_estimator(kind, seed, draft)
        if self.hidden:
            more = None if unlabelled is None else self._before_evidence(unlabelled)
            model = Probed(model, len(self.hidden), C, seed, self.taught, more, draft, shared)
        if not evidence:
            return model
        taught = self.taught and bool(self.hidden)
        more = unlabelled if taught else None  # the evidence of others learns from labels alone
        return VisualConsistency(model, len(evidence) + 1, count, C, taught, more, draft, shared)

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


def select_columns(settings: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """Select the columns to read: with ``labels`` other than all, those that the model's verification can teach.

    Args:
        settings: of the detector, as ``check_settings`` returns them.
        names: feature columns of a token table.

    Raises:
        ConfigError: a name or pattern of the settings fits no column.
    """
    selected = select_features(names, settings["features"], settings["exclude"])
    if settings["labels"] == "all":
        return selected
    evidence = settings["visual_consistency"]
    return tuple(name for name in selected if is_hidden(name) or (evidence and feature_of(name) == FEATURE))


def table_schema(table: pd.DataFrame, read: Sequence[str]) -> FeatureSchema:
    """Build the schema of a table, without verification columns where training alone reads them.

    Args:
        table: token table.
        read: columns that the detector reads.
    """
    names = feature_names(table)
    if not any(map(is_hidden, read)):
        return FeatureSchema(names)
    return FeatureSchema(tuple(name for name in names if name in read or group_of(name) != "verification"))


@dataclass(frozen=True)
class Design:
    """What a detector has learned to build its design matrix; nothing before it is fitted.

    Attributes:
        schema: all features of the table that it was fitted on; other tables must have the same.
        inputs: columns of the matrix.
        image_probe: scores image tokens, with ``inputs.imaged``; else None.
    """

    schema: FeatureSchema = FeatureSchema(())  # noqa: RUF009 (frozen)
    inputs: Inputs = Inputs()
    image_probe: ImageProbe | None = None

    @classmethod
    def fit(
        cls,
        settings: Mapping[str, Any],
        train: pd.DataFrame,
        unlabelled: pd.DataFrame | None,
        shared: SharedFits | None = None,
    ) -> tuple[Design, np.ndarray]:
        """Choose the columns and fit the probe of image tokens, where there are any.

        Args:
            settings: of the detector, as ``check_settings`` returns them.
            train: mentions with labels.
            unlabelled: mentions without labels that probes learn from; None for none.
            shared: fits in common with other detectors; None for none.

        Returns:
            The design and the matrix of ``train``, (rows, columns), in which the probe has not seen a row's picture.

        Raises:
            ConfigError: a feature name or pattern fits no column.
            DataError: a feature has no value at all or an infinite one.
        """
        names = select_columns(settings, feature_names(train))
        schema, inputs = table_schema(train, names), Inputs.of(settings, names)
        if inputs.needs_objects:
            inputs = replace(inputs, objects=frequent_objects(train))
        probe, scores = None, None
        if inputs.reads_tokens and has_tokens(train):
            seeing = replace(inputs, objects=inputs.objects or frequent_objects(train), imaged=True)
            fitted = fit_image_probe(train, unlabelled, seeing.objects, inputs.taught, settings["seed"], shared)
            if fitted is not None:
                (probe, scores), inputs = fitted, seeing
        matrix = inputs.matrix(train, scores)
        known = train[list(inputs.features)].notna().any()
        empty = [name for name in inputs.features if not known[name]]
        if len(train) and empty:
            raise DataError(f"features without any value: {', '.join(empty)}; leave them out with detector.exclude")
        return cls(schema, inputs, probe), matrix

    @classmethod
    def restore(cls, schema: FeatureSchema, inputs: Inputs, arrays: Arrays) -> Design:
        """Restore a design from its manifest and what ``arrays`` returned.

        Raises:
            ArtefactError: an array is missing, has another shape or type, or holds invalid numbers.
        """
        if not (inputs.reads_tokens and "mean" in arrays):
            return cls(schema, inputs)
        return cls(schema, replace(inputs, imaged=True), ImageProbe.restore(arrays, len(inputs.objects)))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name; none without image tokens."""
        return {} if self.image_probe is None else self.image_probe.arrays()

    def matrix(self, table: pd.DataFrame) -> np.ndarray:
        """Build the design matrix of a token table, (rows, columns).

        Raises:
            ArtefactError: the table has other features; the message names the differences.
            DataError: a feature has an infinite value.
        """
        schema = table_schema(table, self.inputs.features)
        if schema.hash != self.schema.hash:
            raise ArtefactError(
                f"the table's features (schema {schema.hash}) are not those the detector was fitted on "
                f"({self.schema.hash}): {self.schema.difference(schema)}"
            )
        probe = self.image_probe
        return self.inputs.matrix(table, None if probe is None else probe.scores(table, self.inputs.objects))

    def arrange(
        self,
        rows: np.ndarray,
        names: Sequence[str] = (),
        places: np.ndarray | None = None,
        absence: np.ndarray | None = None,
    ) -> np.ndarray:
        """Build the design matrix of rows without a table, as a stream makes them, (rows, columns).

        Args:
            rows: (rows, features) in the order of ``inputs.features``.
            names: of the objects that the rows name, where ``inputs`` need them.
            places: (rows, 3) index of the token in the answer, mentions and mentions of the same object before.
            absence: (objects,) of ``absent_objects``, of the picture of all rows; None without image tokens.
        """
        if not self.inputs.needs_objects:
            return self.inputs.arrange(rows)
        named = np.array([self.inputs.index_of.get(name, -1) for name in names])
        scores = None if absence is None else np.where(named < 0, np.nan, absence[named])
        return self.inputs.arrange(rows, named, scores, places)

    def readings(self, model: CalibratedModel, mentions: pd.DataFrame, contents: bool = True) -> Readings:
        """Read what a monitor compares.

        Args:
            model: classifier of the matrix.
            mentions: rows of a token table.
            contents: also look which objects the pictures show.
        """
        matrix, inner = self.matrix(mentions), model.classifier
        while isinstance(inner, Stacked) and len(mentions):
            matrix, inner = inner.join_inputs(matrix), inner.classifier_
        scores = inner.decision_function(matrix) if len(mentions) else np.zeros(0)
        log_odds = logit(np.clip(model.calibrate(scores), *PROBABILITIES))
        columns = matrix[:, : len(self.inputs.explained_columns)]
        probe = self.image_probe if contents and has_tokens(mentions) else None
        return Readings(mentions, columns, log_odds, None if probe is None else probe.contents(mentions))

    def absent_objects(self, tokens: np.ndarray) -> np.ndarray | None:
        """Score for every object of ``inputs`` that a picture lacks it, (objects,) log-odds; None if it reads no token.

        Args:
            tokens: (N, D) image tokens, as a token table has them.

        Raises:
            DataError: the tokens have another number of dimensions than those of training.
        """
        return None if self.image_probe is None else -self.image_probe.transform([tokens])[0]

    def locate(self, image_tokens: str, name: str) -> np.ndarray | None:
        """Compute how probable each image token alone makes it that the picture shows an object.

        This is what ``image_objects`` of ``Detector.explain`` rests on. It learned where objects are from what answers
        named and from no box.

        Args:
            image_tokens: of the column ``image_tokens`` of a token table.
            name: of the object.

        Returns:
            (N,) in [0, 1]; None where the detector reads no image tokens or does not know the name.

        Raises:
            DataError: the tokens are of another kind.
        """
        if self.image_probe is None or not image_tokens or name not in self.inputs.objects:
            return None
        return self.image_probe.locate(unpack_vectors(image_tokens), self.inputs.objects.index(name))
