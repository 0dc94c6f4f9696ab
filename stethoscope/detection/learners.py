"""Fit published detectors as their papers do: by the ``learner`` that a set ``conf/features/paper/<name>`` declares.

    kind              what it is
    logistic          L2 logistic regression, C chosen by inner folds of images (where a set declares no learner)
    boosting          histogram gradient boosting
    network           multi-layer perceptron by Adam, with the settings of ``NetworkSettings``
    layer_networks    one network per layer of the columns, the mean of their probabilities (verification probe)
    balanced_network  the same as evidence beside a prior of a few ``external`` columns, joined by Bayes (HaloProbe)

``logistic`` and ``boosting`` are our ``Detector``, without its monitor. Whatever the kind, scores are calibrated
(Platt) on the calibration fold, which changes no ranking.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from stethoscope.core.errors import ArtefactError, ConfigError, unknown
from stethoscope.core.token_table import MentionSelection, feature_matrix, mention_rows
from stethoscope.detection.array_classifiers import PlattScaling
from stethoscope.detection.baselines import Predictor
from stethoscope.detection.calibrated_model import CalibratedModel, check_labels, fit_platt
from stethoscope.detection.detector import Detector
from stethoscope.detection.estimator_classes import preparation
from stethoscope.detection.estimators import Perceptron
from stethoscope.detection.evidence_prior import balance
from stethoscope.features.columns import feature_of

KINDS = ("logistic", "boosting", "network", "layer_networks", "balanced_network")
_LAYER = re.compile(r"_l(\d+)(?:h\d+)?(?:_d\d+)?$")


@dataclass(frozen=True)
class NetworkSettings:
    """Settings of a network; the defaults are HaloProbe's (arXiv 2604.06165, appendix B).

    Attributes:
        hidden: units of each hidden layer.
        epochs, batch_size: passes over the mentions, and mentions of a step.
        learning_rate, weight_decay: of Adam; the decay is that of ``torch.optim.Adam``, added to the gradient.
        class_weights: whether both classes weigh the same, as with a weighted sampler.
        external: features that the prior of ``balanced_network`` reads.
    """

    hidden: tuple[int, ...] = (128,)
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    class_weights: bool = False
    external: tuple[str, ...] = ()

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> NetworkSettings:
        """Read the settings of a YAML file.

        Raises:
            ConfigError: a key is unknown, or ``hidden`` is no list of numbers.
        """
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise ConfigError(unknown("learner setting", str(key), known))
        values: dict[str, Any] = {
            k: tuple(value) if isinstance(value, list) else value for k, value in settings.items()
        }
        hidden = values.get("hidden", cls.hidden)
        if not isinstance(hidden, tuple) or not hidden or not all(type(n) is int and n > 0 for n in hidden):
            raise ConfigError(f"learner.hidden={hidden!r} should be a list of whole numbers of at least 1, as [128]")
        return cls(**values)


class MeasuredDetector(Detector):
    """A detector that is measured on a board and then dropped: it has no monitor, which would take time to fit."""

    def _fit_monitor(self, model: CalibratedModel, train: pd.DataFrame, calibration: pd.DataFrame | None) -> None:
        return None


class AdamNetwork(Perceptron):
    """A multi-layer perceptron (rectified units, cross-entropy) after a fixed number of epochs of Adam.

    Args:
        settings: layers, epochs and step sizes.
        random_state: seed of the first weights and of the order of the mentions.
        shuffle: whether the mentions are shuffled before every epoch.
    """

    def __init__(self, settings: NetworkSettings, random_state: int = 0, shuffle: bool = True) -> None:
        super().__init__(
            settings.hidden,
            solver="adam",
            # scikit-learn divides it by the weight of a step's mentions: the decay is exact for full steps
            alpha=settings.weight_decay * settings.batch_size,
            batch_size=settings.batch_size,
            learning_rate_init=settings.learning_rate,
            max_iter=settings.epochs,
            n_iter_no_change=settings.epochs + 1,  # never stops early
            random_state=random_state,
            shuffle=shuffle,
        )
        self.settings = settings

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None) -> AdamNetwork:
        """Fit on (rows, columns) without NaN."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", message=".*batch_size")  # fewer mentions than a batch
            return super().fit(X, y, sample_weight=sample_weight)


