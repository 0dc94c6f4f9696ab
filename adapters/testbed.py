"""Adapt the embedded model, a small LLaVA trained on rendered scenes and shipped with the package."""

from __future__ import annotations

from typing import Any

from stethoscope.adapters.hf import HfAdapter
from stethoscope.testbed import MODEL_DIR


class TestbedAdapter(HfAdapter):
    """Adapt the embedded model with its own prompt.

    Args:
        settings: as for ``HfAdapter``; ``model_id`` may name another folder, such as a newly trained model.
    """

    __test__ = False  # pytest would take it for a test class by its name

    def __init__(self, **settings: Any) -> None:
        defaults = {"name": "testbed", "prompt": "USER: <image>\n{question} ASSISTANT:", "dtype": "float32"}
        if settings.get("random_init") is None:
            defaults["model_id"] = str(MODEL_DIR)
        super().__init__(**defaults | settings)
