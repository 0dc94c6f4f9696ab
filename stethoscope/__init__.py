"""Evaluation harness and calibrated hallucination warnings for large vision-language models.

``stethoscope.load(model)`` gives an adapter, ``stethoscope.Evaluator(...).run(adapter, task)`` runs a benchmark,
``stethoscope.Detector.load(folder)`` reads a trained warning classifier.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stethoscope.build import load as load
    from stethoscope.detector import Detector as Detector
    from stethoscope.evaluator import Evaluator as Evaluator

__version__ = "0.1.0"
__all__ = ["Detector", "Evaluator", "__version__", "load"]

_HOMES = {"Detector": "stethoscope.detector", "Evaluator": "stethoscope.evaluator", "load": "stethoscope.build"}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``import stethoscope`` stays quick."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'stethoscope' has no attribute {name!r}")