class CalibratedLearner:
    """A learner whose scores are calibrated (Platt) on the mentions of other images.

    Args:
        selection: mention selection of the rows to fit and to calibrate on.
    """

    def __init__(self, selection: MentionSelection | None = None) -> None:
        self.selection = selection or MentionSelection()
        self._calibrator = PlattScaling(1.0, 0.0)

    def scores(self, table: pd.DataFrame) -> np.ndarray:
        """Compute the log-odds of hallucination before calibration, (rows,)."""
        raise NotImplementedError

    def calibrate(self, table: pd.DataFrame | None) -> None:
        """Fit the calibration on the judged rows of a token table; None leaves it out.

        Raises:
            DataError: there are no judged rows, or all have one label.
        """
        if table is not None:
            rows = mention_rows(table, **self.selection)
            labels = rows["label"].to_numpy(dtype=int)
            check_labels(labels, "calibration")
            self._calibrator = fit_platt(self.scores(rows), labels)

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Return (rows,) probabilities of hallucination in [0, 1]."""
        return expit(self._calibrator.slope * self.scores(table) + self._calibrator.intercept)


class NetworkLearner(CalibratedLearner):
    """A network on the columns of a published method, by itself or as the evidence beside a prior.

    With ``external`` features e it is HaloProbe (arXiv 2604.06165): a prior g(e) is fitted first, the evidence f with
    classes that are balanced for every e (a mention weighs 1 / g(its label)), and the log-odds are those of
    f g / (f g + (1 - f)(1 - g)), logit f + logit g. g is one layer, fitted to its optimum.

    Args:
        columns: names of all columns that the network reads, the external ones included.
        settings: of the network.
        seed: of everything random.
        selection: mention selection of the rows to fit on.
    """

    def __init__(
        self,
        columns: Sequence[str],
        settings: NetworkSettings,
        seed: int = 0,
        selection: MentionSelection | None = None,
    ) -> None:
        super().__init__(selection)
        self.columns, self.settings, self.seed = tuple(columns), settings, seed
        self.external = tuple(name for name in self.columns if feature_of(name) in settings.external)
        if settings.external and not self.external:
            raise ConfigError(f"learner.external={list(settings.external)}: no column of the method belongs to it")
        self._prior: Pipeline | None = None
        self._evidence: Pipeline | None = None

    @threadpool_limits.wrap(limits=1, user_api="blas")
    def fit(self, train: pd.DataFrame, calibration: pd.DataFrame | None = None) -> NetworkLearner:
        """Fit on the judged rows of a token table and calibrate (Platt) on those of other images.

        Raises:
            DataError: a fold has no judged rows or only one label, or a feature has an infinite value.
        """
        train = mention_rows(train, **self.selection)
        matrix, labels = feature_matrix(train, self.columns), train["label"].to_numpy(dtype=int)
        check_labels(labels, "training")
        weights = np.ones(len(labels))
        if self.external:
            self._prior = Pipeline([*preparation(False), ("classify", LogisticRegression(C=1e6, max_iter=2000))])
            external = feature_matrix(train, self.external)
            weights = balance(self._prior.fit(external, labels).decision_function(external), labels)
        elif self.settings.class_weights:
            weights = 1 / np.where(labels == 1, labels.mean(), 1 - labels.mean())
        self._evidence = Pipeline([*preparation(False), ("classify", AdamNetwork(self.settings, self.seed))])
        self._evidence.fit(matrix, labels, classify__sample_weight=weights / weights.mean())
        self.calibrate(calibration)
        return self

    def scores(self, table: pd.DataFrame) -> np.ndarray:
        """Compute the log-odds of hallucination before calibration, (rows,).

        Raises:
            ArtefactError: it was not fitted.
        """
        if self._evidence is None:
            raise ArtefactError("the network was not fitted")
        if not len(table):
            return np.zeros(0)
        evidence = self._evidence.decision_function(feature_matrix(table, self.columns))
        return evidence + (self._prior.decision_function(feature_matrix(table, self.external)) if self._prior else 0)


class LayerNetworks(CalibratedLearner):
    """One network per layer; the score is the mean of their probabilities (hal-verify-probe, 2026).

    Args:
        columns: names of all columns, with a suffix for the layer such as ``_l00`` or ``_l00_d0000``; those without one
            share a network.
        settings: of every network.
        seed: of everything random.
        selection: mention selection of the rows to fit on.
    """

    def __init__(
        self,
        columns: Sequence[str],
        settings: NetworkSettings,
        seed: int = 0,
        selection: MentionSelection | None = None,
    ) -> None:
        super().__init__(selection)
        layers: dict[str, list[str]] = {}
        for name in columns:
            match = _LAYER.search(name)
            layers.setdefault(match[1] if match else "", []).append(name)
        self.networks = [NetworkLearner(names, settings, seed, selection) for names in layers.values()]

    def fit(self, train: pd.DataFrame, calibration: pd.DataFrame | None = None) -> LayerNetworks:
        """Fit on the judged rows of a token table and calibrate (Platt) on those of other images.

        Raises:
            DataError: see ``NetworkLearner.fit``.
        """
        for network in self.networks:
            network.fit(train)
        self.calibrate(calibration)
        return self

    def scores(self, table: pd.DataFrame) -> np.ndarray:
        """Compute the log-odds of the mean probability of hallucination before calibration, (rows,)."""
        return logit(np.mean([expit(network.scores(table)) for network in self.networks], 0).clip(1e-12, 1 - 1e-12))


def make_learner(
    columns: Sequence[str], learner: Mapping[str, Any] | None, selection: MentionSelection, seed: int = 0
) -> Predictor:
    """Create the unfitted learner that a set of features declares.

    Args:
        columns: names of the columns that it reads.
        learner: ``kind``, one of ``KINDS``, and for networks the settings of ``NetworkSettings``; None is ``logistic``.
        selection: mention selection of the rows to fit on.
        seed: of everything random.

    Raises:
        ConfigError: the kind or a setting is unknown.
    """
    settings = dict(learner or {"kind": "logistic"})
    kind: Literal["logistic", "boosting"] | str = settings.pop("kind", "")
    if kind not in KINDS:
        raise ConfigError(unknown("learner.kind", str(kind), KINDS))
    network = NetworkSettings.parse(settings)
    if kind in ("network", "balanced_network"):
        if bool(network.external) != (kind == "balanced_network"):
            raise ConfigError("learner.external should be given for balanced_network, and for no other kind")
        return NetworkLearner(columns, network, seed, selection)
    if kind == "layer_networks":
        return LayerNetworks(columns, network, seed, selection)
    if settings:
        raise ConfigError(f"learner.kind={kind} has no settings, but {', '.join(map(str, settings))} is given")
    # what our detector adds beside hidden states is not the paper's: no probe, no image tokens
    return MeasuredDetector(
        kind, features=columns, hidden_probe=False, visual_consistency=False, seed=seed, **selection
    )


def describe_learner(learner: Mapping[str, Any] | None, columns: int) -> str:
    """Describe a learner in a few words, for the row of its method.

    >>> describe_learner({"kind": "network", "hidden": [64]}, 12)
    'network (64 hidden units, 10 epochs) on 12 columns'
    """
    settings = dict(learner or {"kind": "logistic"})
    kind = settings.pop("kind")
    names = {"logistic": "logistic regression", "boosting": "gradient boosting", "network": "network"}
    names["layer_networks"] = "a network per layer"
    text = names.get(kind, "balanced network and prior")
    if kind not in ("logistic", "boosting"):
        network = NetworkSettings.parse(settings)
        text += f" ({' and '.join(map(str, network.hidden))} hidden units, {network.epochs} epochs)"
    return f"{text} on {columns} columns"
