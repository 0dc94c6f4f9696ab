"""Choose a detector's classifier by its class: one of scikit-learn's that arrays can hold, or one's own."""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import has_fit_parameter

from stethoscope.core.component import TARGET
from stethoscope.core.errors import ArtefactError, ConfigError, StethoscopeError, first_line, unknown
from stethoscope.detection.artifact import Arrays
from stethoscope.detection.base import Estimator, class_path, find_estimator, how_to_import
from stethoscope.detection.compiled_classifiers import SKLEARN, compile_classifier, restore_classifier

BUILT_IN = ("logistic", "boosting", "per_head")
TRIAL_ROWS = 40  # of numbers drawn at random, to which a class is fitted before anything is read
FEW_ROUNDS = 3  # of a classifier of scikit-learn in this fit

_passed: set[tuple[Any, ...]] = set()
"""Classes and settings that were fitted on trial in this process."""
_restoring: ContextVar[bool] = ContextVar("restoring", default=False)


class Clip(TransformerMixin, BaseEstimator):
    """Limit every column to the range between two quantiles of the training data.

    Otherwise a value far outside the training range (a logit-lens rank of 30,000) would decide alone. On 4,005 real
    mentions clipping at 0.1 % costs nothing (AUROC 0.871 with and without), clipping at 1 % or a quantile transform
    costs 0.2-0.4 points.
    """

    def __init__(self, quantile: float = 0.001) -> None:
        self.quantile = quantile

    def fit(self, X: np.ndarray, y: np.ndarray | None = None) -> Clip:
        """Compute the limits from (rows, columns) without NaN."""
        self.low_, self.high_ = np.quantile(X, [self.quantile, 1 - self.quantile], axis=0)
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Clip (rows, columns) to the limits."""
        return np.clip(X, self.low_, self.high_)


def preparation(indicators: bool = True) -> list[tuple[str, TransformerMixin]]:
    """Create the steps before a classifier: median imputation, perhaps with indicators, clipping, standardisation."""
    return [
        ("impute", SimpleImputer(strategy="median", add_indicator=indicators, keep_empty_features=True)),
        ("clip", Clip()),
        ("scale", StandardScaler()),
    ]


class GivenPipeline(Pipeline):
    """A pipeline whose classifier keeps the settings that it was given; its C is not chosen by inner folds."""

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Compute the scores that the compiled classifier has, (rows,)."""
        return compile_classifier(self).decision_function(X)


@contextmanager
def restored_classifier(kind: Any, file: str) -> Iterator[None]:
    """Check that the class which a detector's file names is imported; it is not fitted on trial inside the context.

    Args:
        kind: the setting ``estimator`` of the file.
        file: its name, for messages.

    Raises:
        ArtefactError: it is no class of scikit-learn that arrays can hold, and none that is imported.
    """
    path = _path(kind)
    if isinstance(path, str) and path not in (*BUILT_IN, *SKLEARN) and find_estimator(path) is None:
        parts = path.split(".")
        if len(path) > 200 or len(parts) < 2 or not all(part.isidentifier() for part in parts):
            raise ArtefactError(f"{file} is damaged: its estimator {path[:80]!r} is no path of a class")
        raise ArtefactError(f"{file} needs the estimator {path}, which is not imported; {how_to_import(path)}")
    token = _restoring.set(True)
    try:
        yield
    finally:
        _restoring.reset(token)


def _path(kind: Any) -> Any:
    return kind.get(TARGET) if isinstance(kind, Mapping) else kind


def check_estimator(kind: Any, weighted: bool = False) -> str | dict[str, Any]:
    """Check the setting ``estimator``, and a class by a fit to a few rows.

    Args:
        kind: one of ``BUILT_IN``, the path of a class, a mapping with it as ``_target_`` and the class's settings, or
            an object of such a class.
        weighted: whether it is fitted to weighted rows.

    Returns:
        The setting as a detector's manifest holds it.

    Raises:
        ConfigError: it is none of these, the class refuses a setting, or it does not keep the contract.
    """
    if isinstance(kind, BaseEstimator):
        kind = _describe(kind)
    path = _path(kind)
    if isinstance(kind, str) and kind in BUILT_IN:
        return kind
    if not isinstance(path, str) or (isinstance(kind, Mapping) and path in BUILT_IN):
        raise ConfigError(
            f"detector.estimator={kind!r} should be one of {', '.join(BUILT_IN)}, a class, or a class with settings, "
            f"{{{TARGET}: {SKLEARN[-4]}, n_estimators: 300}}"
        )
    classifier = make_classifier(kind, 0)
    try:
        settings = json.dumps(dict(kind) if isinstance(kind, Mapping) else {}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"detector.estimator: a setting of {path} cannot be written as JSON: {error}") from None
    if weighted and not has_fit_parameter(classifier, "sample_weight"):
        raise ConfigError(f"detector.factored=true weighs mentions, but {path}.fit takes no sample_weight")
    if not _restoring.get():
        trial: tuple[Any, ...] = (type(classifier), path, settings, weighted)
        if trial not in _passed:
            _try(path, settings, weighted)
            _passed.add(trial)
    return dict(kind) if isinstance(kind, Mapping) else path


