"""Classify tokens: map their features to calibrated probabilities of hallucination."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator

from stethoscope.core.errors import ArtefactError, ConfigError, DataError, first_line, wrong_type
from stethoscope.core.files import as_path
from stethoscope.core.token_table import FeatureSchema, Repeats, Subtokens, check_table
from stethoscope.detection import artifact
from stethoscope.detection.array_classifiers import PlattScaling
from stethoscope.detection.calibrated_model import CalibratedModel, Examples
from stethoscope.detection.design_matrix import Design, Inputs
from stethoscope.detection.detector_settings import DetectorManifest, Selection, check_notes, check_settings
from stethoscope.detection.estimator_classes import restored_classifier
from stethoscope.detection.estimators import SharedFits, add_prefix
from stethoscope.detection.evidence_prior import Explanation, explanation
from stethoscope.detection.recalibration import mixture_line, recalibrate
from stethoscope.detection.risk_control import Certificate, RiskGuarantee
from stethoscope.detection.shift import ShiftMonitor
from stethoscope.detection.shift_measures import Readings, RunShift
from stethoscope.detection.visual_consistency import NamedProbability, VisualConsistency, most_likely
from stethoscope.detection.warning_threshold import WarningThreshold, choose_threshold

PROBE = "image_probe"  # prefix of its arrays


class Detector:
    """Give every answer token the probability that it is hallucinated.

    >>> Detector(estimator="boosting", features=["entropy", "attention_*"])
    Detector(estimator='boosting', calibration='platt', features=['entropy', 'attention_*'])

    Args:
        estimator: ``logistic`` (L2 logistic regression), ``boosting`` (histogram gradient boosting), ``per_head`` (a
            small network, for tables with a column for every attention head), or a class: one of
            ``compiled_classifiers.SKLEARN``, or a subclass of ``stethoscope.detection.base.Estimator``. It is given by
            its path, as ``{"_target_": path, "n_estimators": 300}`` with its settings, or as an object.
        calibration: ``platt``, ``isotonic`` or ``none``.
        features: names or shell patterns of the features to use; None for all of the table.
        exclude: names or patterns of features to leave out again.
        objects: also use which object the token names, as indicator columns. Off by default, so that a warning rests on
            evidence from the model and not on how often an object was invented before.
        C: inverse regularisation strength of ``logistic`` and ``per_head``; None chooses it by inner folds of images.
        repeats: learn from the ``first`` mention of every object in an answer, or from ``all``.
        seed: of everything random; the same data and seed give the same detector.
        factored: learn evidence and prior separately (``stethoscope.detection.evidence_prior``), so that every warning
            reports both; the prior reads the position and the object of the mention.
        subtokens: how sub-tokens of a mention are reduced, as in ``stethoscope.core.token_table.mention_rows``.
        visual_consistency: read the feature ``attended_embedding``, where the table has it, to score whether the image
            evidence that a token attended to fits the object it names (``stethoscope.detection.visual_consistency``).
            It reads the object for that purpose only. A table with this feature or hidden states also has the image
            tokens, in which ``stethoscope.detection.image_probe`` looks for the object. False leaves both out.
        hidden_probe: reduce hidden states (features of the group ``hidden``), where the table has them, to two scores
            by a small network (``stethoscope.detection.hidden_probe``). If the training table also has
            ``verify_odds``, one of them learns from the model's own verification; prediction does not need it. False
            reads every dimension as a feature.
        labels: ``all`` learns from judged mentions, and its ``hidden_probe`` from the ``verify_odds`` of others too;
            ``few`` learns all but the weights of its scores from ``verify_odds``; ``none`` ignores labels and takes the
            model's verification for the truth; how many mentions are wrong is then estimated from the scores
            (``recalibration.mixture_line``).
        threshold: where to warn: ``f1`` for the highest F1 on the calibration fold, or a guarantee
            (``stethoscope.detection.risk_control``): ``{"max_false_alarms": 0.05}`` or ``{"max_missed": 0.1}``, with
            ``"confidence": 0.95`` and ``"per_image"``, the most mentions that an image counts with, beside it or not.

    Attributes:
        design: how it builds its design matrix.
        warning_threshold: where to warn, and how that was chosen.
        monitor: compares pictures and answers with those it was calibrated on (``stethoscope.detection.shift``); None
            where the folds were too small for one, and in detectors of older versions.
        notes: JSON-able facts that go into the manifest (model, task, label, split, figures).

    Raises:
        ConfigError: a setting is not one of the above.
    """

    CLASS_SETTINGS = ("estimator",)
    """Settings that may name a class; the constructor finds it, and imports nothing of one's own for it."""

    def __init__(
        self,
        estimator: str | Mapping[str, Any] | BaseEstimator = "logistic",
        calibration: Literal["platt", "isotonic", "none"] = "platt",
        features: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        objects: bool = False,
        C: float | None = None,
        repeats: Repeats = "first",
        seed: int = 0,
        factored: bool = False,
        subtokens: Subtokens = "first",
        visual_consistency: bool = True,
        hidden_probe: bool = True,
        labels: Literal["all", "few", "none"] = "all",
        threshold: str | Mapping[str, float] = "f1",
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        self.settings = check_settings(**given)
        self._selection = Selection(self.settings)
        self._guarantee = RiskGuarantee.parse(threshold) if isinstance(threshold, Mapping) else None
        self.warning_threshold = WarningThreshold()
        self.monitor: ShiftMonitor | None = None
        self.notes: dict[str, Any] = {}
        self._model: CalibratedModel | None = None
        self.design = Design()
        self._base_rate = 0.5
        self._shared: SharedFits | None = None

    def __repr__(self) -> str:
        shown = (f"{key}={self.settings[key]!r}" for key in ("estimator", "calibration", "features"))
        return f"Detector({', '.join(shown)})"

    @property
    def fitted(self) -> bool:
        """Whether the detector was fitted or loaded, so that it can predict."""
        return self._model is not None

    @property
    def additive(self) -> bool:
        """Whether ``explain`` can split its probabilities: any but isotonic calibration."""
        return self.settings["calibration"] != "isotonic"

    @property
    def threshold(self) -> float:
        """Probability at or above which to warn; it can be set."""
        return self.warning_threshold.value

    @threshold.setter
    def threshold(self, value: float) -> None:
        self.warning_threshold = self.warning_threshold._replace(value=value)

    @property
    def certificate(self) -> Certificate | None:
        """The guarantee and the images it rests on; None without a guarantee."""
        return self.warning_threshold.certificate

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns it reads, in order; empty before ``fit``."""
        return self.inputs.features

    @property
    def inputs(self) -> Inputs:
        """The columns of its design matrix; none before ``fit``."""
        return self.design.inputs

    @property
    def schema(self) -> FeatureSchema:
        """All features of the table it was fitted on; a table to predict must have the same."""
        return self.design.schema

    @property
    def model(self) -> CalibratedModel:
        """The fitted classifier with its calibration, which reads the columns of ``features``.

        Raises:
            ArtefactError: the detector was not fitted.
        """
        if self._model is None:
            raise ArtefactError("the detector was not fitted; call fit or load it from a folder")
        return self._model

    @property
    def C(self) -> float | None:
        """The inverse regularisation strength C that was given or chosen; None before ``fit`` and for ``boosting``."""
        return None if self._model is None else self._model.C

    def sharing(self, shared: SharedFits | None) -> Self:
        """Let ``fit`` make what it has in common with other detectors only once; None ends that.

        It is no argument of ``fit``, which detectors of one's own override.
        """
        self._shared = shared
        return self

    def fit(self, train: pd.DataFrame, calibration: pd.DataFrame | None = None) -> Self:
        """Fit on the judged rows of a token table.

        Args:
            train: token table, images to learn from.
            calibration: token table of other images, to calibrate on and to choose the threshold; without it
                out-of-fold scores of ``train`` are used.

        Returns:
            The detector itself.

        Raises:
            ConfigError: a feature name or pattern fits no column, or a table is none.
            DataError: a fold has no judged rows or only one label, an image is in both folds, or a feature has no
                value at all or an infinite one.
            ArtefactError: the two tables have different features.
        """
        for table in (train, *([] if calibration is None else [calibration])):
            check_table(table)
        # if fitting fails, the old model must not read the new columns
        self._model, self.design = None, Design()
        train, calibration = tables = self._selection.centre_replies(train, calibration)
        unlabelled = self._selection.unlabelled(train)
        train = self._selection.labelled(train)
        self.design, matrix = Design.fit(self.settings, train, unlabelled, self._shared)
        examples = Examples.of(matrix, train)
        held_out = None
        if calibration is not None:
            calibration = self._selection.labelled(calibration)
            held_out = Examples.of(self.design.matrix(calibration), calibration)
            both = set(examples.groups) & set(held_out.groups)
            if both:
                raise DataError(f"{len(both)} images are in both folds, {str(min(both))!r} for one; split by image")
        kind, C, seed, method = (self.settings[key] for key in ("estimator", "C", "seed", "calibration"))
        more = None if unlabelled is None else self.design.matrix(unlabelled)
        estimator = self.inputs.classifier(kind, C, seed, more, shared=self._shared)
        model = CalibratedModel.fit(estimator, examples, held_out, method, C)
        # the share of hallucinated mentions where its probabilities are right
        base_rate = float((examples if held_out is None or method == "none" else held_out).labels.mean())
        estimated = None
        if self.settings["labels"] == "none" and method == "platt" and model.held_out_scores is not None:
            estimated = mixture_line(model.held_out_scores)  # the model itself says no far too rarely
        if estimated is not None:
            model = replace(model, calibrator=PlattScaling(*estimated))
            base_rate = float(np.clip(model.calibrate(model.held_out_scores).mean(), 1e-4, 1 - 1e-4))
        warned = train["is_first_subtoken"].to_numpy(dtype=bool)  # a mention gives one warning
        if calibration is not None and held_out is not None:
            held_out = held_out.select(calibration["is_first_subtoken"].to_numpy(dtype=bool))
        note = ", first mentions of an object only" if self.settings["repeats"] == "first" else ""
        self.warning_threshold = choose_threshold(
            model, examples, warned, held_out, self._guarantee, estimated is not None, note
        )
        self.monitor = self._fit_monitor(model, *tables)
        self._model, self._base_rate = model, base_rate
        return self

    def _fit_monitor(
        self, model: CalibratedModel, train: pd.DataFrame, calibration: pd.DataFrame | None
    ) -> ShiftMonitor | None:
        """Fit the monitor on token tables."""
        learned = self.design.readings(model, self._selection.monitored(train), calibration is None)
        held_out = None
        if calibration is not None:
            held_out = self.design.readings(model, self._selection.monitored(calibration))
        return ShiftMonitor.fit(self.inputs.explained_columns, learned, held_out)

    def readings(self, table: pd.DataFrame, contents: bool = True) -> Readings:
        """Read what ``monitor`` compares: of the mentions of a table, judged or not, those that count.

        Args:
            table: a token table.
            contents: also look which objects the pictures show, which only whole runs are compared by.

        Raises:
            ArtefactError, DataError: as in ``predict``.
        """
        return self.design.readings(self.model, self._selection.monitored(table), contents)

    def shift(self, table: pd.DataFrame) -> RunShift | None:
        """Compare a run with the pictures that the detector was calibrated on.

        Args:
            table: token table of the run.

        Returns:
            The comparison; None where the detector has no monitor or the table no mention.

        Raises:
            ArtefactError, DataError: as in ``predict``.
        """
        mentions = self._selection.monitored(table)
        if self.monitor is None or not len(mentions):
            return None
        readings = self.design.readings(self.model, mentions)
        return self.monitor.run(readings, self.threshold, self.certificate)

    def recalibrate(self, table: pd.DataFrame, labelled: bool = True) -> Detector:
        """Return a copy with another calibration, for data unlike those that this detector was calibrated on.

        The threshold is the one with the best F1 on labelled mentions, and that of before (as a score) without labels;
        a guarantee is not carried over. The monitor compares with the new pictures from then on; there is none if they
        are too few to compare with (``shift.FEWEST``).

        Args:
            table: token table of the new data.
            labelled: use the labels (``recalibration.shrunk_line``); False uses none, and estimates how many mentions
                are hallucinated (``recalibration.share_of_hallucinated``).

        Raises:
            ConfigError: the calibration is isotonic, which is no line.
            DataError: the table has no mention, or with ``labelled`` none that is judged; or without labels the monitor
                sees no changed share of hallucinations, or something else that has changed more.
            ArtefactError: as in ``predict``.
        """
        rows = self._selection.monitored(table)
        rows = rows[rows["label"] >= 0].reset_index(drop=True) if labelled else rows
        if not len(rows):
            raise DataError(f"there is no {'judged ' if labelled else ''}mention to calibrate the detector on")
        scores = self.model.scores(self.matrix(rows))
        if not labelled and self.monitor is not None:
            self.monitor.check_share_alone(self.design.readings(self.model, rows))
        images, labels = int(rows["group"].nunique()), rows["label"].to_numpy(dtype=int) if labelled else None
        line, base_rate, model, threshold = recalibrate(
            self.model, scores, labels, self._base_rate, self.threshold, images
        )
        new = copy.copy(self)
        new._model, new._base_rate, new.warning_threshold, new._guarantee = model, base_rate, threshold, None
        new.settings = self.settings | {"calibration": "platt", "threshold": "f1"}
        new._selection = Selection(new.settings)
        new.notes = {key: value for key, value in self.notes.items() if key not in ("split", "figures")}
        new.notes["recalibrated"] = {"images": images, "mentions": len(rows), "labelled": labelled, "line": list(line)}
        if self.monitor is not None:
            new.monitor = self.monitor.with_reference(self.design.readings(model, rows))
        return new

    def select_mentions(self, table: pd.DataFrame, judged: bool = True) -> pd.DataFrame:
        """Select the mentions of a token table that this detector is trained and measured on.

        Args:
            table: a token table.
            judged: False for all mentions, also repeated ones and those without a label.

        Returns:
            One row per mention, or per sub-token with ``subtokens="all"``, indexed from 0.
        """
        return self._selection.mentions(table, judged)

    def deciding_rows(self, mentions: pd.DataFrame) -> np.ndarray:
        """Return for every mention the index of the row whose probability it gets, (rows,) int.

        A detector fitted on first mentions judges an object once per answer: later mentions, which look different
        inside the model, get the probability of the first.

        Args:
            mentions: rows of ``select_mentions(table, judged=False)``.
        """
        return self._selection.deciding_rows(mentions)

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Return the probability that each row of a token table is hallucinated, (rows,) in [0, 1].

        Every row is scored on its own; ``select_mentions`` makes one row of a mention's sub-tokens.

        Raises:
            ArtefactError: the detector was not fitted, or the table's features are not those it was fitted on; the
                message names the differences.
            DataError: a feature has an infinite value.
        """
        return self.model.predict(self.matrix(table))

    def explain(self, table: pd.DataFrame) -> Explanation:
        """Split each row's log-odds into evidence, prior and, for ``logistic``, contributions of features.

        Raises:
            ConfigError: the calibration is isotonic, under which nothing adds up.
            ArtefactError, DataError: as in ``predict``.
        """
        model, matrix = self.model, self.matrix(table)
        return explanation(model, matrix, model.predict(matrix), self.inputs.explained_columns, self._base_rate)

    def visual_evidence(self, table: pd.DataFrame, count: int = 3) -> list[tuple[NamedProbability, ...]]:
        """Return the objects that the image evidence behind each row most resembles.

        The classifier (``stethoscope.detection.visual_consistency``) learns from mentions how the attended evidence of
        each object looks inside the model, and how often the object was present. It does not search the image.

        Args:
            table: a token table.
            count: maximum number of objects per row.

        Returns:
            For every row pairs of an object (None: no known object) and its probability, the most probable first;
            empty for rows that name no object, and for all rows if the detector does not read
            ``attended_embedding``.

        Raises:
            ArtefactError, DataError: as in ``predict``.
        """
        model = self.model.classifier
        if not isinstance(model, VisualConsistency):
            return [()] * len(table)
        candidates = most_likely(model.log_probabilities(self.matrix(table)), self.inputs.objects, count)
        return [looks if name else () for looks, name in zip(candidates, table["object"], strict=True)]

    def matrix(self, table: pd.DataFrame) -> np.ndarray:
        """Build the design matrix, (rows, columns).

        Raises:
            ArtefactError, DataError: as in ``predict``.
        """
        return self.design.matrix(table)

    @property
    def manifest(self) -> dict[str, Any]:
        """JSON-able contents of ``manifest.json``, to which ``artifact.write`` adds versions and digests."""
        return DetectorManifest(
            self.settings,
            self.inputs.features,
            self.inputs.objects,
            self.schema,
            self._base_rate,
            self.warning_threshold,
            None if self.monitor is None else self.monitor.to_dict(),
            self.notes,
        ).to_dict()

    def save(self, folder: Path | str, notes: Mapping[str, Any] | None = None) -> None:
        """Write ``detector.safetensors``, ``manifest.json`` and a model card, ``README.md``.

        Args:
            folder: destination; an older detector there is replaced.
            notes: JSON-able facts to add to the manifest: ``model`` (fingerprint), ``task``, ``label``, ...

        Raises:
            ArtefactError: the detector was not fitted, would not be read back, or the folder holds something else or
                cannot be written.
        """
        folder = as_path(folder, "folder")
        if self._model is None:
            raise ArtefactError("a detector that was not fitted cannot be saved; call fit first")
        try:
            check_notes(notes or {})
        except ValueError as error:
            raise ArtefactError(f"the detector's notes cannot be saved: {error}") from None
        self.notes |= dict(notes or {})
        manifest = self.manifest
        texts = {artifact.CARD: artifact.model_card(manifest)}
        monitor = {} if self.monitor is None else add_prefix("monitor", self.monitor.arrays())
        arrays = {**self._model.arrays(), **add_prefix(PROBE, self.design.arrays()), **monitor}
        artifact.write(folder, arrays, manifest, texts, check=type(self).load)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Hallucination detector of LVLM-Stethoscope",
    ) -> str:
        """Upload the detector to the Hugging Face hub; the repository is created if it does not exist.

        Args:
            repo_id: ``owner/name``.
            private: who may see a new repository; None for the owner's default.
            token: of an account that may write there; None for the one that is logged in.
            revision: branch to write to; None for the main one.
            commit_message: of the upload.

        Returns:
            The URL of the commit.

        Raises:
            ArtefactError: the detector was not fitted, or the hub refuses or cannot be reached.
        """
        if not isinstance(repo_id, str):
            raise wrong_type("repo_id", "the name of a repository (owner/name)", repo_id)
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / "detector")
            return artifact.push(Path(folder) / "detector", repo_id, private, token, revision, commit_message)

    @classmethod
    def from_pretrained(cls, name: Path | str, revision: str | None = None, token: str | None = None) -> Detector:
        """Read a detector from a local folder or from the Hugging Face hub.

        Args:
            name: a folder that ``save`` wrote, or ``owner/name`` on the hub.
            revision: branch, tag or commit on the hub; None for the newest.
            token: of an account that may read a private repository.

        Raises:
            ConfigError: ``name`` is no text and no path.
            ArtefactError: neither holds a detector, or it is damaged or not to be trusted; as ``load``.
        """
        local = as_path(name, "name").is_dir()
        return cls.load(name if local else artifact.fetch(str(name), revision, token))

    @classmethod
    def load(cls, folder: Path | str) -> Detector:
        """Read a detector: arrays of numbers, each of which is checked, and a manifest in JSON.

        Args:
            folder: that ``save`` wrote, or that of a run that has one.

        Raises:
            ConfigError: the folder is no path.
            ArtefactError: the folder holds no detector, or one that is damaged, was changed, holds arrays that do
                not fit its manifest, or has an estimator of a class that is not imported.
        """
        folder = as_path(folder, "folder")
        if not (folder / artifact.MANIFEST).is_file() and (folder / "detector" / artifact.MANIFEST).is_file():
            folder /= "detector"
        arrays, values = artifact.read(folder)
        path = folder / artifact.MANIFEST
        try:
            with restored_classifier(values["settings"]["estimator"], str(path)):
                detector = cls(**values["settings"])
            manifest = DetectorManifest.parse(values)
            inputs = Inputs.of(detector.settings, manifest.features, manifest.objects)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
            raise ArtefactError(f"{path} is damaged: {type(error).__name__}: {first_line(error)}") from None
        settings = detector.settings
        try:
            detector.design = Design.restore(manifest.schema, inputs, arrays.under(PROBE))
            inputs = detector.inputs
            model = inputs.classifier(settings["estimator"], settings["C"], settings["seed"])
            if manifest.monitor is not None:
                detector.monitor = ShiftMonitor.restore(
                    dict(manifest.monitor), arrays.under("monitor"), inputs.explained_columns
                )
            detector._model = CalibratedModel.restore(model, settings["calibration"], arrays, inputs.width)
        except (ArtefactError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{folder / artifact.OBJECTS} cannot be used: {error}") from None
        detector.warning_threshold, detector._base_rate = manifest.threshold, manifest.base_rate
        detector.notes = dict(manifest.notes)
        return detector
