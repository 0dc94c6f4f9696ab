"""Relevancy behind an adapter: image, question and answer as people have them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stethoscope.relevancy.engine import relevancy_from_inputs
from stethoscope.relevancy.result import Relevancy

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.adapter import Adapter
    from stethoscope.records import Answer


def token_relevancy(
    adapter: Adapter, image: Image, question: str, answer: Answer | str, *, scope: str = "row", **options: Any
) -> Relevancy:
    """Relevancy of an answer's tokens to image, question, earlier answer tokens and everything else.

    Args:
        adapter: the model.
        image: the picture. ``question``: what was asked.
        answer: what the model answered, with its ids; or a text, which the adapter tokenises.
        scope: ``row`` or ``token``; this and ``options`` (rule, layers, tokens, budget) as for
            ``relevancy_from_inputs``.

    Returns:
        With ``question_at``, so that ``image``, ``question``, ``answer`` and ``rest`` add up to the whole row.

    Raises:
        CapabilityError: the adapter has no transformers model, or its kind is not supported.
        ConfigError, DataError, CaptureError: as ``relevancy_from_inputs``.
    """
    encoded = adapter.encode(image, question)
    ids = (adapter.answer(encoded, answer) if isinstance(answer, str) else answer).token_ids
    model, inputs = adapter.forward_inputs(encoded, ids)
    found = relevancy_from_inputs(model, inputs, ids, scope=scope, **options)
    return replace(found, question_at=encoded.spans.question)
