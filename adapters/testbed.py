"""The embedded model: a small LLaVA trained on rendered scenes, shipped with the package."""

from __future__ import annotations

from typing import Any

from stethoscope.adapters.hf import HfAdapter


class TestbedAdapter(HfAdapter):
    """The embedded model under its own prompt.

    Args:
        settings: as for ``HfAdapter``; ``model_id`` takes another folder, such as a model that was trained again.
    """

    __test__ = False  # not a test class, whatever pytest thinks of the name

    def __init__(self, **settings: Any) -> None:
        defaults = {"name": "testbed", "prompt": "USER: <image>\n{question} ASSISTANT:", "dtype": "float32"}
        if settings.get("random_init") is None:
            from stethoscope.testbed import MODEL_DIR

            defaults["model_id"] = str(MODEL_DIR)
        super().__init__(**defaults | settings)
