"""A detector on one row after another, as tokens come: the features that a decoding step can fill, quickly judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from stethoscope.diagnosis.detecting import feature_names
from stethoscope.errors import CapabilityError, ConfigError
from stethoscope.features import FEATURES, FeatureSet
from stethoscope.records import Answer
from stethoscope.steps import STEP_NEEDS, Step, trace_of

if TYPE_CHECKING:
    from stethoscope.detector import Detector
    from stethoscope.estimators import CalibratedModel
    from stethoscope.lens import Lens
    from stethoscope.trace import Spans

HISTORY = frozenset(
    {"position", "log_position", "repetition", "sequence_logprob"}
    | {f"lookback_{part}_{row}" for part in ("image", "question", "context") for row in "qc"}
    | {f"{name}_{row}" for name in ("overtrust", "overtrust_column") for row in "qc"}
)
"""Features of a token that are functions of the tokens before it too; all others read the token's own rows."""


class Scorer:
    """Features and warning probability of the tokens of one answer.

    Args:
        detector: fitted; only the features that it reads are computed, not all of the table that it was fitted on.
        delay: 0 for a probability with the token, 1 for one when the next step has read the token.

    Attributes:
        needs: what the steps must hold.
        waits: 1 if a token can be judged only when the next step has read it, else 0.

    Raises:
        CapabilityError: the detector reads what is not known at that time.
    """

    def __init__(self, detector: Detector, delay: int = 0) -> None:
        _check(detector, delay)
        try:
            features = FeatureSet(groups=(), names=feature_names(detector.features))
        except ConfigError as error:
            raise CapabilityError(f"the detector reads features that stethoscope does not compute: {error}") from None
        self.needs = features.needs
        self.waits = int(any(name.endswith("_c") for name in features.names))
        names = (set(features.names) - HISTORY, set(features.names) & HISTORY)
        self._own, self._history = (FeatureSet(groups=(), names=sorted(some)) if some else None for some in names)
        self._features, self._columns = detector.features, detector.schema.names
        self._predict = one_row(detector.model)
        self.rows: list[np.ndarray] = []

    def judge(self, steps: Sequence[Step], ids: Sequence[int], spans: Spans, lens: Lens | None) -> float:
        """The probability of the next token in line.

        Args:
            steps: of all tokens up to it, and of the next one where the scorer ``waits``.
            ids: all tokens up to it.
        """
        values: dict[str, float] = {}
        for features, start in ((self._own, len(ids) - 1), (self._history, 0)):
            if features is None:
                continue
            some = ids[start:]
            answer = Answer("", tuple(some), ((0, 0),) * len(some), (0.0,) * len(some))
            trace = trace_of(steps[start : len(ids) + self.waits], answer, spans, features.needs, lens)
            values |= {name: column[-1] for name, column in features.compute(trace).items()}
        try:
            row = np.array([values[name] for name in self._features], dtype=np.float64)
        except KeyError as error:
            raise CapabilityError(
                f"the detector reads {error.args[0]}, which this model does not give; it was trained on another model"
            ) from None
        self.rows.append(row)
        return self._predict(row)

    def columns(self) -> dict[str, np.ndarray]:
        """(T,) columns as the detector's table has them; those that it does not read are missing values."""
        read = dict(zip(self._features, np.array(self.rows).T, strict=True)) if self.rows else {}
        return {name: read.get(name, np.full(len(self.rows), np.nan)) for name in self._columns}


def _check(detector: Detector, delay: int) -> None:
    if delay not in (0, 1):
        raise ConfigError(f"delay={delay!r} should be 0 (a warning with every token) or 1 (a step later)")
    named = [key for key in ("factored", "objects") if detector.settings[key]]
    if named:
        raise CapabilityError(
            f"the detector reads the name of the object ({named[0]}=true), which is known when it is written out; "
            f"train with detector.{named[0]}=false to warn while the model writes, or give this one as final="
        )
    names = [name for name in feature_names(detector.features) if name in FEATURES]
    late = [name for name in names if not FEATURES[name].needs <= STEP_NEEDS]
    if late:
        raise CapabilityError(
            f"the detector reads {', '.join(late)}, which a decoding step does not give; train with features=fast "
            "to warn while the model writes, or give this one as final="
        )
    consuming = [name for name in names if name.endswith("_c")]
    if consuming and not delay:
        raise CapabilityError(
            f"the detector reads {', '.join(consuming)} of the row that consumes the token; use delay=1, or train "
            "with features=fast"
        )


def one_row(model: CalibratedModel) -> Callable[[np.ndarray], float]:
    """The probability of one row (features,) without missing values.

    For a logistic regression the steps of its pipeline are one dot product: scikit-learn's checks of its input take
    some hundred microseconds a call, as long as a small model takes for a token.
    """
    pipeline = model.model
    if not isinstance(pipeline, Pipeline) or not isinstance(pipeline[-1], LogisticRegression):
        return lambda row: float(model.predict(row[None])[0])
    impute, clip, scale, classify = (step for _, step in pipeline.steps)
    extra = 0 if impute.indicator_ is None else len(impute.indicator_.features_)  # of missing values, here always 0
    weights = classify.coef_[0] / scale.scale_
    bias = float(classify.intercept_[0] - weights @ scale.mean_)
    count = len(weights) - extra
    bias += float(weights[count:] @ np.clip(np.zeros(extra), clip.low_[count:], clip.high_[count:]))
    weights, low, high = weights[:count], clip.low_[:count], clip.high_[:count]

    def predict(row: np.ndarray) -> float:
        score = np.minimum(np.maximum(row, low), high) @ weights + bias
        return float(model.calibrate(np.array([score]))[0])

    return predict
