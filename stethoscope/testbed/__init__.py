"""Provide the embedded testbed: rendered scenes with exact ground truth, and a small LLaVA that hallucinates.

Nothing is downloaded: scenes are rendered, and the model's weights are in ``MODEL_DIR``. Importing this package
imports neither torch nor transformers nor datasets.

    >>> from stethoscope import testbed
    >>> scene = testbed.scenes(1)[0]
    >>> scene.id, scene.image().size
    ('counter-000000', (96, 96))
"""

from __future__ import annotations

import pathlib

from stethoscope.testbed.dataset import as_dataset, export, pope_questions, removal_questions, scenes
from stethoscope.testbed.scene import Scene, SceneObject
from stethoscope.testbed.vocabulary import CATEGORIES

MODEL_DIR = pathlib.Path(__file__).parent / "model"
"""Folder of the trained model, for ``AutoProcessor`` and ``AutoModelForImageTextToText``."""
DETECTOR_DIR = pathlib.Path(__file__).parent / "detector"
"""Folder of a detector that was trained on this model's captions by ``scripts/train_testbed/detector.py``."""

__all__ = [
    "CATEGORIES",
    "DETECTOR_DIR",
    "MODEL_DIR",
    "Scene",
    "SceneObject",
    "as_dataset",
    "export",
    "pope_questions",
    "removal_questions",
    "scenes",
]
