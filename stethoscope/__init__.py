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
    from stethoscope.adapters import load
    from stethoscope.detection.detector import Detector
    from stethoscope.diagnosis import Diagnosis, diagnose
    from stethoscope.evaluation.evaluator import Evaluator
    from stethoscope.streaming.stream import stream
    from stethoscope.streaming.warning_streamer import WarningStreamer

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
    "Detector": "stethoscope.detection.detector",
    "Diagnosis": "stethoscope.diagnosis",
    "Evaluator": "stethoscope.evaluation.evaluator",
    "diagnose": "stethoscope.diagnosis",
    "WarningStreamer": "stethoscope.streaming",
    "load": "stethoscope.adapters",
    "stream": "stethoscope.streaming",
}


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``import stethoscope`` stays quick."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'stethoscope' has no attribute {name!r}")
