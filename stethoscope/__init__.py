"""Evaluation harness and calibrated hallucination warnings for large vision-language models.

``stethoscope.load(model)`` gives an adapter, ``stethoscope.Evaluator(...).run(adapter, task)`` runs a benchmark,
``stethoscope.diagnose(adapter, image, question)`` tells everything about one answer,
``stethoscope.stream(adapter, image, question, detector=...)`` warns while the model writes,
``stethoscope.Detector.load(folder)`` reads a trained warning classifier.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stethoscope.build import load as load
    from stethoscope.detector import Detector as Detector
    from stethoscope.diagnosis import Diagnosis as Diagnosis
    from stethoscope.diagnosis import diagnose as diagnose
    from stethoscope.evaluator import Evaluator as Evaluator
    from stethoscope.streaming import WarningStreamer as WarningStreamer
    from stethoscope.streaming import stream as stream

__version__ = "0.2.0"
__all__ = [
    "Detector",
    "Diagnosis",
    "Evaluator",
    "WarningStreamer",
    "__version__",
    "diagnose",
    "load",
    "stream",
]

_HOMES = {
    "Detector": "stethoscope.detector",
    "Diagnosis": "stethoscope.diagnosis",
    "Evaluator": "stethoscope.evaluator",
    "diagnose": "stethoscope.diagnosis",
    "WarningStreamer": "stethoscope.streaming",
    "load": "stethoscope.build",
    "stream": "stethoscope.streaming",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``import stethoscope`` stays quick."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'stethoscope' has no attribute {name!r}")
