"""Read arrays of a file with every property checked that their reader relies on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stethoscope.core.errors import ArtefactError

LARGEST_NUMBER = 1e50
"""Bound of every number in a file, and its inverse that of a scale: products of them all stay finite."""


class Arrays:
    """The arrays of a detector's file by name, each checked when it is asked for.

    Args:
        values: arrays by name.
        prefix: of the names that this view has.
    """

    def __init__(self, values: Mapping[str, np.ndarray], prefix: str = "", requested: set[str] | None = None) -> None:
        self._values, self._prefix = values, prefix
        self._requested: set[str] = set() if requested is None else requested

    def under(self, name: str) -> Arrays:
        """The arrays whose names begin with ``name.``."""
        return Arrays(self._values, f"{self._prefix}{name}.", self._requested)

    def _get(self, name: str, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
        name = self._prefix + name
        self._requested.add(name)
        if name not in self._values:
            raise ArtefactError(f"array {name!r} is missing")
        array = self._values[name]
        if array.dtype != dtype:
            raise ArtefactError(f"array {name!r} is of type {array.dtype}; it should be {np.dtype(dtype)}")
        if array.ndim != len(shape) or any(n not in (None, size) for n, size in zip(shape, array.shape, strict=True)):
            wanted = " x ".join("any" if n is None else str(n) for n in shape) or "a single number"
            given = " x ".join(map(str, array.shape)) or "a single number"
            raise ArtefactError(f"array {name!r} is {given}; by the manifest it should be {wanted}")
        return array

    def require(self, condition: Any, name: str, rule: str) -> None:
        """Checks what must hold for an array.

        Raises:
            ArtefactError: it does not hold.
        """
        if not condition:
            raise ArtefactError(f"array {self._prefix + name!r} {rule}")

    def numbers(self, name: str, *shape: int | None, largest: float = LARGEST_NUMBER) -> np.ndarray:
        """A float64 array of a shape, None for any length.

        Raises:
            ArtefactError: it is missing, has another shape or type, or a number is not finite or above ``largest``.
        """
        array = self._get(name, np.float64, shape)
        self.require(np.isfinite(array).all(), name, "holds numbers that are not finite")
        self.require((np.abs(array) <= largest).all(), name, f"holds numbers above {largest:g}")
        return array

    def positive(self, name: str, *shape: int | None) -> np.ndarray:
        """As ``numbers``, all above 0 by a margin that makes them safe to divide by."""
        array = self.numbers(name, *shape)
        self.require((array >= 1 / LARGEST_NUMBER).all(), name, "should be above 0 everywhere")
        return array

    def counts(self, name: str, *shape: int | None, below: int) -> np.ndarray:
        """An int64 array of a shape, None for any length, of numbers from 0 to ``below``, which is left out.

        Raises:
            ArtefactError: it is missing, has another shape or type, or a number is outside.
        """
        array = self._get(name, np.int64, shape)
        self.require(((array >= 0) & (array < below)).all(), name, f"should lie from 0 to {below - 1}")
        return array

    def indices(self, name: str, length: int | None, below: int) -> np.ndarray:
        """As ``counts`` in one dimension, each larger than the one before."""
        array = self.counts(name, length, below=below)
        self.require((np.diff(array) > 0).all(), name, "should increase from each to the next")
        return array

    def bits(self, name: str, dtype: type, *shape: int | None) -> np.ndarray:
        """A bool or uint8 array of a shape, None for any length."""
        return self._get(name, dtype, shape)

    def finish(self) -> None:
        """Checks that every array was asked for.

        Raises:
            ArtefactError: there are arrays of no use.
        """
        foreign = sorted(set(self._values) - self._requested)
        if foreign:
            raise ArtefactError(f"array {foreign[0][:80]!r} belongs to no part of such a detector")
