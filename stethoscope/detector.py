"""The warning classifier: token features in, calibrated probabilities of hallucination out."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from stethoscope import artefact
from stethoscope.errors import ArtefactError, ConfigError, DataError, unknown
from stethoscope.estimators import (
    CALIBRATIONS,
    ESTIMATORS,
    CalibratedModel,
    Examples,
    best_threshold,
    make_estimator,
)
from stethoscope.table import FeatureSchema, feature_matrix, mention_rows, require

NOTES = ("model", "task", "label", "split", "figures")  # always in the manifest, null where not known
RARE = 5  # mentions that an object needs in training to get a column of its own


class Detector:
    """Gives every answer token the probability that it is hallucinated.

    >>> from stethoscope.detector import Detector
    >>> Detector(estimator="boosting", features=["entropy", "attention_*"])
    Detector(estimator='boosting', calibration='platt', features=['entropy', 'attention_*'])

    Args:
        estimator: ``logistic`` (L2 logistic regression) or ``boosting`` (histogram gradient boosting).
        calibration: ``platt``, ``isotonic`` or ``none``.
        features: names or shell patterns of the features to use; None for all of the table.
        exclude: names or patterns of features to leave out again.
        objects: also use which object the token names (one column per object seen in training). Off by default, so
            that a warning rests on evidence from the model and not on how often an object was invented before.
        strength: inverse regularisation C of the logistic regression; None chooses it by inner folds of images.
        repeats: learn from the ``first`` mention of every object in an answer, or from ``all``.
        seed: of everything random; the same data and seed give the same detector.

    Attributes:
        threshold: probability at or above which to warn, the best F1 on the calibration fold.
        notes: JSON-able facts that go into the manifest (model, task, label, split, figures).

    Raises:
        ConfigError: a setting is not one of the above.
    """

    def __init__(
        self,
        estimator: Literal["logistic", "boosting"] = "logistic",
        calibration: Literal["platt", "isotonic", "none"] = "platt",
        features: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        objects: bool = False,
        strength: float | None = None,
        repeats: Literal["first", "all"] = "first",
        seed: int = 0,
    ) -> None:
        for key, value, known in (
            ("estimator", estimator, ESTIMATORS),
            ("calibration", calibration, CALIBRATIONS),
            ("repeats", repeats, ("first", "all")),
        ):
            if value not in known:
                raise ConfigError(unknown(f"detector.{key}", str(value), known))
        if strength is not None and not strength > 0:
            raise ConfigError(f"detector.strength={strength} should be above 0, or null to choose it")
        if isinstance(features, str) or isinstance(exclude, str):
            raise ConfigError("detector.features and detector.exclude should be lists, for example [entropy,nll]")
        self.settings: dict[str, Any] = {
            "estimator": estimator,
            "calibration": calibration,
            "features": None if features is None else list(features),
            "exclude": list(exclude),
            "objects": objects,
            "strength": strength,
            "repeats": repeats,
            "seed": seed,
        }
        self.threshold = 0.5
        self.notes: dict[str, Any] = {}
        self._model: CalibratedModel | None = None
        self._schema = FeatureSchema(())
        self._names: tuple[str, ...] = ()
        self._objects: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shown = {key: self.settings[key] for key in ("estimator", "calibration", "features")}
        return f"Detector({', '.join(f'{key}={value!r}' for key, value in shown.items())})"

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` or ``load`` made it ready to predict."""
        return self._model is not None

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features it reads, in order; empty before ``fit``."""
        return self._names

    @property
    def schema(self) -> FeatureSchema:
        """All features of the table it was fitted on; a table to predict must have the same."""
        return self._schema

    def fit(self, train: pd.DataFrame, calibration: pd.DataFrame | None = None) -> Detector:
        """Learns from the judged rows of a token table.

        Args:
            train: token table, images to learn from.
            calibration: token table of other images, to calibrate on and to choose the threshold; without it
                out-of-fold scores of ``train`` are used.

        Returns:
            The detector itself.

        Raises:
            ConfigError: a feature name or pattern fits no column.
            DataError: a fold has no judged rows or only one label, an image is in both folds, or a feature has no
                value at all or an infinite one.
            ArtefactError: the two tables have different features.
        """
        train = mention_rows(train, repeats=self.settings["repeats"])
        self._schema = FeatureSchema.of(train)
        self._names = select_features(self._schema.names, self.settings["features"], self.settings["exclude"])
        counts = train["object"].value_counts() if self.settings["objects"] else pd.Series(dtype=int)
        self._objects = tuple(sorted(str(name) for name, count in counts.items() if count >= RARE and name))
        examples = self._examples(train)
        empty = [name for name, column in zip(self._names, examples.matrix.T, strict=False) if np.isnan(column).all()]
        if len(train) and empty:
            raise DataError(f"features without any value: {', '.join(empty)}; leave them out with detector.exclude")
        held_out = None
        if calibration is not None:
            held_out = self._examples(mention_rows(calibration, repeats=self.settings["repeats"]))
            both = set(examples.groups) & set(held_out.groups)
            if both:
                raise DataError(f"{len(both)} images are in both folds, {min(both)!r} for one; split by image")
        estimator = make_estimator(self.settings["estimator"], self.settings["seed"])
        self._model = CalibratedModel.fit(
            estimator, examples, held_out, self.settings["calibration"], self.settings["strength"]
        )
        chosen_on = examples if held_out is None else held_out
        if len(chosen_on.labels):
            self.threshold = best_threshold(chosen_on.labels, self._model.predict(chosen_on.matrix))
        return self

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """(rows,) probability that each token is hallucinated, in [0, 1], for all rows of a token table.

        Raises:
            ArtefactError: the detector was not fitted, or the table's features are not those it was fitted on; the
                message names the differences.
            DataError: a feature has an infinite value.
        """
        if self._model is None:
            raise ArtefactError("the detector was not fitted; call fit or load it from a folder")
        return self._model.predict(self._matrix(table))

    def _matrix(self, table: pd.DataFrame) -> np.ndarray:
        """(rows, features + objects) what the classifier reads."""
        schema = FeatureSchema.of(table)
        if schema.hash != self._schema.hash:
            raise ArtefactError(
                f"the table's features (schema {schema.hash}) are not those the detector was fitted on "
                f"({self._schema.hash}): {self._schema.difference(schema)}"
            )
        matrix = feature_matrix(table, self._names)
        if not self._objects:
            return matrix
        require(table, ("object",))
        named = table["object"].to_numpy(dtype=str)[:, None] == np.array(self._objects)
        return np.hstack([matrix, named])

    def _examples(self, rows: pd.DataFrame) -> Examples:
        require(rows, ("group",))
        return Examples(self._matrix(rows), rows["label"].to_numpy(dtype=int), rows["group"].to_numpy(dtype=str))

    @property
    def manifest(self) -> dict[str, Any]:
        """What ``manifest.json`` says of the detector; JSON-able. ``artefact.write`` adds versions and digests."""
        return {
            **dict.fromkeys(NOTES),
            **self.notes,
            "kind": "stethoscope.Detector",
            "features": list(self._names),
            "feature_schema_hash": self._schema.hash,
            "table_features": list(self._schema.names),
            "objects": list(self._objects),
            "settings": self.settings,
            "threshold": {"value": self.threshold, "chosen": "highest F1 on the calibration fold"},
        }

    def save(self, folder: Path | str, notes: Mapping[str, Any] | None = None) -> None:
        """Writes ``detector.skops`` and ``manifest.json``.

        Args:
            folder: where to; an older detector there is replaced.
            notes: JSON-able facts to add to the manifest: ``model`` (fingerprint), ``task``, ``label``, ...

        Raises:
            ArtefactError: the detector was not fitted, or the folder holds something else or cannot be written.
        """
        if self._model is None:
            raise ArtefactError("a detector that was not fitted cannot be saved; call fit first")
        self.notes |= dict(notes or {})
        fitted = {
            "features": list(self._names),
            "table_features": list(self._schema.names),
            "objects": list(self._objects),
            "model": self._model.model,
            "calibrator": self._model.calibrator,
        }
        artefact.write(Path(folder), fitted, self.manifest)

    @classmethod
    def load(cls, folder: Path | str) -> Detector:
        """Reads a detector. Nothing is unpickled, and no type beyond a fixed list is made.

        Raises:
            ArtefactError: the folder holds no detector, or one that is damaged, was changed, or holds foreign types.
        """
        fitted, manifest = artefact.read(Path(folder))
        doubled = ("features", "table_features", "objects")  # in the manifest for people, in the other file for us
        if set(fitted) != {*doubled, "model", "calibrator"} or any(manifest.get(key) != fitted[key] for key in doubled):
            raise ArtefactError(f"{folder}: {artefact.MANIFEST} and {artefact.OBJECTS} do not belong together")
        try:
            detector = cls(**manifest["settings"])
            detector.threshold = float(manifest["threshold"]["value"])
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise ArtefactError(f"{Path(folder) / artefact.MANIFEST} is damaged: {error}") from None
        own = {*detector.manifest, *artefact.ADDED} - set(NOTES)
        detector.notes = {key: value for key, value in manifest.items() if key not in own and value is not None}
        detector._names, detector._objects = tuple(fitted["features"]), tuple(fitted["objects"])
        detector._schema = FeatureSchema(tuple(fitted["table_features"]))
        detector._model = CalibratedModel(fitted["model"], fitted["calibrator"])
        return detector


def select_features(
    names: Sequence[str], wanted: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> tuple[str, ...]:
    """Names that fit one of the wanted names or shell patterns and none of the excluded, in their own order.

    Raises:
        ConfigError: a name or pattern fits nothing, or nothing is left.

    >>> select_features(["nll", "entropy", "svar_l00", "svar_l01"], ["svar_*", "nll"], ["*_l01"])
    ('nll', 'svar_l00')
    """
    for pattern in [*(wanted or ()), *exclude]:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(unknown("feature", pattern, names))
    kept = tuple(
        name
        for name in names
        if (wanted is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted))
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
    )
    if not kept:
        raise ConfigError(f"features={wanted} without exclude={list(exclude)} leaves no feature of {len(names)}")
    return kept
