"""Define the contract of a detector's own estimator, and find its class among those that are imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin

from stethoscope.core.errors import ConfigError


class Estimator(ClassifierMixin, BaseEstimator):
    """A classifier of one's own that writes what it has learned as arrays.

    Its constructor stores its arguments under their names, as scikit-learn's do; they go into the detector's manifest,
    so they should be values that JSON has. It gets the inputs of ``logistic``: gaps are filled, values clipped and
    standardised, so no value is missing. Its scores are calibrated on other images like all others.

    A detector's file names the class and holds the arrays; nothing in it makes code run. Who loads it imports the class
    first, by ``plugins=[my_package]`` or in Python.
    """

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None) -> Self:
        """Fit on (rows, columns) float64, (rows,) labels of 0 and 1 (hallucinated), and (rows,) weights or None.

        Only detectors with ``factored=true`` give weights; without the argument it fits all others.
        """
        raise NotImplementedError

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Return (rows, 2) probabilities in [0, 1] of grounded and hallucinated."""
        raise NotImplementedError

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the fitted state as arrays of numbers by name: of floats (finite), int64, bool or uint8."""
        raise NotImplementedError

    def from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Restore the fitted state that ``to_arrays`` returned, on a new object with the same arguments.

        Args:
            arrays: of a file; an array that is missing or has another shape should raise an error.
        """
        raise NotImplementedError


def class_path(cls: type) -> str:
    """Return the dotted path by which a detector's file names a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _subclasses(cls: type[Estimator]) -> Iterator[type[Estimator]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def find_estimator(path: str) -> type[Estimator] | None:
    """Return the subclass of ``Estimator`` at the top of an imported module; None without one, nothing is imported."""
    for cls in _subclasses(Estimator):
        if class_path(cls) == path and getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls:
            return cls
    return None


def how_to_import(path: str) -> str:
    """Say what makes the class of a path available."""
    module = path.rpartition(".")[0][:80]
    if module.split(".")[0] == "__main__":
        return "it was defined in a script or notebook: run its definition first, or move it into a module of its own"
    return f"add plugins=[{module}] if you trust it, or import it first in Python"


def check_probabilities(estimator: Estimator, probabilities: Any, rows: int) -> np.ndarray:
    """Return the (rows,) probabilities of the second class of what ``predict_proba`` returned.

    Raises:
        ConfigError: it returned something else.
    """
    array = np.asarray(probabilities)
    if array.shape != (rows, 2) or array.dtype.kind != "f" or not ((array >= 0) & (array <= 1)).all():
        shape = " x ".join(map(str, array.shape))
        raise ConfigError(
            f"{class_path(type(estimator))}.predict_proba should return {rows} x 2 probabilities from 0 to 1, got "
            f"{shape} of type {array.dtype}{'' if array.shape != (rows, 2) else ', some of them outside'}"
        )
    return array[:, 1].astype(np.float64)