def _describe(estimator: BaseEstimator) -> dict[str, Any]:
    """Describe an unfitted object as a setting: its class and those of its arguments that are not the default."""
    cls = type(estimator)
    path = class_path(cls)
    if not isinstance(estimator, Estimator):
        path = next((name for name in SKLEARN if name.rpartition(".")[2] == cls.__name__), path)
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    given = estimator.get_params(deep=False)
    return {TARGET: path, **{name: value for name, value in given.items() if value is not defaults[name]}}


def make_classifier(kind: str | Mapping[str, Any], seed: int) -> BaseEstimator:
    """Create an unfitted classifier of a class of scikit-learn, or of one's own, with its settings.

    Raises:
        ConfigError: there is no such class, or it has no such setting.
    """
    settings = dict(kind) if isinstance(kind, Mapping) else {TARGET: kind}
    path = str(settings.pop(TARGET))
    cls = _class(path)
    known = list(inspect.signature(cls).parameters)
    for key in settings:
        if key not in known:
            raise ConfigError(unknown("setting of detector.estimator", str(key), known))
    if "random_state" in known:
        settings = {"random_state": seed, **settings}
    try:
        return cls(**settings)
    except StethoscopeError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"detector.estimator: {path} refuses its settings: {first_line(error)}") from error


def _class(path: str) -> type[BaseEstimator]:
    """Return the class of a path: of ``SKLEARN``, or an imported subclass of ``Estimator``.

    Raises:
        ConfigError: there is none; the message says how to make it available.
    """
    module, _, name = path.rpartition(".")
    if path in SKLEARN:
        return getattr(importlib.import_module(module), name)
    own = find_estimator(path)
    if own is not None:
        return own
    if not module or module.split(".")[0] == "sklearn":
        raise ConfigError(unknown("detector.estimator", path, [*BUILT_IN, *SKLEARN]))
    raise ConfigError(
        f"detector.estimator={path[:200]} is no class of scikit-learn that arrays can hold ({SKLEARN[-4]}, ...) and no "
        f"imported subclass of {class_path(Estimator)}; {how_to_import(path)}"
    )


def _try(path: str, settings: str, weighted: bool) -> None:
    """Fit a class to a few rows, write what it learned as arrays, restore it, and compare the scores.

    Raises:
        ConfigError: it refuses its settings, or does not keep the contract.
    """
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(TRIAL_ROWS, 3))
    labels = (matrix[:, 0] + generator.normal(size=TRIAL_ROWS) > 0).astype(int)
    weights = {"classify__sample_weight": np.full(TRIAL_ROWS, 0.5)} if weighted else {}
    classifier = make_classifier({TARGET: path, **json.loads(settings)}, 0)
    if path in SKLEARN:
        rounds = {name: classifier.get_params().get(name) for name in ("n_estimators", "max_iter")}
        few = {name: FEW_ROUNDS for name, value in rounds.items() if isinstance(value, int) and value > FEW_ROUNDS}
        classifier.set_params(**few)
    pipeline = given_pipeline(classifier)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = compile_classifier(clone(pipeline).fit(matrix, labels, **weights))
        scores = compiled.decision_function(matrix)
        again = restore_classifier(clone(pipeline), Arrays(compiled.arrays()), matrix.shape[1])
        same = np.allclose(again.decision_function(matrix), scores, rtol=1e-6, atol=1e-9)
    except ConfigError:
        raise
    except Exception as error:  # the user's own code may raise anything, scikit-learn a TypeError or ValueError
        verb = "refuses its settings" if path in SKLEARN else f"cannot be used: {type(error).__name__}"
        raise ConfigError(f"detector.estimator: {path} {verb}: {first_line(error)}") from error
    if not same:
        raise ConfigError(
            f"detector.estimator: {path} gives other probabilities after from_arrays(to_arrays()) than before"
        )


def given_pipeline(classifier: BaseEstimator) -> GivenPipeline:
    """Put the preparation of inputs before a classifier that keeps its settings."""
    return GivenPipeline([*preparation(), ("classify", classifier)])
