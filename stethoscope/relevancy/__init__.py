"""Compute the relevancy of answer tokens to image patches and text by gradient-weighted attention.

``relevancy_from_inputs(model, inputs, answer_ids)`` works on a transformers model, ``token_relevancy(adapter, image,
question, answer)`` on an adapter. Source: Chefer, Gur and Wolf, "Generic Attention-model Explainability", ICCV 2021
(arXiv 2103.15679), equations 5-10. Names are imported on first use, so importing this package imports no torch.

``engine`` runs the passes, either a whole one or the two of ``shared_passes``. In each pass a recorder of
``gradient_recorder`` takes the calls of layers and attention, whose graphs ``checkpointing`` makes sparse. Backwards,
``attention_backward`` computes blocks of Abar, which ``backward_pass`` turns into rows of R by ``rules``;
``token_alignment`` leads from image tokens to patches.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stethoscope.relevancy.engine import (
        answer_relevancy,
        relevancies_from_passes,
        relevancy_from_inputs,
        token_relevancy,
    )
    from stethoscope.relevancy.result import Relevancy

__all__ = ["Relevancy", "answer_relevancy", "relevancies_from_passes", "relevancy_from_inputs", "token_relevancy"]

_MODULES = {
    "Relevancy": "result",
    "answer_relevancy": "engine",
    "relevancies_from_passes": "engine",
    "relevancy_from_inputs": "engine",
    "token_relevancy": "engine",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"stethoscope.relevancy.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'stethoscope.relevancy' has no attribute {name!r}")
