"""Diagnose one answer: how probable and how grounded every token is, and which objects to doubt.

``diagnose(adapter, image, question)`` gives a ``Diagnosis``. Importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stethoscope.diagnosis.diagnosis import Diagnosis
    from stethoscope.diagnosis.run_diagnosis import diagnose

__all__ = ["Diagnosis", "diagnose"]

_HOMES = {"Diagnosis": "diagnosis", "diagnose": "run_diagnosis"}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"stethoscope.diagnosis.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'stethoscope.diagnosis' has no attribute {name!r}")
