"""Read arrays of a file with every property checked that their reader relies on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stethoscope.core.errors import ArtefactError

LARGEST_NUMBER = 1e50
"""Largest absolute value in a file; scales are at least its inverse, so that products stay finite."""


class Arrays:
    """The arrays of a detector's file by name, each checked when it is read.

    Args:
        values: arrays by name.
        prefix: prefix of the names in this view.
        requested: full names read so far, shared by all views of a file.
    """

    def __init__(self, values: Mapping[str, np.ndarray], prefix: str = "", requested: set[str] | None = None) -> None:
        self._values, self._prefix = values, prefix
        self._requested: set[str] = set() if requested is None else requested

    def under(self, name: str) -> Arrays:
        """Return a view of the arrays whose names begin with ``name.``."""
        return Arrays(self._values, f"{self._prefix}{name}.", self._requested)

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._values

    def everything(self) -> dict[str, np.ndarray]:
        """Return all arrays of this view by name, of any shape and type; floats are checked to be finite.

        Raises:
            ArtefactError: a number is not finite.
        """
        own = {
            name[len(self._prefix) :]: array for name, array in self._values.items() if name.startswith(self._prefix)
        }
        self._requested.update(self._prefix + name for name in own)
        for name, array in own.items():
            self.require(
                array.dtype.kind in "iub" or np.isfinite(array).all(), name, "holds numbers that are not finite"
            )
        return own

    def _get(self, name: str, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
        name = self._prefix + name
        self._requested.add(name)
        if name not in self._values:
            raise ArtefactError(f"array {name!r} is missing")
        array = self._values[name]
        if array.dtype != dtype:
            raise ArtefactError(f"array {name!r} is of type {array.dtype}; it should be {np.dtype(dtype)}")
        if array.ndim != len(shape) or any(n not in (None, size) for n, size in zip(shape, array.shape, strict=True)):
            expected = " x ".join("any" if n is None else str(n) for n in shape) or "a single number"
            actual = " x ".join(map(str, array.shape)) or "a single number"
            raise ArtefactError(f"array {name!r} is {actual}; by the manifest it should be {expected}")
        return array

    def require(self, condition: Any, name: str, rule: str) -> None:
        """Check a condition that an array must fulfil.

        Raises:
            ArtefactError: the condition is false; the message is the array's name and ``rule``.
        """
        if not condition:
            raise ArtefactError(f"array {self._prefix + name!r} {rule}")

    def numbers(self, name: str, *shape: int | None, largest: float = LARGEST_NUMBER) -> np.ndarray:
        """Return a float64 array of the given shape, where None stands for any length.

        Raises:
            ArtefactError: it is missing, has another shape or type, or a number is not finite or above ``largest``.
        """
        array = self._get(name, np.float64, shape)
        self.require(np.isfinite(array).all(), name, "holds numbers that are not finite")
        self.require((np.abs(array) <= largest).all(), name, f"holds numbers above {largest:g}")
        return array

    def positive(self, name: str, *shape: int | None) -> np.ndarray:
        """Return an array as ``numbers`` does, with all values at least 1 / ``LARGEST_NUMBER``, to divide by."""
        array = self.numbers(name, *shape)
        self.require((array >= 1 / LARGEST_NUMBER).all(), name, "should be above 0 everywhere")
        return array

    def counts(self, name: str, *shape: int | None, below: int) -> np.ndarray:
        """Return an int64 array of the given shape (None: any length) with values in [0, ``below``).

        Raises:
            ArtefactError: it is missing, has another shape or type, or a number is outside.
        """
        array = self._get(name, np.int64, shape)
        self.require(((array >= 0) & (array < below)).all(), name, f"should lie from 0 to {below - 1}")
        return array

    def indices(self, name: str, length: int | None, below: int) -> np.ndarray:
        """Return a strictly increasing one-dimensional array as ``counts`` does."""
        array = self.counts(name, length, below=below)
        self.require((np.diff(array) > 0).all(), name, "should increase from each to the next")
        return array

    def bits(self, name: str, dtype: type, *shape: int | None) -> np.ndarray:
        """Return a bool or uint8 array of the given shape, where None stands for any length."""
        return self._get(name, dtype, shape)

    def finish(self) -> None:
        """Check that every array of the file was read.

        Raises:
            ArtefactError: the file has arrays that were not read.
        """
        foreign = sorted(set(self._values) - self._requested)
        if foreign:
            raise ArtefactError(f"array {foreign[0][:80]!r} belongs to no part of such a detector")
